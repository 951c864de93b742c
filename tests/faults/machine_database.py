"""What the state machine sees of the database: every row as it is, and a clock to move."""

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import psycopg

Row = dict[str, Any]

SEEN = """
SELECT json_build_object(
  'jobs', (SELECT coalesce(json_agg(to_jsonb(j) || jsonb_build_object(
             'is_due', j.next_attempt_at IS NULL OR j.next_attempt_at <= now(),
             'is_late', j.deadline_at <= now()) ORDER BY id), '[]') FROM jobs j),
  'attempts', (SELECT coalesce(json_agg(a ORDER BY number), '[]') FROM attempts a),
  'outputs', (SELECT coalesce(json_agg(o), '[]') FROM outputs o),
  'counts', (SELECT coalesce(json_object_agg(status, n), '{}')
             FROM (SELECT status, sum(count) AS n FROM job_counts GROUP BY status) c))
"""

# Moving every time back is the same as letting time pass, without waiting.
PASS_TIME = """
UPDATE jobs SET deadline_at = deadline_at - %(by)s, ring_at = ring_at - %(by)s,
  cancel_requested_at = cancel_requested_at - %(by)s, next_attempt_at = next_attempt_at - %(by)s
  WHERE status IN ('pending', 'processing');
UPDATE attempts SET created_at = created_at - %(by)s, submitted_at = submitted_at - %(by)s
  WHERE state <> 'settled';
UPDATE workers SET heartbeat_at = heartbeat_at - %(by)s;
"""
FORGET = "DELETE FROM jobs; DELETE FROM workers; DELETE FROM job_counts"

# Computed for the moment of asking; they are no part of the row.
MOMENTARY = ("is_due", "is_late")

MOVES = {
    "pending": {"pending", "processing", "cancelled", "failed"},
    "processing": {"processing", "pending", "completed", "failed", "cancelled"},
}


@dataclass(frozen=True)
class Seen:
    """Every row of the four tables at one moment."""

    jobs: dict[UUID, Row]
    attempts: dict[UUID, list[Row]]  # by job, in order
    outputs: dict[UUID, list[Row]]
    counts: dict[str, int]

    def of(self, job_id: UUID) -> tuple[Row, list[Row], list[Row]]:
        """Return all that there is about one job, to be compared."""
        job = {name: value for name, value in self.jobs[job_id].items() if name not in MOMENTARY}
        return job, self.attempts[job_id], self.outputs[job_id]

    def open_attempts(self, job_id: UUID) -> list[Row]:
        """Return the attempts that are not settled."""
        return [attempt for attempt in self.attempts[job_id] if attempt["state"] != "settled"]


class Database:
    """A second pair of eyes on the tables, beside the repository under test."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def forget(self) -> None:
        """Empty the tables."""
        self._connection.execute(FORGET)

    def pass_time(self, seconds: int) -> None:
        """Make everything that is unfinished this much older."""
        for statement in PASS_TIME.split(";")[:-1]:
            self._connection.execute(statement, {"by": timedelta(seconds=seconds)})

    def see(self) -> Seen:
        """Read every row."""
        row = self._connection.execute(SEEN).fetchone()
        assert row is not None
        found = row[0]
        ids = [UUID(job["id"]) for job in found["jobs"]]
        return Seen(
            dict(zip(ids, found["jobs"], strict=True)),
            {id_: [a for a in found["attempts"] if a["job_id"] == str(id_)] for id_ in ids},
            {id_: [o for o in found["outputs"] if o["job_id"] == str(id_)] for id_ in ids},
            {status: count for status, count in found["counts"].items() if count},
        )


def check_rows(seen: Seen, max_retries: int) -> None:
    """Raise AssertionError if the tables contradict themselves."""
    assert seen.counts == Counter(job["status"] for job in seen.jobs.values())
    known = [a["prediction_id"] for rows in seen.attempts.values() for a in rows]
    ids = [prediction_id for prediction_id in known if prediction_id is not None]
    assert len(ids) == len(set(ids)), "a prediction belongs to two attempts"
    for job_id, job in seen.jobs.items():
        _check_job(seen, job_id, job, max_retries)


def _check_job(seen: Seen, job_id: UUID, job: Row, max_retries: int) -> None:
    attempts, outputs = seen.attempts[job_id], seen.outputs[job_id]
    assert len(seen.open_attempts(job_id)) <= 1
    assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    assert job["retry_count"] <= max_retries
    assert (job["worker_id"] is None) or job["status"] == "processing"
    assert bool(outputs) == (job["status"] == "completed")
    assert (job["completed_at"] is not None) == (job["status"] not in MOVES)
    if job["status"] == "completed":
        assert seen.open_attempts(job_id) == []
        last = attempts[-1]
        assert (last["outcome"], last["charged"]) == ("succeeded", "yes")
        assert last["prediction_id"] == job["external_job_id"]
    for earlier, _ in pairwise(attempts):
        assert earlier["state"] == "settled"
        assert earlier["outcome"] != "succeeded"


def check_change(old: Seen, new: Seen) -> None:
    """Raise AssertionError if the step from one view to the next is not a legal one."""
    for job_id, before in old.jobs.items():
        after = new.jobs[job_id]
        if before["status"] not in MOVES:
            assert new.of(job_id)[0] == old.of(job_id)[0], "a terminal row changed"
            continue
        assert after["status"] in MOVES[before["status"]]
        assert after["retry_count"] >= before["retry_count"]
        assert after["throttle_count"] >= before["throttle_count"]
        assert before["started_at"] in (None, after["started_at"])
        _check_attempts(old.attempts[job_id], new.attempts[job_id])


def _check_attempts(old: list[Row], new: list[Row]) -> None:
    for before, after in zip(old, new, strict=False):
        assert before["prediction_id"] in (None, after["prediction_id"])
        if before["state"] == "settled":
            assert after == before, "a settled attempt changed"
