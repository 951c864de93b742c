"""Replicate over HTTP: the official package's low-level calls, and every failure classified.

Facts about the API come from its OpenAPI schema (api.replicate.com/openapi.json) and its docs.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote_to_bytes

import httpx
from replicate import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncReplicate,
)

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.base import Prediction, PredictionRequest
from app.providers.outcome import MESSAGE_CHARS

# Creates that may be held open at once by `Prefer: wait`; the others return at once and are
# polled. httpx's pool scans all its connections at every request, so hundreds are not cheap.
HELD_WAITS = 64
CREATE_CONNECTIONS = 128
READ_CONNECTIONS = 8

PAGES_PER_POLL = 3
GETS_PER_POLL = 20
PAGES_PER_FIND = 20

RETRY_AFTER_BOUNDS = (1.0, 300.0)

# The only failures that prove that a request was never sent.
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)

GONE = (404, 410)


class ReplicateProvider:
    """Predictions on Replicate.

    Creates have a client of their own without keep-alive: a request on a connection that the
    server has just closed fails in a way that cannot be told from an accepted one.
    """

    name = "replicate"

    def __init__(
        self, token: str, base_url: str, *, timeout_seconds: float, prefer_wait_seconds: int
    ) -> None:
        self._origin = httpx.URL(base_url)
        self._prefer_wait_seconds = prefer_wait_seconds
        self._timeout = httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds))
        self._held = 0
        fresh = httpx.Limits(max_connections=CREATE_CONNECTIONS, max_keepalive_connections=0)
        self._creates = self._client(token, base_url, fresh)
        self._reads = self._client(token, base_url, httpx.Limits(max_connections=READ_CONNECTIONS))
        # Without the token: it goes to the API's own origin only.
        self._files = httpx.AsyncClient(timeout=self._timeout, follow_redirects=False)
        self._authorization = {"Authorization": f"Bearer {token}"}

    def _client(self, token: str, base_url: str, limits: httpx.Limits) -> AsyncReplicate:
        return AsyncReplicate(
            bearer_token=token,
            base_url=f"{base_url}/v1",
            max_retries=0,  # the package would repeat a create on time-outs and 5xx
            timeout=self._timeout,
            http_client=httpx.AsyncClient(
                limits=limits, timeout=self._timeout, follow_redirects=False
            ),
        )

    # --- predictions -------------------------------------------------------------------------

    async def create(self, request: PredictionRequest) -> Prediction:
        """See `Provider.create`. Waits for the result only while few others do."""
        wait = self._prefer_wait_seconds if self._held < HELD_WAITS else 0
        self._held += bool(wait)
        try:
            return _prediction(await self._send(request, wait))
        except APIError as error:
            raise _classify(error, creating=True) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ProviderError(
                FailureClass.AMBIGUOUS, "provider_error", "The provider's answer made no sense."
            ) from error
        finally:
            self._held -= bool(wait)

    async def _send(self, request: PredictionRequest, wait: int) -> Any:
        read = (self._timeout.read or 0) + wait
        common: dict[str, Any] = {
            "input": request.input,
            "cancel_after": f"{request.cancel_after_seconds}s",
            "timeout": httpx.Timeout(self._timeout.write, connect=self._timeout.connect, read=read),
            **({"prefer": f"wait={wait}"} if wait else {}),
        }
        owner, name, version = _split(request.model_name)
        if version:
            raw = self._creates.predictions.with_raw_response
            return await (await raw.create(version=request.model_name, **common)).json()
        models = self._creates.models.predictions.with_raw_response
        return await (await models.create(model_owner=owner, model_name=name, **common)).json()

    async def get(self, prediction_id: str) -> Prediction:
        """See `Provider.get`."""
        async with _reading():
            raw = self._reads.predictions.with_raw_response
            response = await raw.get(prediction_id=prediction_id)
            return _prediction(await response.json())

    async def poll(self, prediction_ids: Collection[str]) -> dict[str, Prediction]:
        """See `Provider.poll`: one page of the list watches 100 predictions."""
        wanted = set(prediction_ids)
        found: dict[str, Prediction] = {}
        if len(wanted) > 1:
            async for page in self._pages({}, at_most=PAGES_PER_POLL):
                found.update({seen.id: seen for seen in page if seen.id in wanted})
                if len(found) == len(wanted):
                    return found
        for prediction_id in sorted(wanted - found.keys())[:GETS_PER_POLL]:
            found[prediction_id] = await self.get(prediction_id)
        return found

    async def find(self, request: PredictionRequest, created_after: datetime) -> list[Prediction]:
        """See `Provider.find`: the list has no filter but time, and echoes the input."""
        matches: list[Prediction] = []
        window = {"created_after": created_after.astimezone(UTC).isoformat()}
        pages_read = 0
        async for page in self._pages(window, at_most=PAGES_PER_FIND + 1):
            pages_read += 1
            matches += [seen for seen in page if _matches(seen, request)]
        if not matches and pages_read > PAGES_PER_FIND:
            raise ProviderError(
                FailureClass.TRANSIENT, "provider_error", "The provider's list is too long."
            )
        return matches[::-1]

    async def _pages(
        self, query: dict[str, str], *, at_most: int
    ) -> AsyncIterator[list[Prediction]]:
        """Yield pages of the list of predictions, newest first."""
        for _ in range(at_most):
            async with _reading():
                page = (
                    await self._reads.get(
                        "/predictions", cast_to=httpx.Response, options={"params": query}
                    )
                ).json()
                predictions = [_prediction(entry) for entry in page["results"]]
                # Only the cursor is taken from `next`: the token follows no URL out of a body.
                query = dict(httpx.URL(page.get("next") or "").params)
            yield predictions
            if not query:
                return

    async def cancel(self, prediction_id: str) -> None:
        """See `Provider.cancel`."""
        try:
            async with _reading():
                await self._reads.predictions.with_raw_response.cancel(prediction_id=prediction_id)
        except ProviderError as error:
            if error.failure_class is not FailureClass.PERMANENT:
                raise

    async def input_schema(self, model_name: str) -> dict[str, Any] | None:
        """See `Provider.input_schema`."""
        owner, name, version = _split(model_name)
        found: Any
        async with _reading():
            if version:
                versions = self._reads.models.versions.with_raw_response
                found = await (
                    await versions.get(model_owner=owner, model_name=name, version_id=version)
                ).json()
            else:
                models = self._reads.models.with_raw_response
                model: Any = await (await models.get(model_owner=owner, model_name=name)).json()
                found = model.get("latest_version") or {}
            return _input_schema(found.get("openapi_schema") or {})

    # --- files -------------------------------------------------------------------------------

    async def download(self, url: str) -> AsyncIterator[bytes]:
        """See `Provider.download`. Accepts `https:`, `data:`, and `http:` on the API's own host."""
        if url.startswith("data:"):
            yield _decode_data_url(url)
            return
        target = self._allowed(url)
        headers = self._authorization if _origin(target) == _origin(self._origin) else {}
        try:
            async with self._files.stream("GET", target, headers=headers) as response:
                _raise_for_file(response.status_code)
                async for chunk in response.aiter_bytes(1 << 16):
                    yield chunk
        except httpx.HTTPError as error:
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
        closing: Iterable[Awaitable[None]] = (
            self._creates.close(),
            self._reads.close(),
            self._files.aclose(),
        )
        await asyncio.gather(*closing)


@asynccontextmanager
async def _reading() -> AsyncIterator[None]:
    """Translate the failures of a call that may safely be repeated."""
    try:
        yield
    except APIError as error:
        raise _classify(error, creating=False) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProviderError(
            FailureClass.TRANSIENT, "provider_error", "The provider's answer made no sense."
        ) from error


def _classify(error: APIError, *, creating: bool) -> ProviderError:
    unsure = FailureClass.AMBIGUOUS if creating else FailureClass.TRANSIENT
    if isinstance(error, APIStatusError):
        return _classify_status(error, unsure, creating=creating)
    if isinstance(error, APIConnectionError) and isinstance(error.__cause__, NOT_SENT):
        return ProviderError(
            FailureClass.TRANSIENT, "provider_unreachable", "The provider could not be reached."
        )
    return ProviderError(unsure, "provider_no_answer", "The provider did not answer.")


def _classify_status(
    error: APIStatusError, unsure: FailureClass, *, creating: bool
) -> ProviderError:
    status = error.status_code
    if status == 429:
        return ProviderError(
            FailureClass.THROTTLED,
            "provider_throttled",
            "The provider asked to slow down.",
            retry_after_seconds=_retry_after(error),
        )
    if status in (401, 403):
        # On a read this is no reason to give up a prediction that is already paid.
        return ProviderError(
            FailureClass.PERMANENT if creating else FailureClass.TRANSIENT,
            "provider_auth",
            "The provider refused this service's credentials.",
        )
    if status == 402:
        return ProviderError(
            FailureClass.PERMANENT, "insufficient_credit", "The provider's account has no credit."
        )
    if status == 404 and not creating:
        return PredictionNotFound()
    if status == 404:
        return ProviderError(
            FailureClass.PERMANENT, "model_not_found", "The provider does not know this model."
        )
    if 400 <= status < 500 and status not in (408, 409, 425):
        return ProviderError(FailureClass.PERMANENT, "invalid_input", _detail(error))
    return ProviderError(unsure, "provider_error", f"The provider answered with status {status}.")


def _detail(error: APIStatusError) -> str:
    body = error.body
    detail = body.get("detail") if isinstance(body, dict) else None
    if isinstance(detail, str) and detail:
        return f"The provider refused the input: {detail}"[:MESSAGE_CHARS]
    return "The provider refused the input."


def _retry_after(error: APIStatusError) -> float:
    """Return the longest wait that the 429 asks for, in seconds, within bounds.

    It may stand in the header (seconds or a date), in the body, or in its text only.
    """
    body = error.body if isinstance(error.body, dict) else {}
    text = re.search(r"resets in ~?(\d+(?:\.\d+)?)s", str(body.get("detail", "")))
    asked = [
        _header_seconds(error.response.headers.get("retry-after", "")),
        _number(body.get("retry_after")),
        float(text[1]) if text else 0.0,
    ]
    low, high = RETRY_AFTER_BOUNDS
    return min(max(low, *asked), high)


def _header_seconds(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _prediction(body: Any) -> Prediction:
    """Read a prediction object; only `id` and `status` must be there.

    Recorded answers leave out fields that the schema requires, and know more states than it.
    Raises: ValueError, KeyError, TypeError.
    """
    identity, status = body["id"], body["status"]
    if not (isinstance(identity, str) and identity and isinstance(status, str)):
        raise ValueError("not a prediction")
    metrics = body.get("metrics") or {}
    seconds = metrics.get("predict_time") if isinstance(metrics, dict) else None
    return Prediction(
        id=identity,
        status=status,
        model_name=str(body.get("model") or ""),
        input=body.get("input") or {},
        output=body.get("output"),
        error=None if body.get("error") is None else str(body["error"]),
        version=body.get("version"),
        created_at=_time(body.get("created_at")),
        started_at=_time(body.get("started_at")),
        completed_at=_time(body.get("completed_at")),
        predict_time_seconds=_number(seconds) if seconds is not None else None,
        data_removed=bool(body.get("data_removed")),
    )


def _time(value: Any) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) else None


def _split(model_name: str) -> tuple[str, str, str]:
    """Split `owner/name` or `owner/name:version`."""
    model, _, version = model_name.partition(":")
    owner, _, name = model.partition("/")
    return owner, name, version


def _matches(prediction: Prediction, request: PredictionRequest) -> bool:
    owner, name, version = _split(request.model_name)
    return (
        prediction.model_name == f"{owner}/{name}"
        and version in ("", prediction.version)
        and prediction.input == request.input
    )


def _input_schema(openapi: dict[str, Any]) -> dict[str, Any] | None:
    schemas = openapi.get("components", {}).get("schemas", {})
    if not isinstance(schemas.get("Input"), dict):
        return None
    return {**schemas["Input"], "components": {"schemas": schemas}}


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    default = {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, url.port or default


def _raise_for_file(status: int) -> None:
    if status == 200:
        return
    if status in GONE:
        raise ProviderError(
            FailureClass.PERMANENT,
            "output_expired",
            "The provider deleted the output before it could be stored.",
        )
    raise ProviderError(
        FailureClass.TRANSIENT, "download_failed", f"The output's host answered with {status}."
    )


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
