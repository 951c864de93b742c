"""An API process that dies in the middle of requests: F10."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import uuid4

import httpx

from tests.faults.harness import MODEL, Stack, StartStack
from tests.faults.oracle import check
from tests.faults.report import Scenario, sized

# Below what one API process answers, so that the posts last through several kills.
POSTS_PER_SECOND = 20
PATIENCE_SECONDS = 60.0
ANSWERS_PER_LIFE = 5  # on the average


def test_f10_the_api_dies_while_clients_post(start_stack: StartStack, scenario: Scenario) -> None:
    """300 POSTs with an Idempotency-Key each, the API killed every second, clients repeat.

    300 keys are exactly 300 jobs; each key asked again, after all, names the same job.
    """
    stack = start_stack()
    keys = [uuid4().hex for _ in range(sized(80, 300))]
    with _killed_every_second(stack) as kills:
        jobs = _post_all(stack, keys)
    assert len(kills) >= 2
    assert len(set(jobs.values())) == len(keys)
    assert _post_all(stack, keys) == jobs
    assert stack.query("SELECT count(*) FROM jobs") == [(len(keys),)]
    stack.wait_until_done()
    unanswered = sum(answer.status == 0 for answer in stack.answers)
    assert unanswered
    scenario.record(kills=len(kills), unanswered_posts=unanswered, **vars(check(stack)))


@contextmanager
def _killed_every_second(stack: Stack) -> Iterator[list[float]]:
    """Kill the API and start it again and again; yield the kills' times.

    Each life lasts a second, and longer until it has answered some of the posts: on a busy machine
    16 of them at once are all answered late, and with lives of a second never.
    """
    kills: list[float] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(1):
            if len(stack.accepted) < ANSWERS_PER_LIFE * (len(kills) + 1):
                continue
            stack.apis[-1].kill()
            kills.append(time.time())
            stack.start_api()

    with stack.outage():
        killing = threading.Thread(target=kill)
        killing.start()
        try:
            yield kills
        finally:
            over.set()
            killing.join()


def _post_all(stack: Stack, keys: list[str]) -> dict[str, str]:
    """POST once for each key, each at its time; return the job's id by key."""
    begin = time.monotonic()

    def post(number: int) -> str:
        time.sleep(max(0.0, begin + number / POSTS_PER_SECOND - time.monotonic()))
        return _post_until_answered(stack, keys[number])

    with ThreadPoolExecutor(16) as pool:
        return dict(zip(keys, pool.map(post, range(len(keys))), strict=True))


def _post_until_answered(stack: Stack, key: str) -> str:
    """Repeat the very same request until it is answered with 201; return the job's id."""
    body: dict[str, object] = {
        "prompt": f"{stack.secret_words} {key}",
        "model_name": MODEL,
        "parameters": {"width": 64, "height": 64},
    }
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        with stack.client(timeout_seconds=10) as client:
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
