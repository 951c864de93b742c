"""The local folders where files are half-made, and what a process left there when it died."""

import asyncio
import os
import tempfile
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from app.errors import StorageError


async def leftovers(workspaces: Collection[Path], older_than_seconds: float) -> list[Path]:
    """Return the files in these folders that nobody has written to for so long.

    Raises: StorageError.
    """
    try:
        return await asyncio.to_thread(_old_files, workspaces, older_than_seconds)
    except OSError as error:
        raise StorageError(f"cannot read the workspace: {error.strerror}") from error


async def remove_leftovers(workspaces: Collection[Path], older_than_seconds: float) -> int:
    """Remove them; return how many.

    Raises: StorageError - one of them cannot be removed; the others are.
    """
    paths = await leftovers(workspaces, older_than_seconds)
    try:
        return await asyncio.to_thread(_remove, paths)
    except OSError as error:
        raise StorageError(f"cannot clean the workspace: {error.strerror}") from error


def probe(folder: Path) -> None:
    """Write a file. Raises: OSError.

    It has no name (or none for long), so that whoever dies here leaves nothing behind.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"ok")


def _old_files(workspaces: Collection[Path], older_than_seconds: float) -> list[Path]:
    found = []
    for folder in workspaces:
        now = _now(folder)
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # another worker cleans as well
                if now - path.stat().st_mtime > older_than_seconds:
                    found.append(path)
    return found


def _now(folder: Path) -> float:
    """Return the file system's own time, by a file of now: another machine may serve it."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="now-") as file:
        return os.fstat(file.fileno()).st_mtime


def _remove(paths: Iterable[Path]) -> int:
    removed, failure = 0, None
    for path in paths:
        try:
            path.unlink()
            removed += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure
    return removed
