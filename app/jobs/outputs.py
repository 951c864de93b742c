"""Keeping what a prediction made: download, check, store; the media first, the metadata last."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import structlog

from app.errors import FailureClass, ProviderError, StorageError
from app.jobs.metadata import metadata_document, parameters_text
from app.jobs.models import Attempt, Job, Output
from app.media import sniff
from app.media.arrival import Arrival
from app.media.decoder import Decoder
from app.media.duration import duration_seconds
from app.media.errors import BadPicture, TooLargeToDecode
from app.media.info import PictureInfo
from app.media.png import PngCheck
from app.media.whole import is_whole
from app.providers.base import Prediction, Provider
from app.providers.outcome import is_address, output_values
from app.storage.base import Checkpoint, Storage, media_key, metadata_key

MAX_OUTPUTS = 100
DECODE_MEMORY_BYTES = 120 << 20
# The pauses before a host is asked again for a file that it says is gone, or that is not what it
# should be.
DOUBTS_SECONDS = (2.0, 8.0)

log = structlog.get_logger(__name__)

Decoding = Callable[[], AbstractAsyncContextManager[None]]
Decode = Callable[[Path, str], Awaitable[tuple[str, PictureInfo]]]


class OutputKeeper:
    """Turns a succeeded prediction into stored files and rows to be committed with the job.

    Doing it again is harmless: the same files are written under the same names.
    """

    def __init__(
        self,
        provider: Provider,
        storage: Storage,
        *,
        max_bytes: int,
        max_pixels: int,
        deadline_seconds: float,
        concurrency: int,
        decode_memory_bytes: int = DECODE_MEMORY_BYTES,
        store_original_format: bool = False,
    ) -> None:
        self._provider = provider
        self._storage = storage
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._decoder = Decoder(max_pixels=max_pixels, memory_bytes=decode_memory_bytes)
        self._store_original_format = store_original_format
        self._deadline_seconds = deadline_seconds
        self._downloads = asyncio.Semaphore(concurrency)
        # One child decodes, one after the other: only whose turn it is may have crashed the worker.
        self._decodes = asyncio.Lock()

    async def keep(
        self,
        job: Job,
        attempt: Attempt,
        prediction: Prediction,
        checkpoint: Checkpoint,
        decoding: Decoding = nullcontext,
    ) -> list[Output]:
        """Store every output and then the metadata document.

        `checkpoint` is awaited before each download and before each write that others could
        see, and may raise to stop. What has to be decoded is decoded inside a `decoding()`.
        Raises: ProviderError - PERMANENT for an output that can never be kept, TRANSIENT for
        one worth another download; StorageError; DecoderFailed.
        """
        values = output_values(prediction.output)
        if not values:
            raise _refused("no_output", "The prediction succeeded without any output.")
        if len(values) > MAX_OUTPUTS:
            raise _refused("invalid_output", f"The prediction made more than {MAX_OUTPUTS} files.")
        decode = partial(self._decode, decoding, parameters_text(job, attempt))
        outputs = []
        for index, value in enumerate(values):
            keep = partial(self._keep_one, job.id, index, value, checkpoint, decode)
            outputs.append(await self._insistently(keep, value))
        document = metadata_document(job, attempt, prediction, outputs)
        await self._put_metadata(job.id, document, checkpoint)
        return outputs

    async def _insistently(self, keep: Callable[[], Awaitable[Output]], value: Any) -> Output:
        """Have a file refused by several answers, not by one of its host's bad moments.

        It is paid for, and a refusal is for good.
        """
        pauses_seconds = iter(DOUBTS_SECONDS if _is_elsewhere(value) else ())
        while True:
            try:
                async with self._downloads:
                    return await keep()
            except ProviderError as error:
                pause_seconds = next(pauses_seconds, None)
                if not error.may_pass or pause_seconds is None:
                    raise
                log.warning("output_doubted", code=error.code, pause_seconds=pause_seconds)
            await asyncio.sleep(pause_seconds)

    async def _keep_one(
        self, job_id: UUID, index: int, value: Any, checkpoint: Checkpoint, decode: Decode
    ) -> Output:
        await checkpoint()
        async with self._working_file(job_id) as path:
            output = await self._make(job_id, index, value, path, decode)
            await checkpoint()
            await self._storage.put(media_key(output.name), path, checkpoint)
        return output

    async def _make(
        self, job_id: UUID, index: int, value: Any, path: Path, decode: Decode
    ) -> Output:
        """Download one output to `path`, check it and make it what is kept; describe it."""
        try:
            media_type, picture = await self._fetch_in_time(value, path)
            if media_type in sniff.PICTURES and picture is None:
                media_type, picture = await decode(path, media_type)
        except BadPicture as error:
            message, may_pass = str(error), error.is_damaged
            raise _refused("invalid_output", message, may_pass=may_pass) from error
        with _on_our_disk():
            size_bytes, sha256, seconds = await asyncio.to_thread(_measure, path, media_type)
        return Output(
            job_id=job_id,
            index=index,
            name=output_name(job_id, index, media_type),
            media_type=media_type,
            size_bytes=size_bytes,
            sha256=sha256,
            width=picture.size[0] if picture else None,
            height=picture.size[1] if picture else None,
            duration_seconds=seconds,
            content_policy_suspected=picture is not None and picture.is_one_colour,
        )

    async def _fetch_in_time(self, value: Any, path: Path) -> tuple[str, PictureInfo | None]:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                with _on_our_disk():
                    return await self._fetch(value, path)
        except TimeoutError as error:
            raise ProviderError(
                FailureClass.TRANSIENT, "download_failed", "The download took too long."
            ) from error

    async def _fetch(self, value: Any, path: Path) -> tuple[str, PictureInfo | None]:
        """Write one output to `path`; return its media type and what a PNG, which is checked by
        then, is.
        """
        png_check = PngCheck(self._max_pixels) if is_address(value) else None
        arrival = await asyncio.to_thread(Arrival, path, png_check)
        try:
            async for chunk in self._chunks(value):
                if arrival.size_bytes + len(chunk) > self._max_bytes:
                    raise _refused("output_too_large", "The output is larger than allowed.")
                begins = len(arrival.head) < sniff.HEAD_BYTES
                await asyncio.to_thread(arrival.write, chunk)
                if begins:
                    _refuse_beginning(value, arrival.head)
            if not arrival.size_bytes:
                raise _refused("invalid_output", "The output is empty.", may_pass=True)
            return _media_type(value, arrival.head), await asyncio.to_thread(arrival.finish)
        finally:
            await asyncio.to_thread(arrival.close)

    async def _chunks(self, value: Any) -> AsyncIterator[bytes]:
        if is_address(value):
            async for chunk in self._provider.download(value):
                yield chunk
        elif isinstance(value, str):
            yield value.encode(errors="replace")  # JSON may hold half a surrogate pair
        else:
            yield json.dumps(value).encode()

    async def _decode(
        self, decoding: Decoding, parameters: str, path: Path, media_type: str
    ) -> tuple[str, PictureInfo]:
        """Make the picture what is kept; return its media type and what it is.

        One that is too large for the decoder stays what it is: it is paid for.
        """
        decoder = self._decoder
        # `decoding` writes to the database: what fails there is not the disk.
        async with self._decodes, decoding():
            with _on_our_disk():
                try:
                    if self._store_original_format:
                        return media_type, await asyncio.to_thread(decoder.verify, path)
                    made = await asyncio.to_thread(decoder.make_png, path, parameters)
                    return media_type if made.is_animated else sniff.PNG, made
                except TooLargeToDecode as too_large:
                    if not await asyncio.to_thread(is_whole, path, media_type):
                        raise BadPicture from too_large
                    log.warning("picture_not_decoded", media_type=media_type, size=too_large.size)
                    return media_type, PictureInfo(too_large.size)

    async def _put_metadata(
        self, job_id: UUID, document: dict[str, Any], checkpoint: Checkpoint
    ) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        async with self._working_file(job_id) as path:
            await asyncio.to_thread(_write, path, text)
            await checkpoint()
            await self._storage.put(metadata_key(job_id), path, checkpoint)

    @asynccontextmanager
    async def _working_file(self, job_id: UUID) -> AsyncIterator[Path]:
        """Give a name in the workspace; what is left there at the end is removed."""
        path = self._storage.workspace / f"{job_id}-{uuid4().hex}"
        try:
            yield path
        finally:
            await asyncio.to_thread(_forget, path)


def output_name(job_id: UUID, index: int, media_type: str) -> str:
    """Return the file name: `{job_id}.png` for the first output, `{job_id}-1.png` for the next."""
    number = f"-{index}" if index else ""
    return f"{job_id}{number}.{sniff.EXTENSIONS[media_type]}"


def _is_elsewhere(value: Any) -> bool:
    return is_address(value) and not value.startswith("data:")


def _media_type(value: Any, head: bytes) -> str:
    """Sniff the type; an address that names a picture must lead to one, and none to a page.

    Raises: ProviderError.
    """
    if not is_address(value):
        return "text/plain" if isinstance(value, str) else "application/json"
    found = sniff.media_type(head)
    if found == "text/html":
        raise _refused("invalid_output", "The output is a web page, not a file.", may_pass=True)
    if _promises_picture(value) and found not in sniff.PICTURES:
        message = "The output is not the picture that its name promises."
        raise _refused("invalid_output", message, may_pass=True)
    return found


def _refuse_beginning(value: Any, head: bytes) -> None:
    """Refuse by the first bytes, as soon as they are there, what may go on for 100 MB."""
    if len(head) == sniff.HEAD_BYTES:
        _media_type(value, head)


def _promises_picture(address: str) -> bool:
    if address.startswith("data:"):
        return False  # and `urlsplit` would remember it: megabytes, 128 times
    suffix = PurePosixPath(urlsplit(address).path).suffix.removeprefix(".").lower()
    return suffix in ("png", "jpg", "jpeg", "webp", "gif", "avif")


def _measure(path: Path, media_type: str) -> tuple[int, str, float | None]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stat().st_size, sha256, duration_seconds(path, media_type)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the metadata: {error.strerror}") from error


@contextmanager
def _on_our_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot use the workspace: {error.strerror}") from error


def _forget(path: Path) -> None:
    with suppress(OSError):  # a disk that is read-only by now, say; the sweep finds it later
        path.unlink()


def _refused(code: str, message: str, *, may_pass: bool = False) -> ProviderError:
    return ProviderError(FailureClass.PERMANENT, code, message, may_pass=may_pass)
