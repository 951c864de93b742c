"""Publishing: one message per job that is due. Losing one costs latency and nothing else."""

from collections.abc import Sequence
from threading import Lock
from typing import Any
from uuid import UUID

from kombu import Connection, Producer

from app.tasks.celery_app import celery_app

TASK = "generate"


class BrokerDoorbell:
    """Publishes over one kept connection; a dead one is replaced once, then the caller is told.

    Methods block for as long as the broker is silent, a few seconds at most, and raise whatever its
    client raises: call them in a thread. A message that seemed to fail may still arrive; that is
    harmless.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._connection: Connection | None = None

    def ring(self, job_ids: Sequence[UUID]) -> None:
        """Publish `generate(job_id)` for each job.

        The task's id is the job's, so that Flower shows one task per job, whatever it went
        through.
        """
        with self._lock:
            try:
                self._publish(job_ids)
            except Exception:
                self._disconnect()
                self._publish(job_ids)

    def queue_length(self) -> int:
        """Return the number of messages that wait for a worker."""
        with self._lock:
            try:
                channel: Any = self._connect().default_channel
                # Not `passive`: it asks for a key without our prefix, so it never finds the queue.
                declared = channel.queue_declare(celery_app.conf.task_default_queue)
            except Exception:
                self._disconnect()
                raise
            return int(declared.message_count)

    def _publish(self, job_ids: Sequence[UUID]) -> None:
        producer = Producer(self._connect().default_channel)
        for job_id in job_ids:
            celery_app.send_task(
                TASK, args=(str(job_id),), task_id=str(job_id), producer=producer, retry=False
            )

    def _connect(self) -> Connection:
        if self._connection is None:
            # kombu would try again for four seconds, and a worker that stops would wait for that.
            once = {"max_retries": 0}
            self._connection = celery_app.connection_for_write(transport_options=once)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()


doorbell = BrokerDoorbell()
ring = doorbell.ring
