"""The provider's limits, kept by all workers together: a shared rate, a shared pause, a breaker.

The state lives in Redis, in a few keys that one script reads and writes at once (GCRA: the
"theoretical arrival time" of the next call). While Redis is away each process keeps to its share of
the rate by itself: slower, never unlimited.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

KEY_PREFIX = "media:{governor}:"  # one slot, should this be a cluster

# After a quiet time the calls of one second may come at once, and always one.
BURST_SECONDS = 1.0
# After this many failures in a row nothing is sent but one probe per interval.
FAILURES_TO_OPEN = 10
PROBE_SECONDS = 10
FAILURE_MEMORY_SECONDS = 120
# What a 429 may ask for; the adapter sees to it.
LONGEST_PAUSE_SECONDS = 300.0
# Nobody sleeps longer than this before asking again: the answer may have changed.
LONGEST_SLEEP_SECONDS = 5.0
# After Redis has failed it is left alone for a while.
REDIS_REST_SECONDS = 5.0

# KEYS: arrival time, paused until, failures in a row, next probe. ARGV: seconds per call, burst,
# failures to open, probe interval, longest pause. Returns the seconds to wait before asking again;
# 0: go; -1: go, as a probe; -2: go, although others have failed lately. A time that was written
# down and is later than it can be is brought down: the server's clock has been set back since.
ADMIT = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local function read(key, latest)
    local at = tonumber(redis.call('GET', key) or 0)
    if at <= latest then return at end
    redis.call('SET', key, tostring(latest), 'EX', math.ceil(latest - now) + 1)
    return latest
end
local paused = read(KEYS[2], now + ARGV[5])
if paused > now then return tostring(paused - now) end
local failures = tonumber(redis.call('GET', KEYS[3]) or 0)
if failures >= tonumber(ARGV[3]) then
    local probe = read(KEYS[4], now + ARGV[4])
    if probe > now then return tostring(probe - now) end
    redis.call('SET', KEYS[4], tostring(now + ARGV[4]), 'EX', 60)
    return '-1'
end
local interval = tonumber(ARGV[1])
local arrival = math.max(read(KEYS[1], now + ARGV[2] * interval), now)
local wait = arrival - (ARGV[2] - 1) * interval - now
if wait > 0 then return tostring(wait) end
redis.call('SET', KEYS[1], tostring(arrival + interval), 'EX', math.ceil(ARGV[2] * interval) + 1)
if failures > 0 then return '-2' end
return '0'
"""

# KEYS: paused until. ARGV: seconds. A shorter pause never ends a longer one.
PAUSE = """
local t = redis.call('TIME')
local ends = t[1] + t[2] / 1000000 + ARGV[1]
if ends > tonumber(redis.call('GET', KEYS[1]) or 0) then
    redis.call('SET', KEYS[1], tostring(ends), 'EX', math.ceil(ARGV[1]) + 1)
end
"""

# KEYS: failures in a row, next probe. ARGV: failures to open, probe interval, memory. The failure
# that opens the breaker also sets the time of the first probe.
FAILED = """
local failures = redis.call('INCR', KEYS[1])
redis.call('EXPIRE', KEYS[1], ARGV[3])
if failures == tonumber(ARGV[1]) then
    local t = redis.call('TIME')
    redis.call('SET', KEYS[2], tostring(t[1] + t[2] / 1000000 + ARGV[2]), 'EX', 60)
end
return failures
"""

log = structlog.get_logger(__name__)


class Call(StrEnum):
    """The two kinds of calls that Replicate limits apart."""

    CREATE = "create"
    OTHER = "other"


class Governor(Protocol):
    """Decides when a call to the provider may be made, and learns how calls went.

    Each kind of call has a breaker of its own: reads that succeed say nothing of creates that fail.
    """

    async def admit(self, call: Call) -> None:
        """Return when the call may be made; first come, first served within this process."""
        ...

    async def throttled(self, call: Call, seconds: float) -> None:
        """The provider refused a call for its rate: nobody calls for so long."""
        ...

    async def succeeded(self, call: Call) -> None:
        """The provider answered."""
        ...

    async def failed(self, call: Call) -> None:
        """The provider could not be reached, or failed to answer."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


@dataclass(slots=True)
class _Bucket:
    """The same rate within one process, for when Redis is away."""

    arrival: float = 0.0
    paused_until: float = 0.0

    def wait_seconds(self, interval_seconds: float, now: float) -> float:
        if self.paused_until > now:
            return self.paused_until - now
        wait = self.arrival - now
        if wait <= 0:
            self.arrival = now + interval_seconds
        return max(wait, 0)


class RedisGovernor:
    """See `Governor`. Rates are per minute, for all processes on this Redis together."""

    def __init__(
        self,
        redis: Redis,
        *,
        creates_per_minute: float,
        others_per_minute: float,
        workers: Callable[[], int],
    ) -> None:
        """`workers` returns how many processes share the rate: used while Redis is away."""
        self._redis = redis
        self._intervals = {Call.CREATE: 60 / creates_per_minute, Call.OTHER: 60 / others_per_minute}
        self._workers = workers
        self._turns = {call: asyncio.Lock() for call in Call}
        self._buckets = {call: _Bucket() for call in Call}
        self._redis_rests_until = 0.0
        self._failures = dict.fromkeys(Call, 0)
        self._admit = redis.register_script(ADMIT)
        self._pause = redis.register_script(PAUSE)
        self._failed = redis.register_script(FAILED)

    async def admit(self, call: Call) -> None:
        """See `Governor.admit`. Only the first in line asks; a lock's waiters are in order."""
        async with self._turns[call]:
            while (wait := await self._wait_seconds(call)) > 0:  # noqa: ASYNC110
                # Other processes change the answer: there is no event to wait for.
                await asyncio.sleep(min(wait, LONGEST_SLEEP_SECONDS))

    async def throttled(self, call: Call, seconds: float) -> None:
        """See `Governor.throttled`."""
        log.warning("provider_throttled", call=call.value, seconds=seconds)
        bucket = self._buckets[call]
        bucket.paused_until = max(bucket.paused_until, time.monotonic() + seconds)
        await self._ask(lambda: self._pause(keys=[_key(call, "paused")], args=[seconds]))

    async def succeeded(self, call: Call) -> None:
        """See `Governor.succeeded`. Writes only after a failure: most calls follow a good one."""
        if self._failures[call]:
            self._failures[call] = 0
            if await self._ask(
                lambda: self._redis.delete(_key(call, "failures"), _key(call, "probe"))
            ):
                log.info("provider_answers", call=call.value)

    async def failed(self, call: Call) -> None:
        """See `Governor.failed`."""
        self._failures[call] += 1
        failures = await self._ask(
            lambda: self._failed(
                keys=[_key(call, "failures"), _key(call, "probe")],
                args=[FAILURES_TO_OPEN, PROBE_SECONDS, FAILURE_MEMORY_SECONDS],
            )
        )
        if failures == FAILURES_TO_OPEN:
            log.error("provider_breaker_opened", call=call.value, failures=failures)

    async def aclose(self) -> None:
        """See `Governor.aclose`."""
        await self._redis.aclose()

    async def _wait_seconds(self, call: Call) -> float:
        interval = self._intervals[call]
        answer = await self._ask(
            lambda: self._admit(
                keys=[_key(call, word) for word in ("arrival", "paused", "failures", "probe")],
                args=[
                    interval,
                    _burst(interval),
                    FAILURES_TO_OPEN,
                    PROBE_SECONDS,
                    LONGEST_PAUSE_SECONDS,
                ],
            )
        )
        if answer is None:
            if self._failures[call] >= FAILURES_TO_OPEN:
                interval = max(interval, PROBE_SECONDS)
            return self._buckets[call].wait_seconds(interval * self._workers(), time.monotonic())
        wait = float(answer)
        if wait < 0:
            # Others' failures count as our own: our success must end the row of them.
            self._failures[call] = max(self._failures[call], 1)
        return wait

    async def _ask(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Run a command on Redis; None while it is away."""
        if time.monotonic() < self._redis_rests_until:
            return None
        try:
            return await _hearing_cancels(command())
        except (RedisError, OSError, RuntimeError) as error:
            # RuntimeError: what uvloop says when the connection has just been closed.
            self._redis_rests_until = time.monotonic() + REDIS_REST_SECONDS
            log.warning("governor_without_redis", error=type(error).__name__)
            return None


async def _hearing_cancels(command: Awaitable[Any]) -> Any:
    """Await a command; raise CancelledError if a cancel was lost in it, however it ended.

    redis-py writes within `asyncio.wait_for`, and that one forgets a cancel which comes when what
    it waits for has just ended (Python 3.11; gh-86296, mended in 3.12). A run that goes on although
    it was cancelled waits for ever in a worker that stops.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - in a coroutine there is one
    before = task.cancelling()
    try:
        return await command
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


def _burst(interval_seconds: float) -> int:
    return max(1, round(BURST_SECONDS / interval_seconds))


def _key(*words: str) -> str:
    return KEY_PREFIX + ":".join(words)
