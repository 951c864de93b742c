"""How an attempt ended, and whether it costs anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from app.errors import FailureClass, ProviderError
from app.jobs.models import Attempt, Charged
from app.providers.base import Prediction


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt ended, written in the same transaction as the job's next state.

    `prediction_id` is what the writer knows: should the attempt have got another one meanwhile
    (by the provider's report, say), nothing is written.
    """

    attempt_id: UUID
    prediction_id: str | None
    outcome: str
    charged: Charged
    error_class: FailureClass | None = None
    error_message: str | None = None
    predict_time_seconds: float | None = None
    version: str | None = None


class AttemptEnded(Exception):
    """The attempt is over without a stored output; the job may or may not get another.

    Without a `settlement` it stays open for the sweep, which goes on looking for its prediction.
    """

    def __init__(self, error: ProviderError, settlement: Settlement | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.settlement = settlement


@contextmanager
def ending(
    attempt: Attempt, prediction: Prediction | None = None, *, permanent_only: bool = False
) -> Iterator[None]:
    """Turn failures that end the attempt into `AttemptEnded`.

    An AMBIGUOUS one never does; with `permanent_only` what may pass leaves it open too.
    """
    try:
        yield
    except ProviderError as error:
        lasting = error.failure_class is FailureClass.PERMANENT
        if error.failure_class is FailureClass.AMBIGUOUS or (permanent_only and not lasting):
            raise
        raise AttemptEnded(error, settled(attempt, prediction, error)) from error


def settled(
    attempt: Attempt, prediction: Prediction | None, error: ProviderError | None = None
) -> Settlement:
    """Return how the attempt ended with this prediction, or, if it got none, with this error."""
    return Settlement(
        attempt.id,
        attempt.prediction_id,
        outcome=prediction.status if prediction else error.code if error else "unknown",
        charged=charged(prediction),
        error_class=error.failure_class if error else None,
        error_message=error.message if error else None,
        predict_time_seconds=prediction.predict_time_seconds if prediction else None,
        version=prediction.version if prediction else None,
    )


def absent(attempt: Attempt) -> Settlement:
    """Return the settlement of a create that is proven to have never been accepted."""
    return Settlement(attempt.id, None, "absent", Charged.NO)


def unknown(attempt: Attempt, error: ProviderError | None = None) -> Settlement:
    """Return the settlement of an attempt of which nobody will ever know how it ended."""
    return Settlement(
        attempt.id,
        attempt.prediction_id,
        "unknown",
        Charged.UNKNOWN,
        error_class=error.failure_class if error else None,
        error_message=error.message if error else None,
    )


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
