"""Whether an attempt costs anything."""

from app.jobs.models import Charged
from app.providers.base import Prediction


def charged(prediction: Prediction | None) -> Charged:
    """Tell whether an attempt that ended so is billed; None: no create was accepted.

    A refused create is not, nor a prediction that never started (`aborted`); otherwise the time
    run is billed, also of one that failed (replicate.com/docs/topics/billing).
    """
    if prediction is None or prediction.status == "aborted":
        return Charged.NO
    if prediction.status == "succeeded" or prediction.predict_time_seconds:
        return Charged.YES
    return Charged.UNKNOWN
