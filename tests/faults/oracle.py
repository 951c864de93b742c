"""What must hold after every scenario, O1 to O8: nothing lost, nothing paid twice, files = rows.

It asks the database, the disk, the provider's ledger, the clients' answers and the logs; never the
service itself.
"""

import builtins
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from PIL import Image

from scripts.servers import Postgres
from tests.doubles.replicate_ledger import LedgerEntry
from tests.doubles.replicate_settings import Settings as DoubleSettings
from tests.faults.harness import FULL, Answer, Process, Stack, percentile, wait_for

TERMINAL = frozenset({"completed", "failed", "cancelled"})
LEGAL = frozenset(
    {
        (None, "pending"),
        ("pending", "processing"),
        ("pending", "cancelled"),
        ("pending", "failed"),
        ("processing", "pending"),
        ("processing", "completed"),
        ("processing", "failed"),
        ("processing", "cancelled"),
    }
)
DOCUMENTED = frozenset({200, 201, 204, 206, 304, 401, 404, 405, 409, 413, 416, 422, 503})
READ = frozenset({0, 200, 503})
# Of these a new prediction may be worth it; `canceled` was our own doing, and ends the job.
ENDED_BADLY = frozenset({"failed", "aborted"})
OLD_TEMP_SECONDS = 600
LATE_SECONDS = 30
DEAD_LEASE_SECONDS = 30
SETTLE_SECONDS = 60
READ_P99_SECONDS = 0.25
ENOUGH_READS = 100

HISTORY = """
CREATE SCHEMA faults;
CREATE TABLE faults.history (
    number bigserial, at timestamptz DEFAULT clock_timestamp(), job_id uuid,
    old_status text, status text, phase text, worker_id uuid, lease_token uuid, claimed boolean,
    -- When a job loses its owner: since when another one could see that it is silent.
    old_worker_id uuid, seen_silent interval
);
CREATE TABLE faults.workers (id uuid, name text);  -- all there were
CREATE FUNCTION faults.note_worker() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO faults.workers VALUES (NEW.id, NEW.name);
    RETURN NULL;
END $$;
CREATE TRIGGER faults_note AFTER INSERT ON workers
    FOR EACH ROW EXECUTE FUNCTION faults.note_worker();
CREATE FUNCTION faults.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO faults.history
        (job_id, old_status, status, phase, worker_id, lease_token, claimed,
         old_worker_id, seen_silent)
    VALUES (
        NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.status END, NEW.status, NEW.phase,
        NEW.worker_id, NEW.lease_token,
        TG_OP = 'UPDATE' AND NEW.lease_token IS DISTINCT FROM OLD.lease_token,
        CASE WHEN TG_OP = 'UPDATE' THEN OLD.worker_id END,
        CASE WHEN TG_OP = 'UPDATE' AND NEW.worker_id IS NULL THEN (
            SELECT now() - greatest(silent.heartbeat_at, min(other.started_at))
            FROM workers silent JOIN workers other ON other.id <> silent.id
            WHERE silent.id = OLD.worker_id AND other.heartbeat_at > now() - interval '5 s'
            GROUP BY silent.heartbeat_at) END
    );
    RETURN NULL;
END $$;
CREATE TRIGGER faults_note AFTER INSERT OR UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION faults.note();
"""
FORGET = """
DROP TRIGGER IF EXISTS faults_note ON jobs;
DROP TRIGGER IF EXISTS faults_note ON workers;
DROP SCHEMA IF EXISTS faults CASCADE;
"""


@contextmanager
def noted_history(postgres: Postgres) -> Iterator[None]:
    """Have the database note every change of a job, in a schema of its own, until the end."""
    _run(postgres, FORGET + HISTORY)
    try:
        yield
    finally:
        if not postgres.is_running():
            postgres.start()
        _run(postgres, FORGET)


def _run(postgres: Postgres, script: str) -> None:
    with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
        connection.execute(script)


@dataclass(frozen=True)
class Summary:
    """What the oracle counted, for the report."""

    jobs: dict[str, int]
    creates: int
    lost_answers: int
    created_twice: int
    files: int
    leftover_temps: int
    read_p99_seconds: float


def check(
    stack: Stack,
    *,
    failures: Collection[str] = (),
    max_retries: int = 3,
    may_pay_again: bool = False,
) -> Summary:
    """Raise AssertionError with every broken rule; call it when all jobs should be over.

    `failures`: the error codes with which jobs may have failed. `max_retries`: the stack's
    MAX_RETRY_ATTEMPTS. `may_pay_again`: ON_UNKNOWN_OUTCOME=resubmit, so that O2's "one create"
    does not hold.
    """
    oracle = _Oracle(stack)
    oracle.all_ended(failures)
    oracle.paid_once(may_pay_again)
    oracle.files_match_rows()
    oracle.history_is_legal(max_retries)
    oracle.no_dead_lease()
    oracle.answers_are_documented()
    oracle.resources_are_back()
    oracle.logs_are_clean()
    shown = "\n".join(oracle.broken[:20])
    assert not oracle.broken, f"seed {stack.seed}: {len(oracle.broken)} broken rules\n{shown}"
    lost_answers = sum(not entry.reply_delivered for entry in oracle.creates)
    return Summary(
        stack.counts(),
        len(oracle.creates),
        lost_answers,
        oracle.created_twice,
        oracle.files,
        oracle.temps,
        oracle.read_p99_seconds,
    )


class _Oracle:
    def __init__(self, stack: Stack) -> None:
        self.broken: list[str] = []
        self.created_twice = 0  # but for those that the provider itself reported as failed
        self.files = 0
        self.temps = 0
        self.read_p99_seconds = 0.0
        self._stack = stack
        self.creates = stack.replicate.creates()
        self._jobs = _rows(stack, "SELECT * FROM jobs")
        self._attempts = defaultdict(list)
        for attempt in _rows(stack, "SELECT * FROM attempts ORDER BY job_id, number"):
            self._attempts[attempt["job_id"]].append(attempt)

    def _expect(self, holds: object, rule: str) -> None:
        if not holds:
            self.broken.append(rule)

    def all_ended(self, failures: Collection[str]) -> None:
        """O1: every id answered with 201 exists; every job is over, and well or as expected."""
        ids = {str(job["id"]) for job in self._jobs}
        for job_id in self._stack.accepted:
            self._expect(job_id in ids, f"O1: {job_id} was answered with 201 and does not exist")
        deleted = {a.path.rsplit("/", 1)[-1] for a in self._stack.answers if a.method == "DELETE"}
        kept = set(self._stack.accepted) - deleted
        for job in self._jobs:
            self._expect(job["status"] in TERMINAL, f"O1: {job['id']} is {job['status']}")
            by_itself = job["status"] == "cancelled" and str(job["id"]) in kept
            self._expect(not by_itself, f"O1: nobody has cancelled {job['id']}")
            code = job["error_code"]
            expected = job["status"] != "failed" or code in failures
            self._expect(expected, f"O1: {job['id']} failed with {code}: {job['error_message']}")
            if job["completed_at"] is not None:
                late = (job["completed_at"] - job["deadline_at"]).total_seconds()
                self._expect(late < LATE_SECONDS, f"O1: {job['id']} ended {late} s too late")

    def paid_once(self, may_pay_again: bool) -> None:
        """O2: one accepted create per job, but for those the provider itself reported failed."""
        by_prompt = defaultdict(list)
        for entry in self.creates:
            by_prompt[str(entry.input.get("prompt"))].append(entry)
        known = {job["prompt"] for job in self._jobs}
        for prompt in by_prompt.keys() - known:
            self._expect(False, f"O2: a create of no job: {prompt}")
        for job in self._jobs:
            self._job_paid_once(job, by_prompt[job["prompt"]], may_pay_again)

    def _job_paid_once(
        self, job: dict[str, Any], entries: list[LedgerEntry], may_pay_again: bool
    ) -> None:
        attempts = self._attempts[job["id"]]
        recorded = {attempt["prediction_id"] for attempt in attempts}
        reported = [e for e in entries if e.status in ENDED_BADLY and e.id in recorded]
        twice = max(0, len(entries) - 1 - len(reported))
        self.created_twice += twice
        once = may_pay_again or not twice
        self._expect(once, f"O2: {len(entries)} creates for {job['id']} ({job['status']})")
        known = len(entries) <= len(attempts)
        self._expect(known, f"O2: {len(entries)} creates, {len(attempts)} attempts: {job['id']}")
        self._unpaid_is_not_there(attempts, entries)
        self._only_after_the_end(job, entries, may_pay_again)
        if job["status"] == "completed":
            open_ones = [a["number"] for a in attempts if a["state"] != "settled"]
            self._expect(not open_ones, f"O2: open attempts of {job['id']}: {open_ones}")
            ended_well = [entry.id for entry in entries if entry.status == "succeeded"]
            paid = job["external_job_id"] in ended_well
            self._expect(paid, f"O2: {job['id']} completed from {job['external_job_id']}")
            self._last_is_told(attempts[-1])

    def _last_is_told(self, attempt: dict[str, Any]) -> None:
        """The ledger of ours says of what completed a job how it ended, and that it is paid."""
        told = (attempt["outcome"], attempt["charged"], attempt["error_class"])
        whole = told == ("succeeded", "yes", None) and attempt["settled_at"]
        self._expect(whole, f"O2: {attempt['id']} of a completed job is {told}")

    def _only_after_the_end(
        self, job: dict[str, Any], entries: list[LedgerEntry], may_pay_again: bool
    ) -> None:
        """No create was called for while the one before it could still end well."""
        for earlier, later in pairwise(sorted(entries, key=lambda entry: entry.called_at)):
            over = earlier.completed_at is not None and earlier.completed_at <= later.called_at
            self._expect(over or may_pay_again, f"O2: two at once for {job['id']}: {later.id}")

    def _unpaid_is_not_there(
        self, attempts: list[dict[str, Any]], entries: list[LedgerEntry]
    ) -> None:
        """What was called never accepted is not in the provider's ledger."""
        recorded = {attempt["prediction_id"] for attempt in attempts}
        strangers = [entry.input for entry in entries if entry.id not in recorded]
        for attempt in attempts:
            unpaid = attempt["charged"] == "no" and attempt["prediction_id"] is None
            there = unpaid and attempt["input"] in strangers
            self._expect(not there, f"O2: {attempt['id']} is {attempt['outcome']}, but is there")

    def files_match_rows(self) -> None:
        """O3: completed rows and files are one to one, whole and the same."""
        outputs = _rows(self._stack, "SELECT * FROM outputs")
        named = {output["name"] for output in outputs}
        with_output = {output["job_id"] for output in outputs}
        completed = {job["id"] for job in self._jobs if job["status"] == "completed"}
        self._expect(with_output == completed, "O3: outputs of jobs that are not the completed")
        for output in outputs:
            self._file_matches(output)
        for path in _files(self._stack.media):
            self._expect(path.name in named, f"O3: a file without a row: {path.name}")
        stems = {str(job_id) for job_id in completed}
        for path in _files(self._stack.metadata):
            self._expect(
                path.stem in stems, f"O3: metadata of a job that did not complete: {path.name}"
            )
        self.files = len(outputs)
        self._no_old_temp()

    def _file_matches(self, output: dict[str, Any]) -> None:
        path = self._stack.media / output["name"]
        if not path.exists():
            self._expect(False, f"O3: {path.name} is missing")
            return
        data = path.read_bytes()
        same = hashlib.sha256(data).hexdigest() == output["sha256"]
        self._expect(same and len(data) == output["size_bytes"], f"O3: {path.name} differs")
        if output["media_type"].startswith("image/"):
            self._expect(_decodes(path), f"O3: {path.name} does not decode")
        document = self._stack.metadata / f"{output['job_id']}.json"
        told = json.loads(document.read_text()) if document.exists() else {}
        right = told.get("job_id") == str(output["job_id"])
        kept = output["sha256"] in {kept["sha256"] for kept in told.get("outputs", [])}
        self._expect(right and kept, f"O3: the metadata of {path.name} is missing or another's")

    def _no_old_temp(self) -> None:
        for folder in (self._stack.media, self._stack.metadata):
            hidden = [p for p in folder.rglob("*") if p.is_file() and _is_hidden(p, folder)]
            self.temps += len(hidden)
            for path in hidden:
                age_seconds = time.time() - path.stat().st_mtime
                self._expect(age_seconds < OLD_TEMP_SECONDS, f"O3: an old temp: {path.name}")

    def history_is_legal(self, max_retries: int) -> None:
        """O4: only the moves of the state machine; no more attempts than allowed."""
        changes = _rows(
            self._stack, "SELECT DISTINCT job_id, old_status, status FROM faults.history"
        )
        for change in changes:
            move = (change["old_status"], change["status"])
            legal = move in LEGAL or (move[0] == move[1] and move[1] not in TERMINAL)
            self._expect(legal, f"O4: {change['job_id']} went {move[0]} -> {move[1]}")
        robbed = "SELECT job_id FROM faults.history WHERE claimed AND old_worker_id IS NOT NULL"
        for row in _rows(self._stack, robbed):
            self._expect(False, f"O4: {row['job_id']} was claimed although it had an owner")
        for job in self._jobs:
            outcomes = [attempt["outcome"] for attempt in self._attempts[job["id"]]]
            # Called off, as the database was away when it was asked once more: nothing was sent.
            attempts = len(outcomes) - outcomes.count("create_called_off")
            self._expect(job["retry_count"] <= max_retries, f"O4: too many retries: {job['id']}")
            allowed = 1 + job["retry_count"] + job["throttle_count"]
            self._expect(attempts <= allowed, f"O4: {attempts} attempts: {job['id']}")

    def no_dead_lease(self) -> None:
        """O5: no job was held for long by a silent worker while another one could have taken it."""
        taken = _rows(
            self._stack,
            "SELECT job_id, extract(epoch FROM at)::float AS at,"
            " extract(epoch FROM seen_silent)::float AS silent FROM faults.history"
            " WHERE seen_silent IS NOT NULL",
        )
        for row in taken:
            in_fault = any(
                w.begin <= row["at"] and row["at"] - row["silent"] <= w.end
                for w in self._stack.windows
            )
            in_time = row["silent"] < self._stack.lease_seconds + DEAD_LEASE_SECONDS
            self._expect(in_time or in_fault, f"O5: {row['job_id']} held for {row['silent']:.0f} s")

    def answers_are_documented(self) -> None:
        """O6: documented codes; 503, with Retry-After, and no answer only while a fault shows."""
        for answer in (*self._stack.answers, *self._stack.reads):
            shown = f"{answer.method} {answer.path}: {answer.status} after {answer.seconds:.2f} s"
            if answer.status in (0, 503):
                self._expect(self._in_window(answer), f"O6: without a fault: {shown}")
            if answer.status:
                self._expect(answer.status in DOCUMENTED, f"O6: undocumented: {shown}")
            if (answer.method, answer.path) == ("POST", "/api/v1/generate"):
                taken = answer.status in (0, 201, 503)
                self._expect(taken, f"O6: a good request is refused: {shown}")
            if answer.status == 503:
                # That route's answer is a report, whatever its status.
                right_type = "problem+json" in answer.content_type or "health" in answer.path
                whole = answer.retry_after and right_type
                self._expect(whole, f"O6: a 503 without Retry-After or problem: {shown}")
        strange = {read.path: read.status for read in self._stack.reads if read.status not in READ}
        self._expect(not strange, f"O6: of what was answered with 201: {strange}")
        reads = [a.seconds for a in self._stack.reads if not self._in_window(a)]
        self._expect(reads or self._stack.windows, "O6: nobody has looked at a job")
        self.read_p99_seconds = percentile(reads, 0.99)
        # Of so few it would be the slowest one; and the default run has the machine not to itself.
        if FULL and len(reads) >= ENOUGH_READS:
            fast = self.read_p99_seconds < READ_P99_SECONDS
            self._expect(fast, f"O6: p99 of {len(reads)} GETs is {self.read_p99_seconds:.3f} s")

    def _in_window(self, answer: Answer) -> bool:
        end = answer.at + answer.seconds
        return any(w.begin <= end and answer.at <= w.end for w in self._stack.windows)

    def resources_are_back(self) -> None:
        """O7: no connection of the dead is left; memory and open files are as before the fault.

        The latter at full size, where the scenario has warmed up the processes that survive it.
        """
        try:
            wait_for(lambda: not self._stack.grown(), "resources", SETTLE_SECONDS)
        except AssertionError:
            self._expect(False, f"O7: {self._stack.grown()}")

    def logs_are_clean(self) -> None:
        """O8: no secret, no prompt and no unhandled traceback."""
        stack = self._stack
        secrets = {
            "token": stack.replicate.token,
            "password": stack.postgres.password,
            "broker password": stack.valkey.password,
            "prompt": stack.secret_words,
            "provider's webhook secret": DoubleSettings().webhook_secret,
        }
        own = ("REPLICATE_WEBHOOK_SECRET", "AWS_SECRET_ACCESS_KEY")
        secrets |= {name: stack.settings[name] for name in own if name in stack.settings}
        for path in sorted(stack.logs.iterdir()):
            text = path.read_text(errors="replace")
            for name, secret in secrets.items():
                self._expect(secret not in text, f"O8: the {name} in {path.name}")
            for line in text.splitlines():
                self._expect(not self._is_unhandled(line), f"O8: {path.name}: {line[:300]}")

    def _is_unhandled(self, line: str) -> bool:
        """What a run or a task does not know is no surprise while a fault shows."""
        if any(words in line for words in UNHANDLED):
            return True
        record = _record(line)
        if record.get("event") == "duty_failed":
            return _is_bug(record["error"])
        if "exception" not in record or record["logger"].startswith("celery."):
            return False  # of the broker's absence Celery tells with tracebacks
        at = datetime.fromisoformat(record["timestamp"]).timestamp()
        return not any(w.begin <= at <= w.end for w in self._stack.windows)


UNHANDLED = (
    "Traceback (most recent call last)",
    '"event": "unexpected_error"',
    "raised unexpected",
    "was never retrieved",
    "never awaited",
)


def _record(line: str) -> dict[str, Any]:
    """Return what the log says; nothing for a line of somebody else's, or half a one."""
    try:
        return dict(json.loads(line)) if line.startswith('{"') else {}
    except ValueError:
        return {}


def _is_bug(error: str) -> bool:
    """Tell an error that no outage raises, by its name with the module: Python's, or of SQL."""
    if error.rpartition(".")[2] in ("ProgrammingError", "IntegrityError", "DataError"):
        return True
    kind = getattr(builtins, error.removeprefix("builtins."), None)
    return kind is not None and not issubclass(kind, OSError)


def _rows(stack: Stack, statement: str) -> list[dict[str, Any]]:
    with psycopg.connect(
        stack.postgres.sync_url, row_factory=psycopg.rows.dict_row, autocommit=True
    ) as connection:
        return connection.execute(statement).fetchall()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def taken_from_the_living(stack: Stack) -> list[object]:
    """Jobs freed by others although their owner ran all through its lease: it was never stopped.

    As this test knows it, not by the owner's heartbeats, by which the others have judged.
    """
    freed = stack.query(
        "SELECT job_id, extract(epoch FROM at)::float, name FROM faults.history"
        " JOIN faults.workers ON id = old_worker_id"
        " WHERE status = 'processing' AND worker_id IS NULL"
    )
    owners = {str(worker.pid): worker for worker in stack.workers}
    robbed = []
    for job_id, at, name in freed:
        owner = owners[name.rpartition(":")[2]]
        lived = owner.lived_through(at - stack.lease_seconds, at)
        if lived and not _freed_itself(stack, owner, job_id, at):
            robbed.append(job_id)
    return robbed


def _freed_itself(stack: Stack, owner: Process, job_id: UUID, at: float) -> bool:
    """What a worker gives up itself, because it lost the run, it says."""
    lines = [line for line in owner.child.output() if "job_abandoned" in line]
    told = [json.loads(line) for line in lines if str(job_id) in line]
    times = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in told]
    return any(abs(time_ - at) < stack.lease_seconds for time_ in times)


def recovery_seconds(stack: Stack, killed_at: float, worker_ids: Collection[object]) -> list[float]:
    """Return, for each job that these workers held at the kill, the time until its next claim."""
    held = """
        SELECT DISTINCT ON (job_id) job_id, status, worker_id FROM faults.history
        WHERE at <= to_timestamp(%s) ORDER BY job_id, number DESC
    """
    owners = {
        job_id: worker
        for job_id, status, worker in stack.query(held, killed_at)
        if status == "processing" and worker in worker_ids
    }
    claims = stack.query(
        "SELECT job_id, extract(epoch FROM min(at)) FROM faults.history"
        " WHERE claimed AND at > to_timestamp(%s) GROUP BY job_id",
        killed_at,
    )
    return [float(at) - killed_at for job_id, at in claims if job_id in owners]


def claims_per_job(stack: Stack) -> Counter[str]:
    """Return how often each job was claimed."""
    rows = stack.query("SELECT job_id, count(*) FROM faults.history WHERE claimed GROUP BY job_id")
    return Counter({str(job_id): count for job_id, count in rows})
