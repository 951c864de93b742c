"""What the database enforces by itself, on the schema that Alembic builds."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic.config import Config
from psycopg.types.json import Jsonb

from alembic import command
from app.config import get_settings
from scripts.servers import Postgres

ROOT = Path(__file__).parents[3]

INSERT_JOB = """
    INSERT INTO jobs (id, prompt, model_name, parameters, status, deadline_at, ring_at,
                      retry_count, throttle_count, crash_count)
    VALUES (gen_random_uuid(), 'p', 'm', '{}', %s, now(), now(), 0, 0, 0) RETURNING id
"""
INSERT_ATTEMPT = """
    INSERT INTO attempts (id, job_id, number, provider, model_name, input, state, prediction_id)
    VALUES (gen_random_uuid(), %s, %s, 'mock', 'm', %s, %s, %s)
"""


@pytest.fixture
def connection(database: Postgres) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with psycopg.connect(database.sync_url, autocommit=True) as connection:
        yield connection


Connection = psycopg.Connection[tuple[object, ...]]


def add_job(connection: Connection, status: str = "pending") -> object:
    row = connection.execute(INSERT_JOB, (status,)).fetchone()
    assert row is not None
    return row[0]


def counts(connection: Connection) -> dict[object, object]:
    query = "SELECT status, sum(count)::int FROM job_counts GROUP BY status HAVING sum(count) <> 0"
    return dict(connection.execute(query).fetchall())  # type: ignore[arg-type]


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("change", ["status = 'pending'", "error_code = 'x'", "updated_at = now()"])
def test_a_terminal_row_never_changes(connection: Connection, status: str, change: str) -> None:
    job_id = add_job(connection, status)
    with pytest.raises(psycopg.errors.RestrictViolation, match="never changes"):
        connection.execute(f"UPDATE jobs SET {change} WHERE id = %s", (job_id,))


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_an_unfinished_row_may_change(connection: Connection, status: str) -> None:
    job_id = add_job(connection, status)
    connection.execute("UPDATE jobs SET status = 'completed' WHERE id = %s", (job_id,))


def test_an_unknown_status_is_refused(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        add_job(connection, "sleeping")


def test_a_job_has_one_open_attempt_at_most(connection: Connection) -> None:
    job_id = add_job(connection)
    connection.execute(INSERT_ATTEMPT, (job_id, 1, Jsonb({}), "submitted", "a"))
    with pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute(INSERT_ATTEMPT, (job_id, 2, Jsonb({}), "intent", None))
    connection.execute("UPDATE attempts SET state = 'settled'")
    connection.execute(INSERT_ATTEMPT, (job_id, 2, Jsonb({}), "intent", None))


def test_a_prediction_belongs_to_one_attempt(connection: Connection) -> None:
    connection.execute(INSERT_ATTEMPT, (add_job(connection), 1, Jsonb({}), "submitted", "same"))
    with pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute(INSERT_ATTEMPT, (add_job(connection), 1, Jsonb({}), "submitted", "same"))


def test_counts_follow_every_change(connection: Connection) -> None:
    ids = [add_job(connection) for _ in range(3)]
    assert counts(connection) == {"pending": 3}
    connection.execute("UPDATE jobs SET status = 'processing' WHERE id = ANY(%s)", (ids[:2],))
    connection.execute("UPDATE jobs SET status = 'completed' WHERE id = %s", (ids[0],))
    connection.execute("UPDATE jobs SET ring_at = now() WHERE id = %s", (ids[1],))
    assert counts(connection) == {"pending": 1, "processing": 1, "completed": 1}
    connection.execute("DELETE FROM jobs WHERE id = %s", (ids[2],))
    assert counts(connection) == {"processing": 1, "completed": 1}
    connection.execute("TRUNCATE jobs CASCADE")
    assert counts(connection) == {}


def test_a_rolled_back_insert_is_not_counted(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        add_job(connection)
    assert counts(connection) == {}


class TestMigrations:
    @pytest.fixture
    def alembic(self, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
        """Alembic on an empty database of its own."""
        with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE migrations")
        monkeypatch.setenv("DATABASE_URL", postgres.url.replace("/fleek_media", "/migrations"))
        get_settings.cache_clear()
        yield Config(ROOT / "alembic.ini")
        get_settings.cache_clear()
        with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
            connection.execute("DROP DATABASE migrations WITH (FORCE)")

    def test_models_and_migrations_agree(self, alembic: Config) -> None:
        command.upgrade(alembic, "head")
        command.check(alembic)

    def test_down_and_up_again(self, alembic: Config) -> None:
        command.upgrade(alembic, "head")
        command.downgrade(alembic, "base")
        command.upgrade(alembic, "head")
        command.check(alembic)
