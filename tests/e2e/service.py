"""The service as an operator starts it: the plain commands, as processes, on free ports."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 60


class Service:
    """Starts and ends API, workers and Flower; use as a context manager."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(
            base_url=self.url, timeout=30, trust_env=False, follow_redirects=True
        )
        self._logs = logs
        self._environment = {
            **os.environ,
            "STORAGE_BASE_URL": f"{self.url}/media",
            **environment,
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for process in self._processes:
            process.kill()
            process.wait()

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        """Start one of the environment's programs; its output goes to a file."""
        log = self._logs / f"{len(self._processes)}-{Path(command[0]).name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [BIN / command[0], *command[1:]],
                cwd=ROOT,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process

    def start_api(self) -> subprocess.Popen[bytes]:
        """Start the API and wait until it answers."""
        process = self.run("uvicorn", "app.main:app", "--port", str(self.port))
        wait_for(lambda: self._answers("/health"), "the API")
        return process

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start a worker; it is ready when its heartbeat shows."""
        before = self._workers()
        process = self.run("celery", "-A", "app.tasks.celery_app", "worker")
        wait_for(lambda: self._workers() > before or before > 0, "the worker")
        return process

    def generate(self, prompt: str, **parameters: Any) -> str:
        """POST one job; return its id."""
        body = {"prompt": prompt, "model_name": "acme/painter", "parameters": parameters}
        response = self.client.post("/api/v1/generate", json=body)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        """GET one job."""
        body: dict[str, Any] = self.client.get(f"/api/v1/status/{job_id}").raise_for_status().json()
        return body

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by status."""
        metrics = self.client.get("/metrics").raise_for_status().json()["metrics"]
        counts: dict[str, int] = metrics["jobs_by_status"]
        return counts

    def wait_until_idle(self, seconds: float = 90) -> dict[str, int]:
        """Wait until no job is pending or processing; return the counts."""
        wait_for(
            lambda: not (self.counts()["pending"] + self.counts()["processing"]), "jobs", seconds
        )
        return self.counts()

    def logs(self) -> str:
        """Return what all processes have printed."""
        return "\n".join(path.read_text() for path in sorted(self._logs.iterdir()))

    def _answers(self, path: str) -> bool:
        try:
            return self.client.get(path).is_success
        except httpx.TransportError:
            return False

    def _workers(self) -> int:
        count: int = self.client.get("/metrics").json()["metrics"]["workers"]["alive"]
        return count


def wait_for(condition: Any, what: str, seconds: float = START_SECONDS) -> None:
    """Wait until `condition()` holds."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes], with_signal: int = signal.SIGTERM) -> float:
    """Signal a process and wait for its end; return the seconds it took."""
    started = time.monotonic()
    process.send_signal(with_signal)
    process.wait(timeout=30)
    return time.monotonic() - started
