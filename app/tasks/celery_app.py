"""The Celery application: every option of the broker and the worker, and why.

`celery -A app.tasks.celery_app worker` needs no further options: pool and concurrency stand here.
"""

from ssl import CERT_REQUIRED
from typing import Any

from celery import Celery
from celery.signals import setup_logging
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from celery.worker.control import Panel

from app.config import get_settings
from app.logging import configure_logging
from app.tasks import transport

settings = get_settings()

# What `--without-gossip --without-mingle` does, for which there is no setting: workers have nothing
# to tell each other, and mingling costs a second at every start.
Gossip.compatible_transports = Mingle.compatible_transports = set()

# Flower may look at a worker but not revoke a task: workers remember a revoked id and would refuse
# every later message for that job. A job is cancelled through the API, in the database. Nor may it
# take a worker's queue or threads away, which would look well and hear nothing.
REVOKING = ("revoke", "revoke_by_stamped_headers", "terminate")
CONSUMING = ("add_consumer", "cancel_consumer")
POOL = ("autoscale", "pool_grow", "pool_restart", "pool_shrink", "rate_limit", "time_limit")
for command in (*REVOKING, *CONSUMING, *POOL):
    Panel.data.pop(command, None)

transport.use()

celery_app = Celery(
    "replicate-media-service", broker=settings.broker_url, amqp=transport.PersistentAMQP
)
# The database is the result: one that nobody reads would make publishing wait for its server. Set
# here, because Celery prefers CELERY_RESULT_BACKEND of the environment to any setting below.
celery_app.backend_cls = "disabled"
celery_app.conf.update(
    include=["app.tasks.generate"],
    task_default_queue="generate",
    task_ignore_result=True,
    # The message is only a doorbell: taken off the queue at once. What is lost with a worker is
    # rung again by the sweep; redelivery by the broker would be a second, slower mechanism.
    task_acks_late=False,
    # Of tasks that are acknowledged late, so of none here; to say so keeps a warning of seven
    # lines out of the log of every lost connection.
    worker_cancel_long_running_tasks_on_connection_loss=True,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    task_publish_retry=False,
    # A task's thread only waits for the event loop, which does the work of every job.
    worker_pool="threads",
    worker_concurrency=settings.worker_concurrency,
    worker_send_task_events=True,  # what Flower shows
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    # A worker never gives up on its broker, and notices one that has gone silent: without a
    # socket time-out kombu waits for ever; a BRPOP without a reply it drops after two health
    # checks and a second (kombu 5.7).
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # kombu takes any certificate unless it is told; what the URL says of TLS comes first.
    broker_use_ssl=settings.broker_url.startswith("rediss:") and {"ssl_cert_reqs": CERT_REQUIRED},
    broker_transport_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "global_keyprefix": "media:",
    },
    accept_content=["json"],
    task_serializer="json",
    timezone="UTC",
)


@setup_logging.connect
def _use_our_logging(**_: Any) -> None:
    """Celery configures no logging of its own when this signal has a receiver."""
    configure_logging(settings.log_level)
