"""What is said of an output beside it: the metadata document, and the text inside a PNG."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from app.jobs.models import Attempt, Job, Output
from app.providers.base import Prediction


def metadata_document(
    job: Job, attempt: Attempt, prediction: Prediction, outputs: Sequence[Output]
) -> dict[str, Any]:
    """Return the stored JSON: what went in, as sent, and what was learned.

    Every input parameter stands at the top level; the service's own names win over a parameter
    of the same name, which is still found under `parameters`.
    """
    return {
        **attempt.input,
        "prompt": job.prompt,
        "model_name": job.model_name,
        "parameters": job.parameters,
        "external_job_id": prediction.id,
        "created_at": _iso(job.created_at),
        "job_id": str(job.id),
        "provider": attempt.provider,
        "model_version": prediction.version or attempt.version,
        "attempt": attempt.number,
        "timings": {
            "job_started_at": _iso(job.started_at),
            "prediction_created_at": _iso(prediction.created_at),
            "prediction_started_at": _iso(prediction.started_at),
            "prediction_completed_at": _iso(prediction.completed_at),
            "predict_time_seconds": prediction.predict_time_seconds,
        },
        "outputs": [output.model_dump(mode="json", exclude={"job_id"}) for output in outputs],
    }


def parameters_text(job: Job, attempt: Attempt) -> str:
    """Return what a PNG that we make says of itself: the input as sent, seed included."""
    document = {**attempt.input, "prompt": job.prompt, "model_name": job.model_name}
    return json.dumps(document, ensure_ascii=False)


def _iso(at: datetime | None) -> str | None:
    return at.isoformat().replace("+00:00", "Z") if at else None
