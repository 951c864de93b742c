"""A provider that loses answers, slows us down, fails or is gone: F12 to F19."""

import math
import time
from collections.abc import Sequence
from email.utils import formatdate, parsedate_to_datetime
from itertools import cycle, pairwise, product
from typing import Any

import pytest
from redis import Redis

from tests.doubles.replicate_ledger import LedgerEntry
from tests.faults.bodies import one_colour
from tests.faults.harness import FULL, PATIENT, Stack, StartStack, wait_for
from tests.faults.oracle import check
from tests.faults.records import (
    attempts_about,
    jobs_about,
    seconds,
)
from tests.faults.report import Scenario, full_only, sized

# Webhooks are asked for, and never come.
NOBODY_TELLS = {"RECONCILE_DEADLINE_SECONDS": "5", "PUBLIC_BASE_URL": "https://media.test"}
SERVER_ERRORS = (500, 502, 503, 504)
# From the permission to call until the call arrives, on a busy machine.
ON_ITS_WAY_SECONDS = 0.5
# Requests that Replicate's API has besides the downloads, which have hosts of their own.
API_CALLS = ("create", "get", "list", "cancel", "models", "secret")


@pytest.mark.parametrize("way", ["list", "webhook"])
def test_f12_lost_create_answers_are_adopted(
    start_stack: StartStack, scenario: Scenario, way: str
) -> None:
    """100 of 300 creates are accepted and their answers cut: 0 duplicates, all are adopted.

    Once by the provider's list alone, which shows them late; once by its webhooks alone, while the
    list is dead.
    """
    public = {"PUBLIC_BASE_URL": "https://media.test"} if way == "webhook" else {}
    stack = start_stack(workers=2, **PATIENT, **public)
    cut = sized(12, 100)
    if way == "webhook":
        stack.replicate.configure(webhook_rewrite=stack.url)
        stack.replicate.push_fault("list", "status", status=403, times=None)
    else:
        stack.replicate.configure(list_lag_seconds=0.7)  # of the grace of 1 s
    stack.replicate.push_fault("create", "accept_then_drop", prompt_contains="lost", times=None)
    for _ in range(cut // 4):
        stack.post(4, words="lost")
        stack.post(8)
    stack.wait_until_done(180)
    lost = _unanswered(stack)
    adopted = {job["external_job_id"] for job in jobs_about(stack)} & {e.id for e in lost}
    assert len(adopted) == len(lost) == cut
    _record(scenario, stack, adopted=len(adopted))


@full_only
def test_f13_late_create_answers_outlive_their_worker(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """100 creates are accepted and answered 5 s beyond the time-out, a worker killed meanwhile."""
    stack = start_stack(workers=2)
    stack.replicate.push_fault("create", "accept_then_delay", times=None, seconds=8)
    stack.post(100)
    wait_for(lambda: len(stack.replicate.creates()) >= 50, "the first creates")
    stack.workers[0].kill()
    stack.start_worker()
    # No create is ever answered, so the breaker is open: those that did not leave before, or were
    # reset with their worker, go one in ten seconds, as probes.
    stack.wait_until_done(600)
    assert not [entry for entry in stack.replicate.creates() if entry.reply_delivered]
    _record(scenario, stack, adopted=len(stack.replicate.creates()))


@full_only
def test_f14_what_nobody_can_prove_is_paid_again_where_that_is_wanted(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """8 creates are lost as in the other F14, ON_UNKNOWN_OUTCOME=resubmit: all are completed."""
    stack = start_stack(ON_UNKNOWN_OUTCOME="resubmit", **NOBODY_TELLS)
    stack.replicate.push_fault("create", "accept_then_drop", times=8)
    stack.replicate.push_fault("list", "status", status=403, times=None)
    stack.post(8)
    stack.wait_until_done(240)
    assert stack.counts() == {"completed": 8}
    outcomes = [attempt["outcome"] for attempt in attempts_about(stack)]
    assert outcomes.count("unknown") == 8
    figures = {**vars(check(stack, may_pay_again=True))}
    paid_again = figures.pop("created_twice")  # as it was wanted: the promise is not broken
    assert paid_again == 8
    scenario.record(**figures, paid_again=paid_again)


@full_only
def test_f14_what_nobody_can_prove_is_not_paid_again(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """50 creates are lost, list and webhook are dead: `provider_outcome_unknown`, paid once."""
    stack = start_stack(**NOBODY_TELLS)
    stack.replicate.push_fault("create", "accept_then_drop", times=None)
    stack.replicate.push_fault("list", "status", status=403, times=None)
    stack.post(50)
    # No create is answered: those that did not leave before the breaker opened go as its probes.
    stack.wait_until_done(600)
    assert {job["error_code"] for job in jobs_about(stack)} == {"provider_outcome_unknown"}
    assert len(stack.replicate.creates()) == 50
    _record(scenario, stack, failures={"provider_outcome_unknown"})


def test_f15_throttling_in_every_form_costs_time_only(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """600/min then 6/min burst 1, and every form of 429; 120 jobs, 4 workers: 0 attempts spent.

    Creates never exceed the limit by more than 5 % in any window, give or take the time that a
    call is on its way; all jobs are done. (Scaled down: 120/min instead of 6, Retry-After 2
    instead of 5, and 2 workers.)
    """
    limit, burst = 600, 10
    stack = start_stack(workers=sized(2, 4), REPLICATE_CREATES_PER_MINUTE=str(limit))
    stack.post(sized(40, 200))
    stack.wait_until_done()
    calls = [seconds(call) for call in stack.replicate.ledger().create_calls]
    excess = _excess(calls, limit, burst)
    assert excess <= 0.05, f"{excess:.0%} more creates than allowed"

    asked = sized(2, 5)
    replies = throttled_replies(asked)
    for form, reply in replies.items():
        stack.replicate.push_fault(
            "create", "status", status=429, prompt_contains=form, times=sized(1, 5), **reply
        )
        stack.post(sized(1, 5), words=form)
    stack.wait_until_done()
    waits = {form: _waited(stack, form) for form in replies}
    assert all(waits[form] >= asked for form in ("header", "body-only", "text-only")), waits
    assert waits["missing"] >= 1
    # Not for how long: when the answer was given, a part of the time had gone by.
    date = parsedate_to_datetime(replies["date"]["headers"]["retry-after"])
    repeated = [a for a in attempts_about(stack, "date") if a["number"] > 1]
    assert min(attempt["created_at"] for attempt in repeated) >= date

    jobs, before = sized(5, 25), len(stack.replicate.ledger().create_calls)
    stack.replicate.configure(creates_per_minute=sized(120, 6), creates_burst=1)
    stack.post(jobs, words="slowly")
    stack.wait_until_done(sized(60, 600))
    calls_each = (len(stack.replicate.ledger().create_calls) - before) / jobs
    # A pause is everybody's: were it each job's own, there would be a dozen calls for each.
    assert not FULL or calls_each <= 8
    stack.replicate.configure(creates_per_minute=None)

    longest_pause = _absurd_wait_is_bounded(stack)
    assert {job["retry_count"] for job in jobs_about(stack)} == {0}
    assert {job["status"] for job in jobs_about(stack)} == {"completed"}
    _record(
        scenario,
        stack,
        excess=excess,
        throttles=sum(job["throttle_count"] for job in jobs_about(stack)),
        calls_per_slow_create=calls_each,
        longest_pause_seconds=longest_pause,
    )


@full_only
def test_f15_a_low_rate_of_our_own(start_stack: StartStack, scenario: Scenario) -> None:
    """`REPLICATE_CREATES_PER_MINUTE=6`, 4 workers, 20 jobs: nobody is ever throttled.

    Those that wait for the rate are not claimed: their own deadline has not begun.
    """
    stack = start_stack(workers=4, REPLICATE_CREATES_PER_MINUTE="6")
    stack.replicate.configure(creates_per_minute=6.3, creates_burst=1)
    stack.post(20)
    time.sleep(20)
    waiting = stack.counts()["pending"]
    assert waiting >= 20 - 3 - 4 * 3  # created by now; begun by each
    stack.wait_until_done(240)
    calls = [seconds(call) for call in stack.replicate.ledger().create_calls]
    excess = _excess(calls, 6, 1)
    assert excess <= 0.05, f"{excess:.0%} more creates than allowed"
    assert {job["retry_count"] + job["throttle_count"] for job in jobs_about(stack)} == {0}
    _record(scenario, stack, excess=excess, waiting_after_20_seconds=waiting)


def throttled_replies(asked_seconds: int) -> dict[str, dict[str, Any]]:
    """Return what a 429 may look like that asks for so many seconds, by a word for each form."""
    text = f"Request was throttled. Your rate limit resets in ~{asked_seconds}s."
    date = formatdate(math.ceil(time.time()) + asked_seconds, usegmt=True)
    return {
        "header": {"headers": {"retry-after": str(asked_seconds)}, "body": "slow down"},
        "body-only": {"body": {"status": 429, "retry_after": asked_seconds}},
        "text-only": {"body": {"status": 429, "detail": text}},
        "date": {"headers": {"retry-after": date}, "body": "slow down"},
        "missing": {"body": "slow down"},
    }


def _excess(calls: Sequence[float], per_minute: float, burst: int) -> float:
    """Return by how much the calls in the worst window exceed what rate and burst allow."""
    ordered = sorted(calls)
    worst = -1.0
    for first, begin in enumerate(ordered):
        for last in range(first + burst, len(ordered)):
            window_seconds = ordered[last] - begin + ON_ITS_WAY_SECONDS
            allowed = burst + window_seconds * per_minute / 60
            worst = max(worst, (last - first + 1) / allowed - 1)
    return worst


def _waited(stack: Stack, words: str) -> float:
    """Return the shortest time between two attempts of a job."""
    attempts = attempts_about(stack, words)
    pairs = [
        (later["created_at"] - earlier["created_at"]).total_seconds()
        for earlier, later in pairwise(attempts)
        if earlier["job_id"] == later["job_id"]
    ]
    assert pairs, f"no attempt was throttled: {words}"
    return float(min(pairs))


def _absurd_wait_is_bounded(stack: Stack) -> float:
    """Have a 429 ask for a day; return for how long it pauses. The test does not wait for it."""
    day = {"headers": {"retry-after": "86400"}, "body": {"retry_after": 86400}}
    stack.replicate.push_fault("create", "status", status=429, times=1, **day)
    stack.post(1, words="absurd")
    with stack.redis() as broker:
        key = "media:{governor}:create:paused"
        wait_for(lambda: broker.pttl(key) > 10_000, "the pause")
        pause_seconds = float(broker.pttl(key)) / 1000
        wait_for(lambda: jobs_about(stack, "absurd")[0]["next_attempt_at"], "the job's wait")
        due = "SELECT extract(epoch FROM next_attempt_at - now()) FROM jobs WHERE prompt LIKE %s"
        wait_seconds = float(stack.query(due, "%absurd")[0][0])
        broker.delete(key)
    stack.query("UPDATE jobs SET next_attempt_at = now(), ring_at = now() WHERE status = 'pending'")
    stack.wait_until_done()
    longest = max(pause_seconds, wait_seconds)
    assert 60 < longest <= 330  # five minutes and a tenth
    return longest


def test_f16_errors_in_a_third_of_all_calls_fail_no_job(
    start_stack: StartStack, scenario: Scenario
) -> None:
    """500, 502, 503 and 504 make 30 % of creates, reads and downloads fail; 300 jobs.

    Half of the failing creates are accepted all the same. No job fails, none is paid twice. (With
    12 retries: one of seven creates is lost, and of 300 jobs one may well lose four, which is what
    the default of 3 allows.)
    """
    stack = start_stack(workers=2, MAX_RETRY_ATTEMPTS="12", **PATIENT)
    stack.warm_up()
    for on in ("get", "list", "download"):
        _fail_share(stack, on, ["status"], 0.3)
    _fail_share(stack, "create", ["status", "accept_then_status"], 0.3)
    stack.post(sized(16, 300))
    took = stack.wait_until_done(sized(90, 300))
    fired = stack.replicate.ledger().faults_fired
    kinds = ("create status", "create accept_then_status", "get status", "list status")
    failing = {*kinds, "download status"}
    assert failing <= fired.keys()
    assert set(stack.counts()) == {"completed"}
    _record(scenario, stack, max_retries=12, failed_calls=sum(fired.values()), took_seconds=took)


def _fail_share(stack: Stack, on: str, kinds: Sequence[str], share: float) -> None:
    """Make this share of the calls fail, each status and kind as often as the others.

    One of each for certain: of few calls none may fail by chance. (No more: ten in a row would
    open the breaker.)
    """
    for status, kind in zip(SERVER_ERRORS, cycle(kinds), strict=False):
        stack.replicate.push_fault(on, kind, status=status, times=1)
    every = 1 - (1 - share) ** (1 / (len(SERVER_ERRORS) * len(kinds)))
    for number, (status, kind) in enumerate(product(SERVER_ERRORS, kinds)):
        stack.replicate.push_fault(
            on, kind, status=status, times=None, probability=every, seed=stack.seed + number
        )


@full_only
@pytest.mark.parametrize("manner", ["resets", "refuses"])
def test_f17_a_dead_provider_opens_the_breaker(
    start_stack: StartStack, scenario: Scenario, manner: str
) -> None:
    """The provider is dead for 3 minutes, 200 jobs: the breaker opens within 15 s.

    At most 20 calls a minute while it is open, no job fails, all complete afterwards. Once with
    connections that it resets, once with a port that nothing listens on.
    """
    stack = start_stack(workers=2, links=("provider",))
    stack.warm_up()
    stack.post(5)
    stack.wait_until_done()
    calls = _calls(stack)
    for on in ("create", "get", "list", "cancel", "models"):
        stack.replicate.push_fault(on, "drop", times=None)
    if manner == "refuses":
        stack.proxies["provider"].refuse()
    died, asked = time.monotonic(), _calls(stack, "create")
    stack.post(200)
    with stack.redis() as broker:
        wait_for(
            lambda: int(broker.get("media:{governor}:create:failures") or 0) >= 10, "the breaker"
        )
        opened_after = time.monotonic() - died
        time.sleep(5)  # what was under way is over
        calls, counted_from = _calls(stack), time.monotonic()
        probes = _probes(broker, until=died + 180)
        # What is refused reaches nobody who could count it, but its permission does.
        calls = max(probes, _calls(stack) - calls)
        per_minute = calls * 60 / (time.monotonic() - counted_from)
    assert set(stack.counts()) <= {"pending", "processing", "completed"}
    retries = sum(job["retry_count"] for job in jobs_about(stack))
    # What was sent and reset may have been accepted: to be sure that it was not costs a retry.
    assert retries <= (_calls(stack, "create") - asked if manner == "resets" else 0)
    stack.replicate.clear_faults()
    stack.proxies["provider"].pass_on()
    drained = stack.wait_until_done(120)
    assert opened_after <= 15
    assert 0 < per_minute <= 20
    assert set(stack.counts()) == {"completed"}
    _record(
        scenario,
        stack,
        opened_after_seconds=opened_after,
        calls_per_minute_while_open=per_minute,
        drained_seconds=drained,
        retries=retries,
    )


def _probes(broker: Redis, until: float) -> int:
    """Count the calls that the breaker lets through until then: each sets the time of the next."""
    seen = set()
    while time.monotonic() < until:
        for kind in ("create", "other"):
            if at := broker.get(f"media:{{governor}}:{kind}:probe"):
                seen.add((kind, at))
        time.sleep(0.2)
    return len(seen)


def _calls(stack: Stack, *kinds: str) -> int:
    """Return how many API calls (of these kinds) the provider was asked for so far."""
    requests = stack.replicate.ledger().requests
    return sum(requests.get(kind, 0) for kind in kinds or API_CALLS)


# What goes wrong for good, by a word for each kind: the fault, and the job's error code.
PERMANENT: dict[str, tuple[dict[str, Any], str]] = {
    "code-400": ({"on": "create", "kind": "status", "status": 400}, "invalid_input"),
    "code-401": ({"on": "create", "kind": "status", "status": 401}, "provider_auth"),
    "code-402": ({"on": "create", "kind": "status", "status": 402}, "insufficient_credit"),
    "code-403": ({"on": "create", "kind": "status", "status": 403}, "provider_auth"),
    "code-404": ({"on": "create", "kind": "status", "status": 404}, "model_not_found"),
    "code-422": ({"on": "create", "kind": "status", "status": 422}, "invalid_input"),
    "moderated": (
        {"on": "create", "kind": "fail", "error": "NSFW content detected. Try another prompt."},
        "content_policy",
    ),
}


def test_f18_permanent_errors_fail_at_once(start_stack: StartStack, scenario: Scenario) -> None:
    """400, 401, 402, 403, 404, 422, an NSFW text and a black picture, 25 each: one create each.

    The right `error_code`, and failed within 5 s; a black picture is paid for: kept, and marked.
    """
    stack = start_stack(**PATIENT)
    each = sized(4, 25)
    for words, (fault, _) in PERMANENT.items():
        stack.replicate.push_fault(**fault, prompt_contains=words, times=None)
        stack.post(each, words=words, per_second=20)
    stack.replicate.push_fault("download", prompt_contains="black", times=None, **one_colour())
    stack.post(each, words="black")
    stack.wait_until_done()
    assert {job["status"] for job in jobs_about(stack, "black")} == {"completed"}
    assert stack.query("SELECT content_policy_suspected FROM outputs") == [(True,)] * each
    for words, (_, code) in PERMANENT.items():
        jobs = jobs_about(stack, words)
        assert [(job["status"], job["error_code"]) for job in jobs] == [("failed", code)] * each
    assert len(stack.replicate.ledger().create_calls) == each * (len(PERMANENT) + 1)
    slowest = max(
        (job["completed_at"] - job["created_at"]).total_seconds() for job in jobs_about(stack)
    )
    assert slowest <= 5
    failures = {code for _, code in PERMANENT.values()}
    _record(scenario, stack, failures=failures, slowest_seconds=slowest)


def test_deadlines_end_what_nobody_brings_on(start_stack: StartStack, scenario: Scenario) -> None:
    """20 jobs begun while the provider refuses, their worker killed; 20 while no worker lives."""
    deadlines = {"JOB_DEADLINE_SECONDS": "8", "QUEUE_DEADLINE_SECONDS": "8"}
    stack = start_stack(links=("provider",), **deadlines)
    stack.proxies["provider"].refuse()
    jobs = sized(5, 20)
    stack.post(jobs, words="begun")
    wait_for(lambda: all(job["started_at"] for job in jobs_about(stack)), "all to be begun")
    second = stack.replace(stack.workers[0])
    stack.wait_until_done(60)
    second.kill()
    stack.post(jobs, words="unbegun")
    time.sleep(9)
    stack.start_worker()
    stack.wait_until_done(30)
    codes = {"begun": "deadline_exceeded", "unbegun": "queue_deadline_exceeded"}
    for words, code in codes.items():
        found = jobs_about(stack, f" {words}")
        assert [(job["status"], job["error_code"]) for job in found] == [("failed", code)] * jobs
    late = [(job["completed_at"] - job["deadline_at"]).total_seconds() for job in jobs_about(stack)]
    _record(scenario, stack, failures=set(codes.values()), latest_seconds=max(late))


@full_only
def test_f19_a_cold_boot_takes_its_time(start_stack: StartStack, scenario: Scenario) -> None:
    """A model boots for 8 minutes; 20 jobs succeed, paid once, with the default deadlines."""
    stack = start_stack()
    stack.replicate.configure(starting_seconds=480, latency_seconds=490)
    stack.post(20)
    stack.wait_until_done(600)
    assert set(stack.counts()) == {"completed"}
    assert len(stack.replicate.creates()) == 20
    _record(scenario, stack)


def _unanswered(stack: Stack) -> list[LedgerEntry]:
    return [entry for entry in stack.replicate.creates() if not entry.reply_delivered]


def _record(
    scenario: Scenario,
    stack: Stack,
    *,
    failures: set[str] = frozenset(),  # type: ignore[assignment]
    max_retries: int = 3,
    **figures: Any,
) -> None:
    """Ask the oracle, then write down what this scenario has measured."""
    summary = check(stack, failures=failures, max_retries=max_retries)
    scenario.record(**vars(summary), **figures)
