"""The stored files: as a download of a job, and under their own names for pages to show."""

import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from app.api.conditions import RangeNotSatisfiable, none_match, single_range
from app.api.deps import App
from app.api.problems import problem_responses
from app.errors import JobNotFound, JobNotReady
from app.jobs.models import JobStatus, Output
from app.storage.base import Storage, media_key

# Up to this size one read and one message cost least (measured: a third of any streaming);
# beyond it a slow client would hold too much memory.
WHOLE_BYTES = 4 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_HEADERS = {
    "ETag": {"schema": {"type": "string"}, "description": "The file's SHA-256, quoted."},
    "Content-Disposition": {"schema": {"type": "string"}},
    "Accept-Ranges": {"schema": {"type": "string"}},
}
_BYTES: dict[str, Any] = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": _BYTES, "headers": _HEADERS},
    206: {"description": "The range asked for.", "content": _BYTES},
    304: {"description": "The client's copy (`If-None-Match`) is good."},
}

router = APIRouter(tags=["files"])
log = structlog.get_logger(__name__)


@router.head("/api/v1/download/{job_id}", include_in_schema=False)
@router.get(
    "/api/v1/download/{job_id}",
    summary="Download a job's first output",
    response_class=Response,
    responses={**RESPONSES, **problem_responses(404, 409, 416, 422, 503)},
)
async def download(job_id: UUID, request: Request, app: App) -> Response:
    """Return the file as an attachment; supports `Range` and `If-None-Match`."""
    job = await app.repository.get(job_id)
    if job is None:
        raise JobNotFound("There is no such job.")
    if job.status is not JobStatus.COMPLETED:
        raise JobNotReady(f"The job is {job.status}: it has no file to download.")
    outputs = (await app.repository.outputs([job_id])).get(job_id)
    if not outputs:
        raise JobNotFound("The job has no outputs.")
    headers = _file_headers(outputs[0], "attachment", "private, no-cache")
    return await _serve(request, app.storage, outputs[0], headers)


@router.head("/media/{name}", include_in_schema=False)
@router.get(
    "/media/{name}",
    summary="Show an output by its name",
    response_class=Response,
    responses={**RESPONSES, **problem_responses(404, 416, 503)},
)
async def media(name: str, request: Request, app: App) -> Response:
    """Return the file for a page to show; it never changes, so it may be cached for ever."""
    # Found by the name in its row: no part of the name ever walks through folders.
    output = await app.repository.output_named(name) if _NAME.fullmatch(name) else None
    if output is None:
        raise JobNotFound("There is no such file.")
    headers = _file_headers(output, "inline", "public, max-age=31536000, immutable")
    return await _serve(request, app.storage, output, headers)


def _file_headers(output: Output, disposition: str, cache_control: str) -> dict[str, str]:
    return {
        "ETag": f'"{output.sha256}"',
        "Cache-Control": cache_control,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'{disposition}; filename="{output.name}"',
        # Whatever a model produced, a browser must neither guess its type nor run it.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }


async def _serve(
    request: Request, storage: Storage, output: Output, headers: dict[str, str]
) -> Response:
    if none_match(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    await _check_stored(storage, output)
    headers["Content-Type"] = output.media_type
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(output.size_bytes)})
    span = _span(request.headers, output, headers["ETag"])
    if span is None:
        return await _file(storage, output, 0, output.size_bytes, 200, headers)
    start, length = span
    headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{output.size_bytes}"
    return await _file(storage, output, start, length, 206, headers)


async def _check_stored(storage: Storage, output: Output) -> None:
    size = await storage.size(media_key(output.name))
    if size != output.size_bytes:
        log.error("output_damaged", name=output.name, expected=output.size_bytes, found=size)
        raise JobNotFound("The file is no longer in the storage.")


def _span(headers: Mapping[str, str], output: Output, etag: str) -> tuple[int, int] | None:
    size = output.size_bytes
    try:
        return single_range(headers.get("range"), size, etag=etag, if_range=headers.get("if-range"))
    except RangeNotSatisfiable:
        detail = f"The file has {size} bytes; the range lies outside."
        raise HTTPException(416, detail, {"Content-Range": f"bytes */{size}"}) from None


async def _file(
    storage: Storage, output: Output, start: int, length: int, status: int, headers: dict[str, str]
) -> Response:
    chunks = storage.read(media_key(output.name), start, length)
    if length <= WHOLE_BYTES:
        body = b"".join([chunk async for chunk in chunks])
        return Response(body, status, headers)
    headers["Content-Length"] = str(length)
    return StreamingResponse(chunks, status, headers)
