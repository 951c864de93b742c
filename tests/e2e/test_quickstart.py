"""scripts/quickstart.sh from prompt to picture, and everything that may come between."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 60.0
FAST_MOCK = {"REPLICATE_MOCK_DELAY_MIN": "0", "REPLICATE_MOCK_DELAY_MAX": "0.2"}


class Quickstart:
    """One run of the quickstart in a copy of the project, on ports of its own."""

    def __init__(self, project: Path, *arguments: str, **environment: str) -> None:
        self.api_port, self.flower_port = free_port(), free_port()
        self.output_path = project / "output.txt"
        own = {"API_PORT": str(self.api_port), "FLOWER_PORT": str(self.flower_port)}
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts.quickstart", *arguments],
                cwd=project,
                env={"PATH": os.defpath} | FAST_MOCK | own | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    @property
    def api(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", trust_env=False)

    def wait_until_serving(self) -> None:
        _wait_for(lambda: "Ctrl-C stops everything" in self.output or self.has_ended(), self)
        assert not self.has_ended(), self.output

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def exit_code(self) -> int:
        _wait_for(self.has_ended, self)
        return self.process.returncode

    def path_after(self, label: str) -> Path:
        line = next(line for line in self.output.splitlines() if line.startswith(label))
        return Path(line.removeprefix(label).strip())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the quickstart runs: its data must not be that of a checkout in use."""
    path = tmp_path_factory.mktemp("a project")  # the space is meant
    for folder in ("app", "alembic", "scripts", "requirements"):
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("alembic.ini", "requirements.txt"):
        shutil.copy(ROOT / file, path)
    return path


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., Quickstart]]:
    started: list[Quickstart] = []

    def run(*arguments: str, **environment: str) -> Quickstart:
        started.append(Quickstart(project, *arguments, **environment))
        return started[-1]

    yield run
    for quickstart in started:
        if not quickstart.has_ended():
            quickstart.process.kill()
            quickstart.process.wait()


class TestQuickstart:
    def test_once_saves_the_picture_and_stops_everything(
        self, start: Callable[..., Quickstart]
    ) -> None:
        quickstart = start("a [red] lighthouse", "--once")
        assert quickstart.exit_code() == 0, quickstart.output
        assert "Prompt: a [red] lighthouse\n" in quickstart.output
        with Image.open(quickstart.path_after("Picture")) as picture:
            picture.verify()
        assert quickstart.path_after("Metadata").stat().st_size > 0
        for port in (quickstart.api_port, quickstart.flower_port):
            with socket.socket() as visitor:
                assert visitor.connect_ex(("127.0.0.1", port)) != 0

    def test_it_serves_until_ctrl_c(self, start: Callable[..., Quickstart], project: Path) -> None:
        quickstart = start()
        quickstart.wait_until_serving()
        audit = f'. .quickstart/env && "{sys.executable}" scripts/audit_storage.py'
        subprocess.run(["sh", "-c", audit], cwd=project, capture_output=True, check=True)
        with quickstart.api as api:
            assert api.get("/docs").is_success
            assert api.get("/api/v1/jobs").json()[0]["prompt"] == "a lighthouse at dawn"
            flower = api.get(f"http://127.0.0.1:{quickstart.flower_port}/workers")
        assert flower.is_success
        children = _descendants(quickstart.process.pid)
        quickstart.process.send_signal(signal.SIGINT)
        assert quickstart.exit_code() == 0
        assert not _alive(children)

    def test_kill_9_leaves_no_process_and_loses_no_data(
        self, start: Callable[..., Quickstart]
    ) -> None:
        killed = start("before the crash")
        killed.wait_until_serving()
        children = _descendants(killed.process.pid)
        assert len(children) > 10  # five programs, their guards, PostgreSQL's own processes
        killed.process.kill()
        killed.process.wait()
        _wait_for(lambda: not _alive(children), killed)
        quickstart = start("after the crash")
        quickstart.wait_until_serving()
        with quickstart.api as api:
            prompts = [job["prompt"] for job in api.get("/api/v1/jobs").json()]
        assert prompts[:2] == ["after the crash", "before the crash"]

    def test_a_program_that_dies_is_named_and_ends_the_rest(
        self, start: Callable[..., Quickstart]
    ) -> None:
        quickstart = start()
        quickstart.wait_until_serving()
        children = _descendants(quickstart.process.pid)
        os.kill(_pid_of("celery_app worker", children), signal.SIGKILL)
        assert quickstart.exit_code() == 1
        assert "The worker has ended with exit code 137; the last lines of" in quickstart.output
        assert not _alive(children)

    def test_a_job_that_fails_ends_once_with_an_error(
        self, start: Callable[..., Quickstart]
    ) -> None:
        quickstart = start("--once", REPLICATE_MOCK_FAILURE_RATE="1", MAX_RETRY_ATTEMPTS="0")
        assert quickstart.exit_code() == 1
        assert "There is no picture: " in quickstart.output

    @pytest.mark.parametrize("setting", ["API_PORT", "FLOWER_PORT"])
    def test_a_taken_port_is_one_sentence_that_names_the_setting(
        self, start: Callable[..., Quickstart], setting: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            quickstart = start(**{setting: str(port)})
            assert quickstart.exit_code() == 1
        user = "the API" if setting == "API_PORT" else "Flower"
        assert (
            quickstart.output == f"Port {port} for {user} is taken: set {setting} to a free one.\n"
        )

    def test_a_wrong_setting_is_told_before_anything_starts(
        self, start: Callable[..., Quickstart]
    ) -> None:
        quickstart = start(API_PORT="eighty")
        assert quickstart.exit_code() == 1
        assert "API_PORT" in quickstart.output
        assert "Starting" not in quickstart.output


class TestBootstrap:
    def test_no_fitting_python_is_one_sentence(self, project: Path, tmp_path: Path) -> None:
        broken = dict.fromkeys(("python3", "python3.12"), "exit 127")  # as pyenv's shims may be
        result = _bootstrap(project, _tools(tmp_path, **broken))
        assert result.returncode == 1
        assert result.stderr.startswith("Python 3.11, 3.12, 3.13 or 3.14 is needed")

    def test_a_missing_venv_module_is_one_sentence(self, project: Path, tmp_path: Path) -> None:
        without = f'case "$2" in *ensurepip*) exit 1 ;; esac; exec {sys.executable} "$@"'
        result = _bootstrap(project, _tools(tmp_path, python3=without))
        assert result.returncode == 1
        assert "lacks its venv module: install it" in result.stderr

    @pytest.mark.parametrize(
        ("tool", "answer", "sentence"),
        [
            ("uname", "echo Linux riscv64", "no wheels for Linux riscv64"),
            (
                "df",
                'printf "head\\n/dev/x 9 9 10240 9 /\\n"',
                "There is no space: 400 MB are needed",
            ),
        ],
    )
    def test_an_unfit_machine_is_one_sentence(
        self, project: Path, tmp_path: Path, tool: str, answer: str, sentence: str
    ) -> None:
        result = _bootstrap(project, _tools(tmp_path, **{tool: answer}))
        assert result.returncode == 1
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1


def _bootstrap(project: Path, tools: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [project / "scripts" / "bootstrap.sh"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )


def _tools(folder: Path, **scripts: str) -> Path:
    """A folder for PATH that has what a bare machine has, with some tools replaced."""
    for name in ("awk", "bash", "cat", "cksum", "df", "dirname", "env", "getconf", "sh", "uname"):
        tool = shutil.which(name)
        assert tool is not None
        (folder / name).symlink_to(tool)
    for name, script in scripts.items():
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return folder


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and command of every process that is not a zombie."""
    listing = ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="]
    output = subprocess.check_output(listing, text=True)
    rows = [line.split(maxsplit=3) for line in output.splitlines()]
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if row[2][0] != "Z"}


def _descendants(pid: int) -> set[int]:
    parents = {child: parent for child, (parent, _) in _processes().items()}
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {pid}


def _alive(pids: set[int]) -> set[int]:
    return pids & _processes().keys()


def _pid_of(words: str, pids: set[int]) -> int:
    """The program with the words in its command, which are not in that of its guard."""
    commands = {pid: command for pid, (_, command) in _processes().items() if pid in pids}
    return next(pid for pid, command in commands.items() if words in command)


def _wait_for(condition: Callable[[], bool], quickstart: Quickstart) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, quickstart.output
        time.sleep(0.05)
