"""POST /api/v1/generate: a prompt becomes a job."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Header, Request, Response

from app.api.deps import App, Services
from app.api.problems import problem_responses
from app.api.schemas import CreatedJobView, GenerateRequest
from app.errors import InvalidInput
from app.jobs.models import Job
from app.jobs.repository import NewJob

router = APIRouter(prefix="/api/v1", tags=["jobs"])

log = structlog.get_logger(__name__)

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="Any unique text of the client's: repeats of the request get the same job.",
    ),
]


@router.post(
    "/generate",
    status_code=201,
    summary="Create a generation job",
    response_description="The job is stored; it will end `completed`, `failed` or `cancelled`.",
    responses={
        201: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **problem_responses(403, 408, 413, 422, 503),
    },
)
async def generate(
    body: GenerateRequest,
    request: Request,
    response: Response,
    app: App,
    idempotency_key: IdempotencyKey = None,
) -> CreatedJobView:
    """Store a job and answer at once; follow it at the `Location`.

    The parameters are checked against the model's own input schema when it is at hand; names
    the model does not know are passed on, and named in `warnings`. With an `Idempotency-Key`
    the request may be repeated until it is answered: there is one job per key, for ever.
    """
    new = NewJob(body.prompt, body.model_name, body.parameters, request.state.request_id)
    warnings = await _check(app, new, idempotency_key)
    job = await _add(app, new, idempotency_key)
    log.info("job_accepted", job_id=str(job.id))
    app.dispatcher.enqueue(job.id)
    response.headers["Location"] = f"/api/v1/status/{job.id}"
    outputs = await app.repository.outputs([job.id]) if job.status.is_terminal else {}
    base_url = app.settings.storage_base_url
    return CreatedJobView.of(job, outputs.get(job.id), base_url, warnings=warnings)


async def _check(app: Services, new: NewJob, idempotency_key: str | None) -> list[str]:
    """Return the warnings. Raises: InvalidInput - but for a request that was accepted before."""
    try:
        return await app.parameters.check(new.model_name, new.parameters)
    except InvalidInput:
        known = await app.repository.with_key(idempotency_key) if idempotency_key else None
        if known is None or known.fingerprint != new.fingerprint:
            raise
        return []


async def _add(app: Services, new: NewJob, idempotency_key: str | None) -> Job:
    deadline_seconds = app.settings.queue_deadline_seconds
    if idempotency_key is None:
        return await app.repository.add(new, deadline_seconds)
    job, is_new = await app.repository.add_once(new, deadline_seconds, idempotency_key)
    if not is_new and job.fingerprint != new.fingerprint:
        fault = (("header", "Idempotency-Key"), "was used for another request")
        raise InvalidInput("The Idempotency-Key belongs to another request.", [fault])
    return job
