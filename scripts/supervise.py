"""Child processes that cannot outlive this one: a guard ends each when our pipe to it closes."""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ORPHAN_GRACE_SECONDS = 2.0
LARGEST_LOG_BYTES = 16 * 1024 * 1024
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServerError(Exception):
    """A program could not be started or kept running; the text is one sentence for a person."""


class Child:
    """A running program in a session of its own, with stdout and stderr appended to `log_path`.

    However this process ends, `kill -9` included, the program gets `orphan_signal` at once, and
    SIGKILL `ORPHAN_GRACE_SECONDS` later. Raises ServerError when the program cannot be run at all.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        account: tuple[int, int] | None = None,
        orphan_signal: int = signal.SIGKILL,
        inherited_files: Sequence[int] = (),
    ) -> None:
        order = {
            "command": [str(word) for word in command],
            "account": account,
            "orphan_signal": int(orphan_signal),
            "inherited_files": list(inherited_files),
        }
        self.log_path = log_path
        if log_path.exists() and log_path.stat().st_size > LARGEST_LOG_BYTES:
            log_path.unlink()
        with log_path.open("ab") as log:
            self._log_offset = log.tell()
            self._guard = subprocess.Popen(
                # -IS: the guard needs the standard library only, and must start in milliseconds.
                [sys.executable, "-IS", __file__, json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment,
                # Ctrl-C in a terminal reaches a whole group; we stop our children ourselves.
                start_new_session=True,
                pass_fds=tuple(inherited_files),
            )
        self.pid = self._read_pid()

    def poll(self) -> int | None:
        """The exit code once the program has ended (128 + n after signal n), else None."""
        code = self._guard.poll()
        if code is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
        return code

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Whether the program has ended within the time."""
        try:
            self._guard.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return self.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal; a program that has ended already is no error."""
        assert self._guard.stdin is not None
        if self._guard.stdin.closed:
            return
        try:
            os.write(self._guard.stdin.fileno(), bytes([number]))
        except BrokenPipeError:
            return

    def stop(self, *steps: tuple[int, float]) -> None:
        """Send each step's signal and wait its seconds, then SIGKILL; return when it has ended."""
        for number, grace_seconds in steps:
            self.signal(number)
            if self.wait(grace_seconds):
                return
        self.signal(signal.SIGKILL)
        self.wait()

    def output(self) -> list[str]:
        """The lines this program has logged so far."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_offset)
            return log.read().decode(errors="replace").splitlines()

    def _read_pid(self) -> int:
        assert self._guard.stdout is not None
        with self._guard.stdout as answers:
            answer = answers.readline().decode().strip()
        if answer.isdecimal():
            return int(answer)
        self.wait()
        raise ServerError(answer or f"The guard process failed; see {self.log_path}.")


def guard(order: dict[str, Any]) -> int:
    """Run the program as our child and obey the pipe on stdin; the program's exit code."""
    supervisor_pid = os.getppid()
    wakeup = _wakeup_file()
    try:
        child = _run(order)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{order['command'][0]} could not be run: {error}", flush=True)
        return 127
    print(child.pid, flush=True)
    while child.poll() is None:
        # The time limit is for a supervisor whose pipe a forked process of its own keeps open.
        ready, _, _ = select.select([0, wakeup], [], [], 1.0)
        if wakeup in ready:
            os.read(wakeup, 512)
        orders = os.read(0, 64) if 0 in ready else None
        if orders == b"" or os.getppid() != supervisor_pid:
            _end(child, order["orphan_signal"])
        for number in orders or b"":
            child.send_signal(number)
    _kill_group(child.pid)  # what the program itself has started and left behind
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wakeup_file() -> int:
    """A file that becomes readable when a child ends; requests to stop are ignored from here on."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Handlers, not SIG_IGN: a program inherits ignored signals, and could then not be stopped.
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _run(order: dict[str, Any]) -> "subprocess.Popen[bytes]":
    user, group = order["account"] or (None, None)
    return subprocess.Popen(
        order["command"],
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
        pass_fds=order["inherited_files"],
        user=user,
        group=group,
        extra_groups=None if user is None else [],
        preexec_fn=_die_with_parent(),  # safe: the guard has a single thread
    )


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux the kernel ends the program should the guard itself be killed.

    It runs after the change of user, which would clear the setting.
    """
    if sys.platform != "linux":
        return None
    libc, guard_pid = ctypes.CDLL(None), os.getpid()

    def request_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard_pid:
            os._exit(1)

    return request_signal


def _end(child: "subprocess.Popen[bytes]", first_signal: int) -> None:
    child.send_signal(first_signal)
    try:
        child.wait(ORPHAN_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _kill_group(leader_pid: int) -> None:
    try:
        os.killpg(leader_pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(guard(json.loads(sys.argv[1])))
