"""Predictions that end strangely, and outputs that are not what they should be: F20 to F22."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.bodies import Fault, bad_bodies, good_bodies
from tests.faults.harness import Process, Stack, StartStack, wait_for
from tests.faults.oracle import check
from tests.faults.records import creates_about, jobs_about
from tests.faults.report import Scenario, full_only, sized

DATA_URL = "data:image/png;base64," + good_bodies()["with-script"]["body_base64"]
MIB = 1 << 20
ALLOWED_GROWTH_BYTES = 150 * MIB
# What it is, and the 120 MiB of DECODE_MEMORY_BYTES.
ALLOWED_DECODER_BYTES = 200 * MIB

# Strange lives of predictions, by a word for each kind: the fault on its create, and the job's
# error code, None for a job that completes.
LIVES: dict[str, tuple[dict[str, Any], str | None]] = {
    "aborted": ({"sequence": [(0, "starting"), (0.3, "aborted")]}, "prediction_aborted"),
    "canceled": ({"sequence": [(0, "starting"), (0.3, "canceled")]}, "prediction_canceled"),
    "unknown-for-ever": ({"sequence": [(0, "queued")]}, "prediction_canceled"),
    "unknown-for-a-while": (
        {"sequence": [(0, "booting"), (0.3, "queued"), (1, "succeeded")]},
        None,
    ),
    "back-and-on": (
        {"sequence": [(0, "starting"), (0.3, "processing"), (0.6, "starting"), (1, "succeeded")]},
        None,
    ),
    "back-for-ever": (
        {"sequence": [(0, "starting"), (0.3, "processing"), (0.6, "starting")]},
        "prediction_canceled",
    ),
    "output-null": ({"output": None}, "no_output"),
    "output-string": ({"output": DATA_URL}, None),
    "output-list": ({"output": [DATA_URL, DATA_URL]}, None),
    "output-object": ({"output": {"image": DATA_URL, "nsfw": False}}, None),
}


def test_f20_strange_ends_are_ends(start_stack: StartStack, scenario: Scenario) -> None:
    """`aborted`, `canceled`, unknown status, status going back, output null, string, list, object.

    20 each; every job is over by its deadline, and nothing is polled for ever.
    """
    stack = start_stack(STARTING_DEADLINE_SECONDS="5", RUNNING_DEADLINE_SECONDS="20")
    each = sized(2, 20)
    for words, (fault, _) in LIVES.items():
        kind = "status_sequence" if "sequence" in fault else "output"
        stack.replicate.push_fault("create", kind, prompt_contains=words, times=None, **fault)
        stack.post(each, words=words)
    took = stack.wait_until_done(sized(40, 120))
    assert {words: _ends(stack, words) for words in LIVES} == {
        words: {"completed" if code is None else code} for words, (_, code) in LIVES.items()
    }
    creates = {words: len(creates_about(stack, words)) for words in LIVES}
    # Only what the provider itself gave up before it began is bought again.
    assert each < creates.pop("aborted") <= 4 * each
    assert set(creates.values()) == {each}
    # What both deadlines make together, so that an orphan cannot run for ever.
    assert {entry.headers["cancel-after"] for entry in stack.replicate.creates()} == {"25s"}
    _is_quiet(stack)
    failures = {code for _, code in LIVES.values() if code}
    scenario.record(**vars(check(stack, failures=failures)), took_seconds=took)


def test_f21_bad_bodies_are_never_stored(start_stack: StartStack, scenario: Scenario) -> None:
    """Empty, cut, mislabelled, huge, endless, slow and exploding files, 10 each.

    Good pictures are saved, bad ones fail with a code; the worker grows by 150 MiB at most.
    (Scaled down: 10 MB instead of 100.)
    """
    limit = sized(8, 100) * MIB
    stack = start_stack(MAX_OUTPUT_BYTES=str(limit), DOWNLOAD_DEADLINE_SECONDS=sized("2", "10"))
    bad, good, each = bad_bodies(limit + MIB), good_bodies(), sized(1, 10)
    stack.post(10)
    stack.wait_until_done()
    for words, fault in [*good.items(), *((words, fault) for words, (fault, _) in bad.items())]:
        _push(stack, words, fault, None)
    # A byte a second: too slow the first time, whole the second time.
    _push(stack, "one-byte-a-second", {"kind": "slow", "bytes_per_second": 1}, each)
    words_of_all = [*bad, *good, "one-byte-a-second"]
    with _watched_memory(stack.workers[0]) as memory:
        for words in words_of_all:
            stack.post(each, words=words)
        took = stack.wait_until_done(sized(60, 240))
    assert {words: _ends(stack, words) for words in words_of_all} == {
        words: {bad[words][1] if words in bad else "completed"} for words in words_of_all
    }
    assert memory.growth_bytes <= ALLOWED_GROWTH_BYTES
    assert memory.decoder_bytes <= ALLOWED_DECODER_BYTES
    assert {path.suffix for path in stack.media.iterdir() if path.is_file()} == {".png"}
    assert not [path for path in stack.media.iterdir() if b"<script>" in _read(path)]
    summary = check(stack, failures={code for _, code in bad.values()})
    scenario.record(
        **vars(summary),
        worker_growth_mib=memory.growth_bytes / MIB,
        decoder_mib=memory.decoder_bytes / MIB,
        took_seconds=took,
    )


@full_only
@pytest.mark.parametrize("status", [404, 410])
def test_f22_an_expired_output_is_told_and_not_bought_again(
    start_stack: StartStack, scenario: Scenario, status: int
) -> None:
    """The output's address answers 404 or 410 before the download; 50 jobs.

    `output_expired`, one create each.
    """
    stack = start_stack()
    stack.replicate.push_fault("download", "status", status=status, times=None)
    stack.post(50)
    stack.wait_until_done()
    assert _ends(stack, "") == {"output_expired"}
    assert len(stack.replicate.creates()) == 50
    scenario.record(**vars(check(stack, failures={"output_expired"})))


def _push(stack: Stack, words: str, fault: Fault, times: int | None) -> None:
    stack.replicate.push_fault("download", prompt_contains=words, times=times, **fault)


def _ends(stack: Stack, words: str) -> set[str]:
    """Return how these jobs ended: `completed`, or their error codes."""
    return {job["error_code"] or job["status"] for job in jobs_about(stack, words)}


def _is_quiet(stack: Stack) -> None:
    """Nobody asks for a prediction any more."""

    def reads() -> int:
        requests = stack.replicate.ledger().requests
        return requests.get("get", 0) + requests.get("list", 0)

    seen = [-1, -1, -1]

    def unchanged() -> bool:
        seen.append(reads())
        return len(set(seen[-10:])) == 1  # for a second: three intervals of the poller

    wait_for(unchanged, "an end of the polling", 10)


@dataclass
class _Memory:
    """What a worker has grown by, and what its decoder took, each at its worst."""

    growth_bytes: int = 0
    decoder_bytes: int = 0


@contextmanager
def _watched_memory(worker: Process) -> Iterator[_Memory]:
    over = threading.Event()
    before = _resident_bytes(worker.pid)
    memory = _Memory()

    def watch() -> None:
        while not over.wait(0.02):
            growth_bytes = _resident_bytes(worker.pid) - before
            memory.growth_bytes = max(memory.growth_bytes, growth_bytes)
            for child in _decoders(worker.pid):
                memory.decoder_bytes = max(memory.decoder_bytes, _resident_bytes(child))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def _decoders(pid: int) -> list[int]:
    """Return the children that are decoders by now: until then one shows its parent's memory."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in lists for child in _text(path).split()]
    return [
        child for child in children if "app.media.child" in _text(Path(f"/proc/{child}/cmdline"))
    ]


def _resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", _text(Path(f"/proc/{pid}/status")))
    return int(found[1]) * 1024 if found else 0


def _text(path: Path) -> str:
    """Return nothing for what has ended; other systems than Linux have no /proc."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
