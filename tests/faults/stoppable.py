"""One worker inside the test's own process that can be stopped at any point of a run."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings
from app.db import create_engine, create_sessions
from app.jobs.lifecycle import BEGUN_AT_ONCE, Lifecycle, LifecyclePolicy, Outcome
from app.jobs.models import Job
from app.jobs.orphans import OrphanStopper
from app.jobs.outputs import OutputKeeper
from app.jobs.parameters import ParameterChecker
from app.jobs.reconcile import ReconcilePolicy
from app.jobs.recovery import Recovery
from app.jobs.repository import JobRepository, Lease
from app.jobs.retention import RetentionPolicy
from app.jobs.retry import RetryPolicy
from app.jobs.submission import SubmitPolicy
from app.jobs.watch import PredictionWatcher
from app.providers.replicate import ReplicateProvider
from app.storage import create_storage
from app.storage.base import Storage
from tests.doubles.replicate_server import ReplicateServer
from tests.doubles.ungoverned import Ungoverned
from tests.faults.steps import Steps, counted, number_statements

T = TypeVar("T")

# A create begins in this window, and is waited for during the grace; the pause of a job that has
# to wait is a little of both.
SUBMIT_WINDOW_SECONDS = 0.2
GRACE_SECONDS = 0.3
PAUSE_SECONDS = 0.05
LONGEST_SECONDS = 15.0
# A worker that stops inside a transaction loses it after this long; 10 s in the service.
TRANSACTION_SECONDS = 0.5


@dataclass
class StoppableWorker:
    """A worker's parts, on connections of its own."""

    id: UUID
    repository: JobRepository
    provider: ReplicateProvider
    watcher: PredictionWatcher
    lifecycle: Lifecycle
    recovery: Recovery
    storage: Storage
    database_url: str

    async def run_to_the_end(self, job_id: UUID, steps: Steps) -> list[Outcome]:
        """Run the job as often as a sweep would ring; end early after having been stopped."""
        outcomes: list[Outcome] = []
        with counted(steps):
            async with asyncio.timeout(LONGEST_SECONDS):
                while not (outcomes and steps.stopped.is_set()):
                    outcomes.append(await self._run(job_id))
                    if (await self.job(job_id)).status.is_terminal:
                        break
                    await asyncio.sleep(PAUSE_SECONDS)
        return outcomes

    async def _run(self, job_id: UUID) -> Outcome:
        try:
            return (await self.lifecycle.run(job_id, self.id, Mock())).outcome
        except Exception:
            # It lost its transaction: as in the service, the lease check finds jobs without a run.
            await insistently(self._release_all)
            return Outcome.SKIPPED

    async def _release_all(self) -> None:
        for job_id, token in (await self.repository.leases_of(self.id)).items():
            await self.repository.release(Lease(job_id, token))

    async def job(self, job_id: UUID) -> Job:
        """Return the job's row."""
        job = await insistently(partial(self.repository.get, job_id))
        assert job is not None
        return job

    async def lose_connections(self) -> None:
        """Close its connections as the kernel does when the process is gone."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE application_name = '{self.id}'"
        )
        async with await psycopg.AsyncConnection.connect(self.database_url) as connection:
            await connection.execute(query)


async def insistently(call: Callable[[], Awaitable[T]]) -> T:
    """Call again when the server has closed the connection, as it does with a stopped worker's."""
    for _ in range(3):
        with suppress(SQLAlchemyError):
            return await call()
    return await call()


class _NoDoorbell:
    def ring(self, job_ids: Any) -> None:
        """Nobody listens."""

    def queue_length(self) -> int:
        return 0


class _NoRuns:
    def waiting(self) -> list[UUID]:
        return []

    def resuming(self) -> list[UUID]:
        return []

    def claimed(self) -> list[Lease]:
        return []

    def job_ids(self) -> list[UUID]:
        return []

    def start(self, job_id: UUID, *, at_once: bool) -> None:
        """Nobody starts any."""

    def stop(self, lease: Lease) -> None:
        """There is none."""


@asynccontextmanager
async def stoppable_worker(
    settings: Settings, replicate: ReplicateServer, prefer_wait_seconds: int
) -> AsyncIterator[StoppableWorker]:
    """A worker with its poller running."""
    worker_id = uuid4()
    engine = create_engine(settings, pool_size=3)
    event.listen(engine.sync_engine, "connect", _name_connections(worker_id))
    number_statements(engine)
    repository = JobRepository(create_sessions(engine))
    provider = ReplicateProvider(
        replicate.token,
        replicate.origin,
        timeout_seconds=2,
        prefer_wait_seconds=prefer_wait_seconds,
        governor=Ungoverned(),
    )
    watcher = PredictionWatcher(
        provider, interval_seconds=0.02, starting_seconds=30, running_seconds=30
    )
    checker = ParameterChecker(provider.input_schema)
    storage = create_storage(settings)
    keeper = OutputKeeper(
        provider,
        storage,
        max_bytes=10 << 20,
        max_pixels=10_000_000,
        deadline_seconds=10,
        concurrency=4,
    )
    lifecycle = Lifecycle(repository, repository, provider, watcher, keeper, checker.knows, POLICY)
    recovery = Recovery(
        repository,
        repository,
        OrphanStopper(repository, provider, grace_seconds=0),
        _NoDoorbell(),
        _NoRuns(),
        storage,
        RetentionPolicy(None, None),
        worker_id=worker_id,
        worker_name="stoppable",
        concurrency=1,
        heartbeat_seconds=1,
        lease_seconds=3,
        sweep_seconds=1,
    )
    polling = asyncio.create_task(watcher.run())
    try:
        url = settings.sync_database_url.replace("+psycopg", "")
        yield StoppableWorker(
            worker_id, repository, provider, watcher, lifecycle, recovery, storage, url
        )
    finally:
        polling.cancel()
        await checker.aclose()
        await provider.aclose()
        await engine.dispose()


POLICY = LifecyclePolicy(
    retry=RetryPolicy(
        max_retries=3, backoff_factor=1, backoff_max_seconds=0, grace_seconds=GRACE_SECONDS
    ),
    job_deadline_seconds=60,
    begun_at_once=BEGUN_AT_ONCE,
    submit=SubmitPolicy(cancel_after_seconds=60, webhook_base_url=None),
    reconcile=ReconcilePolicy(
        call_seconds=0, grace_seconds=GRACE_SECONDS, deadline_seconds=30, on_unknown_outcome="fail"
    ),
)


def _name_connections(worker_id: UUID) -> Any:
    milliseconds = round(TRANSACTION_SECONDS * 1000)
    settings = (
        f"SET application_name = '{worker_id}';"
        f"SET idle_in_transaction_session_timeout = {milliseconds}"
    )

    def name(connection: Any, _: object) -> None:
        connection.run_async(lambda driver: driver.execute(settings))

    return name


async def end_of(task: asyncio.Task[Any], seconds: float) -> None:
    """Wait for a stopped worker's task, however it ends."""
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    with suppress(BaseException):
        await task


@dataclass(frozen=True)
class Stored:
    """All that there is of one job: its rows and its files."""

    job: dict[str, Any]
    attempts: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    files: dict[str, bytes]


async def stored(worker: StoppableWorker, settings: Settings, job_id: UUID) -> Stored:
    """Read the job's rows and files."""
    found = await worker.repository.outputs([job_id])
    folders = (settings.storage_path, settings.metadata_directory)
    files = [path for folder in folders for path in folder.glob(f"{job_id}*")]
    return Stored(
        (await worker.job(job_id)).model_dump(),
        [attempt.model_dump() for attempt in await worker.repository.attempts(job_id)],
        [output.model_dump() for output in found.get(job_id, [])],
        {path.name: path.read_bytes() for path in files},
    )


def check_files(found: Stored) -> None:
    """Raise AssertionError unless the files are exactly those of the rows."""
    job_id = str(found.job["id"])
    names = {output["name"] for output in found.outputs} | {f"{job_id}.json"}
    assert found.files.keys() == names
    for output in found.outputs:
        data = found.files[output["name"]]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (
            output["size_bytes"],
            output["sha256"],
        )
    document = json.loads(found.files[f"{job_id}.json"])
    assert document["job_id"] == job_id
    kept = [(output["name"], output["sha256"]) for output in found.outputs]
    assert [(each["name"], each["sha256"]) for each in document["outputs"]] == kept


def leftovers(settings: Settings) -> list[Path]:
    """Return the files that were being made."""
    return list((settings.storage_path / ".incoming").iterdir())
