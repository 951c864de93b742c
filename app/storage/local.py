"""Storage in local folders: the media with their thumbnails and, beside them, the metadata.

Not obstore's local store: it renames without flushing first, so that a power cut may leave an
empty file behind a row that says `completed`.
"""

import asyncio
import errno
import hashlib
import mmap
import os
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from datetime import UTC, datetime
from io import FileIO
from itertools import islice
from pathlib import Path
from uuid import uuid4

from app.errors import StorageError
from app.storage.base import Checkpoint, StoredFile, checked_folder, checked_key
from app.storage.workspaces import probe

# Hidden, in each folder that may be on a file system of its own: for files that are being made.
INCOMING = ".incoming"
CHUNK_BYTES = 1 << 20
# Names that one hop to a thread brings: few, for what is held at once a process does not give back.
LISTED_AT_ONCE = 100
# Read now, in the thread, so that the event loop never waits for the disk (where the flag exists).
MAP_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
# What file systems without hard links say to `link`.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)

# Gives the first file the second's name.
Placing = Callable[[Path, Path], None]


class LocalStorage:
    """Files appear whole or not at all: written beside, flushed to disk, moved into place."""

    def __init__(self, media: Path, metadata: Path) -> None:
        """Use (and make) the two folders.

        Raises: StorageError when they cannot be made.
        """
        media, metadata = media.resolve(), metadata.resolve()
        # Inside the media folder, which is there and may be the only one on its file system:
        # so no move out of the workspace crosses to another.
        self.workspace = media / INCOMING
        # Nor does one out of the metadata's: see `_copy_durably`. Never the folders of what is
        # stored: to list a million files takes hundreds of megabytes.
        self.workspaces: Collection[Path] = {self.workspace, metadata / INCOMING}
        self._folders = {
            "media": media,
            "metadata": metadata,
            "thumbnails": media / ".thumbnails",
        }
        try:
            for folder in (*self._folders.values(), *self.workspaces):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the storage folders: {error.strerror}") from error

    async def put(self, key: str, path: Path, still_ours: Checkpoint | None = None) -> None:
        """See `Storage.put`. The move into place is the moment the file exists."""
        target = self._path(key)
        try:
            try:
                await asyncio.to_thread(_move_durably, path, target)
            except FileExistsError:
                await _put_over(path, target, still_ours)
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
        """See `Storage.read`. Chunks of 1 MiB."""
        path, left, file = self._path(key), length, None
        try:
            file, chunk = await asyncio.to_thread(_open, path, start, _next(left))
            while chunk:
                yield chunk
                left = None if left is None else left - len(chunk)
                chunk = await asyncio.to_thread(file.read, _next(left)) if left != 0 else b""
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error.strerror}") from error
        finally:
            if file is not None:
                file.close()  # at once: nothing of a file that was only read waits to be written

    async def load(self, key: str, start: int, length: int) -> bytes | memoryview:
        """See `Storage.load`. Mapped, not copied: half of what serving a picture would cost.

        Nothing is ever written to a stored file, and one that is deleted stays while mapped.
        """
        try:
            return await asyncio.to_thread(_map, self._path(key), start, length)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error.strerror}") from error

    async def names(self, folder: str) -> AsyncIterator[StoredFile]:
        """See `Storage.names`."""
        try:
            with await asyncio.to_thread(os.scandir, self._folders[checked_folder(folder)]) as all_:
                while entries := await asyncio.to_thread(lambda: [*islice(all_, LISTED_AT_ONCE)]):
                    for file in await asyncio.to_thread(_described, entries):
                        yield file
        except OSError as error:
            raise StorageError(f"cannot list {folder}: {error.strerror}") from error

    async def delete(self, key: str) -> None:
        """See `Storage.delete`. Flushed, so that no power cut brings the file back."""
        try:
            await asyncio.to_thread(_delete_durably, self._path(key))
        except OSError as error:
            raise StorageError(f"cannot delete {key}: {error.strerror}") from error

    async def url(self, key: str, seconds: int) -> None:
        """See `Storage.url`: the API serves the files itself."""

    async def check(self) -> None:
        """See `Storage.check`."""
        try:
            for folder in (*self.workspaces, self._folders["metadata"]):
                await asyncio.to_thread(probe, folder)
        except OSError as error:
            raise StorageError(f"storage is not writable: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        folder, name = checked_key(key)
        return self._folders[folder] / name


async def _put_over(source: Path, target: Path, still_ours: Checkpoint | None) -> None:
    """Store `source` where a file is already: nothing to do, or a replacement of our own."""
    if await asyncio.to_thread(_same_content, source, target):
        # Whoever wrote it may have died before the folder was flushed.
        await asyncio.to_thread(_fsync, target.parent)
        await asyncio.to_thread(source.unlink)
        return
    if still_ours is not None:
        await still_ours()
    await asyncio.to_thread(_replace_durably, source, target)


def _map(path: Path, start: int, length: int) -> bytes | memoryview:
    with FileIO(path) as file:
        end = min(start + length, os.fstat(file.fileno()).st_size)
        if start >= end:
            return b""  # nothing can not be mapped
        offset = start - start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(file.fileno(), end - offset, MAP_FLAGS, mmap.PROT_READ, offset=offset)
        return memoryview(pages)[start - offset :]


def _open(path: Path, start: int, length: int) -> tuple[FileIO, bytes]:
    """Open a file and read its first part; every hop to a thread costs as much as the read."""
    file = FileIO(path)
    try:
        file.seek(start)
        return file, file.read(length)
    except BaseException:
        file.close()
        raise


def _next(left: int | None) -> int:
    return CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)


def _move_durably(source: Path, target: Path) -> None:
    """Move only what is on the disk, then flush the folder: a power cut cannot tear it.

    Raises: FileExistsError - it never replaces a file.
    """
    _place_durably(source, target, _create)


def _replace_durably(source: Path, target: Path) -> None:
    _place_durably(source, target, os.replace)


def _place_durably(source: Path, target: Path, place: Placing) -> None:
    _fsync(source)
    try:
        place(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_durably(source, target, place)
    _fsync(target.parent)


def _create(source: Path, target: Path) -> None:
    try:
        # Unlike a rename it fails when there is a file, and no other writer comes in between.
        os.link(source, target)
        source.unlink()
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        source.replace(target)


def _copy_durably(source: Path, target: Path, place: Placing) -> None:
    """Move to another file system, where the metadata may lie: nothing but a copy leads there."""
    beside = target.parent / INCOMING / uuid4().hex
    beside.parent.mkdir(exist_ok=True)
    try:
        shutil.copyfile(source, beside)
        _fsync(beside)
        place(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    source.unlink()


def _delete_durably(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same_content(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    digests = []
    for path in (one, other):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return digests[0] == digests[1]


def _described(entries: list["os.DirEntry[str]"]) -> list[StoredFile]:
    """Leave out folders, what is hidden, and what has gone since it was listed."""
    files = []
    for entry in entries:
        try:
            if entry.name.startswith(".") or not entry.is_file():
                continue
            found = entry.stat()
        except FileNotFoundError:
            continue
        modified_at = datetime.fromtimestamp(found.st_mtime, UTC)
        files.append(StoredFile(entry.name, found.st_size, modified_at))
    return files
