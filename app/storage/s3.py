"""Storage in an S3 bucket, or whatever speaks S3: the same keys, below an optional prefix."""

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Collection
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from app.errors import StorageError
from app.media.sniff import content_type
from app.storage.base import Checkpoint, StoredFile, checked_folder, checked_key
from app.storage.workspaces import probe

if TYPE_CHECKING:
    from obstore import Attributes, GetOptions, ObjectMeta, PutMode  # for type checkers only
    from obstore.store import ClientConfig, RetryConfig, S3Config

CHUNK_BYTES = 1 << 20
PROBE_KEY = "metadata/.probe"

# Files above this go in parts, a few at a time: none is ever in memory as a whole.
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
LISTED_AT_ONCE = 1000

CONNECT_SECONDS = 5
# Without a byte, in either direction; a slow client of ours does not count.
SILENCE_SECONDS = 30
REQUEST_SECONDS = 600
# A refusing bucket is asked again by the client only briefly: the job itself is tried again later.
RETRIES = 3
RETRY_SECONDS = 60


class S3Storage:
    """An object appears whole or not at all, by S3's own promise; large ones go in parts.

    Make it in the process that uses it: the client does not survive a fork.
    """

    def __init__(
        self,
        url: str,
        workspace: Path,
        *,
        endpoint_url: str | None,
        public_endpoint_url: str | None = None,
        region: str,
        access_key_id: str | None,
        secret_access_key: str | None,
    ) -> None:
        """Use the bucket of `url` (`s3://bucket/prefix`). Nothing is connected yet.

        Without keys the machine's own role is asked. Raises: StorageError when the workspace
        cannot be made.
        """
        config: S3Config = {"region": region}
        if access_key_id and secret_access_key:
            config["access_key_id"] = access_key_id
            config["secret_access_key"] = secret_access_key
        self._store = _open(url, endpoint_url, config)
        # The signature covers the host, so what clients get is signed on the host they see.
        self._public_store = _open(url, public_endpoint_url or endpoint_url, config)
        self.workspace = workspace
        self.workspaces: Collection[Path] = {workspace}
        try:
            _make_private(workspace)
        except OSError as error:
            raise StorageError(f"cannot make the workspace: {error.strerror}") from error

    async def put(self, key: str, path: Path, still_ours: Checkpoint | None = None) -> None:
        """See `Storage.put`."""
        checked_key(key)
        try:
            await asyncio.to_thread(os.utime, path)  # young: left alone however slow the upload
            if (await asyncio.to_thread(path.stat)).st_size > PART_BYTES:
                await self._put_in_parts(key, path, still_ours)
            else:
                await self._put_whole(key, path, still_ours)
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot store {key}: {type(error).__name__}") from error

    async def size(self, key: str) -> int | None:
        """See `Storage.size`."""
        checked_key(key)
        try:
            found = await self._head(key)
            return found["size"] if found else None
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot read {key}: {type(error).__name__}") from error

    async def read(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """See `Storage.read`. One request, so that what is read is of one version."""
        checked_key(key)
        if length == 0:  # S3 has no empty range
            return
        try:
            found = await obstore.get_async(self._store, key, options=_range(start, length))
            async for chunk in found.stream(CHUNK_BYTES):
                yield bytes(chunk)
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as error:
            if start >= (await self.size(key) or 0):
                return  # nor one that begins at the end
            raise StorageError(f"cannot read {key}: {type(error).__name__}") from error

    async def load(self, key: str, start: int, length: int) -> bytes:
        """See `Storage.load`."""
        return b"".join([chunk async for chunk in self.read(key, start, length)])

    async def names(self, folder: str) -> AsyncIterator[StoredFile]:
        """See `Storage.names`."""
        prefix = f"{checked_folder(folder)}/"
        try:
            listing = obstore.list(self._store, prefix, chunk_size=LISTED_AT_ONCE)
            async for batch in listing:
                for found in batch:
                    name = found["path"].removeprefix(prefix)
                    if not name.startswith(".") and "/" not in name:
                        yield StoredFile(name, found["size"], found["last_modified"])
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot list {folder}: {type(error).__name__}") from error

    async def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        checked_key(key)
        try:
            await obstore.delete_async(self._store, key)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot delete {key}: {type(error).__name__}") from error

    async def url(self, key: str, seconds: int) -> str:
        """See `Storage.url`: presigned on the public endpoint, for GET only."""
        checked_key(key)
        try:
            lifetime = timedelta(seconds=seconds)
            return await obstore.sign_async(self._public_store, "GET", key, lifetime)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot sign {key}: {type(error).__name__}") from error

    async def check(self) -> None:
        """See `Storage.check`."""
        try:
            # Whoever tidies temporary folders may have taken it away.
            await asyncio.to_thread(_make_private, self.workspace)
            await asyncio.to_thread(probe, self.workspace)
            await obstore.put_async(self._store, PROBE_KEY, b"ok")
        except (BaseError, OSError) as error:
            raise StorageError(f"storage is not writable: {type(error).__name__}") from error

    async def _put_whole(self, key: str, path: Path, still_ours: Checkpoint | None) -> None:
        """Create the object, or replace exactly the one that was looked at before `still_ours`.

        A writer that was paused, and lost its job meanwhile, finds either the object of the next
        owner or a version that it has not looked at, and asks before it writes again.
        """
        mode: PutMode = "create"
        while True:
            try:
                await self._send(key, path, mode)
                return
            except (AlreadyExistsError, PreconditionError):
                found = await self._head(key)
            if found is None:
                mode = "create"  # deleted since
                continue
            if await self._holds(found, key, path):
                return
            if still_ours is not None:
                await still_ours()
            mode = {"e_tag": found["e_tag"]}

    async def _put_in_parts(self, key: str, path: Path, still_ours: Checkpoint | None) -> None:
        """Store a large file, which no condition can guard: obstore sends none with its parts.

        So the object is looked at first. Only pictures are made anew by us, and they are small;
        a large file is what the provider sent, and the same bytes whoever downloads it.
        """
        found = await self._head(key)
        if found is not None:
            if await self._holds(found, key, path):
                return
            if still_ours is not None:
                await still_ours()
        await self._send(key, path, "overwrite")

    async def _send(self, key: str, path: Path, mode: "PutMode") -> None:
        await obstore.put_async(
            self._store,
            key,
            path,
            attributes=_attributes(key),
            mode=mode,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )

    async def _head(self, key: str) -> "ObjectMeta | None":
        try:
            return await obstore.head_async(self._store, key)
        except FileNotFoundError:
            return None

    async def _holds(self, found: "ObjectMeta", key: str, path: Path) -> bool:
        """Tell whether the object has the file's bytes: read, because a crash is rare."""
        if found["size"] != (await asyncio.to_thread(path.stat)).st_size:
            return False
        theirs = hashlib.sha256()
        async for chunk in self.read(key):
            theirs.update(chunk)
        return theirs.digest() == await asyncio.to_thread(_sha256, path)


def _open(url: str, endpoint_url: str | None, config: "S3Config") -> S3Store:
    address = urlsplit(url)
    client: ClientConfig = {
        "allow_http": (endpoint_url or "").startswith("http://"),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=SILENCE_SECONDS),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
    }
    retries: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
    }
    return S3Store(
        address.netloc,
        prefix=address.path.strip("/") or None,
        config={**config, "endpoint": endpoint_url} if endpoint_url else config,
        client_options=client,
        retry_config=retries,
    )


def _make_private(folder: Path) -> None:
    """Raises: OSError - also when it is somebody else's, who could change what passes through."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is another user's")


def _attributes(key: str) -> "Attributes":
    """Return the headers that the bucket itself serves the file with.

    An attachment: the bucket's host sends no sandboxing CSP, so what a model made must not be
    opened there. Pages show it all the same: `<img>` and `<video>` do not look at this header.
    """
    folder, name = checked_key(key)
    caching = "no-cache" if folder == "metadata" else "public, max-age=31536000, immutable"
    return {
        "Content-Type": content_type(name),
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": caching,
    }


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _range(start: int, length: int | None) -> "GetOptions":
    if length is not None:
        return {"range": (start, start + length)}
    return {"range": {"offset": start}} if start else {}
