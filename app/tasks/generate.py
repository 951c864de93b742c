"""The one Celery task: hand a job to the event loop and wait for how its run ends."""

from typing import Any
from uuid import UUID

import structlog
from celery import Task
from celery.exceptions import Retry
from celery.signals import worker_init, worker_shutdown, worker_shutting_down
from celery.worker.request import Request

from app.jobs.lifecycle import Outcome, RunResult
from app.logging import configure_logging
from app.tasks.celery_app import celery_app, settings
from app.tasks.doorbell import TASK
from app.tasks.memory import leave_modules_alone, use_one_heap
from app.tasks.runtime import Runtime

runtime = Runtime(settings)

log = structlog.get_logger(__name__)


class JobFailed(Exception):
    """The job ended `failed`; its row says why."""


class JobRequest(Request):
    """A message at work in this worker."""

    def send_event(self, type: str, **fields: Any) -> None:
        """Say how the job ended, not how its task did.

        Nothing of a run that was not ours: the job goes on elsewhere, or is over. Raising `Ignore`
        would say nothing either, but Celery copies the stack for it: 4 ms each, so that a worker
        with a thousand jobs in line took more than 5 s to stop.
        """
        result = fields.get("result")
        if result == repr(Outcome.CANCELLED.value):
            super().send_event("task-revoked", terminated=True, signum=None, expired=False)
        elif result != repr(Outcome.SKIPPED.value):
            super().send_event(type, **fields)


@celery_app.task(name=TASK, bind=True, Request=JobRequest, throws=(JobFailed,), max_retries=None)
def generate(task: Task[Any, Any], /, job_id: object = None, *_: object, **__: object) -> str:
    """Run one job: pending (or unowned) to completed, failed, or pending for a retry.

    The task's state in Flower follows the job's. A retry is rung by the sweep when it is due, so
    nothing is published here; a job that is not ours, or not a job, is ignored: anybody may have
    written the message, an older version of us, too.
    """
    del task
    result = _run(job_id)
    match result.outcome:
        case Outcome.FAILED:
            raise JobFailed(result.error_code)
        case Outcome.RETRY:
            raise Retry(f"{result.error_code}, in {result.retry_in_seconds:.0f} s")
        case _:
            return result.outcome.value


def _run(job_id: object) -> RunResult:
    try:
        known = UUID(str(job_id))
    except ValueError:
        return RunResult(Outcome.SKIPPED)
    return runtime.run(known)


@worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    """Take part from the start: Celery calls itself ready only once the broker answers."""
    _refuse_other_pools(sender.pool_cls.__module__)
    use_one_heap()
    configure_logging(settings.log_level)  # Celery asks for it only later
    try:
        runtime.start()
    except Exception as error:
        # Celery would log it and go on, as a worker that takes messages and does nothing.
        log.critical("worker_not_started", exc_info=error)
        raise SystemExit(1) from error
    leave_modules_alone()


def _refuse_other_pools(pool: str) -> None:
    """A forked pool would wait for ever on an event loop that stayed in the parent.

    (`--pool=prefork` is Celery's default, so it means `worker_pool` here.)
    """
    if "thread" not in pool:
        raise SystemExit("This worker runs with --pool threads only (the default here).")


@worker_shutting_down.connect
def _hand_back(**_: Any) -> None:
    runtime.begin_stop()


@worker_shutdown.connect
def _close(**_: Any) -> None:
    runtime.close()
