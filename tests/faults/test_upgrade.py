"""A migration and a change of workers while jobs run: F36."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from alembic import command
from app.config import get_settings
from scripts.servers import Postgres
from tests.e2e.service import ROOT
from tests.faults.harness import Stack, StartStack
from tests.faults.oracle import check
from tests.faults.report import Scenario, full_only

OLD_JOBS = 100_000
LONGEST_LOCK_SECONDS = 1.0

# What an expanding migration does: old workers do not know the column, new ones may.
EXPAND = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "fault", {head!r}, None, None


def upgrade():
    priority = sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0")
    op.add_column("jobs", priority)
    op.create_index("ix_jobs_priority", "jobs", ["priority", "created_at"])


def downgrade():
    op.drop_column("jobs", "priority")
"""

# Cancelled long ago; the history, which is of this test's jobs, need not know them.
ADD_OLD_JOBS = """
ALTER TABLE jobs DISABLE TRIGGER faults_note;
INSERT INTO jobs (id, prompt, model_name, parameters, status, deadline_at, ring_at, created_at,
                  completed_at, retry_count, throttle_count, crash_count)
SELECT gen_random_uuid(), 'an old job ' || n, 'acme/painter', '{}', 'cancelled', now(), now(),
       now() - interval '1 day', now(), 0, 0, 0
FROM generate_series(1, %s) n;
ALTER TABLE jobs ENABLE TRIGGER faults_note;
"""


@pytest.fixture
def expanded(postgres: Postgres, tmp_path: Path) -> Iterator[Config]:
    """Alembic with one more migration than the project has; it is taken back at the end."""
    config = Config(ROOT / "alembic.ini")
    head = ScriptDirectory.from_config(config).get_current_head()
    versions = tmp_path / "versions"
    versions.mkdir()
    (versions / "fault.py").write_text(EXPAND.format(head=head))
    places = os.pathsep.join([str(ROOT / "alembic" / "versions"), str(versions)])
    config.set_main_option("version_locations", places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", postgres.url)
        get_settings.cache_clear()
        yield config
        if not postgres.is_running():
            postgres.start()
        command.downgrade(config, str(head))
    get_settings.cache_clear()


@full_only
def test_f36_a_migration_while_old_and_new_workers_run(
    expanded: Config, start_stack: StartStack, scenario: Scenario
) -> None:
    """300 jobs beside 100,000 old ones: O1-O4, and nobody waits for the migration over 1 s."""
    stack = start_stack(workers=2)
    stack.replicate.configure(latency_seconds=2)
    for statement in ADD_OLD_JOBS.split(";")[:-1]:
        stack.query(statement, *([OLD_JOBS] if "%s" in statement else []))
    with _posting(stack, count=300, per_second=20):
        time.sleep(5)
        started = time.monotonic()
        command.upgrade(expanded, "head")
        migration_seconds = time.monotonic() - started
        for worker in stack.living_workers:
            stack.start_worker()
            worker.terminate()
    stack.wait_until_done()
    longest = max(answer.seconds for answer in stack.answers if answer.method == "POST")
    summary = check(stack)
    assert summary.jobs.pop("cancelled") == OLD_JOBS
    assert summary.jobs == {"completed": 300}
    scenario.record(
        migration_seconds=migration_seconds, longest_post_seconds=longest, **vars(summary)
    )
    assert longest <= LONGEST_LOCK_SECONDS


@contextmanager
def _posting(stack: Stack, count: int, per_second: float) -> Iterator[None]:
    posting = threading.Thread(
        target=stack.post, args=[count], kwargs={"per_second": per_second, "threads": 16}
    )
    posting.start()
    try:
        yield
    finally:
        posting.join()
