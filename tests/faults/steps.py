"""Every point at which a run of a job can end: numbered, and to be stopped at.

A point is a step of one run that others could notice, and the moment before or after it: each SQL
statement, commit, provider call, chunk and file operation. Only code that runs in the context of
a `Steps` counts; other workers in the same process go through the same functions untouched.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

from app.jobs import outputs
from app.jobs.outputs import OutputKeeper
from app.jobs.parameters import ParameterChecker
from app.jobs.repository import JobRepository
from app.jobs.watch import PredictionWatcher
from app.providers.replicate import ReplicateProvider
from app.storage import local
from app.storage.local import LocalStorage

AROUND = [
    (ReplicateProvider, "admit"),
    (ReplicateProvider, "create"),
    (ReplicateProvider, "get"),
    (ReplicateProvider, "find"),
    (ParameterChecker, "knows"),
    (PredictionWatcher, "wait"),
    (OutputKeeper, "_fetch"),
    (OutputKeeper, "_decode"),
    (OutputKeeper, "_put_metadata"),
    (LocalStorage, "put"),
]
# Their statements are points of their own, so only what follows the commit is left.
TRANSACTIONS = [
    "claim",
    "begin_attempt",
    "may_still_submit",
    "record_prediction",
    "begin_storing",
    "begin_decoding",
    "end_decoding",
    "check_owned",
    "retry_later",
    "fail",
    "complete",
]
IN_THREADS = [(outputs, "_measure"), (outputs, "_write"), (outputs, "_forget"), (local, "_fsync")]


class Died(BaseException):
    """The process ends here."""


@dataclass(frozen=True)
class Point:
    """A step, and which time it is taken."""

    step: str
    time: int

    def __str__(self) -> str:
        return f"{self.step} #{self.time}"


@dataclass
class Steps:
    """The points that one worker has passed, and the one where it stops until told."""

    stop_at: Point | None = None
    passed: list[Point] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    dead: bool = False
    _goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    _times: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def reach(self, step: str) -> None:
        """Pass the point, or stop there; raise `Died` once the worker is dead."""
        self._times[step] += 1
        point = Point(step, self._times[step])
        self.passed.append(point)
        if point == self.stop_at:
            self.stopped.set()
            await self._goes_on.wait()
        if self.dead:
            raise Died

    def reach_in_thread(self, step: str) -> None:
        """`reach`, for code that runs in a thread of the worker."""
        asyncio.run_coroutine_threadsafe(self.reach(step), self._loop).result()

    def go_on(self) -> None:
        """Let it go on from where it stopped."""
        self._goes_on.set()

    def die(self) -> None:
        """Let it end where it stopped, so that nothing of it is left."""
        self.dead = True
        self.go_on()


_steps: ContextVar[Steps | None] = ContextVar("steps", default=None)


@contextmanager
def counted(steps: Steps) -> Iterator[None]:
    """Count the points that code in this block (and the tasks and threads it starts) passes."""
    token = _steps.set(steps)
    try:
        yield
    finally:
        _steps.reset(token)


def number_steps(patch: pytest.MonkeyPatch) -> None:
    """Make all but the database's statements into points; see `number_statements`."""
    for owner, name in AROUND:
        patch.setattr(owner, name, _around(name, getattr(owner, name)))
    for name in TRANSACTIONS:
        patch.setattr(JobRepository, name, _around(name, getattr(JobRepository, name)))
    for module, name in IN_THREADS:
        patch.setattr(module, name, _in_thread(name, getattr(module, name)))
    patch.setattr(ReplicateProvider, "download", _chunks(ReplicateProvider.download))


def number_statements(engine: AsyncEngine) -> None:
    """Make each statement and each commit of this engine into a point."""

    def before_statement(*arguments: Any) -> None:
        _reach_in_greenlet(" ".join(arguments[2].split()[:3]))

    def before_commit(_: Any) -> None:
        _reach_in_greenlet("commit")

    event.listen(engine.sync_engine, "before_cursor_execute", before_statement)
    event.listen(engine.sync_engine, "commit", before_commit)


def _reach_in_greenlet(step: str) -> None:
    if (steps := _steps.get()) is not None:
        await_only(steps.reach(step))


def _around(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def stepped(*args: Any, **kwargs: Any) -> Any:
        steps = _steps.get()
        if steps is None:
            return await original(*args, **kwargs)
        await steps.reach(f"before {name.lstrip('_')}")
        result = await original(*args, **kwargs)
        await steps.reach(f"after {name.lstrip('_')}")
        return result

    return stepped


def _in_thread(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def stepped(*args: Any) -> Any:
        if (steps := _steps.get()) is not None:
            steps.reach_in_thread(f"before {name.lstrip('_')}")
        return original(*args)

    return stepped


def _chunks(original: Callable[..., AsyncIterator[bytes]]) -> Callable[..., AsyncIterator[bytes]]:
    @wraps(original)
    async def stepped(provider: ReplicateProvider, url: str) -> AsyncIterator[bytes]:
        steps = _steps.get()
        async for chunk in original(provider, url):
            if steps is not None:
                await steps.reach("chunk of a download")
            yield chunk

    return stepped
