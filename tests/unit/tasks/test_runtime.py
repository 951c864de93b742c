"""What a worker process knows of its runs."""

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from app.config import Settings
from app.jobs.lifecycle import BEGUN_AT_ONCE, Outcome, RunResult, begun_at_once
from app.jobs.reconcile import ReconcilePolicy
from app.jobs.repository import Lease
from app.jobs.submission import SubmitPolicy
from app.tasks.runs import Run, RunRegistry
from app.tasks.runtime import Runtime, _end_with, _note, _policy, _watcher


async def _nothing(*_: object, **__: object) -> RunResult:
    return RunResult(Outcome.SKIPPED)


def test_a_run_waits_then_claims_then_owns() -> None:
    runs, run = RunRegistry(_nothing), Run(uuid4(), at_once=False)
    runs.add(run)
    assert (runs.waiting(), runs.job_ids(), runs.is_waiting(run.job_id)) == ({run.job_id}, [], True)
    run.begins()
    # Its claim may be committed already: the job is not abandoned, nor needs it a second run.
    assert (runs.waiting(), runs.job_ids()) == (set(), [run.job_id])
    assert runs.is_waiting(run.job_id)
    lease = Lease(run.job_id, uuid4())
    run.owns(lease)
    # From here on it may lose the job, and whoever is told of it again has to look.
    assert (runs.claimed(), runs.is_waiting(run.job_id)) == ([lease], False)
    runs.remove(run)
    assert (runs.waiting(), runs.job_ids(), runs.claimed()) == (set(), [], [])


def test_only_jobs_that_go_on_are_resuming() -> None:
    runs, new, begun = RunRegistry(_nothing), Run(uuid4(), False), Run(uuid4(), True)
    for run in (new, begun):
        runs.add(run)
    assert runs.resuming() == {begun.job_id}
    begun.owns(Lease(begun.job_id, uuid4()))
    assert runs.resuming() == set()


async def test_nothing_is_claimed_before_the_first_heartbeat() -> None:
    is_known = asyncio.Event()
    worker = SimpleNamespace(
        _recovery=SimpleNamespace(is_known=is_known),
        _lifecycle=SimpleNamespace(run=_nothing),
        _worker_id=uuid4(),
    )
    run = Run(uuid4(), at_once=False)
    running = asyncio.create_task(Runtime._run_alive(cast(Any, worker), run))
    await asyncio.sleep(0.02)
    assert not running.done()
    is_known.set()
    assert (await running).outcome is Outcome.SKIPPED


async def test_a_lost_connection_that_nobody_waits_for_is_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.get_running_loop()
    _note(loop, {"message": "Future exception was never retrieved", "exception": ConnectionError()})
    assert [record for record in caplog.records if record.exc_info] == []
    _note(loop, {"message": "Task exception was never retrieved", "exception": KeyError()})
    assert [record.name for record in caplog.records if record.exc_info] == ["asyncio"]


@pytest.mark.parametrize(
    ("public", "reports_to"),
    [
        ("https://media.test", "https://media.test/api/v1/webhooks/replicate"),
        ("http://media.test", None),  # Replicate accepts https only
        (None, None),
    ],
)
def test_every_budget_goes_where_it_belongs(public: str | None, reports_to: str | None) -> None:
    settings = Settings(
        _env_file=None,
        replicate_api_token="r8_secret",
        public_base_url=public,
        job_deadline_seconds=1001,
        starting_deadline_seconds=1002,
        running_deadline_seconds=1003,
        reconcile_grace_seconds=104,
        reconcile_deadline_seconds=1005,
    )
    policy = _policy(settings, call_seconds=7)
    assert policy.job_deadline_seconds == 1001
    assert policy.begun_at_once == BEGUN_AT_ONCE
    assert policy.submit == SubmitPolicy(1002 + 1003, reports_to)
    expected = ReconcilePolicy(7, 104, 1005, "fail")
    assert policy.reconcile == expected
    watcher = _watcher(settings, cast(Any, None))
    assert (watcher._starting_seconds, watcher._running_seconds) == (1002, 1003)


@pytest.mark.parametrize(("per_minute", "jobs"), [(0.1, 1), (6, 3), (60, 30), (3000, 64)])
def test_a_low_rate_is_waited_for_unclaimed(per_minute: float, jobs: int) -> None:
    assert begun_at_once(per_minute) == jobs


async def test_a_worker_that_has_lost_a_duty_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look alive, and hold jobs that nobody polls."""
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda *call: signals.append(call))

    async def lost() -> None:
        raise RuntimeError

    for duty, ends in ((asyncio.sleep(10), []), (lost(), [(os.getpid(), signal.SIGTERM)])):
        task: asyncio.Task[None] = asyncio.create_task(duty)
        task.add_done_callback(_end_with)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert signals == ends
