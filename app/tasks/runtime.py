"""The event loop of a worker process, and everything that is bound to it."""

import asyncio
import os
import signal
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.db import POOL_TIMEOUT_SECONDS, create_engine, create_sessions
from app.jobs.lifecycle import Lifecycle, LifecyclePolicy, Outcome, RunResult, begun_at_once
from app.jobs.models import JobStatus
from app.jobs.orphans import OrphanStopper
from app.jobs.outputs import OutputKeeper
from app.jobs.parameters import ParameterChecker
from app.jobs.reconcile import ReconcilePolicy
from app.jobs.recovery import Recovery
from app.jobs.repository import JobRepository
from app.jobs.retention import RetentionPolicy
from app.jobs.retry import RetryPolicy
from app.jobs.submission import SubmitPolicy
from app.jobs.watch import PredictionWatcher
from app.providers import create_provider
from app.providers.base import Provider
from app.storage import create_storage
from app.storage.base import Storage
from app.tasks.doorbell import doorbell
from app.tasks.memory import keep_giving_back
from app.tasks.runs import STOP_SECONDS, Run, RunRegistry
from app.wakeups import CANCELLED, listen

# After SIGTERM, when the runs have stopped: to ring for the jobs that were handed back.
RING_SECONDS = 1.0
# A thousand jobs that wake at once queue for the pool, and have time.
PATIENT_SECONDS = 60.0
# The share of the pool for jobs that are not paid for yet: those that are never queue behind them.
BEGINNING_SHARE = 0.3
# Sweep and heartbeat have connections of their own: behind that queue they would look dead.
DUTY_CONNECTIONS = 3
HEARTBEAT_CONNECTIONS = 1

log = structlog.get_logger(__name__)


class Runtime:
    """Owns the loop's thread. Everything that does I/O is made on the loop, and closed there."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker_id = uuid4()
        self._runs = RunRegistry(self._run)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_note)
        self._thread = threading.Thread(target=self._loop.run_forever, name="jobs", daemon=True)
        self._engines: list[AsyncEngine] = []
        self._background: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._stopping: Future[None] | None = None

    def start(self) -> None:
        """Start the loop, open everything on it, and begin heartbeat, sweep and poller.

        The worker takes part from now on, whether there is a broker or not. Raises if that fails.
        """
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        self._loop.call_soon_threadsafe(self._start_background)

    def run(self, job_id: UUID) -> RunResult:
        """Run a job on the loop and wait for it; called from any thread."""
        return asyncio.run_coroutine_threadsafe(self._run(job_id), self._loop).result()

    def begin_stop(self) -> None:
        """Begin to stop all runs and hand their jobs back; returns at once (signal handler)."""
        if not self._is_stopping:
            # First the word, then the deed: the loop may be done with the runs there are before
            # this thread goes on, and one that began then would never end.
            self._is_stopping = True
            self._stopping = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)

    def close(self) -> None:
        """Wait for the hand-back, then end the loop."""
        self.begin_stop()
        assert self._stopping is not None  # noqa: S101 - set by begin_stop
        self._stopping.result(timeout=3 * STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_SECONDS)

    # --- on the loop -------------------------------------------------------------------------

    async def _open(self) -> None:
        settings = self._settings
        beginning = max(1, round(BEGINNING_SHARE * settings.database_pool_size))
        beginnings = self._open_database(beginning, PATIENT_SECONDS)
        going_on = max(1, settings.database_pool_size - beginning)
        jobs = self._open_database(going_on, PATIENT_SECONDS)
        self._repository = self._open_database(DUTY_CONNECTIONS)
        self._provider = create_provider(settings, lambda: self._recovery.living_workers)
        self._watcher = _watcher(settings, self._provider)
        self._checker = ParameterChecker(self._provider.input_schema)
        storage = create_storage(settings)
        self._lifecycle = Lifecycle(
            jobs,
            beginnings,
            self._provider,
            self._watcher,
            _keeper(settings, self._provider, storage),
            self._checker.knows,
            _policy(settings, self._provider.call_seconds),
        )
        self._recovery = self._create_recovery(storage)

    def _open_database(
        self, connections: int, pool_timeout_seconds: float = POOL_TIMEOUT_SECONDS
    ) -> JobRepository:
        """Return a repository with a pool of its own: whoever uses it waits for nobody else."""
        engine = create_engine(
            self._settings, pool_size=connections, pool_timeout_seconds=pool_timeout_seconds
        )
        self._engines.append(engine)
        return JobRepository(create_sessions(engine))

    def _create_recovery(self, storage: Storage) -> Recovery:
        settings = self._settings
        return Recovery(
            self._repository,
            self._open_database(HEARTBEAT_CONNECTIONS),
            OrphanStopper(self._repository, self._provider, settings.reconcile_grace_seconds),
            doorbell,
            self._runs,
            storage,
            RetentionPolicy(settings.media_retention_days, settings.metadata_retention_days),
            worker_id=self._worker_id,
            worker_name=f"{socket.gethostname()}:{os.getpid()}",
            concurrency=settings.worker_concurrency,
            heartbeat_seconds=settings.worker_heartbeat_seconds,
            lease_seconds=settings.worker_lease_seconds,
            sweep_seconds=settings.sweep_interval_seconds,
        )

    def _start_background(self) -> None:
        duties = (
            self._recovery.run(),
            self._watcher.run(),
            listen(self._settings.redis_url, self._wake),
            keep_giving_back(),
        )
        for duty in duties:
            task = asyncio.create_task(duty)
            task.add_done_callback(_end_with)
            self._background.add(task)

    def _wake(self, word: str) -> None:
        if word == CANCELLED:
            self._recovery.orphans.nudge()
        else:
            self._watcher.nudge(word)

    async def _run(self, job_id: UUID, *, at_once: bool = False) -> RunResult:
        if self._is_stopping or (self._runs.is_waiting(job_id) and not at_once):
            return RunResult(Outcome.SKIPPED)
        run = Run(job_id, at_once)
        self._runs.add(run)
        run.task = asyncio.create_task(self._run_alive(run))
        try:
            result = await run.task
        except asyncio.CancelledError:
            result = RunResult(Outcome.SKIPPED)
        except Exception as error:
            # The job is still ours by its row; the lease check sees that no run stands behind it
            # and frees it.
            is_expected = isinstance(error, SQLAlchemyError | OSError)  # the database is away
            log.warning(
                "run_abandoned",
                job_id=str(job_id),
                error=type(error).__name__,
                exc_info=not is_expected,
            )
            result = RunResult(Outcome.SKIPPED)
        finally:
            self._runs.remove(run)
        return await self._cancelled_or_skipped(run, result)

    async def _cancelled_or_skipped(self, run: Run, result: RunResult) -> RunResult:
        """Tell a job that was cancelled from one that was lost to another worker."""
        if result.outcome is Outcome.SKIPPED and run.lease and not self._is_stopping:
            with suppress(SQLAlchemyError, OSError):
                job = await self._repository.get(run.job_id)
                if job and job.status is JobStatus.CANCELLED:
                    return RunResult(Outcome.CANCELLED)
        return result

    async def _run_alive(self, run: Run) -> RunResult:
        """Claim nothing before the first heartbeat: others would take it from an unknown worker."""
        await self._recovery.is_known.wait()
        return await self._lifecycle.run(run.job_id, self._worker_id, run, at_once=run.at_once)

    async def _stop(self) -> None:
        for task in self._background:
            task.cancel()
        await self._runs.stop_all()
        try:
            handed_back = await self._repository.hand_back(self._worker_id)
            log.info("jobs_handed_back", jobs=len(handed_back))
            if handed_back:
                async with asyncio.timeout(RING_SECONDS):
                    await asyncio.to_thread(doorbell.ring, handed_back)
        except Exception as error:
            # Database or broker away: the next worker takes the jobs when the lease is over.
            log.warning("hand_back_failed", error=type(error).__name__)
        await self._checker.aclose()
        await self._provider.aclose()
        for engine in self._engines:
            await engine.dispose()


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody waits for; a lost connection without the stack.

    asyncpg leaves a future behind when it gives up connecting before the server has answered.
    """
    error = context.get("exception")
    if isinstance(error, OSError):
        log.warning("connection_lost_unheard", error=type(error).__name__)
    else:
        loop.default_exception_handler(context)


def _end_with(duty: asyncio.Task[None]) -> None:
    """A worker that has lost one of its duties must not go on looking alive."""
    if not duty.cancelled():
        log.critical("duty_ended", exc_info=duty.exception())
        os.kill(os.getpid(), signal.SIGTERM)


def _watcher(settings: Settings, provider: Provider) -> PredictionWatcher:
    return PredictionWatcher(
        provider,
        interval_seconds=settings.poll_interval_seconds,
        starting_seconds=settings.starting_deadline_seconds,
        running_seconds=settings.running_deadline_seconds,
    )


def _keeper(settings: Settings, provider: Provider, storage: Storage) -> OutputKeeper:
    return OutputKeeper(
        provider,
        storage,
        max_bytes=settings.max_output_bytes,
        max_pixels=settings.max_output_pixels,
        deadline_seconds=settings.download_deadline_seconds,
        concurrency=settings.download_concurrency,
        decode_memory_bytes=settings.decode_memory_bytes,
        store_original_format=settings.store_original_format,
    )


def _policy(settings: Settings, call_seconds: float) -> LifecyclePolicy:
    return LifecyclePolicy(
        retry=RetryPolicy(
            max_retries=settings.max_retry_attempts,
            backoff_factor=settings.retry_backoff_factor,
            backoff_max_seconds=settings.retry_backoff_max_seconds,
            grace_seconds=settings.reconcile_grace_seconds,
        ),
        job_deadline_seconds=settings.job_deadline_seconds,
        begun_at_once=begun_at_once(settings.replicate_creates_per_minute),
        submit=SubmitPolicy(
            cancel_after_seconds=(
                settings.starting_deadline_seconds + settings.running_deadline_seconds
            ),
            webhook_base_url=settings.webhook_base_url,
            ask_for_png=not settings.store_original_format,
        ),
        reconcile=ReconcilePolicy(
            call_seconds=call_seconds,
            grace_seconds=settings.reconcile_grace_seconds,
            deadline_seconds=settings.reconcile_deadline_seconds,
            on_unknown_outcome=settings.on_unknown_outcome,
        ),
    )
