"""The one Celery task: hand a job to the event loop and wait for how its run ends."""

import gc
from typing import Any
from uuid import UUID

from celery import Task
from celery.exceptions import Ignore, Retry
from celery.signals import worker_init, worker_ready, worker_shutdown, worker_shutting_down

from app.jobs.lifecycle import Outcome
from app.tasks.celery_app import celery_app, settings
from app.tasks.doorbell import TASK
from app.tasks.runtime import Runtime

runtime = Runtime(settings)


class JobFailed(Exception):
    """The job ended `failed`; its row says why."""


@celery_app.task(name=TASK, bind=True, throws=(JobFailed,), max_retries=None)
def generate(task: Task[Any, Any], /, job_id: object = None, *_: object, **__: object) -> str:
    """Run one job: pending (or unowned) to completed, failed, or pending for a retry.

    The task's state in Flower follows the job's. A retry is rung by the sweep when it is due, so
    nothing is published here; a job that is not ours, or not a job, is ignored: anybody may have
    written the message, an older version of us, too.
    """
    del task
    result = runtime.run(_job_id(job_id))
    match result.outcome:
        case Outcome.COMPLETED:
            return result.outcome.value
        case Outcome.FAILED:
            raise JobFailed(result.error_code)
        case Outcome.RETRY:
            raise Retry(f"{result.error_code}, in {result.retry_in_seconds:.0f} s")
        case Outcome.SKIPPED:
            raise Ignore


def _job_id(given: object) -> UUID:
    try:
        return UUID(str(given))
    except ValueError:
        raise Ignore from None


@worker_init.connect
def _refuse_other_pools(sender: Any, **_: Any) -> None:
    """A forked pool would wait for ever on an event loop that stayed in the parent.

    (`--pool=prefork` is Celery's default, so it means `worker_pool` here.)
    """
    if "thread" not in sender.pool_cls.__module__:
        raise SystemExit("This worker runs with --pool threads only (the default here).")
    runtime.start()
    gc.collect()
    gc.freeze()  # modules are not garbage: to look again and again would take a tenth of the time


@worker_ready.connect
def _begin_duties(**_: Any) -> None:
    runtime.begin_duties()


@worker_shutting_down.connect
def _hand_back(**_: Any) -> None:
    runtime.begin_stop()


@worker_shutdown.connect
def _close(**_: Any) -> None:
    runtime.close()
