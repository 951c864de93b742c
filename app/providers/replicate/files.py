"""Downloads what predictions have made: over HTTP, in pieces of bounded size, or out of the URL."""

import base64
import binascii
import re
import zlib
from collections.abc import AsyncIterator
from urllib.parse import unquote_to_bytes

import httpx
from ssrfguard import BlockedAddressError, SSRFGuardError

from app.errors import FailureClass, ProviderError
from app.providers.replicate.connections import Access, client_for_files, plain_client

GONE = (404, 410)
FILE_CHUNK_BYTES = 1 << 16
FILE_HOST = "replicate.delivery"
# What the API's own host may be asked for in the name of a model: all else there is the account's,
# its webhook secret and the inputs of others among it.
FILE_PATH = re.compile(rb"(/v1)?/files/[\w-]+(/[\w-][\w.-]*)?")
GZIP_BEGIN = b"\x1f\x8b"  # also of each further member


class OutputFiles:
    """The files of predictions, wherever their addresses lead."""

    def __init__(self, access: Access) -> None:
        self._origin = access.origin
        self._authorization = {"Authorization": f"Bearer {access.token}"}
        # Without the token: it goes to Replicate's own hosts only.
        self._own, self._others = plain_client(access), client_for_files(access)

    async def download(self, url: str) -> AsyncIterator[bytes]:
        """See `Provider.download`.

        Accepts `data:`, `https:` at public addresses, and the files of the API's own host.
        """
        if url.startswith("data:"):
            yield _decode_data_url(url)
            return
        target = self._allowed(url)
        is_own = self._is_own(target)
        headers = {"Accept-Encoding": "identity"}
        if is_own or _is_of_replicate(target):
            headers |= self._authorization
        client = self._own if is_own else self._others
        try:
            async with client.stream("GET", target, headers=headers) as response:
                _raise_for_file(response.status_code)
                async for chunk in _content(response):
                    yield chunk
        except SSRFGuardError as error:
            if isinstance(error, BlockedAddressError) and _is_of_replicate(target):
                raise _failed() from error  # its addresses are public: our resolver is not well
            raise _not_acceptable() from error
        except (httpx.HTTPError, zlib.error) as error:
            raise _failed() from error

    def _allowed(self, url: str) -> httpx.URL:
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            target = httpx.URL("")
        if self._is_own(target):
            is_good = FILE_PATH.fullmatch(target.raw_path.partition(b"?")[0]) is not None
        else:
            is_good = target.scheme == "https" and bool(target.host)
        if is_good and not target.userinfo:
            return target
        raise _not_acceptable()

    def _is_own(self, target: httpx.URL) -> bool:
        return _origin(target) == _origin(self._origin)

    async def aclose(self) -> None:
        """Close connections."""
        await self._own.aclose()
        await self._others.aclose()


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    default = {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, url.port or default


def _failed() -> ProviderError:
    return ProviderError(
        FailureClass.TRANSIENT, "download_failed", "The output could not be downloaded."
    )


def _not_acceptable() -> ProviderError:
    # For good only if it is said again: a name may have led somewhere else for a moment.
    return ProviderError(
        FailureClass.PERMANENT,
        "invalid_output",
        "The output's address is not acceptable.",
        may_pass=True,
    )


def _is_of_replicate(url: httpx.URL) -> bool:
    """Tell whether a file is where Replicate keeps them, and asks for the token (its schema)."""
    return url.scheme == "https" and f".{url.host}".endswith(f".{FILE_HOST}")


def _raise_for_file(status: int) -> None:
    if status == 200:
        return
    if status in GONE:
        raise ProviderError(
            FailureClass.PERMANENT,
            "output_expired",
            "The provider deleted the output before it could be stored.",
            may_pass=True,
        )
    raise ProviderError(
        FailureClass.TRANSIENT, "download_failed", f"The output's host answered with {status}."
    )


async def _content(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the body in pieces of bounded size, also when it comes compressed unasked.

    httpx would unpack each piece whole: a thousandfold, and for two layers a millionfold.
    Raises: zlib.error; httpx.HTTPError.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        async for chunk in response.aiter_raw(FILE_CHUNK_BYTES):
            yield chunk
        return
    if encoding != "gzip":
        raise ProviderError(
            FailureClass.PERMANENT, "invalid_output", "The output's compression is not known."
        )
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # 16: with gzip's own header
    async for packed in response.aiter_raw(FILE_CHUNK_BYTES):
        while packed:
            if unpacking.eof:
                if not GZIP_BEGIN.startswith(packed[:2]):
                    return  # whatever follows the end is not the file's
                unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            if piece := unpacking.decompress(packed, FILE_CHUNK_BYTES):
                yield piece
            packed = unpacking.unconsumed_tail or unpacking.unused_data
    if not unpacking.eof:
        raise zlib.error("the end is missing")


def _decode_data_url(url: str) -> bytes:
    head, _, data = url.partition(",")
    try:
        if head.endswith(";base64"):
            return base64.b64decode(unquote_to_bytes(data), validate=True)
        return unquote_to_bytes(data)
    except binascii.Error as error:
        raise ProviderError(
            FailureClass.PERMANENT, "invalid_output", "The output is not a valid data URL."
        ) from error
