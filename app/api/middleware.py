"""What surrounds every request: its id and log line, its bounds in size and time, whose it is."""

import asyncio
import re
import time
from collections.abc import Sequence
from uuid import uuid4

import structlog
from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.api.problems import problem
from app.errors import AnswerTooLate, BodyTooSlow

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds by load balancers: not worth a line each.
UNLOGGED_PATHS = frozenset({"/health"})
# From the last byte of a request to the first of its answer: with the network, 5 s at most.
ANSWER_SECONDS = 4.5
REPORTS_PATH = "/api/v1/webhooks/"
REPORT_SHARE = 4

log = structlog.get_logger("app.access")


class RequestContext:
    """Gives every request an id (the client's `X-Request-ID` if it is one) and one log line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_or_new = request_id(scope)
        scope.setdefault("state", {})["request_id"] = given_or_new
        started_at = time.perf_counter()
        status: int | None = None  # stays None when the client left before an answer

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", given_or_new.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        with bound_contextvars(request_id=given_or_new):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                _log_request(scope, status, time.perf_counter() - started_at)


def request_id(scope: Scope) -> str:
    """Return the client's `X-Request-ID`, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _log_request(scope: Scope, status: int | None, seconds: float) -> None:
    if scope["path"] in UNLOGGED_PATHS:
        return
    # The raw path: still percent-encoded, so that no client can break the line.
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
    duration_ms = round(seconds * 1000, 1)
    log.info("request", method=scope["method"], path=path, status=status, duration_ms=duration_ms)


class JsonBodies:
    """Refuses bodies over the limit, declared or not, and reads `curl -d` bodies as JSON.

    FastAPI's own `max_body_size` answers in plain text. A provider's report holds the job's input
    once more, beside output and logs: it may have `REPORT_SHARE` times as much. curl labels what it
    is given with `-d` as a form unless told otherwise; this API knows no forms, so the label says
    nothing.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_report = scope["path"].startswith(REPORTS_PATH)
        max_bytes = REPORT_SHARE * self._max_bytes if is_report else self._max_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > max_bytes:
            response = problem(Request(scope), 413, f"The body exceeds {max_bytes} bytes.")
            await response(scope, receive, send)
            return
        scope["headers"] = [pair for pair in scope["headers"] if not _is_form_label(*pair)]
        await self._app(scope, self._counting(receive, max_bytes), send)

    def _counting(self, receive: Receive, max_bytes: int) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise HTTPException(413)
            return message

        return counted


def _is_form_label(name: bytes, value: bytes) -> bool:
    return name == b"content-type" and value.startswith(b"application/x-www-form-urlencoded")


class CrossOriginProtection:
    """Refuses (403) what changes something and is sent by a page of a stranger's.

    A browser sends a form, or text that is JSON, to any address that it can reach, also on the
    loopback, and asks nobody; but it says whose page it is. Other clients say nothing.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        changes = scope["type"] == "http" and scope["method"] in ("POST", "DELETE")
        if changes and self._is_strangers(Headers(scope=scope)):
            detail = "This page's origin is not one of CORS_ORIGINS."
            await problem(Request(scope), 403, detail)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_strangers(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or "*" in self._allowed or origin in self._allowed:
            return False
        # Behind a proxy the host may have another name; the browser knows better, if it says so.
        is_own = origin.partition("://")[2] == headers.get("host")
        return not is_own and headers.get("sec-fetch-site") != "same-origin"


class AnswersInTime:
    """Raises AnswerTooLate (503) when a request has no answer `ANSWER_SECONDS` after it came in.

    Whatever it waits for: a silent database costs seconds to connect to, and more to close. The
    request is cancelled and ends by itself, unheard. Were it the client that it waits for, that is
    BodyTooSlow (408).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._left: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        running = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        try:
            in_time = await exchange.has_begun(running)
        except asyncio.CancelledError:
            running.cancel()
            raise
        if not in_time:
            self._leave(running, exchange)
            raise BodyTooSlow if exchange.is_reading else AnswerTooLate
        await running

    def _leave(self, running: "asyncio.Future[None]", exchange: "_Exchange") -> None:
        exchange.is_over = True
        running.cancel()
        self._left.add(running)
        running.add_done_callback(self._forget)

    def _forget(self, ended: "asyncio.Future[None]") -> None:
        self._left.discard(ended)
        if not ended.cancelled():
            ended.exception()  # retrieved, or asyncio would report it as forgotten


class _Exchange:
    """One request: what is read and sent, and since when the client has been waiting."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._waits_since = time.monotonic()
        self._begun = asyncio.get_running_loop().create_future()
        self._is_whole = False
        self.is_reading = False
        self.is_over = False

    async def receive(self) -> Message:
        """Read on; while the client sends, it is not waiting."""
        self.is_reading = not self._is_whole
        message = await self._receive()
        self._waits_since = time.monotonic()
        self._is_whole = not message.get("more_body", False)
        self.is_reading = False
        return message

    async def send(self, message: Message) -> None:
        """Pass on what is sent, unless the client has had its answer."""
        if self.is_over:
            return
        if not self._begun.done():
            self._begun.set_result(None)
        await self._send(message)

    async def has_begun(self, running: "asyncio.Future[None]") -> bool:
        """Wait until the answer begins or the application ends; False when it takes too long."""
        ends = {running, self._begun}
        while (left := self._waits_since + ANSWER_SECONDS - time.monotonic()) > 0:
            done, _ = await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return True
        return False


class ClearStart:
    """Lets a refused start (SystemExit) say its one sentence, without the traceback around it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_sentence(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                _, _, sentence = message.get("message", "").rpartition("SystemExit: ")
                message = {**message, "message": sentence.strip()}
            await send(message)

        await self._app(scope, receive, send_sentence)
