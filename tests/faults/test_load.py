"""Much, and for long: ten thousand jobs under every kind of fault at once, and a soak (F37)."""

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

from tests.faults.harness import PATIENT, Process, Stack, StartStack, percentile
from tests.faults.oracle import check, recovery_seconds
from tests.faults.records import jobs_about
from tests.faults.report import Scenario, full_only
from tests.faults.test_database import crash_database

JOBS = int(os.environ.get("FAULTS_LOAD_JOBS", "10000"))
LOST_ANSWERS = JOBS // 10
# Two cores have to keep up with it although a worker's start takes seconds of them.
POSTS_PER_SECOND = 12
KILL_EVERY_SECONDS = 10
DRAIN_SECONDS = 1800

SOAK_SECONDS = float(os.environ.get("FAULTS_SOAK_SECONDS", "7200"))
SOAK_POSTS_PER_SECOND = 5
SOAK_KILL_EVERY_SECONDS = min(300.0, SOAK_SECONDS / 5)
WARM_UP_SHARE = 0.25
# Below an hour the noise of a few allocations is a slope already.
SLOPE_SECONDS = 3600
GROWTH_MIB_PER_HOUR = 1.0
# The queue, its bindings, the limits of two kinds of calls: however many jobs there were.
MOST_KEYS = 15
MIB = 1 << 20


@full_only
def test_ten_thousand_jobs_under_every_fault(start_stack: StartStack, scenario: Scenario) -> None:
    """10,000 jobs, 1,000 of their creates' answers lost: 0 lost, 0 created twice, files = rows.

    From a kill to the next owner's claim: p50 <= 20 s, p99 <= 30 s. Meanwhile a worker is killed
    every few seconds, the broker flushed or restarted empty, and the database crashes.
    (FAULTS_LOAD_JOBS: another number of jobs.)
    """
    stack = start_stack(workers=2, **PATIENT)
    stack.replicate.configure(latency_seconds=3)
    stack.replicate.push_fault(
        "create", "accept_then_drop", times=LOST_ANSWERS, probability=0.15, seed=scenario.seed
    )
    started = time.monotonic()
    posting = threading.Thread(
        target=stack.post,
        args=[JOBS],
        kwargs={"per_second": POSTS_PER_SECOND, "repeat_seconds": 120, "threads": 16},
    )
    posting.start()
    kills = _break_things(stack, posting)
    broken_at = time.monotonic()
    stack.wait_until_done(DRAIN_SECONDS)
    rest_seconds = time.monotonic() - broken_at
    lost = [entry.id for entry in stack.replicate.creates() if not entry.reply_delivered]
    adopted = set(lost) & {job["external_job_id"] for job in jobs_about(stack)}
    recoveries = [s for at, ids in kills for s in recovery_seconds(stack, at, ids)]
    scenario.record(
        kills=len(kills),
        adopted=len(adopted),
        recovery_p50_seconds=percentile(recoveries, 0.5),
        recovery_p99_seconds=percentile(recoveries, 0.99),
        rest_seconds=rest_seconds,
        took_seconds=time.monotonic() - started,
        **vars(check(stack)),
    )
    assert len(stack.accepted) == JOBS
    assert len(lost) >= LOST_ANSWERS
    assert len(adopted) == len(lost)
    assert recoveries
    assert percentile(recoveries, 0.5) <= 20
    assert percentile(recoveries, 0.99) <= 30


def _break_things(stack: Stack, posting: threading.Thread) -> list[tuple[float, set[object]]]:
    """Until all is posted: kill a worker every 10 s or so, and break a server at every third.

    Returns when whose jobs lost their worker.
    """
    faults: list[Callable[[], None]] = [
        stack.flush_broker,
        stack.restart_broker_empty,
        partial(crash_database, stack),
    ]
    breaking = cycle(faults)
    kills: list[tuple[float, set[object]]] = []
    while posting.is_alive():
        posting.join(KILL_EVERY_SECONDS)
        victim = stack.random.choice(stack.living_workers)
        owner: object = stack.worker_id(victim)
        victim.kill()
        kills.append((time.time(), {owner}))
        stack.start_worker()
        if len(kills) % 3 == 0:
            next(breaking)()
    return kills


@dataclass
class _Growth:
    """The memory of a process over time: seconds and bytes."""

    process: Process
    seconds: list[float] = field(default_factory=list)
    resident_bytes: list[float] = field(default_factory=list)

    def sample(self, at: float) -> None:
        self.seconds.append(at)
        self.resident_bytes.append(self.process.resources().resident_bytes)

    def mib_per_hour(self) -> float:
        """Return the slope after the warm-up."""
        first = int(len(self.seconds) * WARM_UP_SHARE)
        line = statistics.linear_regression(self.seconds[first:], self.resident_bytes[first:])
        return line.slope * 3600 / MIB


@full_only
def test_f37_a_soak(start_stack: StartStack, scenario: Scenario) -> None:
    """5 jobs/s for long, a worker killed every 5 min: no memory and no Redis key stays behind.

    2 hours, unless FAULTS_SOAK_SECONDS says otherwise; less than an hour gives no honest slope
    (< 1 MiB/h after the warm-up), so it is only noted then.
    """
    stack = start_stack(workers=2)
    jobs = round(SOAK_SECONDS * SOAK_POSTS_PER_SECOND)
    growths = [_Growth(stack.apis[0]), _Growth(stack.workers[0])]
    posting = threading.Thread(
        target=stack.post,
        args=[jobs],
        kwargs={"per_second": SOAK_POSTS_PER_SECOND, "repeat_seconds": 30},
    )
    posting.start()
    keys = _watch(stack, posting, growths)
    posting.join()
    stack.wait_until_done()
    api, worker = (growth.mib_per_hour() for growth in growths)
    scenario.record(
        soak_seconds=SOAK_SECONDS,
        api_growth_mib_per_hour=api,
        worker_growth_mib_per_hour=worker,
        most_redis_keys=max(keys),
        **vars(check(stack)),
    )
    assert max(keys) <= MOST_KEYS
    assert max(api, worker) < GROWTH_MIB_PER_HOUR or SOAK_SECONDS < SLOPE_SECONDS


def _watch(stack: Stack, posting: threading.Thread, growths: list[_Growth]) -> list[int]:
    """Sample memory every second, and kill the second worker now and then, until all is posted.

    Returns the number of the broker's keys at each look.
    """
    started = killed_at = time.monotonic()
    keys = []
    with stack.redis() as broker:
        while posting.is_alive():
            posting.join(1)
            now = time.monotonic()
            for growth in growths:
                growth.sample(now - started)
            keys.append(int(broker.dbsize()))
            if now - killed_at > SOAK_KILL_EVERY_SECONDS:
                stack.replace(stack.living_workers[-1])
                killed_at = now
    return keys
