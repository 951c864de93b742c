"""Who uses a data path: its owner holds one lock, all processes of its server hold another.

The kernel frees a lock with the last process that holds it, so unlike a pid it cannot be stale.
"""

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import IO

from scripts.supervise import ServerError

LEFTOVER_SECONDS = 5.0  # longer than the guard of a server takes to end it


def owned(path: Path, name: str) -> IO[str]:
    """Hold the lock that says this process uses the data path."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ServerError(
            f"The {name} data in {path.parent} is in use by process {owner}."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def freed(path: Path) -> IO[str]:
    """Hold the lock of a server's processes, once those that a dead owner has left are gone."""
    file = path.open("a+")
    for number in (None, signal.SIGKILL):
        if number is not None:
            _signal_leftover(file, number)
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
                continue
            file.truncate(0)
            return file
    file.close()
    raise ServerError(f"An earlier server on {path.parent} is still running and cannot be stopped.")


def _signal_leftover(file: IO[str], number: int) -> None:
    file.seek(0)
    pid = file.read().strip()
    if pid:
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            return
