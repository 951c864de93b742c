"""The webhooks that the Replicate double sends: signed, and as untidy as the settings ask."""

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Coroutine
from typing import Any

import httpx

from tests.doubles import clock
from tests.doubles.replicate_bodies import prediction_body
from tests.doubles.replicate_ledger import Prediction, WebhookCall, iso
from tests.doubles.replicate_settings import WEBHOOK_ORIGIN, Settings

# Only the terminal webhook is sent again, for about a minute after the end.
RETRY_AFTER_SECONDS = (1, 3, 6, 15, 30)
TIMEOUT_SECONDS = 10.0


class Webhooks:
    """Reports on each prediction to the address that its create named.

    Addresses under `https://media.test` only: no request ever leaves this machine.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def reset(self) -> None:
        """Send nothing more about the predictions there are."""
        for task in self._tasks:
            task.cancel()

    def report_on(
        self, prediction: Prediction, settings: Settings, origin: str
    ) -> asyncio.Task[None] | None:
        """Begin to report, by the settings as they are now.

        Returns what a create's answer has to wait for, if the settings want it to.
        """
        reports = _Reports(prediction, settings, origin)
        if not reports.url.startswith("http"):
            return None
        wanted = prediction.request.webhook_events_filter or ["start", "completed"]
        completed = self._start(reports.send_completed()) if "completed" in wanted else None
        if "start" not in wanted:
            return None
        first = completed if settings.webhook_reversed else None
        start = self._start(reports.send_start(first))
        return start if settings.webhook_before_reply else None

    def _start(self, sending: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(sending)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Reports:
    """What is sent about one prediction."""

    def __init__(self, prediction: Prediction, settings: Settings, origin: str) -> None:
        asked, target = prediction.request.webhook or "", settings.webhook_rewrite
        known = target is not None and asked.startswith(WEBHOOK_ORIGIN)
        self.url = asked.replace(WEBHOOK_ORIGIN, target or "", 1) if known else ""
        self._prediction = prediction
        self._settings = settings
        self._origin = origin

    async def send_start(self, first: asyncio.Task[None] | None) -> None:
        """Report the start, but after `first` is done; never repeated."""
        if first is not None:
            await asyncio.wait([first])
        await asyncio.sleep(self._settings.webhook_delay_seconds)
        await self._send("start", _new_id())

    async def send_completed(self) -> None:
        """Report the end; again, under the same id, until an answer is 2xx."""
        await self._prediction.ended()
        await asyncio.sleep(self._settings.webhook_delay_seconds)
        webhook_id = _new_id()
        for pause_seconds in (*RETRY_AFTER_SECONDS, None):
            if await self._send("completed", webhook_id) or pause_seconds is None:
                return
            await asyncio.sleep(pause_seconds)

    async def _send(self, event: str, webhook_id: str) -> bool:
        """Send all copies at once; tell whether one was answered with 2xx."""
        now = clock.now()
        document = prediction_body(self._prediction, self._settings, self._origin, now)
        body = json.dumps(document).encode()
        headers = signed_headers(self._settings.webhook_secret, body, webhook_id, now)
        copies = range(self._settings.webhook_copies)
        calls = await asyncio.gather(*(self._post(event, body, headers) for _ in copies))
        self._prediction.webhook_calls += calls
        return any(200 <= call.status < 300 for call in calls)

    async def _post(self, event: str, body: bytes, headers: dict[str, str]) -> WebhookCall:
        sent_at, started = clock.now(), time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                status = await _post(httpx.URL(self.url), body, headers)
        except (OSError, ValueError):
            status = 0
        seconds = time.monotonic() - started
        return WebhookCall(event=event, sent_at=iso(sent_at), status=status, seconds=seconds)


async def _post(url: httpx.URL, body: bytes, headers: dict[str, str]) -> int:
    """Send one request over a connection of its own; return the status of the answer.

    By hand, as the pool of httpx grows slow with the hundreds of calls that come at once here.
    Raises: OSError; ValueError when the answer breaks off.
    """
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        about = {"host": url.netloc.decode(), "connection": "close", "content-length": len(body)}
        lines = [f"{name}: {value}\r\n" for name, value in (about | headers).items()]
        writer.write(f"POST {url.path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body)
        _, status, *_ = (await reader.readline()).split()
        await reader.read()
        return int(status)
    finally:
        writer.close()


def signed_headers(secret: str, body: bytes, webhook_id: str, at: float) -> dict[str, str]:
    """The headers of a webhook sent at `at` (seconds since the epoch).

    Signature: HMAC-SHA256 of "{id}.{timestamp}.{body}" under the base64-decoded part of the secret
    after `whsec_` (Standard Webhooks; replicate.com/docs/topics/webhooks/verify-webhook).
    """
    timestamp = str(int(at))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "content-type": "application/json",
        "webhook-id": webhook_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(signature.digest()).decode(),
    }


def _new_id() -> str:
    return f"msg_{secrets.token_hex(12)}"
