"""Jobs that exist: read one, list them, read their metadata, cancel."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.cursors import decode_cursor, encode_cursor
from app.api.deps import App, Services, check_completed, find_job
from app.api.problems import problem_responses
from app.api.schemas import AttemptView, JobsQuery, JobView
from app.errors import FileDeleted, InvalidInput, JobNotFound
from app.jobs.cancellation import cancel_job
from app.jobs.models import DeletionKind, Job, JobStatus
from app.storage.base import metadata_key
from app.wakeups import CANCELLED, wake

router = APIRouter(prefix="/api/v1", tags=["jobs"])

LIST_HEADERS = {
    "X-Total-Count": {
        "description": "How many jobs there are (of this status).",
        "schema": {"type": "integer"},
    },
    "Link": {
        "description": 'The next page, when there is one: `<...?cursor=...>; rel="next"`.',
        "schema": {"type": "string"},
    },
}


@router.get("/status/{job_id}", summary="Read a job", responses=problem_responses(404, 422, 503))
async def status(job_id: UUID, app: App) -> JobView:
    """Return the job with its results, its last error and its next attempt."""
    return (await _views(app, [await find_job(app, job_id)]))[0]


@router.get(
    "/jobs",
    summary="List jobs, newest first",
    responses={200: {"headers": LIST_HEADERS}, **problem_responses(422, 503)},
)
async def list_jobs(
    query: Annotated[JobsQuery, Query()], request: Request, response: Response, app: App
) -> list[JobView]:
    """Return one page of jobs; the `Link` header names the next one."""
    jobs, has_more = await app.repository.newest(
        status=query.status_filter,
        limit=query.limit,
        offset=query.offset,
        before=_before(query),
    )
    total = await app.repository.count(query.status_filter)
    response.headers["X-Total-Count"] = str(total)
    if has_more:
        response.headers["Link"] = _next_link(request.scope["path"], query, jobs[-1])
    return await _views(app, jobs)


@router.get(
    "/jobs/{job_id}/metadata",
    summary="Read what a picture was made from",
    response_class=Response,
    responses={
        200: {
            "description": "The stored document, byte for byte.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **problem_responses(404, 409, 410, 422, 503),
    },
)
async def metadata(job_id: UUID, app: App) -> Response:
    """Return the JSON beside the picture: every parameter, the model's version, the files."""
    await check_completed(app, job_id)
    if await app.repository.deleted_at(job_id, DeletionKind.METADATA):
        raise FileDeleted("The metadata was kept for its time, and deleted.")
    try:
        chunks = [chunk async for chunk in app.storage.read(metadata_key(job_id))]
    except FileNotFoundError:
        raise JobNotFound("The metadata is no longer in the storage.") from None
    return Response(b"".join(chunks), media_type="application/json")


@router.get(
    "/jobs/{job_id}/attempts",
    summary="Read what was asked of the provider",
    responses=problem_responses(404, 422, 503),
)
async def attempts(job_id: UUID, app: App) -> list[AttemptView]:
    """Return every create call made for the job, in order: the ledger of what may be billed."""
    await find_job(app, job_id)
    return [AttemptView.model_validate(row) for row in await app.repository.attempts(job_id)]


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel a job",
    responses=problem_responses(403, 404, 409, 422, 503),
)
async def cancel(job_id: UUID, app: App) -> JobView:
    """Cancel a pending or processing job, at the provider too; a job that has ended stays."""
    job = await cancel_job(app.repository, job_id)
    await wake(app.redis, CANCELLED)
    return (await _views(app, [job]))[0]


async def _views(app: Services, jobs: Sequence[Job]) -> list[JobView]:
    completed = [job.id for job in jobs if job.status is JobStatus.COMPLETED]
    outputs = await app.repository.outputs(completed) if completed else {}
    base_url = app.settings.storage_base_url
    return [JobView.of(job, outputs.get(job.id), base_url) for job in jobs]


def _before(query: JobsQuery) -> tuple[datetime, UUID] | None:
    if query.cursor is None:
        return None
    if "offset" in query.model_fields_set:
        fault = (("query", "offset"), "cannot be combined with `cursor`")
        raise InvalidInput("Give `cursor` or `offset`, not both.", [fault])
    try:
        return decode_cursor(query.cursor)
    except ValueError as error:
        fault = (("query", "cursor"), str(error))
        raise InvalidInput("The cursor is not one of this service.", [fault]) from None


def _next_link(path: str, query: JobsQuery, last: Job) -> str:
    """Make a relative link: it holds behind any proxy, whatever name the client used."""
    parts: dict[str, str | int] = {"limit": query.limit}
    if query.status_filter is not None:
        parts["status_filter"] = query.status_filter.value
    parts["cursor"] = encode_cursor(last.created_at, last.id)
    return f'<{path}?{urlencode(parts)}>; rel="next"'
