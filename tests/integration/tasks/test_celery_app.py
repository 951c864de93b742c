"""The Celery application as the environment makes it, each in a process of its own."""

import sys

import pytest

from scripts.servers import Valkey
from tests.process import run

RING = """
from uuid import uuid4
from app.tasks.doorbell import doorbell
doorbell.ring([uuid4()])
print("rung")
"""
COUNT = """
from uuid import uuid4
from app.tasks.doorbell import doorbell
before = doorbell.queue_length()
doorbell.ring([uuid4(), uuid4()])
print(doorbell.queue_length() - before)
"""
COMMANDS = """
from app.tasks.celery_app import Panel
print(*Panel.data)
"""
TLS = """
from app.tasks.celery_app import celery_app
print(celery_app.connection_for_write().ssl)
"""


def output_of(code: str, **environment: str) -> str:
    ended = run([sys.executable, "-c", code], timeout_seconds=15, **environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_result_backend_that_is_away_does_not_keep_the_doorbell_waiting(valkey: Valkey) -> None:
    away = "redis://127.0.0.1:1/0"
    assert output_of(RING, CELERY_BROKER_URL=valkey.url, CELERY_RESULT_BACKEND=away) == "rung"


def test_nobody_takes_a_workers_queue_or_threads_away_from_outside() -> None:
    """It would look well and hear nothing, as one that remembers revoked ids."""
    known = set(output_of(COMMANDS).split())
    assert {"ping", "stats", "active", "shutdown"} <= known
    assert not {"revoke", "terminate", "cancel_consumer", "pool_shrink", "rate_limit"} & known


def test_the_messages_that_wait_are_counted(valkey: Valkey) -> None:
    assert output_of(COUNT, CELERY_BROKER_URL=valkey.url) == "2"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://127.0.0.1:1/0", "False"),
        ("rediss://127.0.0.1:1/0", "{'ssl_cert_reqs': <VerifyMode.CERT_REQUIRED: 2>}"),
        (
            "rediss://127.0.0.1:1/0?ssl_cert_reqs=none",
            "{'ssl_cert_reqs': <VerifyMode.CERT_NONE: 0>}",
        ),
    ],
)
def test_a_certificate_is_verified_unless_the_url_says_otherwise(url: str, said: str) -> None:
    assert output_of(TLS, CELERY_BROKER_URL=url) == said
