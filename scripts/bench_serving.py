"""What serving a 1.6 MB PNG costs: the server's CPU per request, in ratios to nginx's alone.

Measured in one run, the servers taking turns: nginx with a plain file, the API alone, and the API
behind nginx with X_ACCEL_PREFIX. PostgreSQL's part (one look-up by name) is shown apart.
Needs Linux and nginx (apt-get install nginx-light; it need not run as a service).

Usage: scripts/bench_serving.py [--requests 300] [--rounds 5]
"""

import argparse
import os
import secrets
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psycopg

from scripts.nginx import Nginx, installed
from scripts.servers import FREE_PORTS, Postgres

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
BYTES = 1_600_000
CONNECTIONS = 16
END = b"\r\n\r\n"
START_SECONDS = 30.0
TARGETS = {"API alone": 3.0, "API behind nginx": 1.4}
ADD_JOB = """
    INSERT INTO jobs (id, prompt, model_name, parameters, status, completed_at, deadline_at,
                      ring_at, retry_count, throttle_count, crash_count)
    VALUES (gen_random_uuid(), 'a fox', 'owner/name', '{}', 'completed', now(), now(), now(),
            0, 0, 0)
    RETURNING id
"""
ADD_OUTPUT = """
    INSERT INTO outputs (job_id, index, name, media_type, size_bytes, sha256)
    VALUES (%s, 0, %s, 'image/png', %s, %s)
"""

Cpu = Callable[[], int]


def main() -> int:
    """Returns the exit code: 0 when every target is met, 1 when not, 2 when it cannot measure."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=300, help="of each server in each round")
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    return bench(given.requests, given.rounds)


def bench(requests: int, rounds: int) -> int:
    """Measure and print; return the exit code of `main`."""
    if not installed():
        print("nginx is missing: apt-get install nginx-light (Debian, Ubuntu).", file=sys.stderr)
        return 2
    if not Path("/proc/self/schedstat").exists():
        print("CPU times of other processes are read from Linux's /proc.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder, ExitStack() as stack:
        servers = _start(Path(folder), stack)
        return _report(_measure(servers, requests, rounds))


class Server:
    """One way to the file, and the processes whose CPU it takes; PostgreSQL's apart."""

    def __init__(self, name: str, port: int, path: str, pids: list[int], database: int) -> None:
        self.name = name
        self.port = port
        self.path = path
        self.pids = pids
        self.database = database


def _start(folder: Path, stack: ExitStack) -> list[Server]:
    postgres = stack.enter_context(Postgres(folder / "postgres"))
    environment = {
        **os.environ,
        "DATABASE_URL": postgres.url,
        "STORAGE_PATH": str(folder / "storage" / "media"),
        "REPLICATE_API_TOKEN": "mock_token_for_demo",
        "LOG_LEVEL": "INFO",
    }
    script = [sys.executable, str(ROOT / "scripts" / "init_db.py")]
    subprocess.run(script, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    name = _add_picture(postgres, folder / "storage" / "media")
    ports = iter(_free_ports(4))
    alone, behind, front, static = ports
    api = stack.enter_context(_api(environment, alone, folder))
    inner = {**environment, "X_ACCEL_PREFIX": "/internal-media"}
    inner_api = stack.enter_context(_api(inner, behind, folder))
    nginx = stack.enter_context(
        Nginx(folder / "nginx", api_port=behind, port=front, static_port=static)
    ).start(folder / "storage" / "media")
    database = _postmaster(postgres)
    return [
        Server("nginx alone", static, f"/{name}", [nginx.pid], database),
        Server("API alone", alone, f"/media/{name}", [api], database),
        Server("API behind nginx", front, f"/media/{name}", [inner_api, nginx.pid], database),
    ]


def _add_picture(postgres: Postgres, media: Path) -> str:
    """Store the bytes of a PNG, as far as serving is concerned, with the rows of its job."""
    data = b"\x89PNG\r\n\x1a\n" + secrets.token_bytes(BYTES - 8)
    with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
        row = connection.execute(ADD_JOB).fetchone()
        assert row is not None
        name = f"{row[0]}.png"
        connection.execute(ADD_OUTPUT, (row[0], name, BYTES, sha256(data).hexdigest()))
    media.mkdir(parents=True)
    (media / name).write_bytes(data)
    return name


@contextmanager
def _api(environment: dict[str, str], port: int, folder: Path) -> Iterator[int]:
    """Run the API as the README starts it; give its process id."""
    command = [sys.executable, "-m", "uvicorn", "app.main:app", f"--host={HOST}", f"--port={port}"]
    with (folder / f"api-{port}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--app-dir={ROOT}"], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        _wait_for(port)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _measure(servers: list[Server], requests: int, rounds: int) -> dict[str, list[tuple[int, int]]]:
    """Return, by server, (ns of its CPU, ns of PostgreSQL's) per request of each round."""
    for server in servers:
        _load(server, requests // 3)  # connections and caches: a fair start
    measured: dict[str, list[tuple[int, int]]] = {server.name: [] for server in servers}
    for _ in range(rounds):
        for server in servers:
            begin = _cpu_ns(server.pids), _cpu_ns([server.database])
            _load(server, requests)
            end = _cpu_ns(server.pids), _cpu_ns([server.database])
            spent = ((end[0] - begin[0]) // requests, (end[1] - begin[1]) // requests)
            measured[server.name].append(spent)
    return measured


class _Client:
    """One kept connection that asks for the file again and again, and checks every answer."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection((HOST, server.port), timeout=30)
        self._request = f"GET {server.path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        self._name = server.name

    def ask(self) -> None:
        """Send the next request."""
        self._head = b""
        self._left = BYTES
        self.socket.sendall(self._request)

    def take(self, buffer: bytearray) -> bool:
        """Read what there is; True when the answer is complete."""
        count = self.socket.recv_into(buffer)
        if not count:
            raise SystemExit(f"{self._name} closed the connection.")
        if not self._head.endswith(END):
            self._head, end, body = (self._head + bytes(buffer[:count])).partition(END)
            self._head += end
            count = len(body)
            if not self._head.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"{self._name} answered {self._head[:200]!r}.")
        self._left -= count
        return self._left <= 0


def _load(server: Server, requests: int) -> None:
    """Fetch the file so many times over a few connections, each always busy."""
    buffer = bytearray(1 << 20)
    with selectors.DefaultSelector() as ready, ExitStack() as open_sockets:
        for client in [_Client(server) for _ in range(min(CONNECTIONS, requests))]:
            open_sockets.enter_context(client.socket)
            ready.register(client.socket, selectors.EVENT_READ, client)
            client.ask()
        left = requests - min(CONNECTIONS, requests)
        while ready.get_map():
            for key, _ in ready.select():
                if not key.data.take(buffer):
                    continue
                if left:
                    left -= 1
                    key.data.ask()
                else:
                    ready.unregister(key.data.socket)


def _cpu_ns(pids: list[int]) -> int:
    """Return the CPU time of the processes, their threads and children so far, in ns."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
            children = (thread / "children").read_text().split()
            total += _cpu_ns([int(child) for child in children])
    return total


def _report(measured: dict[str, list[tuple[int, int]]]) -> int:
    """Print medians and ratios; return 0 when each target is met."""
    medians = {
        name: statistics.median(spent for spent, _ in rounds) for name, rounds in measured.items()
    }
    floor = medians["nginx alone"]
    print(
        f"{'one PNG of 1.6 MB':<20} {'CPU us':>8} {'ratio':>6} {'target':>7} {'PostgreSQL us':>14}"
    )
    for name, median in medians.items():
        database = statistics.median(spent for _, spent in measured[name])
        target = f"{TARGETS[name]:.1f}" if name in TARGETS else ""
        ratio = median / floor
        line = f"{name:<20} {median / 1000:>8.0f} {ratio:>6.2f} {target:>7}"
        print(f"{line} {database / 1000:>14.0f}")
    missed = [name for name, target in TARGETS.items() if medians[name] > target * floor]
    print(f"Missed: {', '.join(missed)}." if missed else "Every target is met.")
    return 1 if missed else 0


def _postmaster(postgres: Postgres) -> int:
    with psycopg.connect(postgres.sync_url) as connection:
        status = Path(f"/proc/{connection.info.backend_pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def _free_ports(count: int) -> list[int]:
    """Return so many ports that nobody listens on."""
    free: list[int] = []
    while len(free) < count:
        port = secrets.choice(FREE_PORTS)
        if port not in free and not _listens(port):
            free.append(port)
    return free


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((HOST, port)) == 0


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _listens(port):
        if time.monotonic() > deadline:
            raise SystemExit("The API did not start.")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
