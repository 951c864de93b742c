"""The calls: each made once, within the account's rate, its failures classified."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection
from contextlib import asynccontextmanager
from typing import Any

import httpx
from replicate import APIStatusError, NotFoundError

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.base import MaySend, Prediction, PredictionRequest, Sought, split_model
from app.providers.governor import Call, Governor
from app.providers.replicate.answers import read_page, read_prediction
from app.providers.replicate.connections import (
    Access,
    asked_before_sending,
    client_for_creates,
    client_for_reads,
)
from app.providers.replicate.failures import RETRY_AFTER_BOUNDS_SECONDS, classified
from app.providers.replicate.files import OutputFiles
from app.providers.replicate.search import Page, PredictionSearch

# Creates that may be held open at once by `Prefer: wait`; the others return at once and are polled.
HELD_WAITS = 64

PAGE_PREDICTIONS = 100
PAGES_PER_POLL = 3  # and one more for each hundred that are watched
GETS_PER_POLL = 20
# A search reads everything since the lost create: at ten a second, half an hour's predictions.
PAGES_PER_SEARCH = 200
TRIES_PER_PAGE = 3

# The codes of failures that say nothing but that the provider is not well.
NO_ANSWER = frozenset({"provider_unreachable", "provider_no_answer", "provider_error"})

# How a cancel may be refused because there is nothing to cancel (any more).
NOT_CANCELABLE = (400, 404, 409, 410, 422)


class ReplicateProvider:
    """Predictions on Replicate."""

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
        self._prefer_wait_seconds = prefer_wait_seconds
        self._timeout = httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds))
        self.call_seconds = 2 * timeout_seconds + prefer_wait_seconds
        self._held = 0
        access = Access(base_url, token, self._timeout, httpx.create_ssl_context())
        self._creates = client_for_creates(access)
        self._reads = client_for_reads(access)
        self._files = OutputFiles(access)
        self._search = PredictionSearch(self._pages_for_search)

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
        asking = asked_before_sending.set(may_send)
        try:
            async with self._calling(Call.CREATE):
                return read_prediction(await self._send(request, wait))
        finally:
            asked_before_sending.reset(asking)
            self._held -= bool(wait)

    @asynccontextmanager
    async def _calling(self, call: Call) -> AsyncIterator[None]:
        """Classify the failures of one call, and let the governor learn from how it went."""
        try:
            # The client bounds each read; a server that trickles would never meet that bound.
            with classified(creating=call is Call.CREATE):
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

    async def poll(
        self, prediction_ids: Collection[str]
    ) -> AsyncGenerator[tuple[str, Prediction | None], None]:
        """See `Provider.poll`: one page of the list watches 100 predictions."""
        missing = set(prediction_ids)
        try:
            async for prediction_id, seen in self._poll(missing):
                missing.discard(prediction_id)
                yield prediction_id, seen
        except ProviderError:
            # What was read counts: among many calls one may always fail.
            if len(missing) == len(set(prediction_ids)):
                raise

    async def _poll(
        self, missing: Collection[str]
    ) -> AsyncGenerator[tuple[str, Prediction | None], None]:
        """Yield what the list shows, then what has to be read by itself.

        `missing` loses, by the caller, whatever was yielded.
        """
        if len(missing) > 1:
            try:
                async for seen in self._poll_list(missing):
                    yield seen.id, seen
            except ProviderError as error:
                if error.failure_class is FailureClass.THROTTLED:
                    raise
                # The list may be broken alone: then each prediction can still be read by itself.
        # Others every time: a few that run for long must not hide the rest.
        for prediction_id in random.sample(sorted(missing), min(len(missing), GETS_PER_POLL)):
            try:
                yield prediction_id, await self.get(prediction_id)
            except PredictionNotFound:
                yield prediction_id, None

    async def _poll_list(self, missing: Collection[str]) -> AsyncGenerator[Prediction, None]:
        pages = PAGES_PER_POLL + len(missing) // PAGE_PREDICTIONS
        async for page in self._pages(at_most=pages):
            for seen in page.predictions:
                if seen.id in missing:
                    yield seen
            if not missing:
                return

    async def find(self, sought: Sought, made_within_seconds: float) -> list[Prediction]:
        """See `Provider.find`: the list has no filter but time, and echoes the input."""
        return await self._search.find(sought, made_within_seconds)

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
            return read_page(body["results"], response), following

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

    def download(self, url: str) -> AsyncIterator[bytes]:
        """See `Provider.download`."""
        return self._files.download(url)

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


def _reports_to(webhook: str) -> dict[str, Any]:
    """`start` names the prediction even if the create's answer is lost, `completed` ends it."""
    return {"webhook": webhook, "webhook_events_filter": ["start", "completed"]}


def _input_schema(openapi: dict[str, Any]) -> dict[str, Any] | None:
    schemas = openapi.get("components", {}).get("schemas", {})
    if not isinstance(schemas.get("Input"), dict):
        return None
    return {**schemas["Input"], "components": {"schemas": schemas}}
