"""POST /api/v1/generate: a prompt becomes a job."""

from fastapi import APIRouter, Request, Response

from app.api.deps import App
from app.api.problems import problem_responses
from app.api.schemas import CreatedJobView, GenerateRequest
from app.jobs.repository import NewJob

router = APIRouter(prefix="/api/v1", tags=["jobs"])


@router.post(
    "/generate",
    status_code=201,
    summary="Create a generation job",
    response_description="The job is stored; it will end `completed`, `failed` or `cancelled`.",
    responses={
        201: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **problem_responses(413, 422, 503),
    },
)
async def generate(
    body: GenerateRequest, request: Request, response: Response, app: App
) -> CreatedJobView:
    """Store a job and answer at once; follow it at the `Location`.

    The parameters are checked against the model's own input schema when it is at hand; names
    the model does not know are passed on, and named in `warnings`.
    """
    warnings = await app.parameters.check(body.model_name, body.parameters)
    new = NewJob(body.prompt, body.model_name, body.parameters, request.state.request_id)
    job = await app.repository.add(new, app.settings.queue_deadline_seconds)
    app.dispatcher.enqueue(job.id)
    response.headers["Location"] = f"/api/v1/status/{job.id}"
    return CreatedJobView.of(job, [], app.settings.storage_base_url, warnings=warnings)
