"""What the database and the provider's ledger hold, by the words that a job's prompt ends with."""

from datetime import datetime
from typing import Any

import psycopg

from tests.doubles.replicate_ledger import LedgerEntry
from tests.faults.harness import Stack

Row = dict[str, Any]


def jobs_about(stack: Stack, words: str = "") -> list[Row]:
    """Return the rows of these jobs, oldest first."""
    return _rows(stack, "SELECT * FROM jobs WHERE prompt LIKE %s ORDER BY id", f"%{words}")


def attempts_about(stack: Stack, words: str = "") -> list[Row]:
    """Return the attempts of these jobs, in order within each job."""
    statement = (
        "SELECT a.*, j.prompt FROM attempts a JOIN jobs j ON j.id = a.job_id"
        " WHERE j.prompt LIKE %s ORDER BY a.job_id, a.number"
    )
    return _rows(stack, statement, f"%{words}")


def creates_about(stack: Stack, words: str = "") -> list[LedgerEntry]:
    """Return the accepted creates for these jobs, in order."""
    return [entry for entry in stack.replicate.creates() if entry.input["prompt"].endswith(words)]


def seconds(iso: str) -> float:
    """Return a time of the ledger as seconds of time.time()."""
    return datetime.fromisoformat(iso).timestamp()


def _rows(stack: Stack, statement: str, *values: str) -> list[Row]:
    with psycopg.connect(
        stack.postgres.sync_url, row_factory=psycopg.rows.dict_row, autocommit=True
    ) as connection:
        return connection.execute(statement, values).fetchall()
