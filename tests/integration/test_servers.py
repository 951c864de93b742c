"""PostgreSQL and Valkey under our supervision: whatever dies, the data stays, no process does."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from scripts import locks, unprivileged
from scripts.servers import Postgres, ServerError, Valkey

ROOT = Path(__file__).resolve().parents[2]
AS_ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not AS_ROOT, reason="only root runs its servers as another user")

SUPERVISOR = """
import pathlib, sys, time
from scripts.servers import Postgres, Valkey
folder = pathlib.Path(sys.argv[1])
with Postgres(folder / "postgres") as postgres, Valkey(folder / "valkey") as valkey:
    print(postgres.pid, valkey.pid, flush=True)
    time.sleep(60 if "serve" in sys.argv else 0)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every account can reach; tests share the database cluster made in it."""
    path = Path(tempfile.mkdtemp(prefix="servers-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def postgres(folder: Path) -> Iterator[Postgres]:
    with Postgres(folder / "postgres") as server:
        yield server


@pytest.fixture
def valkey(folder: Path) -> Iterator[Valkey]:
    with Valkey(folder / "valkey") as server:
        yield server


class TestPostgres:
    def test_it_is_utf8_with_a_locale_of_its_own_and_listens_on_loopback_only(
        self, postgres: Postgres
    ) -> None:
        query = "SELECT datlocprovider, datlocale FROM pg_database WHERE datname = 'fleek_media'"
        with psycopg.connect(postgres.sync_url) as connection:
            assert connection.execute(query).fetchone() == ("b", "C.UTF-8")
            assert _show(connection, "server_encoding") == "UTF8"
            assert _show(connection, "listen_addresses") == "127.0.0.1"
            assert _show(connection, "unix_socket_directories") == ""
            assert _show(connection, "password_encryption") == "scram-sha-256"

    def test_a_wrong_password_is_refused(self, postgres: Postgres) -> None:
        wrong = postgres.sync_url.replace(postgres.password, "wrong")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong)

    def test_the_password_is_kept_in_a_private_file(self, postgres: Postgres) -> None:
        path = postgres.data_path / "password"
        assert path.stat().st_mode & 0o777 == 0o600
        assert f":{path.read_text()}@" in postgres.url

    @pytest.mark.parametrize(
        "end",
        [
            pytest.param(lambda server: server.stop(), id="stop"),
            pytest.param(lambda server: server.stop(immediate=True), id="immediate"),
            pytest.param(lambda server: server.kill(), id="kill"),
            pytest.param(lambda server: os.kill(server.pid, signal.SIGKILL), id="killed-by-others"),
        ],
    )
    def test_data_and_url_survive_the_end(
        self, postgres: Postgres, end: Callable[[Postgres], None]
    ) -> None:
        url, written = postgres.sync_url, str(time.time())
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
            connection.execute("INSERT INTO kept VALUES (%s)", (written,))
        end(postgres)
        postgres.start()
        assert postgres.sync_url == url
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT 1 FROM kept WHERE value = %s", (written,)).fetchone()
        assert row == (1,)

    def test_stop_ends_a_session_that_is_open(self, postgres: Postgres) -> None:
        with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
            postgres.stop()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")

    def test_a_pid_file_that_names_a_living_process_does_not_stop_the_start(
        self, postgres: Postgres
    ) -> None:
        postgres.stop()
        pid_file = postgres.data_path / "server" / "data" / "postmaster.pid"
        pid_file.write_text(f"{os.getpid()}\n")
        postgres.start()
        assert pid_file.read_text().startswith(f"{postgres.pid}\n")

    def test_the_error_says_what_the_log_says(self, postgres: Postgres) -> None:
        postgres.stop()
        settings = postgres.data_path / "server" / "data" / "postgresql.auto.conf"
        whole = settings.read_text()
        settings.write_text("nonsense = 1\n")
        with pytest.raises(ServerError, match=r"ended while starting: FATAL: .*contains errors"):
            postgres.start()
        settings.write_text(whole)
        postgres.start()

    def test_an_interrupted_first_start_is_made_good_by_the_next(self, tmp_path: Path) -> None:
        place = Postgres(tmp_path)
        assert place.password
        partial = unprivileged.place_for(tmp_path).files / "data.new"
        partial.mkdir()
        (partial / "PG_VERSION").write_text("18\n")
        with Postgres(tmp_path):
            assert not partial.exists()


class TestValkey:
    @pytest.mark.parametrize(
        "end",
        [
            pytest.param(lambda server: server.stop(), id="stop"),
            pytest.param(lambda server: server.kill(), id="kill"),
        ],
    )
    def test_data_and_url_survive_the_end(
        self, valkey: Valkey, end: Callable[[Valkey], None]
    ) -> None:
        url, written = valkey.url, str(time.time())
        with redis.Redis.from_url(url, decode_responses=True) as client:
            client.set("kept", written)
            time.sleep(0.05)  # the append-only file is written at the end of the event loop's turn
        end(valkey)
        valkey.start()
        assert valkey.url == url
        with redis.Redis.from_url(url, decode_responses=True) as client:
            assert client.get("kept") == written

    def test_it_asks_for_a_password_and_evicts_nothing(self, valkey: Valkey) -> None:
        with (
            redis.Redis(port=valkey.port, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("bind") == {"bind": "127.0.0.1"}

    def test_no_command_line_shows_the_password(self, valkey: Valkey) -> None:
        commands = subprocess.run(
            ["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True
        )
        assert "valkey-server" in commands.stdout
        assert valkey.password not in commands.stdout


class TestStart:
    def test_two_servers_start_at_once(self, tmp_path: Path) -> None:
        first, second = Valkey(tmp_path / "first"), Valkey(tmp_path / "second")
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda server: server.start(), (first, second)))
        assert first.pid != second.pid
        assert first.port != second.port
        first.stop()
        second.stop()

    def test_data_that_another_owner_uses_is_left_alone(self, valkey: Valkey) -> None:
        with pytest.raises(ServerError, match=f"is in use by process {os.getpid()}"):
            Valkey(valkey.data_path).start()
        with redis.Redis.from_url(valkey.url) as client:
            assert client.ping()

    def test_a_taken_port_is_named_and_nothing_is_left_running(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            server = Valkey(folder / "valkey", port=port)
            with pytest.raises(ServerError, match=f"Port {port} for Valkey is taken"):
                server.start()
        with Valkey(folder / "valkey"):
            assert not server.is_running()

    def test_a_missing_wheel_is_told_in_one_sentence(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Valkey, "package", "no_such_wheel")
        with pytest.raises(ServerError, match="The wheel of Valkey is not installed"):
            Valkey(folder / "valkey").start()

    def test_a_folder_that_cannot_be_made_is_told_in_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ServerError, match="Valkey could not start: Not a directory"):
            Valkey(tmp_path / "file" / "valkey").start()

    def test_a_server_that_a_dead_owner_has_left_is_ended(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locks, "LEFTOVER_SECONDS", 0.2)
        lock = _own_without_owner(folder / "valkey" / "server.lock")
        with Valkey(folder / "valkey"):
            assert lock.wait() == -signal.SIGKILL


class TestKilledSupervisor:
    def test_kill_9_leaves_no_process_and_the_next_start_works(self, folder: Path) -> None:
        supervisor = _supervisor(folder, "serve")
        family = _descendants(supervisor.pid)
        assert len(family) > 4  # two guards, two servers, PostgreSQL's own processes
        supervisor.kill()
        supervisor.wait()
        _wait_for(lambda: not _alive(family))
        with Postgres(folder / "postgres"), Valkey(folder / "valkey"):
            pass

    def test_kill_9_of_everything_called_python_leaves_no_server(self, folder: Path) -> None:
        supervisor = _supervisor(folder, "serve")
        family = _descendants(supervisor.pid)
        guards = [pid for pid, parent in _processes().items() if parent == supervisor.pid]
        assert len(guards) == 2
        if sys.platform != "linux":
            guards = []  # there, a killed guard's server lives until the next start
        for pid in (*guards, supervisor.pid):
            os.kill(pid, signal.SIGKILL)
        supervisor.wait()
        _wait_for(lambda: not _alive(family))

    def test_ctrl_c_in_the_terminal_does_not_reach_the_servers(self, folder: Path) -> None:
        supervisor = _supervisor(folder, "serve")
        sessions = _sessions(_descendants(supervisor.pid))
        assert sessions
        assert os.getsid(supervisor.pid) not in sessions
        supervisor.send_signal(signal.SIGINT)
        supervisor.wait()


class TestAccounts:
    def test_permissions_of_the_folders_above_stay_as_they_are(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        before = _permissions(closed)
        with Postgres(closed / "postgres") as postgres, psycopg.connect(postgres.sync_url):
            pass
        assert _permissions(closed) == before

    @only_root
    def test_root_lends_an_unprivileged_user(self, postgres: Postgres, valkey: Valkey) -> None:
        listing = ["ps", "-o", "user=", "-p", f"{postgres.pid},{valkey.pid}"]
        users = subprocess.run(listing, capture_output=True, text=True).stdout.split()
        assert len(users) == 2
        assert "root" not in users

    @only_root
    def test_what_was_placed_elsewhere_goes_when_its_folder_is_deleted(
        self, tmp_path: Path
    ) -> None:
        with Valkey(tmp_path / "first") as first:
            home = unprivileged.place_for(first.data_path).home
        assert not home.is_relative_to(tmp_path)
        shutil.rmtree(first.data_path)
        with Valkey(tmp_path / "second"):
            assert not home.exists()

    @only_root
    def test_what_may_come_back_and_what_is_in_use_is_not_deleted(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(unprivileged, "SHARED_FOLDERS", (folder / "shared",))
        with Valkey(tmp_path / "in-use") as in_use:
            homes = folder / "shared" / "data"
            unmounted = homes / "0123456789abcdef"
            unmounted.mkdir()
            (unmounted / "origin").write_text("/no/such/volume/valkey")
            (homes / "half-made").mkdir()
            shutil.rmtree(in_use.data_path)
            with Valkey(tmp_path / "new"):
                assert unmounted.exists()
                assert len(list(homes.iterdir())) == 4

    @only_root
    def test_many_first_starts_at_once_get_a_place_each(self, tmp_path: Path) -> None:
        paths = [tmp_path / str(number) for number in range(20)]
        for path in paths:
            assert Valkey(path).password
        with ThreadPoolExecutor() as threads:
            places = list(threads.map(unprivileged.place_for, paths))
        assert len({place.home for place in places}) == 20
        assert all(place.files.exists() for place in places)

    @only_root
    def test_a_folder_made_anew_gets_new_data(self, tmp_path: Path) -> None:
        for _ in range(2):
            with (
                Valkey(tmp_path / "valkey") as server,
                redis.Redis.from_url(server.url) as client,
            ):
                assert client.incr("starts") == 1
            shutil.rmtree(server.data_path)

    @only_root
    def test_a_normal_user_starts_stops_and_starts_again(self) -> None:
        account = pwd.getpwnam("nobody")
        python = _python_for(account)
        with tempfile.TemporaryDirectory() as folder:
            os.chown(folder, account.pw_uid, account.pw_gid)
            for _ in range(2):
                run = _run_as(account, [python, "-c", SUPERVISOR, folder])
                assert run.returncode == 0, run.stderr
            # Root may take over: the servers go on as their data's owner.
            with Postgres(Path(folder) / "postgres") as postgres, Valkey(Path(folder) / "valkey"):
                assert os.stat(f"/proc/{postgres.pid}").st_uid == account.pw_uid
            run = _run_as(account, [python, "-c", SUPERVISOR, folder])
            assert run.returncode == 0, run.stderr


def _show(connection: psycopg.Connection, setting: str) -> str:
    row = connection.execute(f"SHOW {setting}").fetchone()
    assert row is not None
    return str(row[0])


def _own_without_owner(path: Path) -> "subprocess.Popen[str]":
    """A process that holds the server lock and is named in it, as a server without its owner."""
    code = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2);"
        "print(os.getpid(), file=file, flush=True); print('ready', flush=True); time.sleep(60)"
    )
    path.parent.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "ready\n"
    return process


def _supervisor(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SUPERVISOR, str(folder), *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert len(output.readline().split()) == 2
    return process


def _processes() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    listing = ["ps", "-A", "-o", "pid=,ppid=,stat="]
    rows = [line.split() for line in subprocess.check_output(listing, text=True).splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def _descendants(pid: int) -> set[int]:
    parents = _processes()
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {pid}


def _alive(pids: set[int]) -> set[int]:
    return pids & _processes().keys()


def _sessions(pids: set[int]) -> set[int]:
    sessions = set()
    for pid in pids:
        with suppress(ProcessLookupError):  # PostgreSQL's own processes come and go
            sessions.add(os.getsid(pid))
    return sessions


def _wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def _permissions(folder: Path) -> list[tuple[Path, int, int]]:
    above = (folder, *folder.parents)
    return [(path, path.stat().st_mode, path.stat().st_uid) for path in above]


def _run_as(account: pwd.struct_passwd, command: list[str]) -> "subprocess.CompletedProcess[str]":
    paths = (str(ROOT), sysconfig.get_path("platlib"))
    return subprocess.run(
        command,
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def _python_for(account: pwd.struct_passwd) -> str:
    version = f"python3.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            if _run_as(account, [python, "-c", "import scripts.servers"]).returncode == 0:
                return python
        except OSError:
            continue
    pytest.skip("no Python with our packages lies where an unprivileged user can reach it")
