"""Compares the database's rows with the stored files, both ways, and repairs what it safely can.

Every output of every completed job is read and compared with its SHA-256; every stored file must
belong to a row. Works on folders and buckets, beside a running service, with the service's own
settings (environment, config.env). Ends with 1 when something is wrong and not repaired.

A lost or damaged file can only be reported. With --repair, what nobody can ask for is deleted:
files of jobs that ended without completing, of deleted media, left over by a crash. Files of jobs
that no row knows may belong to another database: only --repair-unknown deletes them, a day old.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psycopg

from app.config import get_settings
from app.errors import StorageError
from app.jobs.strays import batches
from app.storage import create_storage
from app.storage.base import FOLDERS, Storage, StoredFile, job_id_of, media_key, metadata_key
from app.storage.workspaces import leftovers, remove_leftovers

BATCH = 500
READERS = 8
# No download or thumbnail takes this long.
LEFTOVER_SECONDS = 600.0
UNKNOWN_AGE = timedelta(hours=24)
FIRST_ID = UUID(int=0)

COMPLETED = """
    SELECT j.id FROM jobs j WHERE j.status = 'completed' AND j.id > %s
    ORDER BY j.id LIMIT %s
"""
OUTPUTS = """
    SELECT o.job_id, o.name, o.size_bytes, o.sha256 FROM outputs o WHERE o.job_id = ANY(%s)
"""
DELETED = "SELECT job_id, kind, purged_at IS NOT NULL FROM deletions WHERE job_id = ANY(%s)"
STATUSES = "SELECT id, status FROM jobs WHERE id = ANY(%s)"


@dataclass(slots=True)
class Finding:
    """One thing that is wrong; `kind` is stable, `detail` is for people."""

    kind: str
    key: str
    detail: str
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """What the rows say of an output."""

    job_id: UUID
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Rows:
    """What the database knows of some jobs."""

    statuses: dict[UUID, str]
    names: set[str]
    marked: set[tuple[UUID, str]]
    purged: set[tuple[UUID, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when all is well (again), 1 when not, 2 when it cannot look."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repair", action="store_true", help="delete what nobody can ask for")
    options.add_argument("--repair-unknown", action="store_true", help="and what no row knows")
    options.add_argument("--json", action="store_true", help="print one JSON document")
    given = options.parse_args(arguments)
    try:
        audit = asyncio.run(_run(given.repair or given.repair_unknown, given.repair_unknown))
    except (StorageError, psycopg.Error) as error:
        print(f"The audit could not be finished: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    _print(audit, as_json=given.json)
    return 1 if any(not finding.repaired for finding in audit.findings) else 0


async def _run(repair: bool, repair_unknown: bool) -> "Audit":
    settings = get_settings()
    url = settings.sync_database_url.replace("+psycopg", "")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        audit = Audit(connection, create_storage(settings), repair, repair_unknown)
        await audit.run()
    return audit


class Audit:
    """One look at everything; the findings are gathered, in the order they are met."""

    def __init__(
        self,
        connection: "psycopg.AsyncConnection[tuple[Any, ...]]",
        storage: Storage,
        repair: bool,
        repair_unknown: bool,
    ) -> None:
        self.findings: list[Finding] = []
        self.checked: Counter[str] = Counter()
        self._connection = connection
        self._storage = storage
        self._repair = repair
        self._repair_unknown = repair_unknown
        self._readers = asyncio.Semaphore(READERS)

    async def run(self) -> None:
        """Look from the rows to the files, from the files to the rows, and for leftovers."""
        async for job_ids in self._completed():
            await self._check_rows(job_ids)
        for folder in FOLDERS:
            async for files in batches(self._storage.names(folder)):
                await self._check_files(folder, files)
        await self._check_leftovers()

    # --- from the rows to the files ----------------------------------------------------------

    async def _completed(self) -> AsyncIterator[list[UUID]]:
        last = FIRST_ID
        while True:
            rows = await self._query(COMPLETED, last, BATCH)
            if not rows:
                return
            last = rows[-1][0]
            yield [row[0] for row in rows]

    async def _check_rows(self, job_ids: list[UUID]) -> None:
        marked = (await self._rows(job_ids)).marked
        expected = [Expected(*row) for row in await self._query(OUTPUTS, job_ids)]
        checks = [self._check_output(o) for o in expected if (o.job_id, "media") not in marked]
        checks += [self._check_metadata(i) for i in job_ids if (i, "metadata") not in marked]
        found = [finding for finding in await asyncio.gather(*checks) if finding]
        if not found:
            return
        # What is missing may have been deleted, for its age, since the marks were read.
        marked = (await self._rows(job_ids)).marked
        for job_id, finding in found:
            folder = finding.key.partition("/")[0]
            if (job_id, folder) not in marked:
                self.findings.append(finding)

    async def _check_output(self, output: Expected) -> tuple[UUID, Finding] | None:
        key = media_key(output.name)
        async with self._readers:
            self.checked["outputs"] += 1
            size = await self._storage.size(key)
            if size is None:
                return output.job_id, Finding("missing_file", key, "The output has no file.")
            if size != output.size_bytes:
                detail = f"{size} bytes instead of {output.size_bytes}."
                return output.job_id, Finding("wrong_size", key, detail)
            if await _sha256(self._storage, key) != output.sha256:
                return output.job_id, Finding("wrong_sha256", key, "The bytes are not the row's.")
        return None

    async def _check_metadata(self, job_id: UUID) -> tuple[UUID, Finding] | None:
        key = metadata_key(job_id)
        async with self._readers:
            self.checked["metadata"] += 1
            if await self._storage.size(key):
                return None
        return job_id, Finding("missing_metadata", key, "The job has no metadata document.")

    # --- from the files to the rows ----------------------------------------------------------

    async def _check_files(self, folder: str, files: list[StoredFile]) -> None:
        """The files were listed first: what has been stored since can not look unknown."""
        self.checked["files"] += len(files)
        ids = {job_id for file in files if (job_id := job_id_of(file.name))}
        rows = await self._rows(list(ids))
        for file in files:
            if finding := _judge(folder, file, rows):
                await self._settle(finding, file)
                self.findings.append(finding)

    async def _settle(self, finding: Finding, file: StoredFile) -> None:
        allowed = self._repair
        if finding.kind == "unknown_file":
            is_old = datetime.now(UTC) - file.modified_at > UNKNOWN_AGE
            allowed = self._repair_unknown and is_old
        if allowed:
            await self._storage.delete(finding.key)
            finding.repaired = True

    async def _check_leftovers(self) -> None:
        found = await leftovers(self._storage.workspaces, LEFTOVER_SECONDS)
        if self._repair:
            await remove_leftovers(self._storage.workspaces, LEFTOVER_SECONDS)
        for path in found:
            detail = "A dead process left it half-made."
            self.findings.append(Finding("leftover", str(path), detail, repaired=self._repair))

    # --- the database ------------------------------------------------------------------------

    async def _rows(self, job_ids: list[UUID]) -> Rows:
        deleted = await self._query(DELETED, job_ids)
        return Rows(
            statuses=dict(await self._query(STATUSES, job_ids)),
            names={row[1] for row in await self._query(OUTPUTS, job_ids)},
            marked={(row[0], row[1]) for row in deleted},
            purged={(row[0], row[1]) for row in deleted if row[2]},
        )

    async def _query(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return await (await self._connection.execute(query, values)).fetchall()


def _judge(folder: str, file: StoredFile, rows: Rows) -> Finding | None:
    """Say what is wrong with a file that is there, if anything."""
    key = f"{folder}/{file.name}"
    job_id = job_id_of(file.name)
    status = rows.statuses.get(job_id) if job_id else None
    if job_id is None or status is None:
        return Finding("unknown_file", key, "No row knows its job.")
    if status in ("failed", "cancelled"):
        return Finding("file_of_ended_job", key, f"Its job is {status}.")
    if status != "completed":
        return None  # being stored
    if (job_id, "metadata" if folder == "metadata" else "media") in rows.purged:
        return Finding("file_of_deleted_output", key, "It should be deleted.")
    if not _is_expected(folder, file.name, job_id, rows):
        return Finding("unexpected_file", key, "Its job has completed without it.")
    return None


def _is_expected(folder: str, name: str, job_id: UUID, rows: Rows) -> bool:
    if folder == "metadata":
        return metadata_key(job_id) == f"metadata/{name}"
    if folder == "thumbnails":  # {output}.{size}.webp
        return name.rsplit(".", 2)[0] in rows.names
    return name in rows.names


async def _sha256(storage: Storage, key: str) -> str:
    digest = hashlib.sha256()
    try:
        async for chunk in storage.read(key):
            await asyncio.to_thread(digest.update, chunk)
    except FileNotFoundError:
        return ""  # deleted since; looked up again before it is reported
    return digest.hexdigest()


def _print(audit: Audit, *, as_json: bool) -> None:
    if as_json:
        findings = [asdict(finding) for finding in audit.findings]
        print(json.dumps({"checked": audit.checked, "findings": findings}, indent=2))
        return
    for finding in audit.findings:
        repaired = " (deleted)" if finding.repaired else ""
        print(f"{finding.kind:<22} {finding.key}: {finding.detail}{repaired}")
    checked = ", ".join(f"{count} {name}" for name, count in audit.checked.items()) or "nothing"
    left = sum(not finding.repaired for finding in audit.findings)
    print(f"Checked {checked}: {len(audit.findings)} found, {left} left.")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Not sys.exit: a thread of obstore's that is still in Python while that ends aborts the process
    # (134, without a word). See github.com/PyO3/pyo3-async-runtimes/issues/40.
    os._exit(code)
