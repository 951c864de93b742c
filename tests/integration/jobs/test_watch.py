"""The poller: who is woken, when, and what it survives."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.errors import PredictionNotFound, ProviderError
from app.jobs import watch
from app.jobs.watch import PredictionWatcher
from app.providers.base import PredictionRequest
from app.providers.replicate import ReplicateProvider
from tests.doubles.replicate_server import ReplicateServer
from tests.doubles.ungoverned import Ungoverned

REQUEST = PredictionRequest("acme/painter", {"prompt": "p", "seed": 1}, 60)


@pytest.fixture
async def provider(replicate: ReplicateServer) -> AsyncIterator[ReplicateProvider]:
    provider = ReplicateProvider(
        replicate.token,
        replicate.origin,
        timeout_seconds=2,
        prefer_wait_seconds=0,
        governor=Ungoverned(),
    )
    yield provider
    await provider.aclose()


@pytest.fixture
def watcher(provider: ReplicateProvider) -> PredictionWatcher:
    return PredictionWatcher(
        provider, interval_seconds=0.02, starting_seconds=30, running_seconds=30
    )


@asynccontextmanager
async def running(watcher: PredictionWatcher) -> AsyncIterator[None]:
    polling = asyncio.create_task(watcher.run())
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        polling.cancel()


async def test_two_runs_may_wait_for_one_prediction_and_one_of_them_go(
    watcher: PredictionWatcher, provider: ReplicateProvider
) -> None:
    """A job that was freed and claimed again in this process has two runs for a moment."""
    created = await provider.create(REQUEST)
    first, second = [asyncio.create_task(watcher.wait(created.id)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    async with running(watcher):
        assert (await second).status == "succeeded"


async def test_an_unknown_prediction_ends_its_own_wait_only(
    watcher: PredictionWatcher, provider: ReplicateProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MISSING_SECONDS", 0.05)
    created = [await provider.create(REQUEST) for _ in range(3)]
    waits = [asyncio.create_task(watcher.wait(id_)) for id_ in ("x" * 26, *(c.id for c in created))]
    async with running(watcher):
        unknown, *ends = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(unknown, PredictionNotFound)
    assert [end.status for end in ends if not isinstance(end, BaseException)] == ["succeeded"] * 3


async def test_two_answers_far_apart_do_not_make_it_unknown(
    watcher: PredictionWatcher, provider: ReplicateProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between nothing could be read."""
    monkeypatch.setattr(watch, "MISSING_SECONDS", 0)
    created, poll = await provider.create(REQUEST), provider.poll
    misses = [created.id] * 2

    async def missing(ids: Any) -> Any:
        if misses:
            yield misses.pop(), None
            return
        async for seen in poll(ids):
            yield seen

    monkeypatch.setattr(provider, "poll", missing)
    async with running(watcher):
        assert (await watcher.wait(created.id)).status == "succeeded"


async def test_the_poller_survives_any_failure(
    watcher: PredictionWatcher, provider: ReplicateProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LONGEST_PAUSE_SECONDS", 0.02)
    created, poll = await provider.create(REQUEST), provider.poll
    failures: list[bool] = []

    async def failing_once(*arguments: Any) -> Any:
        if not failures:
            failures.append(True)
            raise RuntimeError("nobody thought of this")
        async for seen in poll(*arguments):
            yield seen

    monkeypatch.setattr(provider, "poll", failing_once)
    with capture_logs() as logged:
        async with running(watcher):
            assert (await watcher.wait(created.id)).status == "succeeded"
    assert [line["log_level"] for line in logged if line["event"] == "poll_failed"] == ["error"]


async def test_what_the_list_shows_does_not_wait_for_other_reads(
    watcher: PredictionWatcher,
    provider: ReplicateProvider,
    replicate: ReplicateServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read by itself may wait for the provider's rate, for minutes if it asks for them."""

    async def hanging(_: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(provider, "get", hanging)
    replicate.configure(latency_seconds=0)
    created = await provider.create(REQUEST)
    unlisted = asyncio.create_task(watcher.wait("x" * 26))
    async with running(watcher), asyncio.timeout(5):
        assert (await watcher.wait(created.id)).status == "succeeded"
    unlisted.cancel()


async def test_an_overdue_prediction_is_cancelled_until_it_was_heard(
    watcher: PredictionWatcher, provider: ReplicateProvider, replicate: ReplicateServer
) -> None:
    replicate.configure(latency_seconds=60)
    replicate.push_fault("cancel", "status", status=500, times=3)
    created = await provider.create(REQUEST)
    watcher._running_seconds = 0.1
    async with running(watcher):
        assert (await watcher.wait(created.id)).status == "canceled"
    assert len(replicate.creates()[0].cancel_calls) == 1


async def test_cancels_that_hang_hold_up_nobody(
    watcher: PredictionWatcher,
    provider: ReplicateProvider,
    replicate: ReplicateServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not those that have ended, in the same answer or a later one."""
    cancelling = []

    async def hanging(prediction_id: str) -> None:
        cancelling.append(prediction_id)
        await asyncio.Event().wait()

    monkeypatch.setattr(provider, "cancel", hanging)
    replicate.configure(latency_seconds=60)
    overdue = [await provider.create(REQUEST) for _ in range(watch.CANCELS_AT_ONCE + 2)]
    waits = [asyncio.create_task(watcher.wait(created.id)) for created in overdue]
    replicate.configure(latency_seconds=0)
    watcher._starting_seconds = watcher._running_seconds = 0
    async with running(watcher):
        async with asyncio.timeout(5):
            while len(cancelling) < watch.CANCELS_AT_ONCE:
                await asyncio.sleep(0.02)
        quick = await provider.create(REQUEST)
        assert (await watcher.wait(quick.id)).status == "succeeded"
    assert len(set(cancelling)) == len(cancelling) == watch.CANCELS_AT_ONCE
    for wait in waits:
        wait.cancel()


async def test_one_that_can_not_be_cancelled_is_given_up(
    watcher: PredictionWatcher,
    provider: ReplicateProvider,
    replicate: ReplicateServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "CANCEL_GRACE_SECONDS", 0.3)
    replicate.configure(latency_seconds=60)
    replicate.push_fault("cancel", "status", status=500, times=None)
    created = await provider.create(REQUEST)
    watcher._running_seconds = 0.1
    async with running(watcher):
        with pytest.raises(ProviderError) as caught:
            await watcher.wait(created.id)
    assert caught.value.code == "prediction_deadline_exceeded"
