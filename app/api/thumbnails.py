"""Thumbnails of stored pictures: made when first asked for, kept in the storage, made once."""

import asyncio
from pathlib import Path
from uuid import uuid4

import structlog

from app.api.singleflight import SingleFlight
from app.errors import ServiceUnavailable, StorageError
from app.jobs.models import Output
from app.media import sniff
from app.media.decoder import Decoder, DecoderFailed
from app.media.errors import BadPicture
from app.storage.base import Storage, media_key, thumbnail_key

# What the decoder may take: enough for the largest picture without transparency.
PIXEL_BYTES = 4.1
SPARE_BYTES = 64 << 20

log = structlog.get_logger(__name__)


class Thumbnails:
    """The thumbnails of one API process; another one may make the same at the same time."""

    def __init__(self, storage: Storage, max_pixels: int) -> None:
        self._storage = storage
        memory_bytes = round(PIXEL_BYTES * max_pixels) + SPARE_BYTES
        self._decoder = Decoder(max_pixels=max_pixels, memory_bytes=memory_bytes)
        # The decoder takes turns by itself, but each who waits there would hold up a thread.
        self._turn = asyncio.Lock()
        self._making: SingleFlight[str, bytes] = SingleFlight()

    async def get(self, output: Output, size: int) -> bytes | None:
        """Return the WebP, or None when there can be none: no picture, or too large to decode.

        Raises: FileNotFoundError - the output is not in the storage; StorageError;
        ServiceUnavailable - the decoder does not start or answer.
        """
        if output.media_type not in sniff.PICTURES:
            return None
        key = thumbnail_key(output.name, size)
        try:
            return await _read(self._storage, key)
        except FileNotFoundError:
            pass
        try:
            return await self._making.do(key, lambda: self._make(key, output, size))
        except BadPicture:
            log.warning("no_thumbnail", name=output.name)
            return None

    async def _make(self, key: str, output: Output, size: int) -> bytes:
        path = self._storage.workspace / f"thumbnail-{uuid4().hex}"
        try:
            async with self._turn:
                await self._fetch(media_key(output.name), path)
                await asyncio.to_thread(self._decoder.make_thumbnail, path, size)
            data = await asyncio.to_thread(path.read_bytes)
            await self._storage.put(key, path)
        except FileNotFoundError:
            raise
        except DecoderFailed as error:
            raise ServiceUnavailable("No thumbnail can be made right now.") from error
        except OSError as error:
            raise StorageError(f"cannot make a thumbnail: {error}") from error
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return data

    async def _fetch(self, key: str, path: Path) -> None:
        chunks = self._storage.read(key)
        try:
            file = await asyncio.to_thread(path.open, "wb")
        except FileNotFoundError as error:  # of the workspace, not of the output
            raise StorageError("the workspace is gone") from error
        try:
            async for chunk in chunks:
                await asyncio.to_thread(file.write, chunk)
        finally:
            await asyncio.to_thread(file.close)


async def _read(storage: Storage, key: str) -> bytes:
    return b"".join([chunk async for chunk in storage.read(key)])
