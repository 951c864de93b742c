"""Many searches, one reading of the list."""

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta

import pytest

from app.errors import FailureClass, ProviderError
from app.providers.base import Prediction, Sought
from app.providers.replicate.search import Page, PredictionSearch

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A_DAY = 86400.0
LATELY = 20.0  # and the margin of a minute: what is a hundred seconds old is too old


def prediction(name: str, *, age_seconds: float = 0, model_name: str = "a/b") -> Prediction:
    created_at = NOW - timedelta(seconds=age_seconds)
    return Prediction(name, "starting", model_name, {"prompt": name}, created_at=created_at)


def sought(name: str) -> Sought:
    return Sought("a/b", {"prompt": name})


class List:
    """The provider's list: each reading waits for `go_on` after its first page, if there is one."""

    def __init__(self, *predictions: Prediction) -> None:
        self.predictions = list(predictions)
        self.readings = 0
        self.unreadable = 0
        self.go_on: asyncio.Event | None = None
        self.failure: ProviderError | None = None
        self.search = PredictionSearch(self.read)

    async def read(self) -> AsyncGenerator[Page, None]:
        self.readings += 1
        yield Page(self.predictions[::-1], NOW, self.unreadable)
        if self.go_on is not None:
            await self.go_on.wait()
        if self.failure is not None:
            raise self.failure

    async def find(self, name: str, within_seconds: float = A_DAY) -> list[str]:
        found = await self.search.find(sought(name), within_seconds)
        return [seen.id for seen in found]


async def test_searches_that_come_together_share_one_reading() -> None:
    names = [f"p{n}" for n in range(50)]
    provider = List(*map(prediction, names))
    provider.go_on = asyncio.Event()
    first = asyncio.create_task(provider.find("p0"))
    await asyncio.sleep(0.01)
    searches = [asyncio.create_task(provider.find(name)) for name in names[1:]]
    await asyncio.sleep(0)
    provider.go_on.set()
    assert await asyncio.gather(first, *searches) == [[name] for name in names]
    assert provider.readings == 2


async def test_whoever_comes_during_a_reading_gets_the_next_one() -> None:
    provider = List()
    provider.go_on = asyncio.Event()
    early = asyncio.create_task(provider.find("late"))
    await asyncio.sleep(0.01)
    provider.predictions.append(prediction("late"))
    late = asyncio.create_task(provider.find("late"))
    await asyncio.sleep(0)
    provider.go_on.set()
    assert (await early, await late) == ([], ["late"])


async def test_one_reading_goes_back_as_far_as_the_oldest_search_needs() -> None:
    old = prediction("same", age_seconds=100)
    provider = List(old, prediction("same"))
    provider.go_on = asyncio.Event()
    first = asyncio.create_task(provider.find("other"))
    await asyncio.sleep(0.01)
    searches = [provider.find("same", since) for since in (LATELY, A_DAY)]
    both = asyncio.gather(*searches)
    await asyncio.sleep(0)
    provider.go_on.set()
    await first
    assert await both == [["same"], ["same", "same"]]
    assert provider.readings == 2


async def test_a_search_ends_where_the_rest_of_the_list_is_older_than_it_asks() -> None:
    provider = List(prediction("old", age_seconds=100), prediction("new"))
    provider.go_on = asyncio.Event()  # never: only the first page is read
    assert await provider.find("new", LATELY) == ["new"]
    assert await provider.find("old", LATELY) == []
    await provider.search.aclose()


async def test_a_failed_reading_fails_those_that_it_has_not_answered() -> None:
    provider = List(prediction("old", age_seconds=100), prediction("new"))
    provider.go_on = asyncio.Event()
    provider.failure = ProviderError(FailureClass.TRANSIENT, "provider_error", "")
    waiting = asyncio.create_task(provider.find("x"))
    await asyncio.sleep(0.01)  # its reading has begun: the others share the next one
    searches = [asyncio.create_task(provider.find("old")) for _ in range(5)]
    answered = asyncio.create_task(provider.find("new", LATELY))
    await asyncio.sleep(0)
    provider.go_on.set()
    failures = await asyncio.gather(waiting, *searches, return_exceptions=True)
    assert {type(failure) for failure in failures} == {ProviderError}
    assert await answered == ["new"]
    assert provider.readings == 2
    provider.failure = None
    assert await provider.find("old") == ["old"]


async def test_a_search_that_is_given_up_leaves_the_others_alone() -> None:
    provider = List(prediction("p"))
    provider.go_on = asyncio.Event()
    first, second = [asyncio.create_task(provider.find("p")) for _ in range(2)]
    await asyncio.sleep(0.01)
    first.cancel()
    provider.go_on.set()
    assert await second == ["p"]
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_failure_that_nobody_thought_of_reaches_whoever_waits() -> None:
    provider = List()
    provider.predictions = [None]  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        await provider.find("p")
    provider.predictions = []
    assert await provider.find("p") == []


async def test_an_entry_that_can_not_be_read_may_be_it() -> None:
    provider = List(prediction("p"))
    provider.unreadable = 1
    assert await provider.find("p") == ["p"]
    with pytest.raises(ProviderError) as caught:
        await provider.find("q")
    assert caught.value.failure_class is FailureClass.TRANSIENT


async def test_a_prediction_of_another_model_is_shown_too() -> None:
    provider = List(prediction("p", model_name="other/model"))
    assert await provider.find("p") == ["p"]
