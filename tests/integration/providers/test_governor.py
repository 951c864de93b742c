"""The shared rate, pause and breaker on real Valkey: each governor stands for a worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from redis.asyncio import Connection, Redis

from app.config import Settings
from app.errors import PredictionNotFound
from app.providers import create_provider
from app.providers import governor as module
from app.providers.base import Provider
from app.providers.governor import Call, RedisGovernor
from scripts.servers import Valkey
from tests.doubles.replicate_server import ReplicateServer

StartGovernor = Callable[..., RedisGovernor]

# Who must not go waits for far longer than this; who must is given far longer than it needs.
AT_ONCE_SECONDS = 0.5
GENEROUS_SECONDS = 10


@pytest.fixture
async def start(valkey: Valkey) -> AsyncIterator[StartGovernor]:
    """Start governors with the given rate per minute on an empty Valkey."""
    redis = Redis.from_url(valkey.url)
    await redis.flushdb()
    await redis.aclose()
    started = []

    def start(per_minute: float, workers: int = 1, url: str = valkey.url) -> RedisGovernor:
        governor = RedisGovernor(
            Redis.from_url(url, socket_timeout=10, socket_connect_timeout=10),
            creates_per_minute=per_minute,
            others_per_minute=per_minute,
            workers=lambda: workers,
        )
        started.append(governor)
        return governor

    yield start
    for governor in started:
        await governor.aclose()


async def admitted_within(governors: list[RedisGovernor], seconds: float) -> int:
    """Count the creates that the governors admit together in this time."""
    count = 0

    async def ask(governor: RedisGovernor) -> None:
        nonlocal count
        while True:
            await governor.admit(Call.CREATE)
            count += 1

    tasks = [asyncio.create_task(ask(governor)) for governor in governors for _ in range(3)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    return count


async def admits(governor: RedisGovernor, call: Call = Call.CREATE) -> bool:
    """Whether the call goes; use it where one that does not would wait for longer still."""
    return await _admits_within(GENEROUS_SECONDS, governor, call)


async def admits_at_once(governor: RedisGovernor, call: Call = Call.CREATE) -> bool:
    return await _admits_within(AT_ONCE_SECONDS, governor, call)


async def _admits_within(seconds: float, governor: RedisGovernor, call: Call) -> bool:
    try:
        await asyncio.wait_for(governor.admit(call), seconds)
    except TimeoutError:
        return False
    return True


async def test_workers_share_one_rate(start: StartGovernor) -> None:
    count = await admitted_within([start(1200), start(1200)], 1.5)
    # 20 a second and the burst; the loop may be late, never early.
    assert 20 <= count <= 20 * (1.5 + module.BURST_SECONDS) + 1


async def test_a_slow_rate_has_no_burst(start: StartGovernor) -> None:
    governor = start(1)
    assert await admits(governor)
    assert not await admits_at_once(governor)


async def test_creates_and_other_calls_are_counted_apart(start: StartGovernor) -> None:
    governor = start(1)
    assert await admits(governor)
    assert not await admits_at_once(governor)
    assert await admits(governor, Call.OTHER)


async def test_the_first_in_line_goes_first(start: StartGovernor) -> None:
    governor = start(1200)
    order: list[int] = []

    async def ask(number: int) -> None:
        await governor.admit(Call.CREATE)
        order.append(number)

    await asyncio.gather(*(ask(number) for number in range(30)))
    assert order == list(range(30))


class TestPause:
    async def test_one_throttled_worker_pauses_all(self, start: StartGovernor) -> None:
        first, second = start(60_000), start(60_000)
        await first.throttled(Call.CREATE, 60)
        assert not await admits_at_once(second)
        assert await admits(second, Call.OTHER)

    async def test_whoever_waits_goes_on_when_it_ends(
        self, start: StartGovernor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LONGEST_SLEEP_SECONDS", 60)
        first, second = start(60_000), start(60_000)
        began_at = time.monotonic()
        await first.throttled(Call.CREATE, 1)
        assert await admits(second)
        assert time.monotonic() - began_at > 0.9

    async def test_a_shorter_pause_does_not_end_a_longer_one(self, start: StartGovernor) -> None:
        governor = start(60_000)
        await governor.throttled(Call.CREATE, 30)
        await governor.throttled(Call.CREATE, 0.01)
        await asyncio.sleep(0.05)
        assert not await admits_at_once(start(60_000))


class TestBreaker:
    @pytest.fixture(autouse=True)
    def _late_probes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PROBE_SECONDS", 60)

    @pytest.fixture
    def _quick_probes(self, _late_probes: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PROBE_SECONDS", 1)

    async def _open(self, governor: RedisGovernor) -> None:
        for _ in range(module.FAILURES_TO_OPEN):
            await governor.failed(Call.CREATE)

    async def test_a_run_of_failures_stops_everybody(self, start: StartGovernor) -> None:
        first, second = start(60_000), start(60_000)
        await self._open(first)
        assert not await admits_at_once(second)

    async def test_reads_that_succeed_say_nothing_of_creates_that_fail(
        self, start: StartGovernor
    ) -> None:
        governor = start(60_000)
        await governor.failed(Call.OTHER)
        await self._open(governor)
        await governor.succeeded(Call.OTHER)
        assert await admits(governor, Call.OTHER)
        assert not await admits_at_once(governor)

    async def test_a_good_answer_in_between_starts_the_count_again(
        self, start: StartGovernor
    ) -> None:
        governor = start(60_000)
        for _ in range(5):
            for _ in range(module.FAILURES_TO_OPEN - 1):
                await governor.failed(Call.CREATE)
            await governor.succeeded(Call.CREATE)
        assert await admits(governor)

    async def test_whoever_gives_it(self, start: StartGovernor) -> None:
        failing, well = start(60_000), start(60_000)
        for _ in range(module.FAILURES_TO_OPEN - 1):
            await failing.failed(Call.CREATE)  # and is killed
        await well.admit(Call.CREATE)
        await well.succeeded(Call.CREATE)
        await well.failed(Call.CREATE)
        assert await admits(well)

    @pytest.mark.usefixtures("_quick_probes")
    async def test_one_probe_per_interval_finds_out(self, start: StartGovernor) -> None:
        first, second = start(60_000), start(60_000)
        await self._open(first)
        assert await admitted_within([first, second], 3.5) in (
            2,
            3,
        )  # on a busy machine one is late

    @pytest.mark.usefixtures("_quick_probes")
    async def test_a_good_probe_closes_it_for_all(
        self, start: StartGovernor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = start(60_000), start(60_000)
        await self._open(first)
        monkeypatch.setattr(module, "PROBE_SECONDS", 60)  # the next one
        await second.admit(Call.CREATE)  # the probe, by one that has seen no failure itself
        await second.succeeded(Call.CREATE)
        assert await admits(first)
        assert await admits(first)


class TestClockSetBack:
    """Times that were written down by a server whose clock has been set back since."""

    @pytest.mark.parametrize("word", ["arrival", "probe"])
    async def test_nobody_waits_for_the_old_time(
        self, start: StartGovernor, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, word: str
    ) -> None:
        monkeypatch.setattr(module, "PROBE_SECONDS", 0.5)
        governor = start(60_000)
        redis = Redis.from_url(valkey.url)
        if word == "probe":
            for _ in range(module.FAILURES_TO_OPEN):
                await governor.failed(Call.CREATE)
        await redis.set(module._key(Call.CREATE, word), str(time.time() + 600))
        await redis.aclose()
        assert await admitted_within([governor], 1.5) >= 1

    async def test_a_pause_stays_one_within_bounds(
        self, start: StartGovernor, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 1)
        governor = start(60_000)
        redis = Redis.from_url(valkey.url)
        await redis.set(module._key(Call.CREATE, "paused"), str(time.time() + 100_000))
        await redis.aclose()
        assert not await admits_at_once(governor)
        assert await admitted_within([governor], 1.5) >= 1


async def test_the_slowest_rate_is_kept_to(start: StartGovernor, valkey: Valkey) -> None:
    governor = start(1 / 100)
    await governor.admit(Call.CREATE)
    redis = Redis.from_url(valkey.url)
    assert await redis.ttl(module._key(Call.CREATE, "arrival")) >= 6000
    await redis.aclose()


class TestSettings:
    """As the entry points make it: rates and Redis from the settings."""

    def provider(
        self, double: ReplicateServer, redis_url: str, *, creates: float, calls: float
    ) -> Provider:
        settings = Settings(
            _env_file=None,
            redis_url=redis_url,
            replicate_api_token=double.token,
            replicate_base_url=double.origin,
            replicate_creates_per_minute=creates,
            replicate_calls_per_minute=calls,
        )
        return create_provider(settings, workers=lambda: 4)

    async def gets_within(self, provider: Provider, seconds: float) -> int:
        count = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    with suppress(PredictionNotFound):
                        await provider.get("unknown")
                    count += 1
        await provider.aclose()
        return count

    async def test_creates_and_other_calls_have_each_their_own(
        self, start: StartGovernor, replicate: ReplicateServer, valkey: Valkey
    ) -> None:
        provider = self.provider(replicate, valkey.url, creates=60_000, calls=6)
        for _ in range(3):
            await provider.admit()
        assert await self.gets_within(provider, 5) == 1

    async def test_without_redis_each_worker_has_its_share(
        self, replicate: ReplicateServer
    ) -> None:
        provider = self.provider(replicate, "redis://127.0.0.1:1", creates=1, calls=600)
        assert 2 <= await self.gets_within(provider, 2) <= 7  # of 20 for all four


class TestWithoutRedis:
    async def test_a_shorter_pause_does_not_end_a_longer_one(self, start: StartGovernor) -> None:
        governor = start(60_000, url="redis://127.0.0.1:1")
        await governor.throttled(Call.CREATE, 60)
        await governor.throttled(Call.CREATE, 0.01)
        await asyncio.sleep(0.05)
        assert not await admits_at_once(governor)

    async def test_each_worker_keeps_to_its_share(self, start: StartGovernor) -> None:
        away = "redis://127.0.0.1:1"
        workers = [start(2400, workers=2, url=away) for _ in range(2)]
        assert 20 <= await admitted_within(workers, 1) <= 44

    async def test_the_breaker_holds_in_this_process(
        self, start: StartGovernor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PROBE_SECONDS", 0.5)
        governor = start(60_000, url="redis://127.0.0.1:1")
        for _ in range(module.FAILURES_TO_OPEN):
            await governor.failed(Call.CREATE)
        assert await admitted_within([governor], 1.25) in (2, 3)  # on a busy machine one is late
        await governor.succeeded(Call.CREATE)
        assert await admitted_within([governor], 1) > 20

    async def test_a_pause_holds_in_this_process(self, start: StartGovernor) -> None:
        governor = start(60_000, url="redis://127.0.0.1:1")
        await governor.throttled(Call.CREATE, 30)
        assert not await admits_at_once(governor)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("steps", range(12))
async def test_a_cancel_at_any_step_is_heard(
    start: StartGovernor, steps: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(*_: object) -> None:
        raise ConnectionResetError("Connection lost")

    governor = start(60_000)
    await governor.admit(Call.CREATE)  # connects
    if fails:
        monkeypatch.setattr(Connection, "_send_packed_command", cut)
    admitting = asyncio.create_task(governor.admit(Call.CREATE))
    for _ in range(steps):
        await asyncio.sleep(0)
    if not admitting.cancel():
        await admitting  # it was admitted by then
        return
    with pytest.raises(asyncio.CancelledError):
        await admitting
