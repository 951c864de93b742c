"""One run for many callers, remembered as long as it should be."""

import asyncio

import pytest

from app.api.singleflight import SingleFlight


class Runs:
    """Counts how often it runs; each run waits for `go`."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        await self.go.wait()
        return number


async def test_many_callers_share_one_run() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    runs = Runs()
    calls = [asyncio.create_task(flight.do("key", runs)) for _ in range(20)]
    await asyncio.sleep(0)
    runs.go.set()
    assert await asyncio.gather(*calls) == [1] * 20
    assert await flight.do("key", runs) == 2


async def test_keys_do_not_wait_for_each_other() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    stuck, free = Runs(), Runs()
    free.go.set()
    waiting = asyncio.create_task(flight.do("stuck", stuck))
    assert await flight.do("free", free) == 1
    assert not waiting.done()
    stuck.go.set()
    assert await waiting == 1


async def test_whoever_leaves_does_not_stop_it() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    runs = Runs()
    first = asyncio.create_task(flight.do("key", runs))
    second = asyncio.create_task(flight.do("key", runs))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    runs.go.set()
    assert await second == 1


async def test_an_error_reaches_all_and_is_not_remembered() -> None:
    flight: SingleFlight[str, int] = SingleFlight(remembered=10)
    runs = Runs()
    runs.go.set()
    answers = await asyncio.gather(
        *(flight.do("key", _fail) for _ in range(3)), return_exceptions=True
    )
    assert [str(answer) for answer in answers] == ["no"] * 3
    assert await flight.do("key", runs) == 1


async def test_the_last_results_answer_later_calls() -> None:
    flight: SingleFlight[str, int] = SingleFlight(remembered=2)
    runs = Runs()
    runs.go.set()
    assert [await flight.do(key, runs) for key in "abab"] == [1, 2, 1, 2]
    assert [await flight.do(key, runs) for key in "cba"] == [3, 2, 4]


async def _fail() -> int:
    raise ValueError("no")
