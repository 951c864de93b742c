"""Whether a webhook really comes from Replicate: Standard Webhooks signatures, with rotation.

Replicate signs "{id}.{timestamp}.{raw body}" with the account's secret (replicate.com/docs/topics/
webhooks/verify-webhook); the library refuses a timestamp more than five minutes off.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
from standardwebhooks import Webhook, WebhookVerificationError

from app.errors import ProviderError

# How often a signature that fits no known secret may make us ask for a new one, and for the first.
REFETCH_SECONDS = 60.0
FETCH_AGAIN_SECONDS = 5.0

log = structlog.get_logger(__name__)


class WebhookVerifier:
    """Knows the account's secret: configured (several, while it is rotated), or fetched."""

    def __init__(self, configured: list[str], fetch: Callable[[], Awaitable[str]]) -> None:
        self._configured = configured
        self._fetch = fetch
        self._fetched: str | None = None
        self._failure: ProviderError | None = None
        self._rests_until = 0.0
        self._fetching = asyncio.Lock()

    async def fault(self, body: bytes, headers: Mapping[str, str]) -> str | None:
        """Return why the raw body carries no fresh signature with the account's secret, or None.

        Raises: ProviderError when the secret is needed and cannot be fetched.
        """
        fault = self._fault_by_any(body, headers)
        if fault and not self._configured and "webhook-signature" in headers:
            await self._refetch()
            fault = self._fault_by_any(body, headers)
        return fault

    def _fault_by_any(self, body: bytes, headers: Mapping[str, str]) -> str | None:
        fault: str | None = "no secret is known"
        for secret in self._known():
            fault = _fault_by(secret, body, headers)
            if fault is None:
                return None
        return fault

    def _known(self) -> list[str]:
        return [*self._configured, *([self._fetched] if self._fetched else [])]

    async def _refetch(self) -> None:
        """Fetch the secret, but not for every forged signature. Raises: as `fault`."""
        async with self._fetching:
            if time.monotonic() >= self._rests_until:
                await self._fetch_it()
            if self._fetched is None and self._failure is not None:
                raise self._failure.with_traceback(None)  # or it would grow with every raise

    async def _fetch_it(self) -> None:
        try:
            self._fetched, self._failure = await self._fetch(), None
        except ProviderError as error:
            log.warning("webhook_secret_missing", code=error.code)
            self._failure = error
        rest_seconds = FETCH_AGAIN_SECONDS if self._fetched is None else REFETCH_SECONDS
        self._rests_until = time.monotonic() + rest_seconds


def _fault_by(secret: str, body: bytes, headers: Mapping[str, str]) -> str | None:
    wanted = ("webhook-id", "webhook-timestamp", "webhook-signature")
    given: dict[str, Any] = {name: headers.get(name, "") for name in wanted}
    try:
        Webhook(secret).verify(body, given, json_parse=False)
    except WebhookVerificationError as error:
        return str(error)
    except Exception as error:
        # The library lets through what split() and base64 raise on garbage. Whatever it is, the
        # signature does not fit.
        return type(error).__name__
    return None
