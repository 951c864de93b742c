"""Files that were asked for a moment ago, answered without the layers that find them.

Routing, look-ups, the line in the log cost the API several times what sending the file costs;
pages ask for the same few files again and again, and what a name stands for never changes. So a
file is looked up, and logged, once in a few seconds.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.api.middleware import ANSWER_SECONDS, request_id
from app.api.problems import problem_for
from app.errors import AnswerTooLate
from app.jobs.models import Output

# For so long a file may still be answered for after it was deleted.
SECONDS = 5.0
ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class KnownFile:
    """What a path leads to, and the headers that do not depend on the request."""

    output: Output
    headers: dict[str, str]


class RecentFiles:
    """The files of the last seconds by path; the oldest go when there are too many."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, KnownFile]] = {}

    def add(self, path: str, file: KnownFile) -> None:
        """Remember a file that is in the storage."""
        self._known.pop(path, None)
        while len(self._known) >= ENTRIES:
            del self._known[next(iter(self._known))]
        self._known[path] = (time.monotonic() + SECONDS, file)

    def get(self, path: str) -> KnownFile | None:
        """Return the file, unless it was looked up too long ago."""
        until, file = self._known.get(path, (0.0, None))
        return file if time.monotonic() < until else None


Answering = Callable[[Request, KnownFile], Awaitable[Response]]


class AnswerRecent:
    """ASGI middleware: answers for known files; everything else, errors too, goes further down.

    So does a page's script of another origin: the CORS headers are made there.
    """

    def __init__(self, app: ASGIApp, answer: Answering) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        response = await self._known(scope) if scope["type"] == "http" else None
        await (response or self._app)(scope, receive, send)

    async def _known(self, scope: Scope) -> Response | None:
        if scope["method"] not in ("GET", "HEAD") or scope["query_string"]:
            return None
        services = scope["app"].state.services
        file = services.recent.get(scope["path"])
        if file is None or any(name == b"origin" for name, _ in scope["headers"]):
            return None
        known_as = scope.setdefault("state", {})["request_id"] = request_id(scope)
        with bound_contextvars(request_id=known_as):
            response = await self._answered(Request(scope), file)
        if response is None:
            return None
        response.headers["X-Request-ID"] = known_as
        if services.settings.cors_origin_list:
            # Or a browser's cache would answer another origin's script with it.
            response.headers["Vary"] = "Origin"
        return response

    async def _answered(self, request: Request, file: KnownFile) -> Response | None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._answer(request, file)
        except TimeoutError:
            # Not further down: whoever finds it out there would wait as long once more.
            return problem_for(request, AnswerTooLate())
        except Exception:
            return None  # it is for the layers further down to say what is wrong
