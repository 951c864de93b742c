"""Storage in an S3 bucket, or whatever speaks S3: the same keys, below an optional prefix."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from app.errors import StorageError
from app.storage.base import checked_key, remove_old

if TYPE_CHECKING:
    from obstore import GetOptions  # these exist for type checkers only
    from obstore.store import S3Config

CHUNK_BYTES = 1 << 20
PROBE_KEY = "metadata/.probe"


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
        region: str,
        access_key_id: str | None,
        secret_access_key: str | None,
    ) -> None:
        """Use the bucket of `url` (`s3://bucket/prefix`). Nothing is connected yet.

        Without keys the machine's own role is asked. Raises: StorageError when the workspace
        cannot be made.
        """
        address = urlsplit(url)
        config: "S3Config" = {"region": region}
        if endpoint_url:
            config["endpoint"] = endpoint_url
        if access_key_id and secret_access_key:
            config["access_key_id"] = access_key_id
            config["secret_access_key"] = secret_access_key
        self._store = S3Store(
            address.netloc,
            prefix=address.path.strip("/") or None,
            config=config,
            client_options={"allow_http": (endpoint_url or "").startswith("http://")},
        )
        self.workspace = workspace
        try:
            workspace.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the workspace: {error.strerror}") from error

    async def put(self, key: str, path: Path) -> None:
        """See `Storage.put`."""
        checked_key(key)
        try:
            await obstore.put_async(self._store, key, path)
            await asyncio.to_thread(path.unlink)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot store {key}: {type(error).__name__}") from error

    async def size(self, key: str) -> int | None:
        """See `Storage.size`."""
        checked_key(key)
        try:
            return (await obstore.head_async(self._store, key))["size"]
        except FileNotFoundError:
            return None
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

    async def clean(self, older_than_seconds: float) -> int:
        """See `Storage.clean`."""
        try:
            return await asyncio.to_thread(self._remove_old, older_than_seconds)
        except OSError as error:
            raise StorageError(f"cannot clean the workspace: {error.strerror}") from error

    async def check(self) -> None:
        """See `Storage.check`."""
        try:
            await obstore.put_async(self._store, PROBE_KEY, b"ok")
        except (BaseError, OSError) as error:
            raise StorageError(f"storage is not writable: {type(error).__name__}") from error

    def _remove_old(self, older_than_seconds: float) -> int:
        return remove_old(self.workspace.iterdir(), older_than_seconds, self.workspace)


def _range(start: int, length: int | None) -> "GetOptions":
    if length is not None:
        return {"range": (start, start + length)}
    return {"range": {"offset": start}} if start else {}
