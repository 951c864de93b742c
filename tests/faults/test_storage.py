"""A disk or bucket that is full, read-only or broken, deaths while storing: F26, F27, F28."""

import base64
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.faults.bucket import bucket_settings, fetch_bucket
from tests.faults.harness import Stack, StartStack, wait_for
from tests.faults.oracle import check
from tests.faults.proxy import FaultProxy
from tests.faults.report import Scenario, full_only, sized
from tests.faults.test_workers import keep_workers

SMALL = "size=8m"
LARGE = "size=256m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An 8 MiB file system where the stack will keep its files; needs root on Linux."""
    folder = tmp_path / "0" / "storage"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", SMALL, "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def _serve_noise(stack: Stack) -> None:
    """Every output is a PNG of 1 MiB that no compression makes smaller."""
    side = 592
    noise = Image.frombytes("RGB", (side, side), random.Random(1).randbytes(side * side * 3))
    encoded = BytesIO()
    noise.save(encoded, "PNG", compress_level=0)
    body = base64.b64encode(encoded.getvalue()).decode()
    stack.replicate.push_fault("download", "bytes", times=None, body_base64=body)


def test_f26_the_disk_is_full(
    small_disk: Path, start_stack: StartStack, scenario: Scenario
) -> None:
    """40 jobs of 1 MiB on a disk of 8 MiB that grows after 20 s: nothing torn, all finish."""
    jobs = sized(16, 40)
    stack = start_stack()
    _serve_noise(stack)
    stack.post(jobs)
    wait_for(lambda: "storage_failed" in stack.log_text(), "a full disk")
    time.sleep(sized(3, 20))
    assert stack.counts().get("completed", 0) < jobs
    _remount(small_disk, LARGE)
    rest_seconds = stack.wait_until_done(60)
    scenario.record(rest_seconds=rest_seconds, **vars(check(stack)))


@full_only
def test_f27_the_disk_is_read_only(
    small_disk: Path, start_stack: StartStack, scenario: Scenario
) -> None:
    """50 jobs on a disk that is read-only for 20 s: as F26."""
    _remount(small_disk, LARGE)
    stack = start_stack()
    stack.replicate.configure(latency_seconds=10)
    stack.post(50)
    _remount(small_disk, "ro")
    with stack.outage(5):
        wait_for(lambda: "storage_failed" in stack.log_text(), "a read-only disk")
        time.sleep(20)
        _remount(small_disk, "rw")
    rest_seconds = stack.wait_until_done(60)
    scenario.record(rest_seconds=rest_seconds, **vars(check(stack)))


@full_only
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_f27_the_disk_fails(
    start_stack: StartStack, scenario: Scenario, tmp_path: Path, error: str
) -> None:
    """50 jobs, each rename or flush fails for 20 s: as F26."""
    failing = tmp_path / "failing"
    failing.touch()
    stack = start_stack(SABOTAGE_ERRNO=error, SABOTAGE_ERRNO_WHILE=str(failing))
    stack.post(50)
    wait_for(lambda: "storage_failed" in stack.log_text(), "a failing disk")
    time.sleep(20)
    assert "completed" not in stack.counts()
    failing.unlink()
    rest_seconds = stack.wait_until_done(60)
    scenario.record(rest_seconds=rest_seconds, **vars(check(stack)))


def _http(status: str, code: str) -> bytes:
    """Return what an S3 server answers that will not take a file."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


# How the bucket fails, by a word for each manner.
BUCKET_FAILURES: dict[str, Callable[[FaultProxy], None]] = {
    "refuses": FaultProxy.refuse,
    "is silent": FaultProxy.hold,
    "answers 500": lambda s3: s3.answer(_http("500 Internal Server Error", "InternalError")),
    "answers 412": lambda s3: s3.answer(_http("412 Precondition Failed", "PreconditionFailed")),
    "finds another checksum": lambda s3: s3.answer(_http("400 Bad Request", "BadDigest")),
}


@full_only
@pytest.mark.parametrize("manner", BUCKET_FAILURES)
def test_f27_the_bucket_fails(
    start_stack: StartStack, scenario: Scenario, s3_url: str, manner: str
) -> None:
    """50 jobs, the bucket fails for 20 s: none is completed without its file, all finish after.

    It is silent for 35 s: until the client gives up.
    """
    with FaultProxy(httpx.URL(s3_url).port or 0) as s3:
        stack = start_stack(**bucket_settings(f"http://127.0.0.1:{s3.port}"))
        BUCKET_FAILURES[manner](s3)
        stack.post(50)
        time.sleep(35 if manner == "is silent" else 20)
        assert "completed" not in stack.counts()
        s3.pass_on()
        rest_seconds = stack.wait_until_done(120)
    assert set(stack.counts()) == {"completed"}
    fetch_bucket(stack, s3_url)
    scenario.record(rest_seconds=rest_seconds, **vars(check(stack)))


@full_only
def test_f28_workers_that_die_while_storing(
    start_stack: StartStack, scenario: Scenario, tmp_path: Path
) -> None:
    """60 jobs, kill -9 after the temp file, after the rename, before the UPDATE: files = rows."""
    notes = tmp_path / "notes"
    notes.mkdir()
    stack = start_stack(workers=0, SABOTAGE_CRASHES=str(notes))
    for point in ("temp", "renamed", "committing"):
        stack.post(4, words=f"dies-once-{point}")
        stack.post(16)
    deaths = keep_workers(stack, 2, seconds=240)
    assert deaths >= 6
    assert len(list(notes.iterdir())) == 12
    summary = check(stack)
    assert summary.leftover_temps > 0
    _are_swept_when_old(stack)
    scenario.record(worker_deaths=deaths, **vars(summary))


def _are_swept_when_old(stack: Stack) -> None:
    """Make the half-written files old, and wait until the worker that starts has removed them."""
    hidden = list((stack.media / ".incoming").iterdir())
    assert hidden
    for path in hidden:
        os.utime(path, (0, 0))
    stack.start_worker()
    wait_for(lambda: not any(path.exists() for path in hidden), "the sweep of old files", 20)
