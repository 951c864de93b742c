"""Where outputs and their metadata live: one interface, whatever is behind it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from uuid import UUID

from app.errors import StorageError

FOLDERS = ("media", "metadata", "thumbnails")
# In pixels; few, because each is kept.
THUMBNAIL_SIZES = (128, 256, 512)

# Returns, or raises to stop.
Checkpoint = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a folder, as a listing shows it; the time is the storage's clock, in UTC."""

    name: str
    size_bytes: int
    modified_at: datetime


class Storage(Protocol):
    """Keeps whole files under keys such as `media/{name}` and `metadata/{job_id}.json`.

    A key either holds a whole, durable file or nothing. Every method may raise `StorageError`.
    """

    workspace: Path
    """A local folder for files being made; `put` may move from here without copying."""

    workspaces: Collection[Path]
    """All local folders where files are half-made: see `app.storage.workspaces`."""

    async def put(self, key: str, path: Path, still_ours: Checkpoint | None = None) -> None:
        """Make the local file `path` durable under `key`; `path` is gone afterwards.

        A key is written once: when it holds the same bytes already (a crash came between the
        write and its note), that is success. Other bytes are replaced, atomically, but only
        after `still_ours` has been awaited: it raises when the caller has lost the job, whose
        next owner may have completed it with what is there.
        """
        ...

    async def size(self, key: str) -> int | None:
        """Return the size in bytes, or None when there is no such key."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """Stream `length` bytes (to the end when None) from byte `start`.

        Raises (while iterating): FileNotFoundError when there is no such key; StorageError.
        """
        ...

    async def load(self, key: str, start: int, length: int) -> bytes | memoryview:
        """Return a small part at once: what `read` streams.

        Raises: FileNotFoundError when there is no such key; StorageError.
        """
        ...

    def names(self, folder: str) -> AsyncIterator[StoredFile]:
        """List a folder (`media`, `metadata`, `thumbnails`) in no order, hidden files left out.

        What is put or deleted meanwhile may or may not be in it.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove the file for good; a key that holds nothing is fine."""
        ...

    async def url(self, key: str, seconds: int) -> str | None:
        """Return an address where anybody may GET the file for this long, else None.

        It is not asked whether the file is there. None: the storage has no server of its own.
        """
        ...

    async def check(self) -> None:
        """Raise StorageError unless a file can be written right now."""
        ...


def media_key(name: str) -> str:
    """Return the key of an output file; `name` is `Output.name`."""
    return f"media/{name}"


def metadata_key(job_id: UUID) -> str:
    """Return the key of a job's metadata document."""
    return f"metadata/{job_id}.json"


def thumbnail_key(name: str, size: int) -> str:
    """Return the key of an output's thumbnail, at most `size` pixels wide and high."""
    return f"thumbnails/{name}.{size}.webp"


def checked_key(key: str) -> tuple[str, str]:
    """Return a key's folder and name.

    Raises: StorageError - it leads anywhere but to a file directly in one of the folders.
    """
    folder, _, name = key.partition("/")
    leads_away = name.startswith(".") or "/" in name or "\0" in name
    if folder not in FOLDERS or not name or leads_away:
        raise StorageError(f"not a storage key: {key!r}")
    return folder, name


def checked_folder(folder: str) -> str:
    """Return the folder's name. Raises: StorageError - there is no such folder."""
    if folder not in FOLDERS:
        raise StorageError(f"not a storage folder: {folder!r}")
    return folder


def job_id_of(name: str) -> UUID | None:
    """Return the job whose file this is: every file's name begins with its id."""
    try:
        return UUID(name[:36])
    except ValueError:
        return None
