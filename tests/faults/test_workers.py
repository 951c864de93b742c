"""Workers that die, pause and restart: F1, F2, F29, F31, F32, F33, F34."""

import threading
import time
from uuid import UUID

from tests.faults.harness import FULL, PATIENT, Process, Stack, StartStack, percentile, wait_for
from tests.faults.oracle import (
    check,
    claims_per_job,
    recovery_seconds,
    taken_from_the_living,
)
from tests.faults.report import Scenario, full_only, sized

# The full run measures with the leases that are the default.
DEFAULT_LEASES = {
    "WORKER_HEARTBEAT_SECONDS": "3",
    "WORKER_LEASE_SECONDS": "15",
    "SWEEP_INTERVAL_SECONDS": "1",
    "POLL_INTERVAL_SECONDS": "1",
}
MOST_KILLS = sized(4, 40)
# As fast as they go, 500 POSTs keep both processors busy for seconds, and it is these that GETs
# wait for then, not the fault.
FLOOD_PER_SECOND = 40


class Kills:
    """Kills workers, starts others in their place, and remembers when whose jobs lost them."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.done: list[tuple[float, set[UUID]]] = []

    def kill(self, *workers: Process) -> None:
        ids = {self._stack.worker_id(worker) for worker in workers}
        for worker in workers:
            worker.kill()
        self.done.append((time.time(), ids))
        started = [self._stack.start_worker(wait=False) for _ in workers]
        for worker in started:
            self._stack.wait_for_worker(worker)

    def recoveries(self) -> list[float]:
        """Seconds from a kill to the next claim, for every job that was held."""
        return [s for at, ids in self.done for s in recovery_seconds(self._stack, at, ids)]


def test_f01_all_workers_killed_again_and_again(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """500 jobs, all workers killed after every 2 s of work until 80 % are done: over in 60 s."""
    jobs = sized(60, 500)
    stack = start_stack(workers=2)
    stack.replicate.configure(latency_seconds=sized(4, 1))  # there is work at every kill
    kills = Kills(stack)
    stack.post(jobs)
    while stack.finished() < 0.8 * jobs and len(kills.done) < MOST_KILLS:
        time.sleep(2)
        kills.kill(*stack.living_workers)
    assert kills.recoveries()
    assert not FULL or stack.finished() >= 0.8 * jobs
    stack.wait_until_done(60)
    rest_seconds = time.time() - kills.done[-1][0]
    assert not FULL or rest_seconds <= 60
    scenario.record(kills=2 * len(kills.done), rest_seconds=rest_seconds, **_figures(kills, stack))


@full_only
def test_f02_one_random_worker_killed_again_and_again(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """500 jobs, one of 4 workers killed every 3 s until 400 are done: over in 60 s.

    The catalogue's "one pool child every 300 ms", for workers without pool children.

    A worker process has no pool children, and needs 2 s to start. From the kill to the next
    owner's claim: p50 <= 20 s, p99 <= 30 s with the default leases.
    """
    stack = start_stack(workers=4, **DEFAULT_LEASES)
    stack.replicate.configure(latency_seconds=12)
    kills = Kills(stack)
    stack.post(500, per_second=FLOOD_PER_SECOND)
    while stack.finished() < 400 and len(kills.done) < 2 * MOST_KILLS:
        time.sleep(1)
        kills.kill(stack.random.choice(stack.living_workers))
    assert stack.finished() >= 400
    stack.wait_until_done(60)
    rest_seconds = time.time() - kills.done[-1][0]
    recoveries = kills.recoveries()
    assert len(recoveries) > 100
    assert taken_from_the_living(stack) == []
    figures = _figures(kills, stack)
    scenario.record(kills=len(kills.done), rest_seconds=rest_seconds, **figures)
    assert rest_seconds <= 60
    assert percentile(recoveries, 0.5) <= 20
    assert percentile(recoveries, 0.99) <= 30


def _figures(kills: Kills, stack: Stack) -> dict[str, object]:
    recoveries = kills.recoveries()
    return {
        **vars(check(stack)),
        "recoveries": len(recoveries),
        "recovery_p50_seconds": percentile(recoveries, 0.5),
        "recovery_p99_seconds": percentile(recoveries, 0.99),
        "recovery_max_seconds": max(recoveries, default=0.0),
    }


@full_only
def test_f29_workers_whose_clocks_are_wrong(start_stack: StartStack, scenario: Scenario) -> None:
    """100 jobs, clocks +10 min, -10 min and jumping: no lease stolen or immortal, none paid twice.

    Python's clocks are shifted in the worker: libfaketime is not on every machine. The provider's
    is wrong as well, and of 20 creates the answer is lost.
    """
    stack = start_stack(workers=0, **PATIENT)
    stack.replicate.configure(latency_seconds=2, clock_ahead_seconds=-600)
    stack.replicate.push_fault("create", "accept_then_drop", times=20)
    workers = [
        stack.start_worker(SABOTAGE_CLOCK=shift, SABOTAGE_CRASHES="")
        for shift in ("600", "-600", "jump")
    ]
    stack.post(100)
    time.sleep(1.5)
    workers[0].kill()
    stack.wait_until_done(60)
    dead = {stack.worker_id(workers[0])}
    assert taken_from_the_living(stack) == []
    owners = {row[0] for row in stack.query("SELECT DISTINCT worker_id FROM faults.history")}
    assert dead < owners - {None}
    summary = check(stack)
    assert (summary.lost_answers, summary.creates) == (20, 100)
    scenario.record(**vars(summary))


@full_only
def test_f31_workers_restarted_one_after_the_other(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """300 jobs, each worker restarted by SIGTERM 5 times: gone in 30 s, none failed or double."""
    stack = start_stack(workers=2, **DEFAULT_LEASES)
    stack.replicate.configure(latency_seconds=2)
    ids = stack.post(100)
    seconds = []
    for _ in range(5):
        for worker in stack.living_workers:
            ids += stack.post(20)
            seconds.append(worker.terminate())
            stack.start_worker()
    stack.wait_until_done(60)
    summary = check(stack)
    assert summary.jobs == {"completed": len(ids)} == {"completed": 300}
    scenario.record(stop_max_seconds=max(seconds), **vars(summary))
    assert max(seconds) <= 30


@full_only
def test_f31_a_worker_stopped_while_a_thousand_jobs_wait(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """SIGTERM with 1000 jobs waiting for the provider: gone in 5 s, each resumed as it was."""
    stack = start_stack(workers=1, **DEFAULT_LEASES)
    stack.replicate.configure(latency_seconds=60)
    stack.post(1000)
    wait_for(lambda: len(stack.replicate.creates()) == 1000, "all creates", 240)
    stop_seconds = stack.workers[0].terminate()
    owned = stack.query("SELECT count(*) FROM jobs WHERE worker_id IS NOT NULL")[0][0]
    stack.start_worker()
    stack.wait_until_done(150)
    summary = check(stack)
    scenario.record(stop_seconds=stop_seconds, **vars(summary))
    assert owned == 0
    assert summary.jobs == {"completed": 1000}
    assert stop_seconds <= 5


@full_only
def test_f32_a_paused_worker_that_wakes_changes_nothing(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """50 jobs, one of two workers stopped for 60 s: it writes 0 rows and replaces 0 files.

    Half of its jobs have ended when it wakes; the others still run, as another's.
    """
    stack = start_stack(workers=2)
    stack.replicate.configure(latency_seconds=2)
    slow = [(0, "starting"), (1, "processing"), (85, "succeeded")]
    stack.replicate.push_fault(
        "create", "status_sequence", sequence=slow, prompt_contains="slow", times=None
    )
    stack.post(25, words="slow")
    stack.post(25)
    zombie = stack.workers[0]
    zombie_id = stack.worker_id(zombie)
    wait_for(lambda: len(_held_by(stack, zombie_id)) > 5, "jobs of the zombie to be")
    zombie.pause()
    paused_at, held = time.monotonic(), _held_by(stack, zombie_id)
    stack.wait_until_finished(25)
    time.sleep(max(0, paused_at + 60 - time.monotonic()))
    before, claims = _rows_and_files(stack), claims_per_job(stack)
    zombie.resume()
    time.sleep(15)
    assert _rows_and_files(stack) == before
    assert zombie.is_running
    stack.wait_until_done(30)
    assert claims_per_job(stack) == claims
    ended = [line for line in zombie.child.output() if '"event": "job_completed"' in line]
    assert not [line for line in ended if any(job_id in line for job_id in held)]
    stack.post(20)
    stack.wait_until_done(30)
    scenario.record(held=len(held), **vars(check(stack)))


def _held_by(stack: Stack, worker_id: UUID) -> list[str]:
    """Return the slow jobs that this worker owns."""
    held = "SELECT id::text FROM jobs WHERE worker_id = %s AND prompt LIKE '%%slow'"
    return [job_id for (job_id,) in stack.query(held, worker_id)]


def _rows_and_files(stack: Stack) -> tuple[object, object]:
    changes = stack.query("SELECT max(number) FROM faults.history")
    attempts = stack.query("SELECT * FROM attempts ORDER BY id")
    files = {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for folder in (stack.media, stack.metadata)
        for path in folder.iterdir()
        if path.is_file()
    }
    return (changes, attempts), files


@full_only
def test_f33_a_job_that_kills_its_worker_fails_as_poisoned(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """10 poison jobs among 200: `poisoned` after 3 crashes; the other 190 unharmed."""
    # A death may come between an intent and its create, and that counts as a retry.
    stack = start_stack(workers=0, SABOTAGE_CRASHES="-", MAX_RETRY_ATTEMPTS="20")
    for _ in range(10):
        stack.post(1, words="dies-always-decoding", output_format="webp")
        stack.post(19)
    deaths = keep_workers(stack, 2, seconds=400)
    summary = check(stack, failures=["poisoned"], max_retries=20)
    poisoned = stack.query("SELECT prompt FROM jobs WHERE status = 'failed'")
    scenario.record(worker_deaths=deaths, **vars(summary))
    assert all("dies-always" in words for (words,) in poisoned)
    crashes = "SELECT DISTINCT crash_count FROM jobs WHERE status = 'failed'"
    assert stack.query(crashes) == [(3,)]
    assert summary.jobs == {"completed": 190, "failed": 10}


def keep_workers(stack: Stack, count: int, seconds: float) -> int:
    """Start a worker for each that dies, as a supervisor does, until all jobs are over.

    Returns how many have died.
    """
    give_up_at = time.monotonic() + seconds
    while {"pending", "processing"} & stack.counts().keys():
        assert time.monotonic() < give_up_at, stack.counts()
        while len(stack.living_workers) < count:
            stack.start_worker(wait=False)
        time.sleep(0.2)
    return len(stack.workers) - len(stack.living_workers)


@full_only
def test_f34_many_sweepers_paused_and_killed(start_stack: StartStack, scenario: Scenario) -> None:
    """500 jobs on 5 workers (each sweeps), paused and killed at random: no living owner robbed."""
    # A lease that a starved worker can keep: every restart takes seconds of both processors.
    stack = start_stack(workers=5, WORKER_LEASE_SECONDS="8")
    stack.replicate.configure(latency_seconds=3)
    posting = threading.Thread(target=stack.post, args=[500], kwargs={"per_second": 7})
    posting.start()  # so that there is work at every kill
    kills = Kills(stack)
    for _ in range(12):
        victim, other = stack.random.sample(stack.living_workers, 2)
        victim.pause()
        time.sleep(stack.random.uniform(0.5, 12))
        kills.kill(other)
        victim.resume()
    posting.join()
    rest_seconds = stack.wait_until_done(60)
    assert taken_from_the_living(stack) == []
    assert kills.recoveries()
    scenario.record(rest_seconds=rest_seconds, **_figures(kills, stack))
