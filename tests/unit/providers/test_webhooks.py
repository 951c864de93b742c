"""The account's webhook secret: fetched when it is needed, and not for every forged signature."""

import asyncio
import time

import pytest

from app.errors import FailureClass, ProviderError
from app.providers.replicate import webhooks
from app.providers.replicate.webhooks import WebhookVerifier
from tests.doubles.replicate_webhooks import signed_headers

BODY = b'{"id": "p1"}'
SECRET = "whsec_" + "c2VjcmV0" * 4
OTHER = "whsec_" + "b3RoZXIg" * 4


class Account:
    """Replicate's side: tells the secret, if it can, and counts how often it is asked."""

    def __init__(self, secret: str | None = SECRET) -> None:
        self.secret = secret
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def tell(self) -> str:
        self.asked += 1
        await self.answers.wait()
        if self.secret is None:
            raise ProviderError(FailureClass.TRANSIENT, "provider_no_answer", "No answer.")
        return self.secret


def headers(secret: str = SECRET) -> dict[str, str]:
    return signed_headers(secret, BODY, "msg_1", time.time())


async def fault(verifier: WebhookVerifier, secret: str = SECRET) -> str | None:
    return await verifier.fault(BODY, headers(secret))


async def test_it_is_fetched_once() -> None:
    account = Account()
    verifier = WebhookVerifier([], account.tell)
    assert [await fault(verifier) for _ in range(3)] == [None] * 3
    assert account.asked == 1


async def test_forged_signatures_do_not_make_us_ask_again() -> None:
    account = Account()
    verifier = WebhookVerifier([], account.tell)
    assert all([await fault(verifier, OTHER) for _ in range(20)])
    assert account.asked == 1


async def test_nor_while_it_cannot_be_fetched_and_no_report_is_called_forged() -> None:
    account = Account(None)
    verifier = WebhookVerifier([], account.tell)
    for secret in (SECRET, OTHER) * 10:
        with pytest.raises(ProviderError, match="provider_no_answer"):
            await fault(verifier, secret)
    assert account.asked == 1


async def test_it_is_asked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FETCH_AGAIN_SECONDS", 0)
    account = Account(None)
    verifier = WebhookVerifier([], account.tell)
    with pytest.raises(ProviderError):
        await fault(verifier)
    account.secret = SECRET
    assert await fault(verifier) is None


async def test_a_fetch_that_is_given_up_tells_nothing() -> None:
    """The request was answered 503 meanwhile: that is no reason to refuse the next one."""
    account = Account()
    account.answers.clear()
    verifier = WebhookVerifier([], account.tell)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await fault(verifier)
    account.answers.set()
    assert await fault(verifier) is None


async def test_a_known_one_serves_while_another_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "REFETCH_SECONDS", 0)
    account = Account()
    verifier = WebhookVerifier([], account.tell)
    assert await fault(verifier) is None
    account.secret = None
    assert await fault(verifier, OTHER) is not None
    assert await fault(verifier) is None
