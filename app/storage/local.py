"""Storage in two local folders: the media and, beside it, the metadata."""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

from app.errors import StorageError
from app.storage.base import checked_key, remove_old

CHUNK_BYTES = 1 << 20


class LocalStorage:
    """Files appear whole or not at all: written beside, flushed to disk, renamed into place."""

    def __init__(self, media: Path, metadata: Path) -> None:
        """Use (and make) the two folders.

        Raises: StorageError when they cannot be made.
        """
        self._folders = {"media": media.resolve(), "metadata": metadata.resolve()}
        # Inside the media folder, so that the rename never crosses file systems.
        self.workspace = self._folders["media"] / ".incoming"
        try:
            for folder in (*self._folders.values(), self.workspace):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the storage folders: {error.strerror}") from error

    async def put(self, key: str, path: Path) -> None:
        """See `Storage.put`. The rename is the moment the file exists."""
        try:
            await asyncio.to_thread(_move_durably, path, self._path(key))
        except OSError as error:
            raise StorageError(f"cannot store {key}: {error.strerror}") from error

    async def size(self, key: str) -> int | None:
        """See `Storage.size`."""
        try:
            return (await asyncio.to_thread(self._path(key).stat)).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error.strerror}") from error

    async def read(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """See `Storage.read`. Chunks of 1 MiB: each is one hop to a thread."""
        try:
            file = await asyncio.to_thread(self._path(key).open, "rb")
            try:
                await asyncio.to_thread(file.seek, start)
                left = length
                while left is None or left > 0:
                    wanted = CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)
                    chunk = await asyncio.to_thread(file.read, wanted)
                    if not chunk:
                        return
                    left = left - len(chunk) if left is not None else None
                    yield chunk
            finally:
                await asyncio.to_thread(file.close)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error.strerror}") from error

    async def clean(self, older_than_seconds: float) -> int:
        """See `Storage.clean`."""
        try:
            return await asyncio.to_thread(self._remove_old, older_than_seconds)
        except OSError as error:
            raise StorageError(f"cannot clean the workspace: {error.strerror}") from error

    async def check(self) -> None:
        """See `Storage.check`."""
        try:
            for folder in (self.workspace, self._folders["metadata"]):
                await asyncio.to_thread(_probe, folder)
        except OSError as error:
            raise StorageError(f"storage is not writable: {error.strerror}") from error

    def _remove_old(self, older_than_seconds: float) -> int:
        # The metadata folder holds leftovers too, all of them hidden: see `_copy_durably`.
        hidden = self._folders["metadata"].glob(".*")
        return remove_old([*self.workspace.iterdir(), *hidden], older_than_seconds, self.workspace)

    def _path(self, key: str) -> Path:
        folder, name = checked_key(key)
        return self._folders[folder] / name


def _move_durably(source: Path, target: Path) -> None:
    """Rename only what is on the disk, then flush the folder: a power cut cannot tear it."""
    _fsync(source)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_durably(source, target)
    _fsync(target.parent)


def _copy_durably(source: Path, target: Path) -> None:
    """Move to another file system, where the metadata may lie: no rename leads there."""
    beside = target.with_name(f".{uuid4().hex}")
    try:
        shutil.copyfile(source, beside)
        _fsync(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    source.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _probe(folder: Path) -> None:
    # A name of its own, and hidden: other checks, and other machines, may look at this moment.
    path = folder / f".probe-{uuid4().hex}"
    try:
        path.write_bytes(b"ok")
    finally:
        path.unlink(missing_ok=True)
