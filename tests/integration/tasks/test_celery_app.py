"""The Celery application as the environment makes it, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from scripts.servers import Valkey

ROOT = Path(__file__).parents[3]
RING = """
from uuid import uuid4
from app.tasks.doorbell import doorbell
doorbell.ring([uuid4()])
print("rung")
"""


def output_of(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=15,
        check=True,
    ).stdout.strip()


def test_a_result_backend_that_is_away_does_not_keep_the_doorbell_waiting(valkey: Valkey) -> None:
    away = "redis://127.0.0.1:1/0"
    assert output_of(RING, CELERY_BROKER_URL=valkey.url, CELERY_RESULT_BACKEND=away) == "rung"
