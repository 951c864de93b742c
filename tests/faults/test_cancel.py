"""Cancels at every moment of a job's life: F30."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from tests.faults.harness import Stack, StartStack, percentile, wait_for
from tests.faults.oracle import check
from tests.faults.records import (
    attempts_about,
    creates_about,
    jobs_about,
    seconds,
)
from tests.faults.report import Scenario, sized

# The moments at which jobs are cancelled, by a word for each; what holds them there is below.
MOMENTS = (
    "before-the-claim",
    "while-the-create-is-sent",
    "after-the-lost-answer",
    "while-it-starts",
    "while-it-runs",
    "while-it-is-stored",
    "before-the-retry",
    "as-it-comes",
)
CANCEL_REACHES_PROVIDER_SECONDS = 2.0


@dataclass(frozen=True)
class Cancel:
    """One confirmed cancel: when it was asked for, and when it was answered with `cancelled`."""

    job_id: str
    asked_at: float
    confirmed_at: float


def test_f30_cancels_at_every_moment_stick(start_stack: StartStack, scenario: Scenario) -> None:
    """50 cancels at each of 8 moments, double cancels, and cancels after the end; 400 jobs.

    One terminal state each; the provider is told whenever there is a prediction; no create is
    called after a confirmed cancel.
    """
    patient = {"RETRY_BACKOFF_FACTOR": "60", "REPLICATE_TIMEOUT_SECONDS": "5"}
    stack = start_stack(DOWNLOAD_CONCURRENCY="64", **patient)
    each = sized(5, 50)
    _hold_jobs_at_their_moments(stack)
    cancels = {words: _cancel_at(stack, words, each) for words in MOMENTS}
    assert all(len(cancels[words]) == each for words in MOMENTS[:-1])
    confirmed = [cancel for words in MOMENTS for cancel in cancels[words]]
    _cancelled_twice(stack, confirmed)
    stack.replicate.clear_faults()
    stack.wait_until_done()
    wait_for(lambda: not _untold(stack), "the provider's cancels", 60, lambda: _untold(stack))
    _assert_no_create_after(stack, confirmed)
    told_after = _seconds_until_told(stack, confirmed)
    assert max(told_after) <= CANCEL_REACHES_PROVIDER_SECONDS
    assert {job["status"] for words in MOMENTS[:-1] for job in jobs_about(stack, words)} == {
        "cancelled"
    }
    _completed_stay_completed(stack, sized(2, 50))
    leftovers = _remove_files_of_cancelled_jobs(stack)
    scenario.record(
        **vars(check(stack)),
        cancels=len(confirmed),
        provider_cancel_p50_seconds=percentile(told_after, 0.5),
        slowest_provider_cancel_seconds=max(told_after),
        files_of_cancelled_jobs=leftovers,
    )


def _hold_jobs_at_their_moments(stack: Stack) -> None:
    """Have the provider keep jobs where their words say; one fault each."""
    push = stack.replicate.push_fault
    starting, running = [(0, "starting")], [(0, "starting"), (0.1, "processing")]
    lives = {"while-it-starts": starting, "while-it-runs": running}
    for words, sequence in lives.items():
        push("create", "status_sequence", sequence=sequence, prompt_contains=words, times=None)
    push("create", "delay", seconds=3, prompt_contains=MOMENTS[1], times=None)
    push("create", "accept_then_drop", prompt_contains=MOMENTS[2], times=None)
    push("download", "slow", bytes_per_second=20, prompt_contains=MOMENTS[5], times=None)
    push("create", "fail", prompt_contains=MOMENTS[6], times=None)


def _cancel_at(stack: Stack, words: str, count: int) -> list[Cancel]:
    """Post jobs, wait until all are at their moment, and cancel them all at once."""
    worker = stack.workers[0]
    if words == "before-the-claim":
        worker.pause()
    ids = stack.post(count, words=words, threads=count if words == "as-it-comes" else 8)
    if words == "as-it-comes":
        return _cancel(stack, ids, lambda: time.sleep(stack.random.uniform(0, 0.5)))
    wait_for(lambda: _at_their_moment(stack, words) == count, words)
    cancels = _cancel(stack, ids)
    worker.resume()
    return cancels


def _at_their_moment(stack: Stack, words: str) -> int:
    """Return how many of these jobs are where they are to be cancelled."""
    _close_the_breaker(stack)
    jobs, creates = jobs_about(stack, words), creates_about(stack, words)
    attempts = attempts_about(stack, words)
    waiting = sum(job["phase"] == "waiting" for job in jobs)
    counts: dict[str, int] = {
        "before-the-claim": sum(job["status"] == "pending" for job in jobs),
        "while-the-create-is-sent": sum(job["phase"] == "submitting" for job in jobs),
        "after-the-lost-answer": min(len(creates), len(attempts)),
        "while-it-starts": waiting,
        "while-it-runs": min(waiting, sum(entry.status == "processing" for entry in creates)),
        "while-it-is-stored": sum(len(entry.downloads) > 0 for entry in creates),
        "before-the-retry": sum(job["next_attempt_at"] is not None for job in jobs),
    }
    return counts[words]


def _close_the_breaker(stack: Stack) -> None:
    """Forget failures: after ten lost answers the other creates would be held back."""
    with stack.redis() as broker:
        broker.delete("media:{governor}:create:failures")


def _cancel(
    stack: Stack, ids: Sequence[str], hesitate: Callable[[], None] = lambda: None
) -> list[Cancel]:
    """DELETE all jobs at once; return the cancels that were confirmed."""
    with ThreadPoolExecutor(min(len(ids), 16)) as pool, stack.client() as client:

        def cancel(job_id: str) -> Cancel | None:
            hesitate()
            asked_at = time.time()
            response = _delete(stack, client, job_id)
            if response.status_code == 409:  # it had ended already
                return None
            assert response.json()["status"] == "cancelled"
            return Cancel(job_id, asked_at, time.time())

        return [done for done in pool.map(cancel, ids) if done]


def _delete(stack: Stack, client: httpx.Client, job_id: str) -> httpx.Response:
    response = stack.request(client, "DELETE", f"/api/v1/jobs/{job_id}")
    assert response is not None
    assert response.status_code in (200, 409)
    return response


def _cancelled_twice(stack: Stack, cancels: Sequence[Cancel]) -> None:
    """A second cancel finds a job that has ended, whatever the first one met."""
    with stack.client() as client:
        for cancel in cancels:
            assert _delete(stack, client, cancel.job_id).status_code == 409


def _untold(stack: Stack) -> list[str]:
    """Return predictions of cancelled jobs that the provider was not asked to stop."""
    cancelled = {job["prompt"] for job in jobs_about(stack) if job["status"] == "cancelled"}
    settled = {
        attempt["prediction_id"]
        for attempt in attempts_about(stack)
        if attempt["state"] == "settled" and attempt["outcome"] == "failed"
    }
    return [
        entry.id
        for entry in stack.replicate.creates()
        if entry.input["prompt"] in cancelled and not entry.cancel_calls and entry.id not in settled
    ]


def _assert_no_create_after(stack: Stack, cancels: Sequence[Cancel]) -> None:
    confirmed_at = {cancel.job_id: cancel.confirmed_at for cancel in cancels}
    prompts = {job["prompt"]: str(job["id"]) for job in jobs_about(stack)}
    for entry in stack.replicate.creates():
        at = confirmed_at.get(prompts[entry.input["prompt"]])
        assert at is None or seconds(entry.called_at) <= at


def _seconds_until_told(stack: Stack, cancels: Sequence[Cancel]) -> list[float]:
    """Return how long the provider's cancel took after the client's, where its id was known."""
    asked_at = {cancel.job_id: cancel.asked_at for cancel in cancels}
    known = {
        attempt["prediction_id"]: asked_at[str(attempt["job_id"])]
        for words in ("while-it-starts", "while-it-runs", "while-it-is-stored")
        for attempt in attempts_about(stack, words)
    }
    return [
        seconds(entry.cancel_calls[0]) - known[entry.id]
        for entry in stack.replicate.creates()
        if entry.id in known
    ]


def _completed_stay_completed(stack: Stack, count: int) -> None:
    """A cancel after the end is refused and changes nothing."""
    ids = stack.post(count, words="after-the-end")
    stack.wait_until_done()
    before = jobs_about(stack, "after-the-end")
    assert {job["status"] for job in before} == {"completed"}
    with stack.client() as client:
        for job_id in ids:
            assert _delete(stack, client, job_id).status_code == 409
    assert jobs_about(stack, "after-the-end") == before


def _remove_files_of_cancelled_jobs(stack: Stack) -> int:
    """Remove and count files that were in place when the cancel beat the commit of their job.

    They are nobody's: a file is written before the row that would name it. All other files
    without a row are the oracle's to find.
    """
    cancelled = {str(job["id"]) for job in jobs_about(stack) if job["status"] == "cancelled"}
    paths = [
        path
        for folder in (stack.media, stack.metadata)
        for path in folder.iterdir()
        if path.is_file() and path.stem in cancelled
    ]
    for path in paths:
        path.unlink()
    return len(paths)
