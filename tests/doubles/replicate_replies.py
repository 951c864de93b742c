"""What the Replicate double sends: problem documents, files, and replies that break off midway."""

import asyncio
import base64
import hashlib
import io
import json
import math
import socket
import struct
from asyncio import Transport
from collections.abc import AsyncIterator
from http.client import responses
from random import Random
from typing import Any, Protocol, cast

from PIL import Image, ImageOps
from starlette.datastructures import MutableHeaders
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.doubles.replicate_settings import Fault

PROBLEM_JSON = "application/problem+json"
MEDIA_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
}
PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
FLOOD_CHUNK_BYTES = 64 * 1024
# The box that every MP4 file begins with, for players of the base format.
MP4_HEAD = b"\0\0\0\x18ftypisom\0\0\x02\0isommp41"
VIDEO_BYTES = 300_000


class Reply(Protocol):
    """A Starlette response, or something that stands in for one."""

    @property
    def headers(self) -> MutableHeaders: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Problem(Exception):
    """A refusal, answered as `application/problem+json`; `extra` joins the document."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str | None = None,
        headers: dict[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        title = title or responses[status]
        self.status = status
        self.document = {"title": title, "detail": detail, "status": status} | extra
        self.headers = headers

    def reply(self) -> Response:
        return Response(json.dumps(self.document), self.status, self.headers, PROBLEM_JSON)


def status_reply(fault: Fault) -> Response:
    """The answer of a `status` fault: a problem document, any JSON, or any text."""
    if fault.body is None:
        title = responses.get(fault.status, "Unknown Error")  # 520 to 524 have no name
        content = json.dumps({"title": title, "detail": f"{title}.", "status": fault.status})
        media_type = PROBLEM_JSON
    elif isinstance(fault.body, str):
        content, media_type = fault.body, "text/html; charset=utf-8"
    else:
        content, media_type = json.dumps(fault.body), "application/json"
    return Response(content, fault.status, fault.headers, fault.content_type or media_type)


class Dropped:
    """No reply at all: the client sees its connection reset (RST) or closed (FIN)."""

    def __init__(self, *, reset: bool) -> None:
        self.headers = MutableHeaders()
        self._reset = reset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = connection(scope)
        if self._reset:
            # Closing a socket that lingers for zero seconds sends RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        transport.abort()
        await _disconnected(receive)


class Cut(Response):
    """The headers and the first half of the body, then the connection ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start"} | start)
        half = bytes(self.body[: len(self.body) // 2])
        await send({"type": "http.response.body", "body": half, "more_body": True})
        connection(scope).close()  # flushes first, unlike abort()
        await _disconnected(receive)


def connection(scope: Scope) -> Transport:
    """The TCP connection a request came over, put there by the server's protocol class."""
    return cast("Transport", scope["state"]["transport"])


async def _disconnected(receive: Receive) -> None:
    # The server answers 500 for an application that returns without a reply while it still
    # believes the client is there.
    while (await receive())["type"] != "http.disconnect":
        pass


def made_file(model: str, prediction_id: str, index: int, inputs: dict[str, Any]) -> bytes:
    """An output file of this model: the same bytes each time, other bytes for each prediction."""
    if extension(model, inputs) == "mp4":
        return MP4_HEAD + Random(f"{prediction_id}/{index}").randbytes(VIDEO_BYTES)
    return picture(prediction_id, index, inputs)


def picture(prediction_id: str, index: int, inputs: dict[str, Any]) -> bytes:
    """A gradient of `width` x `height` (64 x 64 when not given) as png, jpg or webp.

    Its colours come from the prediction, the index and the seed: the same bytes each time, other
    bytes for each prediction.
    """
    digest = hashlib.sha256(f"{prediction_id}/{index}/{inputs.get('seed')}".encode()).digest()
    size = (_pixels(inputs.get("width")), _pixels(inputs.get("height")))
    gradient = Image.linear_gradient("L").resize(size)
    image = ImageOps.colorize(gradient, black=_rgb(digest[:3]), white=_rgb(digest[3:6]))
    encoded = io.BytesIO()
    image.save(encoded, PIL_FORMATS[_picture_format(inputs)], compress_level=1)
    return encoded.getvalue()


def _pixels(wanted: object) -> int:
    return wanted if isinstance(wanted, int) and 1 <= wanted <= 4096 else 64


def _rgb(digest: bytes) -> tuple[int, int, int]:
    return digest[0], digest[1], digest[2]


def extension(model: str, inputs: dict[str, Any]) -> str:
    """File name extension of the outputs: the input's `output_format` if it is a known one.

    A model with the name `filmer` makes videos.
    """
    return "mp4" if model.endswith("/filmer") else _picture_format(inputs)


def _picture_format(inputs: dict[str, Any]) -> str:
    wanted = inputs.get("output_format")
    return wanted if wanted in PIL_FORMATS else "png"


def file_reply(content: bytes, media_type: str, fault: Fault | None) -> Reply:
    """A file, or what a fault of on="download" makes of it."""
    kind = fault.kind if fault is not None else None
    if fault is None:
        return Response(content, media_type=media_type)
    headers = fault.headers
    if kind == "html":
        return Response("<html><body>Not an image</body></html>", 200, headers, "text/html")
    if kind == "wrong_content_type":
        return Response(content, 200, headers, fault.content_type or "text/plain")
    if kind == "bytes":
        content = base64.b64decode(fault.body_base64)
        return Response(content, 200, headers, fault.content_type or media_type)
    if kind == "truncate":
        return Response(content[: len(content) // 2], 200, headers, media_type)
    if kind == "empty":
        return Response(b"", 200, headers, media_type)
    if kind == "cut":
        return Cut(content, 200, headers, media_type)
    if kind == "slow":
        headers = headers | {"content-length": str(len(content))}
        trickle = _trickle(content, fault.bytes_per_second)
        return StreamingResponse(trickle, 200, headers, media_type)
    return StreamingResponse(_flood(content, fault.size_bytes), 200, headers, media_type)


async def _trickle(content: bytes, bytes_per_second: int) -> AsyncIterator[bytes]:
    step = max(1, bytes_per_second // 10)
    for start in range(0, len(content), step):
        yield content[start : start + step]
        await asyncio.sleep(step / bytes_per_second)


async def _flood(content: bytes, size_bytes: int | None) -> AsyncIterator[bytes]:
    """The true file, then zeros up to `size_bytes` in all, or for ever."""
    left: float = math.inf if size_bytes is None else size_bytes - len(content)
    yield content
    while left > 0:
        yield bytes(int(min(left, FLOOD_CHUNK_BYTES)))
        left -= FLOOD_CHUNK_BYTES
        # Sending to a client that has left never waits, so this is where its leaving is noticed.
        await asyncio.sleep(0)
