"""The stored files: as a download of a job, and under their own names for pages to show."""

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from enum import IntEnum
from typing import Any
from uuid import UUID

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from app.api.conditions import RangeNotSatisfiable, is_match, none_match, single_range
from app.api.deps import App, Services, check_completed
from app.api.problems import problem_responses
from app.api.recent import KnownFile
from app.config import Settings
from app.errors import FileDeleted, JobNotFound, StorageError
from app.jobs.models import Output
from app.media.sniff import content_type
from app.storage.base import THUMBNAIL_SIZES, Storage, media_key

# Up to this size one read and one message cost least (measured: a third of any streaming);
# beyond it a slow client would hold too much memory.
WHOLE_BYTES = 4 << 20

FOR_EVER = "public, max-age=31536000, immutable"
# Whatever a model produced, a browser must neither guess its type nor run it.
SAFETY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
}

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
    307: {"description": "The file is in a bucket, at the `Location`, for a while."},
}

router = APIRouter(tags=["files"])
log = structlog.get_logger(__name__)


class ThumbnailSize(IntEnum):
    """How wide and high a thumbnail is at most, in pixels."""

    SMALL, MEDIUM, LARGE = THUMBNAIL_SIZES


@router.head("/api/v1/download/{job_id}", include_in_schema=False)
@router.get(
    "/api/v1/download/{job_id}",
    summary="Download a job's first output",
    response_class=Response,
    responses={**RESPONSES, **problem_responses(404, 409, 410, 412, 416, 422, 503)},
)
async def download(job_id: UUID, request: Request, app: App) -> Response:
    """Return the file as an attachment; supports `Range` and `If-None-Match`."""
    await check_completed(app, job_id)
    outputs = (await app.repository.outputs([job_id])).get(job_id)
    if not outputs:
        raise JobNotFound("The job has no outputs.")
    _check_kept(outputs.deleted_at)
    headers = _file_headers(outputs[0], "attachment", "private, no-cache")
    return await _answer_first(request, app, KnownFile(outputs[0], headers))


@router.head("/media/{name}", include_in_schema=False)
@router.get(
    "/media/{name}",
    summary="Show an output by its name",
    response_class=Response,
    responses={**RESPONSES, **problem_responses(404, 410, 412, 416, 422, 503)},
)
async def media(
    name: str, request: Request, app: App, size: ThumbnailSize | None = None
) -> Response:
    """Return the file for a page to show; it never changes, so it may be cached for ever.

    With `size` it is a thumbnail of a picture: WebP, at most so many pixels wide and high.
    """
    # Found by the name in its row: no part of the name ever walks through folders.
    found = await app.repository.output_named(name) if _NAME.fullmatch(name) else None
    if found is None:
        raise JobNotFound("There is no such file.")
    output, deleted_at = found
    _check_kept(deleted_at)
    if size is not None:
        return await _thumbnail(request, app, output, size)
    file = KnownFile(output, _file_headers(output, "inline", FOR_EVER))
    return await _answer_first(request, app, file)


def _check_kept(deleted_at: datetime | None) -> None:
    if deleted_at is not None:
        raise FileDeleted(f"The file was deleted on {deleted_at:%Y-%m-%d}: its time was over.")


def _file_headers(output: Output, disposition: str, cache_control: str) -> dict[str, str]:
    return {
        "ETag": f'"{output.sha256}"',
        "Cache-Control": cache_control,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'{disposition}; filename="{output.name}"',
        **SAFETY,
    }


async def _answer_first(request: Request, app: Services, file: KnownFile) -> Response:
    """Answer as `answer` does, after a look whether the file is there and whole."""
    if not _redirects(request, app.settings):
        await _check_stored(app.storage, file.output)
    if file.output.size_bytes <= WHOLE_BYTES or _nginx_sends(app.settings):
        # What is streamed may fail half-way, which the layers around us know how to handle.
        app.recent.add(request.scope["path"], file)
    return await answer(request, file)


async def answer(request: Request, file: KnownFile) -> Response:
    """Answer a request for a file that is known to be in the storage.

    Raises: HTTPException, JobNotFound; StorageError.
    """
    app: Services = request.app.state.services
    output, headers = file.output, {"Content-Type": content_type(file.output.name), **file.headers}
    if condition := _precondition(request.headers, headers):
        return condition
    # Refused here (416) whoever sends the file; RFC 9110 knows ranges of GET only.
    span = _span(request.headers, output, headers["ETag"]) if request.method == "GET" else None
    if _nginx_sends(app.settings):
        del headers["Accept-Ranges"]  # nginx says so itself, and answers the range
        headers["X-Accel-Redirect"] = f"{app.settings.x_accel_prefix}/{output.name}"
        return Response(headers=headers)
    if _redirects(request, app.settings):
        seconds = app.settings.presigned_url_seconds
        return _redirect(await app.storage.url(media_key(output.name), seconds), seconds)
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(output.size_bytes)})
    return await _send(app.storage, output, span, headers)


def _nginx_sends(settings: Settings) -> bool:
    return settings.x_accel_prefix is not None and settings.is_storage_local


def _redirects(request: Request, settings: Settings) -> bool:
    """Tell whether the client is sent to the bucket: an address is signed for GET alone."""
    wanted = settings.s3_serve == "redirect" and not settings.is_storage_local
    return wanted and request.method == "GET"


def _precondition(asked: Headers, headers: Mapping[str, str]) -> Response | None:
    """Answer 304 or refuse (412) as the client's `If-None-Match` and `If-Match` want it."""
    if not is_match(_joined(asked, "if-match"), headers["ETag"]):
        raise HTTPException(412, "The file is not the version that you have.")
    if none_match(_joined(asked, "if-none-match"), headers["ETag"]):
        kept = {name: value for name, value in headers.items() if name != "Content-Type"}
        return Response(status_code=304, headers=kept)
    return None


def _joined(headers: Headers, name: str) -> str | None:
    """A list may come in several lines (RFC 9110, section 5.3)."""
    return ", ".join(headers.getlist(name)) or None


def _redirect(url: str | None, seconds: int) -> Response:
    """Send the client to the bucket; it may remember the way for half of its time, and with it
    the file: under every new address it would fetch the same bytes again."""
    assert url is not None  # noqa: S101 - a bucket has addresses
    caching = f"private, max-age={seconds // 2}"
    return Response(status_code=307, headers={"Location": url, "Cache-Control": caching})


async def _send(
    storage: Storage, output: Output, span: tuple[int, int] | None, headers: dict[str, str]
) -> Response:
    if span is None:
        return await _file(storage, output, 0, output.size_bytes, 200, headers)
    start, length = span
    headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{output.size_bytes}"
    return await _file(storage, output, start, length, 206, headers)


async def _check_stored(storage: Storage, output: Output) -> None:
    size = await storage.size(media_key(output.name))
    if size != output.size_bytes:
        log.error("output_damaged", name=output.name, expected=output.size_bytes, found=size)
        raise _gone()


def _gone() -> JobNotFound:
    return JobNotFound("The file is no longer in the storage.")


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
    key = media_key(output.name)
    if length > WHOLE_BYTES:
        headers["Content-Length"] = str(length)
        return StreamingResponse(_read(storage, key, start, length), status, headers)
    try:
        body = await storage.load(key, start, length)
    except FileNotFoundError:
        body = b""
    if len(body) != length:
        raise _gone()  # since it was found: it may have been deleted on schedule
    return Response(body, status, headers)


async def _read(storage: Storage, key: str, start: int, length: int) -> AsyncIterator[bytes]:
    """Stream a file that was there a moment ago."""
    try:
        async for chunk in storage.read(key, start, length):
            yield chunk
    except FileNotFoundError as error:
        raise StorageError(f"{key} has gone while it was asked for") from error


async def _thumbnail(request: Request, app: Services, output: Output, size: int) -> Response:
    try:
        data = await app.thumbnails.get(output, size)
    except FileNotFoundError:
        raise _gone() from None
    if data is None:
        raise JobNotFound("There is no thumbnail of what is not a picture, or too large to decode.")
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "Cache-Control": FOR_EVER,
        "Content-Disposition": f'inline; filename="{output.name}.{size}.webp"',
        "Content-Type": "image/webp",
        **SAFETY,
    }
    return _precondition(request.headers, headers) or Response(data, headers=headers)
