"""F38, second half: a run stopped at every point where it can end, and every way to go on."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import pytest
import structlog

from app.config import Settings
from app.errors import JobAlreadyFinished
from app.jobs.cancellation import cancel_job
from app.jobs.lifecycle import Outcome
from app.jobs.models import AttemptState, Job, JobStatus
from app.jobs.repository import NewJob
from app.providers.base import Prediction
from app.storage.workspaces import remove_leftovers
from scripts.servers import Postgres, Valkey
from tests.doubles.replicate_server import ReplicateServer
from tests.faults import stoppable
from tests.faults.report import Scenario, sized
from tests.faults.steps import Point, Steps, number_steps
from tests.faults.stoppable import (
    StoppableWorker,
    Stored,
    check_files,
    end_of,
    insistently,
    leftovers,
    stoppable_worker,
    stored,
)

# Connections that are cut on purpose are not closed politely.
pytestmark = [
    pytest.mark.usefixtures("servers"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

POINTS = sized(2, 10_000)
# Where chance also chooses the point of the second worker, in the full run.
ROUNDS = sized(1, 4)


@dataclass(frozen=True)
class Course:
    """How a job would go undisturbed."""

    creates: int = 1
    wait_seconds: int = 0
    latency_seconds: float = 0.1
    parameters: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, str] | None = None
    refused_with: int | None = None  # the status of every create's answer
    end: JobStatus = JobStatus.COMPLETED


COURSES = {
    "polled": Course(),
    "answered at once": Course(wait_seconds=1, latency_seconds=0, parameters={"num_outputs": 2}),
    "decoded": Course(wait_seconds=1, latency_seconds=0, parameters={"output_format": "webp"}),
    "answer lost": Course(fault=("create", "accept_then_drop")),
    "create lost": Course(fault=("create", "drop")),
    "prediction fails": Course(creates=2, fault=("create", "fail")),
    "refused": Course(creates=0, refused_with=422, end=JobStatus.FAILED),
}


@dataclass
class Stage:
    """What the ways to go on need: the stopped worker, the next one, and the job."""

    replicate: ReplicateServer
    settings: Settings
    course: Course
    choice: random.Random
    first: StoppableWorker
    second: StoppableWorker
    steps: Steps
    task: asyncio.Task[list[Outcome]]
    job_id: UUID
    points: list[Point]
    may_leave_files: bool = False

    async def take_over(self, steps: Steps | None = None) -> None:
        """The sweep frees the job, and the next worker brings it to its end."""
        while (await self.second.job(self.job_id)).worker_id == self.first.id:
            await self.second.repository.release_dead(0)
            await asyncio.sleep(0.02)  # it leaves out rows that a stopped transaction has locked
        await self.second.run_to_the_end(self.job_id, steps or Steps())

    async def die(self) -> None:
        """The stopped worker's process is gone, with its connections."""
        self.may_leave_files = True
        await self.first.lose_connections()

    async def seen(self) -> Stored:
        """Return all rows and files of the job."""
        return await stored(self.second, self.settings, self.job_id)


# --- the ways to go on -----------------------------------------------------------------------


async def dies(stage: Stage) -> None:
    """kill -9; another worker takes over."""
    await stage.die()
    await stage.take_over()


async def dies_after_a_report(stage: Stage) -> None:
    """The provider's webhook comes before anybody takes over."""
    await stage.die()
    [create, *_] = [*stage.replicate.creates(), None]
    attempts = await stage.second.repository.attempts(stage.job_id)
    if create and attempts and attempts[-1].state is AttemptState.INTENT:
        prediction = Prediction(create.id, "starting", create.model, create.input)
        await stage.second.repository.adopt(attempts[-1].id, prediction)
    await stage.take_over()


async def hands_back(stage: Stage) -> None:
    """SIGTERM; what is under way is given its moment to end."""
    await _hand_back(stage, goes_on=True)


async def hands_back_abruptly(stage: Stage) -> None:
    """SIGTERM; what is under way hangs, and is abandoned."""
    await _hand_back(stage, goes_on=False)


async def _hand_back(stage: Stage, *, goes_on: bool) -> None:
    stage.task.cancel()
    if goes_on:
        stage.steps.go_on()
    await asyncio.wait([stage.task], timeout=0.3)
    await stage.second.repository.hand_back(stage.first.id)
    await stage.die()
    await stage.take_over()


async def wakes_too_late(stage: Stage) -> None:
    """A zombie: it was paused, and wakes when all is done."""
    await stage.take_over()
    before, creates = await stage.seen(), stage.replicate.creates()
    stage.steps.go_on()
    await stage.task
    assert await stage.seen() == before, "the zombie changed something"
    assert len(stage.replicate.creates()) == len(creates), "the zombie created something"


async def wakes_in_between(stage: Stage) -> None:
    """A zombie that wakes while the next worker is at some point of its own run."""
    steps = Steps(stage.choice.choice(stage.points))
    taking_over = asyncio.create_task(stage.take_over(steps))
    stopped = asyncio.create_task(steps.stopped.wait())
    await asyncio.wait([stopped, taking_over], return_when=asyncio.FIRST_COMPLETED)
    stage.steps.go_on()
    await stage.task
    steps.go_on()
    stopped.cancel()
    await taking_over
    await stage.second.run_to_the_end(stage.job_id, Steps())


async def is_cancelled_and_goes_on(stage: Stage) -> None:
    """A cancel arrives; the worker notices or not."""
    cancelling = asyncio.create_task(_cancel(stage))
    # A worker that stopped in a transaction keeps the cancel waiting.
    await asyncio.wait([cancelling], timeout=stoppable.TRANSACTION_SECONDS / 2)
    await asyncio.wait([cancelling], timeout=stoppable.SUBMIT_WINDOW_SECONDS * 2)
    stage.steps.go_on()
    await stage.task
    await _check_cancel(stage, await cancelling)


async def is_cancelled_and_dies(stage: Stage) -> None:
    """A cancel arrives, and the worker dies."""
    cancelling = asyncio.create_task(_cancel(stage))
    await asyncio.wait([cancelling], timeout=stage.choice.uniform(0, 0.05))
    await stage.die()
    await _check_cancel(stage, await cancelling)


async def _cancel(stage: Stage) -> tuple[Job | None, int]:
    """Cancel the job; return it, and how many creates there were by then."""
    try:
        job = await cancel_job(stage.second.repository, stage.job_id)
    except JobAlreadyFinished:
        return None, 0
    return job, len(stage.replicate.creates())


async def _check_cancel(stage: Stage, answer: tuple[Job | None, int]) -> None:
    """Once confirmed it sticks, nothing is created any more, and what runs is stopped."""
    job, creates = answer
    stage.may_leave_files = True
    final = await stage.second.job(stage.job_id)
    if job is None:
        assert final.status is not JobStatus.CANCELLED
        return
    assert job.status is JobStatus.CANCELLED
    assert final.model_dump() == job.model_dump()
    assert len(stage.replicate.creates()) == creates, "created after the cancel was confirmed"
    for _ in range(2):
        await stage.second.recovery.orphans.stop_lost_orphans()
        async with asyncio.TaskGroup() as tasks:
            await stage.second.recovery.orphans.stop_orphans(tasks)
    running = [create.id for create in stage.replicate.creates() if create.status in RUNNING]
    assert running == [], "a prediction runs on"
    for known in (True, False):
        assert await stage.second.repository.take_orphans(10, known=known) == []


RUNNING = ("starting", "processing")
WAYS: list[Callable[[Stage], Awaitable[None]]] = [
    dies,
    dies_after_a_report,
    hands_back,
    hands_back_abruptly,
    wakes_too_late,
    wakes_in_between,
    is_cancelled_and_goes_on,
    is_cancelled_and_dies,
]


# --- the test --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("app.jobs.submission", "app.jobs.repository.statements"):
        monkeypatch.setattr(f"{name}.SUBMIT_WINDOW_SECONDS", stoppable.SUBMIT_WINDOW_SECONDS)
    monkeypatch.setattr("app.jobs.repository.ledger.STOP_AGAIN_SECONDS", 0)
    monkeypatch.setattr("app.jobs.cancellation.WAIT_SECONDS", 2.0)
    monkeypatch.setattr("app.jobs.submission.CREATE_GRACE_SECONDS", 0.1)
    monkeypatch.setattr("app.jobs.retry.INTERNAL_DELAY_SECONDS", 0)
    monkeypatch.setattr("app.jobs.orphans.PATIENCE_SECONDS", 0)
    tls = httpx.create_ssl_context()  # reading the roots for each worker would cost 30 ms
    monkeypatch.setattr(httpx, "create_ssl_context", lambda: tls)
    number_steps(monkeypatch)
    # Stopped workers' failures are many, and their tracebacks long.
    quiet, before = structlog.make_filtering_bound_logger(logging.CRITICAL), structlog.get_config()
    structlog.configure(wrapper_class=quiet, cache_logger_on_first_use=False)
    yield
    structlog.configure(**before)


@pytest.fixture
def settings(postgres: Postgres, valkey: Valkey, tmp_path: Any) -> Settings:
    """The service's settings on the test's servers."""
    return Settings(
        _env_file=None,
        database_url=postgres.url,
        redis_url=valkey.url,
        storage_path=tmp_path / "media",
    )


@pytest.fixture
async def second(
    settings: Settings, replicate: ReplicateServer, course: Course
) -> AsyncIterator[StoppableWorker]:
    """The worker that takes over."""
    async with stoppable_worker(settings, replicate, course.wait_seconds) as worker:
        yield worker


@pytest.fixture
def course(request: pytest.FixtureRequest) -> Course:
    """The course that the test's parameter names."""
    return COURSES[request.param]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("course", COURSES, indirect=True)
async def test_f38_stopped_at_any_point(
    course: Course,
    way: Callable[[Stage], Awaitable[None]],
    settings: Settings,
    replicate: ReplicateServer,
    second: StoppableWorker,
    scenario: Scenario,
) -> None:
    """F38, every crash point x every way to go on: one create, a terminal row, files that match.

    The default run takes a sample of the points.
    """
    points = await _all_points(replicate, second, course)
    choice = random.Random(scenario.seed)
    stopped, rounds = 0, ROUNDS if way is wakes_in_between else 1
    for _ in range(rounds):
        reached = 0
        for point in choice.sample(points, len(points)):
            print(f"{way.__name__} at {point}")  # noqa: T201 - names the case that failed
            reached += await _stop_at(
                point, points, way, settings, replicate, second, course, choice
            )
            if reached == POINTS:
                break
        stopped += reached
    scenario.record(points=len(points), stopped=stopped)
    # Not every run takes exactly the same way: a few of the points are not reached.
    assert stopped >= 0.9 * rounds * min(POINTS, len(points))


async def _all_points(
    replicate: ReplicateServer, worker: StoppableWorker, course: Course
) -> list[Point]:
    """Let a job go its undisturbed course, and note every point."""
    steps = Steps()
    job_id = await _add(replicate, worker, course)
    await worker.run_to_the_end(job_id, steps)
    assert (await worker.job(job_id)).status is course.end
    return steps.passed


async def _add(replicate: ReplicateServer, worker: StoppableWorker, course: Course) -> UUID:
    replicate.reset()
    replicate.configure(latency_seconds=course.latency_seconds)
    if course.fault:
        replicate.push_fault(*course.fault)
    if course.refused_with:
        replicate.push_fault("create", "status", status=course.refused_with, times=None)
    new = NewJob("a lighthouse", "acme/painter", {"width": 64, "height": 64, **course.parameters})
    # On a busy machine it, too, may be taken for stopped in its transaction.
    return (await insistently(lambda: worker.repository.add(new, 60))).id


async def _stop_at(
    point: Point,
    points: list[Point],
    way: Callable[[Stage], Awaitable[None]],
    settings: Settings,
    replicate: ReplicateServer,
    second: StoppableWorker,
    course: Course,
    choice: random.Random,
) -> bool:
    """Run a job, stop its worker there, and go on; return whether it came there."""
    job_id = await _add(replicate, second, course)
    async with stoppable_worker(settings, replicate, course.wait_seconds) as first:
        steps = Steps(point)
        task = asyncio.create_task(first.run_to_the_end(job_id, steps))
        stopped = asyncio.create_task(steps.stopped.wait())
        await asyncio.wait([stopped, task], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        stage = Stage(
            replicate, settings, course, choice, first, second, steps, task, job_id, points
        )
        try:
            if steps.stopped.is_set():
                await way(stage)
            else:
                await task
            await _check(stage)
        finally:
            steps.die()
            await end_of(task, 2)
    await remove_leftovers(second.storage.workspaces, 0)
    assert leftovers(settings) == []
    return steps.stopped.is_set()


async def _check(stage: Stage) -> None:
    found = await stage.seen()
    job = found.job
    assert job["status"] in (stage.course.end, JobStatus.CANCELLED)
    creates = stage.replicate.creates()
    useful = [create.id for create in creates if create.status not in ("failed", "canceled")]
    assert len(creates) <= stage.course.creates, "created twice"
    assert leftovers(stage.settings) == [] or stage.may_leave_files
    if job["status"] is JobStatus.COMPLETED:
        assert useful == [job["external_job_id"]]
        assert len(creates) == stage.course.creates
        assert [attempt["outcome"] for attempt in found.attempts].count("succeeded") == 1
        check_files(found)
    else:
        assert found.outputs == []
