"""Many searches, one reading of the list."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from app.errors import FailureClass, ProviderError
from app.providers.base import Prediction, PredictionRequest
from app.providers.search import PredictionSearch

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=1)


def prediction(name: str, *, age_seconds: float = 0, model_name: str = "a/b") -> Prediction:
    created_at = NOW - timedelta(seconds=age_seconds)
    return Prediction(name, "starting", model_name, {"prompt": name}, created_at=created_at)


def request(name: str) -> PredictionRequest:
    return PredictionRequest("a/b", {"prompt": name}, 60)


class List:
    """The provider's list: each reading waits for `go_on` after its first page, if there is one."""

    def __init__(self, *predictions: Prediction) -> None:
        self.predictions = list(predictions)
        self.readings: list[datetime] = []
        self.go_on: asyncio.Event | None = None
        self.failure: ProviderError | None = None
        self.search = PredictionSearch(self.read)

    async def read(self, created_after: datetime) -> AsyncIterator[list[Prediction]]:
        self.readings.append(created_after)
        yield self.predictions[::-1]
        if self.go_on is not None:
            await self.go_on.wait()
        if self.failure is not None:
            raise self.failure

    async def find(self, name: str, created_after: datetime = LONG_AGO) -> list[str]:
        found = await self.search.find(request(name), created_after)
        return [seen.id for seen in found]


async def test_searches_that_come_together_share_one_reading() -> None:
    names = [f"p{n}" for n in range(50)]
    provider = List(*map(prediction, names))
    provider.go_on = asyncio.Event()
    first = asyncio.create_task(provider.find("p0"))
    await asyncio.sleep(0)
    searches = [asyncio.create_task(provider.find(name)) for name in names[1:]]
    await asyncio.sleep(0)
    provider.go_on.set()
    assert await asyncio.gather(first, *searches) == [[name] for name in names]
    assert len(provider.readings) == 2


async def test_whoever_comes_during_a_reading_gets_the_next_one() -> None:
    provider = List()
    provider.go_on = asyncio.Event()
    early = asyncio.create_task(provider.find("late"))
    await asyncio.sleep(0)
    provider.predictions.append(prediction("late"))
    late = asyncio.create_task(provider.find("late"))
    await asyncio.sleep(0)
    provider.go_on.set()
    assert (await early, await late) == ([], ["late"])


async def test_one_reading_goes_back_as_far_as_the_oldest_search_needs() -> None:
    old = prediction("same", age_seconds=100)
    provider = List(old, prediction("same"))
    a_minute_ago = NOW - timedelta(seconds=60)
    provider.go_on = asyncio.Event()
    first = asyncio.create_task(provider.find("other"))
    await asyncio.sleep(0)
    searches = [provider.find("same", since) for since in (a_minute_ago, LONG_AGO)]
    both = asyncio.gather(*searches)
    await asyncio.sleep(0)
    provider.go_on.set()
    await first
    assert await both == [["same"], ["same", "same"]]
    assert provider.readings[1:] == [LONG_AGO]


async def test_a_failed_reading_fails_all_and_is_not_repeated() -> None:
    provider = List(prediction("p"))
    provider.go_on = asyncio.Event()
    provider.failure = ProviderError(FailureClass.TRANSIENT, "provider_error", "")
    searches = [asyncio.create_task(provider.find("p")) for _ in range(10)]
    await asyncio.sleep(0)
    provider.go_on.set()
    failures = await asyncio.gather(*searches, return_exceptions=True)
    assert {type(failure) for failure in failures} == {ProviderError}
    assert len(provider.readings) <= 2
    provider.failure = None
    assert await provider.find("p") == ["p"]


async def test_a_reader_that_is_stopped_leaves_its_work_to_the_next() -> None:
    provider = List(prediction("p"))
    provider.go_on = asyncio.Event()
    reader = asyncio.create_task(provider.find("p"))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(provider.find("p"))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    provider.go_on.set()
    assert await waiting == ["p"]
