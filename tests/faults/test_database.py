"""A database that crashes, is silent or breaks off, and everything failing at once: F8, F9, F11."""

import json
import random
import threading
import time
from collections.abc import Callable
from functools import partial

from tests.doubles.replicate_settings import Settings
from tests.doubles.replicate_webhooks import signed_headers
from tests.faults.harness import PATIENT, Link, Stack, StartStack
from tests.faults.oracle import check, taken_from_the_living
from tests.faults.proxy import FaultProxy
from tests.faults.report import Scenario, full_only, sized

DATABASE_LINKS: tuple[Link, ...] = ("api_database", "worker_database")
ALL_LINKS: tuple[Link, ...] = (*DATABASE_LINKS, "api_broker", "worker_broker", "provider")
SECRET = Settings().webhook_secret
# From the moment the database is back until an old connection may still show.
RETURN_SECONDS = 8


def test_f08_the_database_crashes(start_stack: StartStack, scenario: Scenario) -> None:
    """300 jobs, PostgreSQL stopped at once, for 5 s, 3 times: 503 only, no id answered 201 lost."""
    jobs, crashes = sized(90, 300), sized(2, 3)
    stack = start_stack(workers=2)
    stack.warm_up()
    stack.replicate.configure(latency_seconds=2)
    posting = threading.Thread(
        target=stack.post, args=[jobs], kwargs={"per_second": 15, "repeat_seconds": 60}
    )
    posting.start()
    for _ in range(crashes):
        time.sleep(2)
        with stack.outage(RETURN_SECONDS):
            stack.postgres.stop(immediate=True)
            time.sleep(sized(3, 5))
            stack.postgres.start()
    posting.join()
    rest_seconds = stack.wait_until_done(90)
    refused = [answer.seconds for answer in stack.answers if answer.status == 503]
    assert refused
    assert {answer.status for answer in stack.answers} == {201, 503}
    assert len(stack.accepted) == jobs
    assert taken_from_the_living(stack) == []
    scenario.record(
        refused=len(refused),
        refused_max_seconds=max(refused),
        rest_seconds=rest_seconds,
        **vars(check(stack)),
    )
    assert max(refused) <= 5


@full_only
def test_f09_the_database_goes_silent(start_stack: StartStack, scenario: Scenario) -> None:
    """100 jobs, no byte from PostgreSQL for 20 s: every route answers 503 within 5 s, and again
    200 by itself; leases may be lost, but there is no second create and no stale write.
    """
    stack = start_stack(workers=2, links=DATABASE_LINKS, REPLICATE_WEBHOOK_SECRET=SECRET)
    stack.warm_up()
    stack.replicate.configure(latency_seconds=3)
    done = stack.post(3)
    stack.wait_until_done(30)
    (attempt_id,) = stack.query("SELECT id FROM attempts WHERE job_id = %s", done[0])[0]
    stack.post(100)
    time.sleep(2)
    with stack.outage(RETURN_SECONDS):
        for link in DATABASE_LINKS:
            stack.proxies[link].hold()
        silent_at = time.monotonic()
        answers = _ask_every_route(stack, done[0], attempt_id)
        time.sleep(max(0.0, silent_at + 20 - time.monotonic()))
        for link in DATABASE_LINKS:
            stack.proxies[link].pass_on()
    back_at = time.monotonic()
    while stack.finished() < 103 or not _all_well(stack, done[0]):
        assert time.monotonic() < back_at + 60, (stack.counts(), stack.answers[-20:])
        time.sleep(0.2)
    scenario.record(
        route_max_seconds=max(seconds for _, _, seconds in answers),
        recovered_seconds=time.monotonic() - back_at,
        **vars(check(stack)),
    )
    for route, status, seconds in answers:
        assert (status, seconds <= 5) == (503, True), (route, status, seconds)


def _routes(job_id: str) -> list[tuple[str, str]]:
    """Every route that needs the database, as a request that is answered with 2xx or 409."""
    return [
        ("GET", f"/api/v1/status/{job_id}"),
        ("GET", "/api/v1/jobs"),
        ("GET", f"/api/v1/jobs/{job_id}/attempts"),
        ("GET", f"/api/v1/jobs/{job_id}/metadata"),
        ("GET", f"/api/v1/download/{job_id}"),
        ("DELETE", f"/api/v1/jobs/{job_id}"),
        ("GET", f"/media/{job_id}.png"),
        ("GET", f"/media/{job_id}.png?size=256"),
        ("GET", "/health/detailed"),
        ("GET", "/metrics"),
        ("POST", "/api/v1/generate"),
    ]


def _ask_every_route(stack: Stack, job_id: str, attempt_id: object) -> list[tuple[str, int, float]]:
    """Each twice: with connections that were there before, and with none."""
    answers = []
    webhook = ("POST", f"/api/v1/webhooks/replicate/{attempt_id}")
    with stack.client() as client:
        for method, path in [*_routes(job_id), webhook] * 2:
            report = {"id": "x", "status": "starting"}
            given = {"prompt": stack.prompt()} if path.endswith("generate") else report
            body = json.dumps(given).encode()
            signed = signed_headers(SECRET, body, "msg_x", time.time())
            told = {"content": body, "headers": signed | {"content-type": "application/json"}}
            stack.request(client, method, path, **(told if method == "POST" else {}))
            answer = stack.answers[-1]
            answers.append((f"{method} {path}", answer.status, answer.seconds))
    return answers


def _all_well(stack: Stack, job_id: str) -> bool:
    with stack.client() as client, stack.outage(0):
        for method, path in _routes(job_id):
            if method == "GET":
                stack.request(client, method, path)
                if stack.answers[-1].status != 200:
                    return False
    return True


def test_connections_that_break_in_the_middle(start_stack: StartStack, scenario: Scenario) -> None:
    """300 jobs; connections to database, broker and provider are reset, cut off and slow at random.

    So a commit's answer is lost now and then, and whoever waits for it cannot know that it is done.
    """
    jobs = sized(40, 300)
    stack = start_stack(workers=2, links=ALL_LINKS, MAX_RETRY_ATTEMPTS="12", **PATIENT)
    stack.warm_up()
    posting = threading.Thread(
        target=stack.post, args=[jobs], kwargs={"per_second": 8, "repeat_seconds": 60}
    )
    breaks = 0
    with stack.outage(RETURN_SECONDS):
        posting.start()
        while posting.is_alive():
            _break(stack.random.choice(list(stack.proxies.values())), stack.random)
            posting.join(0.3)
            breaks += 1
        for proxy in stack.proxies.values():
            proxy.pass_on()
    rest_seconds = stack.wait_until_done(120)
    assert len(stack.accepted) == jobs
    assert set(stack.counts()) == {"completed"}
    summary = check(stack, max_retries=12)
    scenario.record(breaks=breaks, rest_seconds=rest_seconds, **vars(summary))


def _break(proxy: FaultProxy, choice: random.Random) -> None:
    """Reset what there is, or have what comes be slow or cut off; `pass_on` ends both."""
    proxy.pass_on()
    match choice.choice(["reset", "delay", "cut"]):
        case "reset":
            proxy.reset()
        case "delay":
            proxy.delay(choice.uniform(0.05, 0.5))
        case "cut":
            # Some answers of a connection that is made anew, or of one that was there.
            proxy.cut_replies(choice.randint(1, 6000))


@full_only
def test_f11_everything_at_once(start_stack: StartStack, scenario: Scenario) -> None:
    """1,000 jobs while workers are killed, the broker is flushed and restarted empty, and the
    database crashes.
    """
    jobs = 1000
    stack = start_stack(workers=2)
    stack.warm_up()
    stack.replicate.configure(latency_seconds=2)
    posting = threading.Thread(
        target=stack.post, args=[jobs], kwargs={"per_second": 25, "repeat_seconds": 120}
    )
    posting.start()
    faults: list[Callable[[], None]] = [
        stack.flush_broker,
        stack.restart_broker_empty,
        partial(crash_database, stack),
    ]
    rounds = 0
    while stack.finished() < 0.8 * jobs and rounds < 24:
        time.sleep(2)
        for worker in stack.living_workers:
            stack.replace(worker)
        if rounds % 2 == 0:
            faults[rounds // 2 % 3]()
        broken_at = time.monotonic()
        time.sleep(4)
        rounds += 1
    posting.join()
    stack.wait_until_done(180)
    rest_seconds = time.monotonic() - broken_at
    assert len(stack.accepted) == jobs
    assert rounds >= 5  # each of the three at least
    scenario.record(kills=2 * rounds, rest_seconds=rest_seconds, **vars(check(stack)))


def crash_database(stack: Stack) -> None:
    """Stop PostgreSQL at once, and start it again after 5 s."""
    with stack.outage(RETURN_SECONDS):
        stack.postgres.stop(immediate=True)
        time.sleep(5)
        stack.postgres.start()
