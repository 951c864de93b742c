"""The runs of a worker process: which wait for their turn, which have claimed their job."""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.jobs.lifecycle import RunResult
from app.jobs.repository import Lease

# After SIGTERM, for the runs to stop.
STOP_SECONDS = 3.0


@dataclass(slots=True, eq=False)
class Run:
    """One run of a job: it waits for its turn, then claims, then owns the job."""

    job_id: UUID
    at_once: bool
    task: asyncio.Task[RunResult] | None = None
    has_begun: bool = False
    lease: Lease | None = None

    def begins(self) -> None:
        """See `RunObserver`."""
        self.has_begun = True

    def owns(self, lease: Lease) -> None:
        """See `RunObserver`."""
        self.lease = lease


class RunRegistry:
    """The runs of this process; touched on the event loop only."""

    def __init__(self, run: Callable[..., Coroutine[Any, Any, RunResult]]) -> None:
        """`run(job_id, at_once=...)` runs a job."""
        self._run = run
        self._runs: set[Run] = set()
        self._started: set[asyncio.Task[RunResult]] = set()

    def add(self, run: Run) -> None:
        """Note a run before it claims, so that its job never looks abandoned."""
        self._runs.add(run)

    def remove(self, run: Run) -> None:
        """Forget a run that has ended."""
        self._runs.discard(run)

    def is_waiting(self, job_id: UUID) -> bool:
        """Tell whether a run of this job has yet to claim it: a second one is not needed."""
        return any(run.job_id == job_id and run.lease is None for run in self._runs)

    def waiting(self) -> Collection[UUID]:
        """See `redelivery.Runs`."""
        return {run.job_id for run in self._runs if not run.has_begun}

    def resuming(self) -> Collection[UUID]:
        """See `redelivery.Runs`."""
        return {run.job_id for run in self._runs if run.at_once and run.lease is None}

    def claimed(self) -> Collection[Lease]:
        """See `redelivery.Runs`."""
        return [run.lease for run in self._runs if run.lease]

    def job_ids(self) -> Collection[UUID]:
        """See `redelivery.Runs`."""
        return [run.job_id for run in self._runs if run.has_begun]

    def start(self, job_id: UUID, *, at_once: bool) -> None:
        """See `redelivery.Runs`."""
        task = asyncio.create_task(self._run(job_id, at_once=at_once))
        self._started.add(task)
        task.add_done_callback(self._started.discard)

    def stop(self, lease: Lease) -> None:
        """See `redelivery.Runs`."""
        for run in self._runs:
            if run.lease == lease and run.task:
                run.task.cancel()

    async def stop_all(self) -> None:
        """Stop every run; creates under way are given a moment to end."""
        tasks = [run.task for run in self._runs if run.task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
