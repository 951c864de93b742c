"""The whole service as real processes, with something to break in every connection.

A `Stack` is made by the `start_stack` fixture:

    stack = start_stack(workers=2, links=["worker_broker"], POLL_INTERVAL_SECONDS="0.2")
    ids = stack.post(100)
    with stack.outage():
        stack.proxies["worker_broker"].hold()
        ...
    stack.wait_until_done()
    check(stack)                       # the oracle
"""

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
import psycopg
import redis

from scripts.servers import Postgres, Valkey
from scripts.supervise import Child
from tests.doubles.replicate_server import ReplicateServer
from tests.e2e.service import BIN, ROOT
from tests.faults.proxy import FaultProxy
from tests.ports import free_port

# Scaled down by default, to be part of every test run; `scripts/test.sh --faults` asks for all.
FULL = os.environ.get("FAULTS") == "full"
START_SECONDS = 60.0
READS_PER_SECOND = 4
MODEL = "acme/painter"

# Every connection that can be put behind a proxy.
Link = Literal["api_database", "worker_database", "api_broker", "worker_broker", "provider"]

# Quick enough for a test: a dead worker's jobs are free after 4 seconds instead of 15.
QUICK = {
    "WORKER_HEARTBEAT_SECONDS": "1",
    "WORKER_LEASE_SECONDS": "4",
    "SWEEP_INTERVAL_SECONDS": "0.5",
    "POLL_INTERVAL_SECONDS": "0.3",
    "REPLICATE_PREFER_WAIT_SECONDS": "0",
    "REPLICATE_TIMEOUT_SECONDS": "3",
    "RETRY_BACKOFF_FACTOR": "1.2",
    "RECONCILE_GRACE_SECONDS": "1",
}
# On a busy machine an answer of the provider may take longer than 3 s without any fault.
PATIENT = {"REPLICATE_TIMEOUT_SECONDS": "15"}
# What has to do with the load of a test, never with the fault.
UNLIMITED = {"REPLICATE_CREATES_PER_MINUTE": "100000", "REPLICATE_CALLS_PER_MINUTE": "1000000"}
# What a process may hold more than before, beside a tenth: pools fill, allocators keep pages.
FILES_SLACK = 30
RESIDENT_SLACK_BYTES = 40 << 20
# What a process may hold of the database: its pools, and in a worker those of its duties.
POOL_CONNECTIONS = 10
DUTY_CONNECTIONS = {"api": 0, "worker": 4}


@dataclass(frozen=True)
class Answer:
    """One answer of the API, or the lack of one (`status` 0)."""

    method: str
    path: str
    status: int
    seconds: float
    at: float  # time.time() when the request was sent
    retry_after: str | None
    content_type: str


@dataclass(frozen=True)
class Window:
    """A time in which a fault may show in the API's answers; seconds of time.time()."""

    begin: float
    end: float


@dataclass(frozen=True)
class Resources:
    """What a process holds."""

    resident_bytes: int
    open_files: int


@dataclass
class Process:
    """A running API or worker."""

    role: Literal["api", "worker"]
    child: Child
    port: int = 0
    # When this test has stopped it, or told it to end; seconds of time.time().
    stops: list[Window] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.child.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.child.poll() is None

    def kill(self) -> None:
        """SIGKILL; return when it has ended."""
        self._stop()
        self.signal(signal.SIGKILL)
        self.child.wait(10)

    def terminate(self, timeout_seconds: float = 30) -> float:
        """SIGTERM; return the seconds until it had ended. AssertionError when it takes longer."""
        started = time.monotonic()
        self._stop()
        self.signal(signal.SIGTERM)
        if not self.child.wait(timeout_seconds):
            self.signal(signal.SIGABRT)  # faulthandler: where every thread stands
            self.child.wait(10)
            log = "\n".join(self.child.output())
            raise AssertionError(f"the {self.role} ignores SIGTERM:\n{log[-6000:]}")
        return time.monotonic() - started

    def pause(self) -> None:
        """SIGSTOP."""
        self._stop()
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)
        if self.stops and self.stops[-1].end == math.inf:
            self.stops[-1] = Window(self.stops[-1].begin, time.time())

    def _stop(self) -> None:
        self.stops.append(Window(time.time(), math.inf))

    def lived_through(self, begin: float, end: float) -> bool:
        """Tell whether it ran all the time; what ended by itself, before or after, did not."""
        stopped = any(stop.begin <= end and begin <= stop.end for stop in self.stops)
        ended_by_test = bool(self.stops) and self.stops[-1].end == math.inf
        return not stopped and (self.is_running or ended_by_test)

    def signal(self, number: int) -> None:
        """Send a signal at once, unless it has ended."""
        if self.is_running:
            os.kill(self.pid, number)

    def resources(self) -> Resources:
        """Return what it holds now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        resident_bytes = int(line.split()[1]) * 1024
        return Resources(resident_bytes, len(os.listdir(f"/proc/{self.pid}/fd")))


@dataclass
class Stack:
    """API and worker processes on real servers, with the links that were asked for proxied.

    Everything the API has answered is in `answers`, every id answered with 201 in `accepted`.
    """

    postgres: Postgres
    valkey: Valkey
    replicate: ReplicateServer
    folder: Path
    seed: int
    links: Sequence[Link] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    proxies: dict[Link, FaultProxy] = field(default_factory=dict)
    apis: list[Process] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)  # all, also those that have ended
    answers: list[Answer] = field(default_factory=list)
    reads: list[Answer] = field(default_factory=list)  # of the client that looks all the time
    accepted: list[str] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    baseline: dict[int, Resources] = field(default_factory=dict)  # by process id

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._closing = ExitStack()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._posts = 0
        self._api_port = 0
        self.logs.mkdir(parents=True)
        for link in self.links:
            self.proxies[link] = self._closing.enter_context(FaultProxy(self._target(link)))

    # --- processes ---------------------------------------------------------------------------

    @property
    def logs(self) -> Path:
        """The folder with one file per process."""
        return self.folder / "logs"

    @property
    def media(self) -> Path:
        """STORAGE_PATH."""
        return self.folder / "storage" / "media"

    @property
    def metadata(self) -> Path:
        """METADATA_PATH."""
        return self.folder / "storage" / "metadata"

    @property
    def lease_seconds(self) -> float:
        """For how long a silent worker keeps its jobs."""
        return float(self.environment("worker")["WORKER_LEASE_SECONDS"])

    def start_api(self, **settings: str) -> Process:
        """Start an API process (again on the same port if the last one ended); wait for it."""
        if not self._api_port or any(api.is_running for api in self.apis):
            self._api_port = free_port()
        process = self._start("api", settings, self._api_port)
        self.apis.append(process)
        wait_for(lambda: self._answers(process), "the API")
        return process

    def start_worker(self, *options: str, wait: bool = True, **settings: str) -> Process:
        """Start a worker; it is ready (`wait`) when its heartbeat is in the database.

        `options` are more words of its command. A setting `SABOTAGE_...` makes it one of
        `saboteur`.
        """
        process = self._start("worker", settings, options=options)
        self.workers.append(process)
        if wait:
            self.wait_for_worker(process)
        return process

    def wait_for_worker(self, process: Process) -> None:
        """Wait for the first heartbeat of a worker."""
        query = "SELECT count(*) FROM workers WHERE name LIKE %s"

        def beats() -> bool:
            assert process.is_running, self.log_of(process)[-2000:]
            return bool(self.query(query, f"%:{process.pid}")[0][0])

        wait_for(beats, "the worker", state=lambda: self.log_of(process)[-2000:])

    @property
    def living_workers(self) -> list[Process]:
        """The workers that have not ended."""
        return [worker for worker in self.workers if worker.is_running]

    def replace(self, worker: Process) -> Process:
        """Kill a worker and start another, without waiting for it."""
        worker.kill()
        return self.start_worker(wait=False)

    def worker_id(self, process: Process) -> UUID:
        """Return the id under which a worker owns jobs."""
        rows = self.query("SELECT id FROM workers WHERE name LIKE %s", f"%:{process.pid}")
        found: UUID = rows[0][0]
        return found

    def environment(self, role: Literal["api", "worker"]) -> dict[str, str]:
        """Return the environment of a new process of this role."""
        database: Link = "api_database" if role == "api" else "worker_database"
        broker: Link = "api_broker" if role == "api" else "worker_broker"
        own = {
            "DATABASE_URL": self._through(database, self.postgres.url, self.postgres.port),
            "REDIS_URL": self._through(broker, self.valkey.url, self.valkey.port),
            "REPLICATE_API_TOKEN": self.replicate.token,
            "REPLICATE_BASE_URL": self._through(
                "provider", self.replicate.origin, self._target("provider")
            ),
            "STORAGE_PATH": str(self.media),
            "DATABASE_POOL_SIZE": str(POOL_CONNECTIONS),
            "PYTHONFAULTHANDLER": "1",
        }
        return {**os.environ, **UNLIMITED, **QUICK, **own, **self.settings}

    def _start(
        self,
        role: Literal["api", "worker"],
        settings: Mapping[str, str],
        port: int = 0,
        options: Sequence[str] = (),
    ) -> Process:
        commands = {
            "api": ["uvicorn", "app.main:app", "--port", str(port), "--no-access-log"],
            "worker": ["celery", "-A", "app.tasks.celery_app", "worker"],
        }
        name, *arguments = commands[role]
        environment = {**self.environment(role), **settings}
        command: list[str | Path] = [BIN / name, *arguments, *options]
        if role == "worker" and any(name.startswith("SABOTAGE_") for name in environment):
            command = [BIN / "python", "-m", "tests.faults.saboteur", *arguments, *options]
        number = len(self.apis) + len(self.workers)
        log = self.logs / f"{number:03}-{role}.log"
        child = Child(command, log_path=log, environment=environment, folder=ROOT)
        return Process(role, child, port)

    def _target(self, link: Link) -> int:
        if link == "provider":
            return httpx.URL(self.replicate.origin).port or 0
        return self.postgres.port if link.endswith("database") else self.valkey.port

    def _through(self, link: Link, url: str, port: int) -> str:
        proxy = self.proxies.get(link)
        return url.replace(f":{port}", f":{proxy.port}") if proxy else url

    # --- the public API ------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The origin of the API that was started last."""
        return f"http://127.0.0.1:{self.apis[-1].port}"

    def client(self, timeout_seconds: float = 30) -> httpx.Client:
        """Return a new client of the API; close it."""
        return httpx.Client(base_url=self.url, timeout=timeout_seconds, trust_env=False)

    def request(
        self, client: httpx.Client, method: str, path: str, **options: Any
    ) -> httpx.Response | None:
        """Make one request and note its answer; None when there was none."""
        answer, response = _exchange(client, method, path, options)
        with self._lock:
            self.answers.append(answer)
            if method == "POST" and path == "/api/v1/generate" and answer.status == 201:
                assert response is not None
                self.accepted.append(response.json()["id"])
        return response

    def read_on(self) -> None:
        """Look at jobs in the background until the end, as clients that wait for theirs do."""
        reading = threading.Thread(target=self._read)
        reading.start()
        self._closing.callback(reading.join)

    def _read(self) -> None:
        choice = random.Random(self.seed)
        with httpx.Client(timeout=10, trust_env=False) as client:
            while not self._over.wait(1 / READS_PER_SECOND):
                paths = ["/api/v1/jobs"]
                for known in self.accepted[-200:][:1]:  # one of some time ago, if there is any
                    paths += [f"/api/v1/status/{known}", f"/api/v1/jobs/{known}/attempts"]
                url = self.url + choice.choice(paths)
                self.reads.append(_exchange(client, "GET", url, {})[0])

    def prompt(self, words: str = "") -> str:
        """Return a prompt that no other job has and no log may show."""
        with self._lock:
            self._posts += 1
            return f"{self.secret_words} {self._posts} {words}".strip()

    @property
    def secret_words(self) -> str:
        """What every prompt begins with."""
        return f"a heron {self.seed:x} number"

    def post(
        self,
        count: int,
        *,
        per_second: float | None = None,
        threads: int = 8,
        repeat_seconds: float = 0,
        words: str = "",
        model: str = MODEL,
        **parameters: Any,
    ) -> list[str]:
        """POST so many jobs; return the ids that were answered with 201, in any order.

        With `per_second` each is sent at its time, however slow the answers are. A POST without
        a 201 is repeated, as another job, for `repeat_seconds`.
        """
        begin = time.monotonic()
        local = threading.local()
        clients: list[httpx.Client] = []

        def post_one(number: int) -> str | None:
            if not hasattr(local, "client"):
                local.client = self.client()
                clients.append(local.client)
            if per_second:
                time.sleep(max(0.0, begin + number / per_second - time.monotonic()))
            return self._post_one(local.client, repeat_seconds, words, model, parameters)

        with ThreadPoolExecutor(threads) as pool:
            ids = list(pool.map(post_one, range(count)))
        for client in clients:
            client.close()
        return [job_id for job_id in ids if job_id]

    def _post_one(
        self,
        client: httpx.Client,
        repeat_seconds: float,
        words: str,
        model: str,
        parameters: dict[str, Any],
    ) -> str | None:
        give_up_at = time.monotonic() + repeat_seconds
        size = {"width": 64, "height": 64}
        while True:
            body = {
                "prompt": self.prompt(words),
                "model_name": model,
                "parameters": size | parameters,
            }
            response = self.request(client, "POST", "/api/v1/generate", json=body)
            if response is not None and response.status_code == 201:
                return str(response.json()["id"])
            if time.monotonic() > give_up_at:
                return None
            time.sleep(0.2)

    def _answers(self, process: Process) -> bool:
        assert process.is_running, self.log_of(process)
        try:
            url = f"http://127.0.0.1:{process.port}/health"
            return httpx.get(url, timeout=START_SECONDS, trust_env=False).is_success
        except httpx.TransportError:
            return False

    # --- what happens inside -------------------------------------------------------------------

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement, not through any proxy; return its rows."""
        with psycopg.connect(
            self.postgres.sync_url, autocommit=True, connect_timeout=int(START_SECONDS)
        ) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def redis(self) -> "redis.Redis":
        """Return a client of the broker, not through any proxy; close it."""
        return redis.Redis.from_url(self.valkey.url, socket_timeout=START_SECONDS)

    def flush_broker(self) -> None:
        """FLUSHALL: every message and every shared limit is gone."""
        with self.redis() as client:
            client.flushall()

    def restart_broker_empty(self) -> None:
        """Kill the broker and start it again without what it held."""
        self.flush_broker()
        self.valkey.kill()
        self.valkey.start()

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by status, as the rows say."""
        return dict(self.query("SELECT status, count(*) FROM jobs GROUP BY status"))

    def finished(self) -> int:
        """Return how many jobs are over."""
        return sum(n for word, n in self.counts().items() if word not in ("pending", "processing"))

    def wait_until_finished(self, count: int, seconds: float = 60) -> None:
        """Wait until so many jobs are over."""
        wait_for(lambda: self.finished() >= count, f"{count} finished jobs", seconds, self.counts)

    def wait_until_done(self, seconds: float = 90) -> float:
        """Wait until no job is pending or processing; return the seconds it took."""
        started = time.monotonic()

        def idle() -> bool:
            return not {"pending", "processing"} & self.counts().keys()

        wait_for(idle, "the end of all jobs", seconds, self.counts)
        return time.monotonic() - started

    @contextmanager
    def outage(self, grace_seconds: float = 5) -> Iterator[None]:
        """A time in which the API may answer 503 or not at all; `grace_seconds` after it too."""
        begin = time.time()
        try:
            yield
        finally:
            self.windows.append(Window(begin, time.time() + grace_seconds))

    def warm_up(self) -> None:
        """Run some jobs and forget them; then note what each process holds, for O7 (full run)."""
        if not FULL:
            return
        self.post(50)
        self.wait_until_done()
        self.accepted.clear()  # before its rows go: nobody may look for them any more
        time.sleep(2)
        self.query("TRUNCATE jobs, attempts, outputs, job_counts, faults.history CASCADE")
        for folder in (self.media, self.metadata):
            for path in folder.glob("[!.]*"):
                path.unlink()
        self.replicate.reset()
        self.answers.clear()
        self.reads.clear()
        processes = [process for process in (*self.apis, *self.workers) if process.is_running]
        self.baseline = {process.pid: process.resources() for process in processes}

    def grown(self) -> list[str]:
        """Say which processes hold over a tenth more than at the baseline (with some slack).

        And whether the database has more connections than the pools of those that live.
        """
        grown = self._surplus_connections()
        for process in (*self.apis, *self.workers):
            before = self.baseline.get(process.pid)
            if before is None or not process.is_running:
                continue
            now = process.resources()
            if now.open_files > 1.1 * before.open_files + FILES_SLACK:
                grown.append(f"{process.role}: {before.open_files} -> {now.open_files} files")
            if now.resident_bytes > 1.1 * before.resident_bytes + RESIDENT_SLACK_BYTES:
                grown.append(f"{process.role}: {before.resident_bytes} -> {now.resident_bytes} B")
        return grown

    def _surplus_connections(self) -> list[str]:
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = %s AND backend_type = 'client backend'"
        )
        held = self.query(query, "replicate-media-service")[0][0]
        living = [process for process in (*self.apis, *self.workers) if process.is_running]
        allowed = sum(POOL_CONNECTIONS + DUTY_CONNECTIONS[process.role] for process in living)
        return [f"{held} connections to the database, not {allowed}"] if held > allowed else []

    def log_text(self) -> str:
        """Return what all processes have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.logs.iterdir()))

    def log_of(self, process: Process) -> str:
        """Return what one process has printed."""
        return "\n".join(process.child.output())

    def close(self) -> None:
        """End every process and proxy."""
        self._over.set()
        for process in (*self.apis, *self.workers):
            process.kill()
        self._closing.close()


def _exchange(
    client: httpx.Client, method: str, path: str, options: dict[str, Any]
) -> tuple[Answer, httpx.Response | None]:
    sent_at, started = time.time(), time.monotonic()
    response: httpx.Response | None = None
    with suppress(httpx.TransportError):
        response = client.request(method, path, **options)
    seconds = time.monotonic() - started
    status = response.status_code if response is not None else 0
    headers = response.headers if response is not None else httpx.Headers()
    told = headers.get("retry-after"), headers.get("content-type", "")
    return Answer(method, path, status, seconds, sent_at, *told), response


StartStack = Callable[..., Stack]


def wait_for(
    condition: Callable[[], Any],
    what: str,
    seconds: float = START_SECONDS,
    state: Callable[[], Any] = lambda: "",
) -> None:
    """Wait until `condition()` holds. AssertionError, with `state()`, when it takes longer."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, f"waited {seconds} s for {what}: {state()}"
        time.sleep(0.1)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` (0 to 1) of the values do not exceed; 0 without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
