"""F38, first half: any interleaving of workers, clients and sweeps keeps the promises."""

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import event

from app.config import Settings
from app.db import create_engine, create_sessions
from app.jobs import retry
from app.jobs.repository import JobRepository, ledger, statements
from scripts.servers import Postgres
from tests.faults import machine
from tests.faults.harness import FULL
from tests.faults.machine import JobsMachine, World
from tests.faults.machine_database import Database
from tests.faults.report import Scenario, sized

PROGRAMS = sized(50, 1250)
SHARDS = sized(1, 4)
STEPS = 40

# Programs that never get there would prove nothing.
REACHED = {
    "answer lost",
    "cancel: cancelled",
    "claimed reconciling",
    "completed",
    "create accepted",
    "lease lost",
    "proven absent",
    "taken from the silent",
} | sized(set(), {"expired", "orphan canceled", "reported"})


@pytest.fixture
def world(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One loop, one connection pool, and the machine's own time."""
    monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", machine.SUBMIT_WINDOW)
    monkeypatch.setattr(ledger, "STOP_AGAIN_SECONDS", 0)
    monkeypatch.setattr(retry, "INTERNAL_DELAY_SECONDS", machine.INTERNAL_DELAY)
    if not postgres.is_running():
        postgres.start()
    engine = create_engine(Settings(_env_file=None, database_url=postgres.url), pool_size=1)
    event.listen(engine.sync_engine, "connect", _without_waiting_for_the_disk)
    with (
        asyncio.Runner() as runner,
        psycopg.connect(postgres.sync_url, autocommit=True) as connection,
    ):
        connection.execute("SET synchronous_commit = off")
        world = World(runner, JobRepository(create_sessions(engine)), Database(connection))
        yield world
        runner.run(engine.dispose())


def _without_waiting_for_the_disk(connection: Any, _: object) -> None:
    connection.run_async(lambda driver: driver.execute("SET synchronous_commit = off"))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_f38_any_interleaving_keeps_the_promises(
    world: World, scenario: Scenario, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    """F38, 5,000 programs: 0 illegal transitions, 0 second payments, every job ends."""
    monkeypatch.setattr(JobsMachine, "world", world, raising=False)
    profile = settings(
        max_examples=PROGRAMS,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=not FULL,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    if FULL:
        seed(scenario.seed)(JobsMachine)
    run_state_machine_as_test(JobsMachine, settings=profile)
    scenario.record(programs=PROGRAMS, reached=world.steps)
    assert world.steps.keys() >= REACHED


class TestPausedBeforeSending:
    """Programs that chance takes long to find; all begin between an intent and its create."""

    @pytest.fixture
    def program(self, world: World, monkeypatch: pytest.MonkeyPatch) -> JobsMachine:
        """A job whose worker was silent for too long, and has just committed its intent."""
        monkeypatch.setattr(JobsMachine, "world", world, raising=False)
        program = JobsMachine()
        program.start(deadline=100_000)
        self.claim(program)
        program.time_passes()
        program.advance(program.runs[0])
        return program

    def claim(self, program: JobsMachine) -> None:
        """The next worker gets the job, if it is free."""
        runs = len(program.runs)
        program.deliver(0, worker=runs)
        assert len(program.runs) == runs + 1

    def test_no_create_follows_a_cancel_that_the_next_owner_let_through(
        self, program: JobsMachine
    ) -> None:
        program.release_dead()
        self.claim(program)
        for _ in range(2):
            program.advance(program.runs[1])  # it finds nothing, yet
        program.cancel(0)
        program.advance(program.runs[0])
        assert program.calls

    def test_a_create_that_was_sent_late_is_not_taken_for_lost(self, program: JobsMachine) -> None:
        paused = program.runs[0]
        for _ in range(3):
            program.time_passes()
        assert program.may_send(paused)  # nobody else has the job
        program.release_dead()
        self.claim(program)
        for _ in range(2):
            program.advance(program.runs[1])
        program.send(paused)
        program.go_on(0, "none", worker=0)
        program.teardown()
        program.nothing_is_paid_twice()

    def test_what_nobody_can_prove_is_not_paid_again(self, program: JobsMachine) -> None:
        program.die(0)
        for _ in range(6):
            program.time_passes()
        program.release_dead()
        self.claim(program)
        program.advance(program.runs[-1], smooth=False)  # the provider says nothing, for so long
        assert program.world.steps["outcome unknown"] == 1
        [(job_id, job)] = program.seen.jobs.items()
        assert job["status"] == "failed"
        program.stop_orphans()
        assert len(program.seen.open_attempts(job_id)) == 1, "it may show yet"
        program.give_orphans_up()
        assert program.seen.open_attempts(job_id) == []
        program.nothing_is_paid_twice()

    def test_what_nobody_could_prove_is_stopped_when_it_shows(self, program: JobsMachine) -> None:
        program.advance(program.runs[0])  # the create is sent ...
        program.go_on(0, "none", worker=0)  # ... and accepted
        program.die(0)
        for _ in range(6):
            program.time_passes()
        program.release_dead()
        self.claim(program)
        program.advance(program.runs[-1], smooth=False)
        [created] = program.ledger.creates
        assert not created.is_terminal
        program.stop_orphans()
        assert created.status == "canceled"
        assert program.seen.open_attempts(created.job_id) == []
