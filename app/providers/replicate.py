"""Replicate over HTTP: the official package's low-level calls, and every failure classified.

Facts about the API come from its OpenAPI schema (api.replicate.com/openapi.json) and its docs.
"""

import asyncio
import base64
import binascii
import math
import random
import re
import socket
import struct
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote_to_bytes
from urllib.request import getproxies, proxy_bypass

import httpx
from replicate import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncReplicate,
    NotFoundError,
)

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.answers import read_prediction, storable
from app.providers.base import (
    MaySend,
    Prediction,
    PredictionRequest,
    called_off,
    split_model,
)
from app.providers.governor import LONGEST_PAUSE_SECONDS, Call, Governor
from app.providers.outcome import MESSAGE_CHARS
from app.providers.search import Page, PredictionSearch

# Creates that may be held open at once by `Prefer: wait`; the others return at once and are
# polled. httpx's pool scans all its connections at every request, so hundreds are not cheap.
HELD_WAITS = 64
CREATE_CONNECTIONS = 128
READ_CONNECTIONS = 8

PAGE_PREDICTIONS = 100
PAGES_PER_POLL = 3  # and one more for each hundred that are watched
GETS_PER_POLL = 20
# A search reads everything since the lost create: at ten a second, half an hour's predictions.
PAGES_PER_SEARCH = 200
TRIES_PER_PAGE = 3

RETRY_AFTER_BOUNDS_SECONDS = (1.0, LONGEST_PAUSE_SECONDS)

ACCOUNT_REFUSALS = {
    401: ("provider_auth", "The provider refused this service's credentials."),
    402: ("insufficient_credit", "The provider's account has no credit."),
    403: ("provider_auth", "The provider refused this service's credentials."),
}

# The only failures that prove that a request was never sent.
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)

# The codes of failures that say nothing but that the provider is not well.
NO_ANSWER = frozenset({"provider_unreachable", "provider_no_answer", "provider_error"})

GONE = (404, 410)

# How a cancel may be refused because there is nothing to cancel (any more).
NOT_CANCELABLE = (400, 404, 409, 410, 422)

FILE_CHUNK_BYTES = 1 << 16
FILE_HOST = "replicate.delivery"
GZIP_BEGIN = b"\x1f\x8b"  # also of each further member

# A clock that differs by more from the provider's is plainly wrong.
CLOCK_DIFFERENCE = timedelta(hours=1)


class ReplicateProvider:
    """Predictions on Replicate.

    Creates have a client of their own without keep-alive: a request on a connection that the
    server has just closed fails in a way that cannot be told from an accepted one.
    """

    name = "replicate"

    def __init__(
        self,
        token: str,
        base_url: str,
        *,
        timeout_seconds: float,
        prefer_wait_seconds: int,
        governor: Governor,
    ) -> None:
        self._governor = governor
        self._origin = httpx.URL(base_url)
        self._prefer_wait_seconds = prefer_wait_seconds
        self._timeout = httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds))
        self._tls = httpx.create_ssl_context()  # one for all: it takes 30 ms to read the roots
        self.call_seconds = 2 * timeout_seconds + prefer_wait_seconds
        self._held = 0
        fresh = httpx.Limits(max_connections=CREATE_CONNECTIONS, max_keepalive_connections=0)
        self._creates = self._client(token, base_url, transport=self._over_when_closed(fresh))
        few = httpx.Limits(max_connections=READ_CONNECTIONS)
        self._reads = self._client(token, base_url, limits=few, verify=self._tls)
        # Without the token: it goes to Replicate's own hosts only.
        self._files = httpx.AsyncClient(
            timeout=self._timeout, follow_redirects=False, verify=self._tls
        )
        self._authorization = {"Authorization": f"Bearer {token}"}
        self._search = PredictionSearch(self._pages_for_search)

    def _over_when_closed(self, limits: httpx.Limits) -> httpx.AsyncHTTPTransport:
        """Return a transport whose connections send nothing any more once they are closed.

        Linux goes on sending what a closed socket holds for a minute or more, also for a process
        that was killed: a create would arrive long after we have asked whether it did.
        """
        lingering = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return httpx.AsyncHTTPTransport(
            verify=self._tls,
            limits=limits,
            proxy=_proxy_for(self._origin),
            socket_options=[lingering],
        )

    def _client(self, token: str, base_url: str, **connecting: Any) -> AsyncReplicate:
        return AsyncReplicate(
            bearer_token=token,
            base_url=f"{base_url}/v1",
            max_retries=0,  # the package would repeat a create on time-outs and 5xx
            timeout=self._timeout,
            http_client=httpx.AsyncClient(
                timeout=self._timeout,
                follow_redirects=False,
                **connecting,
                event_hooks={"request": [_ask_before_sending]},
            ),
        )

    # --- predictions -------------------------------------------------------------------------

    async def admit(self) -> None:
        """See `Provider.admit`."""
        await self._governor.admit(Call.CREATE)

    async def create(
        self, request: PredictionRequest, may_send: MaySend | None = None
    ) -> Prediction:
        """See `Provider.create`. Waits for the result only while few others do."""
        wait = self._prefer_wait_seconds if self._held < HELD_WAITS else 0
        self._held += bool(wait)
        asking = _may_send.set(may_send)
        try:
            async with self._calling(Call.CREATE):
                return read_prediction(await self._send(request, wait))
        finally:
            _may_send.reset(asking)
            self._held -= bool(wait)

    @asynccontextmanager
    async def _calling(self, call: Call) -> AsyncIterator[None]:
        """Classify the failures of one call, and let the governor learn from how it went."""
        try:
            # The client bounds each read; a server that trickles would never meet that bound.
            with _classified(creating=call is Call.CREATE):
                async with asyncio.timeout(self.call_seconds):
                    yield
        except ProviderError as error:
            if error.failure_class is FailureClass.THROTTLED:
                pause = error.retry_after_seconds or RETRY_AFTER_BOUNDS_SECONDS[0]
                await self._governor.throttled(call, pause)
            elif error.code in NO_ANSWER:
                await self._governor.failed(call)
            elif error.failure_class is not FailureClass.INTERNAL:
                await self._governor.succeeded(call)
            raise
        await self._governor.succeeded(call)

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        """Make a call that may safely be repeated, when the provider's rate allows it."""
        await self._governor.admit(Call.OTHER)
        async with self._calling(Call.OTHER):
            yield

    async def _send(self, request: PredictionRequest, wait: int) -> Any:
        read = (self._timeout.read or 0) + wait
        common: dict[str, Any] = {
            "input": request.input,
            "cancel_after": f"{request.cancel_after_seconds}s",
            "timeout": httpx.Timeout(self._timeout.write, connect=self._timeout.connect, read=read),
            **({"prefer": f"wait={wait}"} if wait else {}),
            **(_reports_to(request.webhook) if request.webhook else {}),
        }
        owner, name, version = split_model(request.model_name)
        if version:
            raw = self._creates.predictions.with_raw_response
            return await (await raw.create(version=request.model_name, **common)).json()
        models = self._creates.models.predictions.with_raw_response
        return await (await models.create(model_owner=owner, model_name=name, **common)).json()

    async def get(self, prediction_id: str) -> Prediction:
        """See `Provider.get`."""
        async with self._reading():
            raw = self._reads.predictions.with_raw_response
            try:
                response = await raw.get(prediction_id=prediction_id)
            except NotFoundError as error:
                raise PredictionNotFound from error
            return read_prediction(await response.json())

    async def poll(self, prediction_ids: Collection[str]) -> dict[str, Prediction | None]:
        """See `Provider.poll`: one page of the list watches 100 predictions."""
        found: dict[str, Prediction | None] = {}
        try:
            await self._poll(set(prediction_ids), found)
        except ProviderError:
            # What was read counts: among many calls one may always fail.
            if not found:
                raise
        return found

    async def _poll(self, wanted: set[str], found: dict[str, Prediction | None]) -> None:
        if len(wanted) > 1:
            try:
                await self._poll_list(wanted, found)
            except ProviderError as error:
                if error.failure_class is FailureClass.THROTTLED:
                    raise
                # The list may be broken alone: then each prediction can still be read by itself.
        missing = sorted(wanted - found.keys())
        # Others every time: a few that run for long must not hide the rest.
        for prediction_id in random.sample(missing, min(len(missing), GETS_PER_POLL)):
            try:
                found[prediction_id] = await self.get(prediction_id)
            except PredictionNotFound:
                found[prediction_id] = None

    async def _poll_list(self, wanted: set[str], found: dict[str, Prediction | None]) -> None:
        pages = PAGES_PER_POLL + len(wanted) // PAGE_PREDICTIONS
        async for page in self._pages(at_most=pages):
            found.update({seen.id: seen for seen in page.predictions if seen.id in wanted})
            if len(found) == len(wanted):
                return

    async def find(
        self, request: PredictionRequest, made_within_seconds: float
    ) -> list[Prediction]:
        """See `Provider.find`: the list has no filter but time, and echoes the input."""
        return await self._search.find(request, made_within_seconds)

    async def _pages_for_search(self) -> AsyncGenerator[Page, None]:
        """Yield the list, newest first. Not asked for by time: our clock is not the provider's."""
        query: dict[str, str] = {}
        for _ in range(PAGES_PER_SEARCH):
            page, query = await self._page_insistently(query)
            yield page
            if not query:
                return
        raise ProviderError(
            FailureClass.TRANSIENT, "provider_error", "The provider's list is too long."
        )

    async def _page_insistently(self, query: dict[str, str]) -> tuple[Page, dict[str, str]]:
        """Ask again for a page that failed: of many pages one always may."""
        for _ in range(TRIES_PER_PAGE - 1):
            try:
                return await self._page(query)
            except ProviderError as error:
                if error.failure_class is FailureClass.THROTTLED:
                    raise
        return await self._page(query)

    async def _pages(self, *, at_most: int) -> AsyncGenerator[Page, None]:
        """Yield pages of the list of predictions, newest first."""
        query: dict[str, str] = {}
        for _ in range(at_most):
            page, query = await self._page(query)
            yield page
            if not query:
                return

    async def _page(self, query: dict[str, str]) -> tuple[Page, dict[str, str]]:
        """Return one page, and the query of the next one (empty: it was the last)."""
        async with self._reading():
            response = await self._reads.get(
                "/predictions", cast_to=httpx.Response, options={"params": query}
            )
            body = response.json()
            # Only the cursor is taken from `next`: the token follows no URL out of a body.
            following = dict(httpx.URL(body["next"]).params) if body.get("next") else {}
            if body.get("next") and not following:
                raise ValueError("a next page without a cursor")
            return _read_page(body["results"], response), following

    async def cancel(self, prediction_id: str) -> Prediction | None:
        """See `Provider.cancel`."""
        async with self._reading():
            raw = self._reads.predictions.with_raw_response
            try:
                response = await raw.cancel(prediction_id=prediction_id)
            except APIStatusError as error:
                if error.status_code not in NOT_CANCELABLE:
                    raise
            else:
                return read_prediction(await response.json())
        try:
            prediction = await self.get(prediction_id)
        except PredictionNotFound:
            return None
        if not prediction.is_terminal:
            raise ProviderError(
                FailureClass.TRANSIENT, "provider_error", "The provider did not take the cancel."
            )
        return prediction

    async def input_schema(self, model_name: str) -> dict[str, Any] | None:
        """See `Provider.input_schema`."""
        async with self._reading():
            try:
                found = await self._version(model_name)
            except NotFoundError:
                # An answer, or a wrong name would count as the provider's failure, and a few of
                # them open the breaker: there is no such model, as its create will say.
                return None
            return _input_schema(found.get("openapi_schema") or {})

    async def _version(self, model_name: str) -> Any:
        """Return the model's version as it is published: the one that is named, or the latest."""
        owner, name, version = split_model(model_name)
        if version:
            versions = self._reads.models.versions.with_raw_response
            named = versions.get(model_owner=owner, model_name=name, version_id=version)
            return await (await named).json()
        models = self._reads.models.with_raw_response
        model: Any = await (await models.get(model_owner=owner, model_name=name)).json()
        return model.get("latest_version") or {}

    async def webhook_secret(self) -> str:
        """See `Provider.webhook_secret`."""
        async with self._reading():
            secrets = self._reads.webhooks.default.secret.with_raw_response
            found: Any = await (await secrets.get()).json()
            return str(found["key"])

    # --- files -------------------------------------------------------------------------------

    async def download(self, url: str) -> AsyncIterator[bytes]:
        """See `Provider.download`. Accepts `https:`, `data:`, and `http:` on the API's own host."""
        if url.startswith("data:"):
            yield _decode_data_url(url)
            return
        target = self._allowed(url)
        headers = {"Accept-Encoding": "identity"}
        if _origin(target) == _origin(self._origin) or _is_of_replicate(target):
            headers |= self._authorization
        try:
            async with self._files.stream("GET", target, headers=headers) as response:
                _raise_for_file(response.status_code)
                async for chunk in _content(response):
                    yield chunk
        except (httpx.HTTPError, zlib.error) as error:
            raise ProviderError(
                FailureClass.TRANSIENT, "download_failed", "The output could not be downloaded."
            ) from error

    def _allowed(self, url: str) -> httpx.URL:
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            target = httpx.URL("")
        plain = target.scheme == "http" and _origin(target) == _origin(self._origin)
        if target.host and (target.scheme == "https" or plain) and not target.userinfo:
            return target
        raise ProviderError(
            FailureClass.PERMANENT, "invalid_output", "The output's address is not acceptable."
        )

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._search.aclose()
        closing: list[Awaitable[None]] = [
            self._creates.close(),
            self._reads.close(),
            self._files.aclose(),
            self._governor.aclose(),
        ]
        await asyncio.gather(*closing)


class _CalledOff(Exception):
    """`may_send` said no, or could not say."""


_may_send: ContextVar[MaySend | None] = ContextVar("may_send", default=None)


async def _ask_before_sending(request: httpx.Request) -> None:
    """Have the connection ask `may_send` when it is made and nothing is sent yet.

    To connect takes time, in which the job may have been cancelled or taken over.
    """
    may_send = _may_send.get()
    if may_send is None:
        return

    async def trace(event: str, _: object) -> None:
        if event == "http11.send_request_headers.started":
            await _raise_unless(may_send)

    request.extensions["trace"] = trace


async def _raise_unless(may_send: MaySend) -> None:
    try:
        allowed = await may_send()
    except Exception as error:
        raise _CalledOff from error
    if not allowed:
        raise _CalledOff


@contextmanager
def _classified(*, creating: bool) -> Iterator[None]:
    unsure = FailureClass.AMBIGUOUS if creating else FailureClass.TRANSIENT
    try:
        yield
    except APIError as error:
        raise _classify(error, creating=creating) from error
    except TimeoutError as error:
        raise ProviderError(
            unsure, "provider_no_answer", "The provider did not answer in time."
        ) from error
    except (
        *(ValueError, KeyError, TypeError, AttributeError, httpx.InvalidURL),
        RecursionError,  # JSON nested a thousand levels deep
    ) as error:
        raise ProviderError(
            unsure, "provider_error", "The provider's answer made no sense."
        ) from error


def _classify(error: APIError, *, creating: bool) -> ProviderError:
    unsure = FailureClass.AMBIGUOUS if creating else FailureClass.TRANSIENT
    if isinstance(error, APIStatusError):
        refusal = _refusal(error, creating=creating)
        return refusal or ProviderError(
            unsure, "provider_error", f"The provider answered with status {error.status_code}."
        )
    if isinstance(error.__cause__, _CalledOff):
        return called_off()
    if isinstance(error, APIConnectionError) and isinstance(error.__cause__, NOT_SENT):
        return ProviderError(
            FailureClass.UNAVAILABLE if creating else FailureClass.TRANSIENT,
            "provider_unreachable",
            "The provider could not be reached.",
        )
    return ProviderError(unsure, "provider_no_answer", "The provider did not answer.")


def _refusal(error: APIStatusError, *, creating: bool) -> ProviderError | None:
    """Return what a clear "no" means; None for an answer that may mean anything."""
    status = error.status_code
    if status == 429:
        return ProviderError(
            FailureClass.THROTTLED,
            "provider_throttled",
            "The provider asked to slow down.",
            retry_after_seconds=_retry_after(error),
        )
    if status in ACCOUNT_REFUSALS:
        # On a read this is no reason to give up a prediction that is already paid.
        lasting = FailureClass.PERMANENT if creating else FailureClass.TRANSIENT
        return ProviderError(lasting, *ACCOUNT_REFUSALS[status])
    if not creating or not 400 <= status < 500 or status in (408, 409, 425):
        return None
    if status == 404:
        return ProviderError(
            FailureClass.PERMANENT, "model_not_found", "The provider does not know this model."
        )
    return ProviderError(FailureClass.PERMANENT, "invalid_input", _detail(error))


def _detail(error: APIStatusError) -> str:
    body = error.body
    detail = body.get("detail") if isinstance(body, dict) else None
    if isinstance(detail, str) and detail:
        return f"The provider refused the input: {storable(detail)}"[:MESSAGE_CHARS]
    return "The provider refused the input."


def _retry_after(error: APIStatusError) -> float | None:
    """Return the longest wait that the 429 asks for, in seconds, within bounds; None if none.

    It may stand in the header (seconds or a date), in the body, or in its text only.
    """
    body = error.body if isinstance(error.body, dict) else {}
    text = re.search(r"resets in ~?(\d+(?:\.\d+)?)s", str(body.get("detail")))
    said = [error.response.headers.get("retry-after", ""), str(body.get("retry_after"))]
    said.append(text[1] if text else "")
    answered_at = _own_date(error.response) or datetime.now(UTC)
    asked = [seconds for value in said if (seconds := _seconds(value, answered_at)) is not None]
    low, high = RETRY_AFTER_BOUNDS_SECONDS
    return min(max(low, *asked), high) if asked else None


def _seconds(value: str, answered_at: datetime) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        return None if math.isnan(seconds) else seconds
    try:
        return (_utc(parsedate_to_datetime(value)) - answered_at).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def _read_page(entries: Any, response: httpx.Response) -> Page:
    """Read what can be read: one strange entry must not hide the others. Raises: TypeError."""
    predictions, unreadable = [], 0
    for entry in entries:
        try:
            predictions.append(read_prediction(entry))
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1
    return Page(predictions, _date(response), unreadable)


def _date(response: httpx.Response) -> datetime:
    """Return when the provider answered by its own clock; by ours if it does not say.

    Ours also if it is a little behind: to look too far back costs a page, not far enough a second
    create.
    """
    ours = datetime.now(UTC)
    at = _own_date(response) or ours
    return min(at, ours) if abs(at - ours) < CLOCK_DIFFERENCE else at


def _own_date(response: httpx.Response) -> datetime | None:
    """Return when the provider says that it answered; None if it does not say."""
    try:
        return _utc(parsedate_to_datetime(response.headers["date"]))
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _reports_to(webhook: str) -> dict[str, Any]:
    """`start` names the prediction even if the create's answer is lost, `completed` ends it."""
    return {"webhook": webhook, "webhook_events_filter": ["start", "completed"]}


def _input_schema(openapi: dict[str, Any]) -> dict[str, Any] | None:
    schemas = openapi.get("components", {}).get("schemas", {})
    if not isinstance(schemas.get("Input"), dict):
        return None
    return {**schemas["Input"], "components": {"schemas": schemas}}


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    default = {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, url.port or default


def _proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names, as httpx reads it for its own transports."""
    named = getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    if not proxy or proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


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
