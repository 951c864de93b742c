"""Retention: what is due goes, in an order that a crash at any line leaves whole."""

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from app.errors import StorageError
from app.jobs import retention
from app.jobs.models import DeletionKind
from app.jobs.repository import JobRepository
from app.jobs.retention import RetentionPolicy, enforce_retention
from app.storage.base import media_key, metadata_key, thumbnail_key
from app.storage.local import LocalStorage
from scripts.servers import Postgres
from tests.contracts.storage import listed, put

MEDIA_ONLY = RetentionPolicy(media_days=30, metadata_days=None)
BOTH = RetentionPolicy(media_days=30, metadata_days=90)
ADD_JOB = """
    INSERT INTO jobs (id, prompt, model_name, parameters, status, completed_at, deadline_at,
                      ring_at, retry_count, throttle_count, crash_count)
    VALUES (%s, 'p', 'm', '{}', %s, now() - %s * interval '1 day', now(), now(), 0, 0, 0)
"""
ADD_OUTPUT = """
    INSERT INTO outputs (job_id, index, name, media_type, size_bytes, sha256)
    VALUES (%s, %s, %s, 'image/png', 7, '00')
"""


class Archive:
    """Jobs that ended days ago, with their files."""

    def __init__(
        self, connection: psycopg.Connection[tuple[Any, ...]], storage: LocalStorage
    ) -> None:
        self._connection = connection
        self.storage = storage

    async def add(self, days: float, *, status: str = "completed", outputs: int = 1) -> UUID:
        job_id = uuid4()
        self._connection.execute(ADD_JOB, (job_id, status, days))
        for index in range(outputs):
            name = f"{job_id}-{index}.png"
            self._connection.execute(ADD_OUTPUT, (job_id, index, name))
            await put(self.storage, media_key(name), b"content")
        await put(self.storage, metadata_key(job_id), b"{}")
        return job_id

    async def left(self) -> tuple[set[str], set[str]]:
        """The jobs that still have media, and those that still have metadata."""
        media = {file.name[:36] for file in await listed(self.storage, "media")}
        return media, {file.name[:36] for file in await listed(self.storage, "metadata")}

    def marks(self) -> dict[tuple[str, str], bool]:
        """By job and kind: whether the files are noted to be gone."""
        query = "SELECT job_id::text, kind, purged_at IS NOT NULL FROM deletions"
        return {(row[0], row[1]): row[2] for row in self._connection.execute(query)}

    def age_marks(self) -> None:
        """As if they had been made long ago, by a worker that has died since."""
        self._connection.execute("UPDATE deletions SET deleted_at = now() - interval '1 hour'")


@pytest.fixture
async def archive(database: Postgres, tmp_path: Path) -> AsyncIterator[Archive]:
    with psycopg.connect(database.sync_url, autocommit=True) as connection:
        yield Archive(connection, LocalStorage(tmp_path / "media", tmp_path / "metadata"))


async def test_each_kind_goes_at_its_own_time(repository: JobRepository, archive: Archive) -> None:
    young, older, oldest = [str(await archive.add(days)) for days in (29, 31, 91)]
    await enforce_retention(repository, archive.storage, BOTH)
    assert await archive.left() == ({young}, {young, older})
    marks = {(older, "media"): True, (oldest, "media"): True, (oldest, "metadata"): True}
    assert archive.marks() == marks


async def test_off_deletes_nothing(repository: JobRepository, archive: Archive) -> None:
    job = str(await archive.add(10_000))
    await enforce_retention(repository, archive.storage, RetentionPolicy(None, None))
    assert await archive.left() == ({job}, {job})


@pytest.mark.parametrize("status", ["failed", "cancelled", "pending", "processing"])
async def test_only_completed_jobs_count(
    repository: JobRepository, archive: Archive, status: str
) -> None:
    job = str(await archive.add(100, status=status))
    await enforce_retention(repository, archive.storage, BOTH)
    assert await archive.left() == ({job}, {job})


async def test_every_output_goes_with_its_thumbnails(
    repository: JobRepository, archive: Archive
) -> None:
    job = await archive.add(31, outputs=3)
    for index, size in ((0, 128), (1, 256), (2, 512)):
        await put(archive.storage, thumbnail_key(f"{job}-{index}.png", size), b"webp")
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    assert await listed(archive.storage, "media") == []
    assert await listed(archive.storage, "thumbnails") == []


async def test_it_goes_on_where_it_ended(
    repository: JobRepository, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(retention, "BATCHES_PER_ROUND", 2)
    jobs = [str(await archive.add(100 - number)) for number in range(7)]
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    assert (await archive.left())[0] == set(jobs[4:])  # the oldest first
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    assert (await archive.left())[0] == set()


async def test_a_job_that_was_committed_late_is_found(
    repository: JobRepository, archive: Archive
) -> None:
    await archive.add(40)
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    await archive.add(40.02)  # completed half an hour before the last one that was marked
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    assert await listed(archive.storage, "media") == []


class Dies(Exception):
    """The worker, at this line."""


@pytest.mark.parametrize("line", ["mark", "first delete", "second delete", "note"])
async def test_a_crash_at_any_line_leaves_no_promise_broken(
    repository: JobRepository,
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
) -> None:
    """No row without a mark whose file is gone; and the next worker deletes the rest."""
    job = str(await archive.add(31, outputs=2))
    deletes = 0

    async def delete(key: str) -> None:
        nonlocal deletes
        deletes += 1
        if line == ("first delete" if deletes == 1 else "second delete"):
            raise Dies
        await LocalStorage.delete(archive.storage, key)

    async def dies(*_: object, **__: object) -> Sequence[UUID]:
        raise Dies

    with monkeypatch.context() as patch, suppress(Dies):
        patch.setattr(archive.storage, "delete", delete)
        if line in ("mark", "note"):
            patch.setattr(repository, "mark_deleted" if line == "mark" else "note_purged", dies)
        await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    whole = len(await listed(archive.storage, "media")) == 2
    assert whole or (job, "media") in archive.marks()
    assert True not in archive.marks().values()

    archive.age_marks()
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    assert await listed(archive.storage, "media") == []
    assert archive.marks() == {(job, "media"): True}


async def test_what_was_marked_goes_even_when_retention_is_off_again(
    repository: JobRepository, archive: Archive
) -> None:
    await archive.add(31)
    await repository.mark_deleted(DeletionKind.MEDIA, 0, 10)
    await enforce_retention(repository, archive.storage, RetentionPolicy(None, None))
    assert len(await listed(archive.storage, "media")) == 1  # somebody may be at it right now
    archive.age_marks()
    await enforce_retention(repository, archive.storage, RetentionPolicy(None, None))
    assert await listed(archive.storage, "media") == []


async def test_a_storage_that_fails_is_tried_again(
    repository: JobRepository, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = str(await archive.add(31))

    async def delete(key: str) -> None:
        raise StorageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(archive.storage, "delete", delete)
        with pytest.raises(StorageError):
            await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    archive.age_marks()
    await enforce_retention(repository, archive.storage, MEDIA_ONLY)
    assert archive.marks() == {(job, "media"): True}


async def test_a_file_that_cannot_be_deleted_keeps_no_other(
    repository: JobRepository, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, *others = [str(await archive.add(days)) for days in (103, 102, 101)]

    async def delete(key: str) -> None:
        if key.startswith(f"media/{stuck}"):
            raise StorageError("denied")
        await LocalStorage.delete(archive.storage, key)

    monkeypatch.setattr(archive.storage, "delete", delete)
    for _ in range(2):  # by whoever marks it, and by whoever finds the mark
        with pytest.raises(StorageError):
            await enforce_retention(repository, archive.storage, BOTH)
        assert await archive.left() == ({stuck}, set())
        gone = {
            job for (job, kind), purged in archive.marks().items() if kind == "media" and purged
        }
        assert gone == set(others)
        archive.age_marks()


async def test_two_workers_share_the_work(repository: JobRepository, archive: Archive) -> None:
    for _ in range(6):
        await archive.add(31)
    first = await repository.mark_deleted(DeletionKind.MEDIA, 0, 4)
    second = await repository.mark_deleted(DeletionKind.MEDIA, 0, 4)
    assert (len(first), len(second)) == (4, 2)
    assert not set(first) & set(second)
