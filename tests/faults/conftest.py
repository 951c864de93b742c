"""Fixtures of the fault scenarios: the stack, and the scenario's entry in the report."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from scripts.servers import Postgres, Valkey
from tests.doubles.replicate_server import ReplicateServer
from tests.faults.harness import Link, Stack, StartStack
from tests.faults.oracle import noted_history
from tests.faults.report import Scenario

OUTCOME = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Keep how the test went, for the report."""
    report = yield
    if report.when == "call":
        item.stash[OUTCOME] = report.outcome
    return report


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """The test's seed (printed; FAULTS_SEED repeats one) and its figures."""
    seed = int(os.environ.get("FAULTS_SEED") or random.randrange(2**32))
    print(f"seed: {seed}")  # noqa: T201 - pytest shows it when the test fails
    scenario = Scenario(request.node.name.removeprefix("test_"), seed)
    started = time.monotonic()
    yield scenario
    scenario.write(request.node.stash.get(OUTCOME, "error"), time.monotonic() - started)


@pytest.fixture
def servers(postgres: Postgres, valkey: Valkey) -> Iterator[None]:
    """Both servers run, whatever the last scenario did to them, and are empty."""
    for server in (postgres, valkey):
        if not server.is_running():
            server.start()
    with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
        connection.execute("TRUNCATE jobs, attempts, outputs, workers, job_counts CASCADE")
    with noted_history(postgres):
        yield


@pytest.fixture
def start_stack(
    servers: None,
    postgres: Postgres,
    valkey: Valkey,
    replicate: ReplicateServer,
    tmp_path: Path,
    scenario: Scenario,
) -> Iterator[StartStack]:
    """Start APIs and workers: `start_stack(apis=1, workers=1, links=[...], **settings)`."""
    stacks: list[Stack] = []

    def start(
        apis: int = 1, workers: int = 1, links: tuple[Link, ...] = (), **settings: str
    ) -> Stack:
        folder = tmp_path / str(len(stacks))
        stack = Stack(postgres, valkey, replicate, folder, scenario.seed, links, settings)
        stacks.append(stack)
        stack.flush_broker()
        for _ in range(apis):
            stack.start_api()
        started = [stack.start_worker(wait=False) for _ in range(workers)]
        for worker in started:
            stack.wait_for_worker(worker)
        stack.read_on()
        return stack

    yield start
    for stack in stacks:
        stack.close()
