"""A local server that speaks Replicate's HTTP API, keeps a ledger, and fails on demand.

    python -m tests.doubles.replicate_server --port 0 --ready-file PATH

Tests start it with `ReplicateServer`. Replicate's rules come from its published OpenAPI text and
from the HTTP recordings in the replicate-python repository.
"""

import argparse
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tests.doubles import clock
from tests.doubles.replicate_api import ReplicateApi
from tests.doubles.replicate_control import ControlApi
from tests.doubles.replicate_ledger import Ledger, LedgerEntry
from tests.doubles.replicate_replies import Problem
from tests.doubles.replicate_webhooks import Webhooks

PROJECT_ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_SECONDS = 30.0
BACKLOG = 4096
OPEN_FILES = 16_384
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class LedgerSnapshot:
    """The double's memory at one moment."""

    creates: list[LedgerEntry]  # every accepted create, in order
    create_calls: list[str]  # when create calls came in, refused ones included; ISO 8601
    requests: dict[str, int]  # by kind: create, get, list, cancel, models, download, throttled ...
    faults_fired: dict[str, int]  # by "<on> <kind>"


class ReplicateServer:
    """Context manager: the double in a process of its own, on a free port of 127.0.0.1.

    The process dies with this one, `kill -9` included (on Linux with the thread that started it).
    Control calls raise httpx.HTTPStatusError when the double refuses them.
    """

    token = "r8_test"

    def __init__(self) -> None:
        self.origin = ""
        self._snapshot = TypeAdapter(LedgerSnapshot)

    def __enter__(self) -> Self:
        with tempfile.TemporaryDirectory(prefix="replicate-double-") as folder:
            ready_file = Path(folder, "port")
            module = [sys.executable, "-m", "tests.doubles.replicate_server"]
            options = ["--ready-file", str(ready_file), "--parent-pid", str(os.getpid())]
            self.process = subprocess.Popen(
                module + options, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL
            )
            self.origin = f"http://127.0.0.1:{self._port(ready_file)}"
        self._control = httpx.Client(
            base_url=self.origin, timeout=START_TIMEOUT_SECONDS, trust_env=False
        )
        return self

    def _port(self, ready_file: Path) -> int:
        give_up_at = time.monotonic() + START_TIMEOUT_SECONDS
        while not ready_file.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the double ended with code {self.process.returncode}")
            if time.monotonic() > give_up_at:
                self._stop()
                raise TimeoutError("the double did not start")
            time.sleep(0.01)
        return int(ready_file.read_text())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._control.close()
        self._stop()

    def _stop(self) -> None:
        # Nothing to save, and a process that a test has stopped (SIGSTOP) would not hear SIGTERM.
        self.process.kill()
        self.process.wait()

    def ledger(self) -> LedgerSnapshot:
        """Everything the double has seen since it started or was reset."""
        return self._snapshot.validate_json(self._call("GET", "/_ledger").content)

    def creates(self) -> list[LedgerEntry]:
        """Every accepted create, in order: what Replicate would have billed."""
        return self.ledger().creates

    def reset(self) -> None:
        """Forget predictions, counters and faults; back to the default settings."""
        self._call("DELETE", "/_ledger")

    def configure(self, **settings: Any) -> None:
        """Change some fields of `replicate_settings.Settings`, keep the others."""
        self._call("PUT", "/_ledger/settings", settings)

    def push_fault(self, on: str, kind: str, **fields: Any) -> None:
        """Add a `replicate_settings.Fault` behind those that wait already."""
        self._call("POST", "/_ledger/faults", {"on": on, "kind": kind} | fields)

    def clear_faults(self) -> None:
        """Drop the faults that have not struck yet."""
        self._call("DELETE", "/_ledger/faults")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return self._control.request(method, path, json=body).raise_for_status()


class _Protocol(HttpToolsProtocol):
    """Hands each request its transport, so that a reply can break the connection off."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport


class _Server(uvicorn.Server):
    """Announces its port, and leaves the signals alone: SIGTERM ends the process at once."""

    def __init__(self, config: uvicorn.Config, ready_file: Path | None) -> None:
        super().__init__(config)
        self._ready_file = ready_file

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready_file is not None:
            port = self.servers[0].sockets[0].getsockname()[1]
            written = self._ready_file.with_suffix(".tmp")
            written.write_text(str(port))
            written.replace(self._ready_file)


def main() -> None:
    """Serve until a signal, or until the parent process is gone."""
    arguments = argparse.ArgumentParser(description="Test double of Replicate's HTTP API")
    arguments.add_argument("--port", type=int, default=0, help="0: any free port")
    arguments.add_argument("--ready-file", type=Path, help="gets the port, once it is open")
    arguments.add_argument("--parent-pid", type=int, help="end when this parent is gone")
    options = arguments.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if options.parent_pid is not None and sys.platform == "linux":
        # Works even while this process is stopped; the watch in _config serves other systems.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _allow_open_files()
    _Server(_config(options.port, options.parent_pid), options.ready_file).run()


def _allow_open_files() -> None:
    # A thousand held connections pass the soft limit that many systems start with.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _config(port: int, parent_pid: int | None) -> uvicorn.Config:
    async def end_with_parent() -> None:
        if parent_pid is not None and os.getppid() != parent_pid:
            os._exit(0)

    return uvicorn.Config(
        _app(),
        host="127.0.0.1",
        port=port,
        http=_Protocol,
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        date_header=False,  # see _Dated
        callback_notify=end_with_parent,
        timeout_notify=0,
    )


def _app() -> Starlette:
    ledger, webhooks = Ledger(), Webhooks()
    return Starlette(
        middleware=[Middleware(_Dated)],
        routes=ReplicateApi(ledger, webhooks).routes() + ControlApi(ledger, webhooks).routes(),
        exception_handlers={Problem: _refuse, HTTPException: _refuse_route},
    )


class _Dated:
    """Dates every answer by the double's own clock."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Date"] = formatdate(clock.now(), usegmt=True)
            await send(message)

        await self._app(scope, receive, dated)


async def _refuse(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.reply()


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, error.detail).reply()


if __name__ == "__main__":
    main()
