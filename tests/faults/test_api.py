"""An API process that dies in the middle of requests: F10."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from uuid import uuid4

import httpx

from tests.faults.harness import MODEL, Answer, Stack, StartStack, wait_for
from tests.faults.oracle import check
from tests.faults.report import Scenario, sized

CLIENTS = 16
LIVES = sized(3, 5)
KEYS_PER_LIFE = 60
# An API dies after so few of them that most clients are in the middle of a request.
ANSWERS_PER_LIFE = 5
PATIENCE_SECONDS = 60.0


def test_f10_the_api_dies_while_clients_post(start_stack: StartStack, scenario: Scenario) -> None:
    """300 POSTs with an Idempotency-Key each, the API killed among them, clients repeat.

    300 keys are exactly 300 jobs; each key asked again, after all, names the same job.
    """
    stack = start_stack()
    keys = [uuid4().hex for _ in range(LIVES * KEYS_PER_LIFE)]
    killed_at: list[float] = []
    with stack.client(timeout_seconds=10) as client, ThreadPoolExecutor(CLIENTS) as threads:
        post = partial(_post_until_answered, stack, client)
        jobs = _post_through_lives(stack, threads, post, keys, killed_at)
        assert len(set(jobs)) == len(keys)
        assert list(threads.map(post, keys)) == jobs
    assert stack.query("SELECT count(*) FROM jobs") == [(len(keys),)]
    stack.wait_until_done()
    broken_off = sum(_was_broken_off(answer, killed_at) for answer in stack.answers)
    assert broken_off
    scenario.record(kills=len(killed_at), broken_off_posts=broken_off, **vars(check(stack)))


def _post_through_lives(
    stack: Stack,
    threads: ThreadPoolExecutor,
    post: Callable[[str], str],
    keys: Sequence[str],
    killed_at: list[float],
) -> list[str]:
    """POST once for each key; return the jobs' ids, and note the times of the kills.

    What ends a life is how many it has answered, not a time: each has posts to break off, however
    slow the machine.
    """
    posts: list[Future[str]] = []
    with stack.outage():
        for begin in range(0, len(keys), KEYS_PER_LIFE):
            if begin:
                answers = begin - KEYS_PER_LIFE + ANSWERS_PER_LIFE
                killed_at.append(_die(stack, answers))
            new = keys[begin : begin + KEYS_PER_LIFE]
            posts += [threads.submit(post, key) for key in new]
        return [post.result() for post in posts]


def _die(stack: Stack, answers: int) -> float:
    """Kill the API once it has given so many answers, and start another; return when it died."""
    wait_for(lambda: len(stack.accepted) >= answers, "answers", PATIENCE_SECONDS)
    died_at = time.time()
    stack.apis[-1].kill()
    stack.start_api()
    return died_at


def _was_broken_off(answer: Answer, killed_at: Sequence[float]) -> bool:
    """Tell of a request whether it was under way when the API died; others were refused."""
    return answer.status == 0 and any(
        answer.at < at < answer.at + answer.seconds for at in killed_at
    )


def _post_until_answered(stack: Stack, client: httpx.Client, key: str) -> str:
    """Repeat the very same request until it is answered with 201; return the job's id."""
    body: dict[str, object] = {
        "prompt": f"{stack.secret_words} {key}",
        "model_name": MODEL,
        "parameters": {"width": 64, "height": 64},
    }
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        response = _post(stack, client, key, body)
        if response is not None and response.status_code == 201:
            return str(response.json()["id"])
        time.sleep(0.1)
    raise AssertionError(f"no answer within {PATIENCE_SECONDS} s")


def _post(
    stack: Stack, client: httpx.Client, key: str, body: dict[str, object]
) -> httpx.Response | None:
    headers = {"Idempotency-Key": key}
    return stack.request(client, "POST", "/api/v1/generate", json=body, headers=headers)
