"""A worker with a flaw built in: `python -m tests.faults.saboteur worker`, what celery would be.

SABOTAGE_CRASHES     folder: a job whose prompt holds `dies-once-{point}` kills its worker there
                     once; `dies-always-{point}` every time. Points: decoding, temp, renamed,
                     committing.
SABOTAGE_CLOCK       seconds by which this process's wall clock is wrong; `jump`: by up to an hour,
                     another time at each look.
SABOTAGE_ERRNO       name of the error (ENOSPC, EIO) that the storage gives while the file
SABOTAGE_ERRNO_WHILE exists.
"""

import contextvars
import errno
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from celery.__main__ import main

from app.jobs.outputs import OutputKeeper
from app.jobs.repository import JobRepository
from app.media.decoder import Decoder
from app.storage import local
from app.storage.local import LocalStorage
from app.tasks import generate as generate  # loads all that a worker does: it has clocks, too

Method = Callable[..., Awaitable[Any]]

prompt: contextvars.ContextVar[str] = contextvars.ContextVar("prompt", default="")


def run() -> None:
    """Build the flaws in, then be celery."""
    if folder := os.environ.get("SABOTAGE_CRASHES"):
        _crash(Path(folder))
    if error := os.environ.get("SABOTAGE_ERRNO"):
        _fail(getattr(errno, error), Path(os.environ["SABOTAGE_ERRNO_WHILE"]))
    if shift := os.environ.get("SABOTAGE_CLOCK"):
        _shift_clock(shift)
    sys.argv[0] = "celery"
    main()


def _crash(folder: Path) -> None:
    keep, make_png = OutputKeeper.keep, Decoder.make_png

    async def noted_keep(self: OutputKeeper, job: Any, *arguments: Any) -> Any:
        prompt.set(job.prompt)
        return await keep(self, job, *arguments)

    def deadly_make_png(*arguments: Any) -> Any:
        _die(folder, "decoding")
        return make_png(*arguments)

    OutputKeeper.keep = noted_keep  # type: ignore[assignment,method-assign]
    Decoder.make_png = deadly_make_png  # type: ignore[assignment,method-assign]
    _wrap(OutputKeeper, "_make", after=lambda: _die(folder, "temp"))
    _wrap(LocalStorage, "put", after=lambda: _die(folder, "renamed"))
    _wrap(JobRepository, "complete", before=lambda: _die(folder, "committing"))


def _wrap(
    owner: type,
    name: str,
    *,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    method: Method = getattr(owner, name)

    async def wrapped(*arguments: Any) -> Any:
        before()
        result = await method(*arguments)
        after()
        return result

    setattr(owner, name, wrapped)


def _die(folder: Path, point: str) -> None:
    words = prompt.get()
    if f"dies-always-{point}" in words or (f"dies-once-{point}" in words and _first(folder, words)):
        os.kill(os.getpid(), signal.SIGKILL)


def _first(folder: Path, words: str) -> bool:
    try:
        (folder / hashlib.sha256(words.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _fail(number: int, flag: Path) -> None:
    """Fail half of the times before the move, half when it is done and is to be flushed."""
    move, fsync = local._move_durably, local._fsync

    def failing_move(source: Path, target: Path) -> None:
        if flag.exists() and random.random() < 0.5:
            raise OSError(number, os.strerror(number))
        move(source, target)

    def failing_fsync(path: Path) -> None:
        if flag.exists() and path.is_dir():
            raise OSError(number, os.strerror(number))
        fsync(path)

    local._move_durably, local._fsync = failing_move, failing_fsync


def _shift_clock(shift: str) -> None:
    """Wherever the application or its libraries ask Python for the time of day."""
    true_time = time.time

    def seconds() -> float:
        return random.uniform(-3600, 3600) if shift == "jump" else float(shift)

    class WrongDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(true_time(), UTC).astimezone(tz) + timedelta(
                seconds=seconds()
            )

    time.time = lambda: true_time() + seconds()
    for name, module in list(sys.modules.items()):
        if name.startswith("app.") and getattr(module, "datetime", None) is datetime:
            module.datetime = WrongDatetime  # type: ignore[attr-defined]
    shifted = sys.modules["app.providers.replicate.answers"].datetime
    assert shifted is WrongDatetime, "the provider's list is dated by the true time"


if __name__ == "__main__":
    run()
