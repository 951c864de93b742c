"""scripts/audit_storage.py: every planted error is found, on disk and in a bucket, and no other."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from app.config import Settings
from app.storage import create_storage
from app.storage.base import Storage, media_key, metadata_key, thumbnail_key
from scripts.servers import Postgres
from tests.contracts.storage import listed, put
from tests.s3_server import KEYS

ROOT = Path(__file__).parents[2]
DATA = b"the bytes of a picture"
ADD_JOB = """
    INSERT INTO jobs (id, prompt, model_name, parameters, status, completed_at, deadline_at,
                      ring_at, retry_count, throttle_count, crash_count)
    VALUES (%s, 'p', 'm', '{}', %s, now(), now(), now(), 0, 0, 0)
"""
ADD_OUTPUT = """
    INSERT INTO outputs (job_id, index, name, media_type, size_bytes, sha256)
    VALUES (%s, 0, %s, 'image/png', %s, %s)
"""
ADD_DELETION = """
    INSERT INTO deletions (job_id, kind, completed_at, purged_at) VALUES (%s, %s, now(), %s)
"""


@dataclass
class Archive:
    """A database and a storage, and the script that compares them."""

    connection: psycopg.Connection[tuple[Any, ...]]
    storage: Storage
    environment: dict[str, str]

    async def job(self, status: str = "completed", *, files: bool = True) -> UUID:
        job_id = uuid4()
        self.connection.execute(ADD_JOB, (job_id, status))
        if status == "completed":
            values = (job_id, f"{job_id}.png", len(DATA), hashlib.sha256(DATA).hexdigest())
            self.connection.execute(ADD_OUTPUT, values)
        if files:
            await put(self.storage, media_key(f"{job_id}.png"), DATA)
            await put(self.storage, metadata_key(job_id), b"{}")
        return job_id

    def delete(self, job_id: UUID, kind: str, *, purged: bool) -> None:
        at = "2026-01-01" if purged else None
        self.connection.execute(ADD_DELETION, (job_id, kind, at))

    def audit(self, *options: str) -> tuple[int, dict[str, str], dict[str, bool]]:
        """The exit code, and by key: what is wrong, and whether it was repaired."""
        command = [sys.executable, str(ROOT / "scripts" / "audit_storage.py"), "--json", *options]
        environment = {**os.environ, **self.environment}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
        assert ran.stdout, ran.stderr
        found = json.loads(ran.stdout)["findings"]
        kinds = {finding["key"]: finding["kind"] for finding in found}
        assert len(kinds) == len(found)
        return ran.returncode, kinds, {finding["key"]: finding["repaired"] for finding in found}


@pytest.fixture(params=["disk", "bucket"])
def archive(
    request: pytest.FixtureRequest, database: Postgres, tmp_path: Path
) -> Iterator[Archive]:
    environment = {"DATABASE_URL": database.url, "STORAGE_URL": f"file://{tmp_path}/files"}
    if request.param == "bucket":
        environment |= {
            **KEYS,
            "STORAGE_URL": f"s3://media/{uuid4().hex}",
            "AWS_ENDPOINT_URL": request.getfixturevalue("s3_url"),
            "TMPDIR": str(tmp_path),
        }
    values: dict[str, Any] = {name.lower(): value for name, value in environment.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        storage = create_storage(Settings(_env_file=None, **values))
    with psycopg.connect(database.sync_url, autocommit=True) as connection:
        yield Archive(connection, storage, environment)


async def test_all_is_well(archive: Archive) -> None:
    job = await archive.job()
    await archive.job()
    for status in ("pending", "processing"):
        await archive.job(status)  # being stored
    await archive.job("failed", files=False)
    await put(archive.storage, thumbnail_key(f"{job}.png", 256), b"webp")
    await archive.storage.check()
    (archive.storage.workspace / "young").write_bytes(b"half")
    gone = await archive.job(files=False)
    archive.delete(gone, "media", purged=True)
    archive.delete(gone, "metadata", purged=True)
    going = await archive.job()
    archive.delete(going, "media", purged=False)
    assert archive.audit("--repair-unknown") == (0, {}, {})
    assert len(await listed(archive.storage, "media")) == 5


async def test_what_can_only_be_reported(archive: Archive) -> None:
    missing, cut, changed, undocumented = [await archive.job() for _ in range(4)]
    await archive.storage.delete(media_key(f"{missing}.png"))
    await put(archive.storage, media_key(f"{cut}.png"), DATA[:-1])
    await put(archive.storage, media_key(f"{changed}.png"), DATA[::-1])
    await archive.storage.delete(metadata_key(undocumented))
    expected = {
        f"media/{missing}.png": "missing_file",
        f"media/{cut}.png": "wrong_size",
        f"media/{changed}.png": "wrong_sha256",
        f"metadata/{undocumented}.json": "missing_metadata",
    }
    for options in ([], ["--repair"], ["--repair-unknown"]):
        code, kinds, repaired = archive.audit(*options)
        assert (code, kinds) == (1, expected)
        assert not any(repaired.values())
    assert len(await listed(archive.storage, "media")) == 3


async def test_what_nobody_can_ask_for_is_deleted(archive: Archive) -> None:
    kept, failed, cancelled = [await archive.job(s) for s in ("completed", "failed", "cancelled")]
    deleted = await archive.job()
    archive.delete(deleted, "media", purged=True)
    await put(archive.storage, media_key(f"{kept}-1.webp"), b"of an earlier try")
    await put(archive.storage, thumbnail_key(f"{kept}-1.webp", 128), b"webp")
    await put(archive.storage, thumbnail_key(f"{deleted}.png", 128), b"webp")
    half = archive.storage.workspace / "half"
    half.write_bytes(b"half")
    long_ago = time.time() - 3600
    os.utime(half, (long_ago, long_ago))
    expected = {
        f"media/{failed}.png": "file_of_ended_job",
        f"metadata/{failed}.json": "file_of_ended_job",
        f"media/{cancelled}.png": "file_of_ended_job",
        f"metadata/{cancelled}.json": "file_of_ended_job",
        f"media/{deleted}.png": "file_of_deleted_output",
        f"thumbnails/{deleted}.png.128.webp": "file_of_deleted_output",
        f"media/{kept}-1.webp": "unexpected_file",
        f"thumbnails/{kept}-1.webp.128.webp": "unexpected_file",
        str(half): "leftover",
    }
    code, kinds, repaired = archive.audit()
    assert (code, kinds) == (1, expected)
    assert not any(repaired.values())
    code, kinds, repaired = archive.audit("--repair")
    assert (code, kinds) == (0, expected)
    assert all(repaired.values())
    assert archive.audit() == (0, {}, {})
    assert [file.name for file in await listed(archive.storage, "media")] == [f"{kept}.png"]


async def test_what_no_row_knows_is_left_alone_unless_asked_for_and_old(
    archive: Archive, request: pytest.FixtureRequest
) -> None:
    stranger = uuid4()
    await put(archive.storage, media_key(f"{stranger}.png"), b"of another database")
    await put(archive.storage, media_key("readme.txt"), b"somebody's own")
    await put(archive.storage, metadata_key(stranger), b"{}")
    expected = dict.fromkeys(
        (f"media/{stranger}.png", "media/readme.txt", f"metadata/{stranger}.json"), "unknown_file"
    )
    for options in ([], ["--repair"], ["--repair-unknown"]):  # young: it may be on its way
        code, kinds, repaired = archive.audit(*options)
        assert (code, kinds) == (1, expected)
        assert not any(repaired.values())
    if "disk" not in request.node.callspec.id:
        return  # a bucket keeps its own time
    two_days_ago = time.time() - 2 * 86_400
    for path in archive.storage.workspace.parents[1].rglob("*.*"):
        os.utime(path, (two_days_ago, two_days_ago))
    assert archive.audit("--repair")[0] == 1
    assert archive.audit("--repair-unknown")[0] == 0
    assert await listed(archive.storage, "media") == []


async def test_many_rows_and_files(archive: Archive) -> None:
    jobs = [uuid4() for _ in range(1201)]
    with archive.connection.cursor() as cursor:
        cursor.executemany(ADD_JOB, [(job, "failed") for job in jobs])
    await put(archive.storage, media_key(f"{jobs[700]}.png"), DATA)
    code, kinds, _ = archive.audit()
    assert (code, kinds) == (1, {f"media/{jobs[700]}.png": "file_of_ended_job"})


def test_for_people(database: Postgres, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "audit_storage.py")]
    environment = {**os.environ, "DATABASE_URL": database.url, "STORAGE_URL": f"file://{tmp_path}"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "Checked nothing: 0 found, 0 left.\n")
    environment["DATABASE_URL"] = "postgresql://nobody:s3cret@127.0.0.1:1/none"
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("The audit could not be finished: ")
    assert "s3cret" not in ran.stderr
