"""GET /api/v1/status, GET /api/v1/jobs and GET /api/v1/jobs/{id}/metadata."""

import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from app.api.deps import Services
from app.jobs.models import DeletionKind
from app.storage.base import metadata_key
from tests.integration.api.conftest import Jobs, problem_of

FIELDS = [
    *("id", "prompt", "model_name", "parameters", "status", "created_at", "updated_at"),
    *("started_at", "completed_at", "retry_count", "next_attempt_at", "error_code"),
    *("error_message", "result_url", "file_size", "external_job_id", "outputs"),
]
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class TestStatus:
    async def test_a_pending_job_has_every_field(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.pending()
        body = (await client.get(f"/api/v1/status/{job.id}")).json()
        assert list(body) == FIELDS
        assert body["id"] == str(job.id)
        assert body["status"] == "pending"
        assert INSTANT.fullmatch(body["created_at"])
        assert INSTANT.fullmatch(body["updated_at"])
        assert body["outputs"] == []
        empty = {name for name in FIELDS if body[name] is None}
        assert empty == set(FIELDS[7:9]) | set(FIELDS[10:16])

    async def test_a_completed_job_shows_its_outputs(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.completed(b"first", b"the second")
        body = (await client.get(f"/api/v1/status/{job.id}")).json()
        assert body["status"] == "completed"
        assert body["result_url"] == f"http://localhost:8000/media/{job.id}.png"
        assert body["file_size"] == 5
        assert INSTANT.fullmatch(body["completed_at"])
        assert body["outputs"][1] == {
            "index": 1,
            "url": f"http://localhost:8000/media/{job.id}-1.png",
            "media_type": "image/png",
            "size_bytes": 10,
            "sha256": hashlib.sha256(b"the second").hexdigest(),
            "width": 64,
            "height": 48,
            "duration_seconds": None,
            "content_policy_suspected": False,
            "deleted_at": None,
        }

    async def test_a_failed_job_says_why(self, client: httpx2.AsyncClient, jobs: Jobs) -> None:
        job = await jobs.failed()
        body = (await client.get(f"/api/v1/status/{job.id}")).json()
        assert body["status"] == "failed"
        assert body["error_code"] == "invalid_input"
        assert body["error_message"] == "The model said no."
        assert body["result_url"] is None

    async def test_a_due_retry_is_pending_with_its_time_and_last_error(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.retrying()
        body = (await client.get(f"/api/v1/status/{job.id}")).json()
        assert body["status"] == "pending"
        assert body["retry_count"] == 1
        assert INSTANT.fullmatch(body["next_attempt_at"])
        assert body["error_message"] == "Slow."

    async def test_unknown_is_404_and_malformed_422(self, client: httpx2.AsyncClient) -> None:
        problem_of(await client.get(f"/api/v1/status/{uuid4()}"), 404)
        for wrong in ("nope", "1", "%00", "0190b5c2-0000-7000-8000-00000000000g", "x" * 3000):
            problem = problem_of(await client.get(f"/api/v1/status/{wrong}"), 422)
            assert problem["errors"][0]["path"] == "path.job_id"


class TestList:
    async def test_empty_is_an_empty_array(self, client: httpx2.AsyncClient) -> None:
        response = await client.get("/api/v1/jobs")
        assert response.json() == []
        assert response.headers["x-total-count"] == "0"
        assert "link" not in response.headers

    async def test_newest_first_with_the_total(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        made = [(await jobs.pending(f"fox {n}")).id for n in range(5)]
        response = await client.get("/api/v1/jobs?limit=3&offset=1")
        assert [job["id"] for job in response.json()] == [str(id_) for id_ in made[3:0:-1]]
        assert response.headers["x-total-count"] == "5"
        assert list(response.json()[0]) == FIELDS

    async def test_following_the_links_shows_every_job_once(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        made = [str((await jobs.pending()).id) for _ in range(7)]
        seen: list[str] = []
        url: str | None = "/api/v1/jobs?limit=3&status_filter=pending"
        pages = 0
        while url:
            response = await client.get(url)
            seen += [job["id"] for job in response.json()]
            url = next_page(response)
            pages += 1
            await jobs.pending()  # newer jobs do not shift the pages
        assert seen == made[::-1]
        assert pages == 3

    async def test_a_page_is_bounded_in_bytes_as_well(
        self, client: httpx2.AsyncClient, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A megabyte each, and a hundred of them, would be a hundred megabytes in one answer."""
        monkeypatch.setattr("app.jobs.repository.client.PAGE_BYTES", 15)
        made = [str((await jobs.pending()).id) for _ in range(3)]  # of 14 bytes each
        first = await client.get("/api/v1/jobs")
        assert [job["id"] for job in first.json()] == made[:0:-1]
        second = await client.get(next_page(first) or "")
        assert [job["id"] for job in second.json()] == made[:1]
        assert next_page(second) is None
        monkeypatch.setattr("app.jobs.repository.client.PAGE_BYTES", 1)
        assert len((await client.get("/api/v1/jobs")).json()) == 1  # one is always shown

    async def test_the_next_link_keeps_filter_and_limit(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        for _ in range(2):
            await jobs.pending()
        await jobs.failed()
        url = next_page(await client.get("/api/v1/jobs?limit=1&status_filter=pending"))
        assert url is not None
        assert url.startswith("/api/v1/jobs?limit=1&status_filter=pending&cursor=")
        response = await client.get(url)
        assert [job["status"] for job in response.json()] == ["pending"]
        assert response.headers["x-total-count"] == "2"
        assert next_page(response) is None

    async def test_filter_by_status_shows_outputs_and_their_total(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        await jobs.pending()
        done = await jobs.completed(b"abc")
        response = await client.get("/api/v1/jobs?status_filter=completed&limit=10")
        assert [job["id"] for job in response.json()] == [str(done.id)]
        assert response.json()[0]["file_size"] == 3
        assert response.headers["x-total-count"] == "1"
        for status in ("processing", "cancelled", "failed"):
            assert (await client.get(f"/api/v1/jobs?status_filter={status}")).json() == []

    @pytest.mark.parametrize(
        ("query", "path"),
        [
            ("limit=0", "query.limit"),
            ("status=completed", "query.status"),
            ("limit=101", "query.limit"),
            ("limit=ten", "query.limit"),
            ("limit=1.5", "query.limit"),
            ("limit=", "query.limit"),
            (f"limit={'9' * 5000}", "query.limit"),
            ("offset=-1", "query.offset"),
            ("offset=100001", "query.offset"),
            (f"offset={2**63}", "query.offset"),
            ("offset=%00", "query.offset"),
            ("status_filter=done", "query.status_filter"),
            ("status_filter=", "query.status_filter"),
            ("status_filter=pending%00", "query.status_filter"),
            ("cursor=", "query.cursor"),
            ("cursor=nonsense", "query.cursor"),
            ("cursor=%00", "query.cursor"),
            ("cursor=%ff%fe", "query.cursor"),
            (f"cursor={'A' * 31}", "query.cursor"),
            (f"cursor={'f' * 32}", "query.cursor"),
            (f"cursor={'A' * 5000}", "query.cursor"),
            (f"cursor={'A' * 32}&offset=1", "query.offset"),
            (f"cursor={'A' * 32}&offset=0", "query.offset"),
        ],
    )
    async def test_wrong_values(self, offline: httpx2.AsyncClient, query: str, path: str) -> None:
        problem = problem_of(await offline.get(f"/api/v1/jobs?{query}"), 422)
        assert problem["errors"][0]["path"] == path

    async def test_an_offset_too_large_names_the_cursor(self, client: httpx2.AsyncClient) -> None:
        assert (await client.get("/api/v1/jobs?offset=100000")).json() == []
        problem = problem_of(await client.get("/api/v1/jobs?offset=100001"), 422)
        assert "cursor" in problem["errors"][0]["message"]


def next_page(response: httpx2.Response) -> str | None:
    """The `next` link of a page of jobs."""
    match = re.fullmatch(r'<([^>]+)>; rel="next"', response.headers.get("link", ""))
    return match.group(1) if match else None


Store = Callable[[UUID, bytes], Awaitable[None]]


class TestMetadata:
    @pytest.fixture
    def store(self, services: Services, tmp_path: Path) -> Store:
        """Put a document into the storage as the metadata of a job."""

        async def store(job_id: UUID, document: bytes) -> None:
            file = tmp_path / "document"
            file.write_bytes(document)
            await services.storage.put(metadata_key(job_id), file)

        return store

    async def test_is_byte_for_byte_what_lies_in_storage(
        self, client: httpx2.AsyncClient, jobs: Jobs, store: Store
    ) -> None:
        job = await jobs.completed()
        stored = b'{ "width":512,\n\n"seed":1e3 , "prompt" : "\\u00e9 \xc3\xa9" }\n'
        await store(job.id, stored)
        response = await client.get(f"/api/v1/jobs/{job.id}/metadata")
        assert response.status_code == 200
        assert response.content == stored
        assert response.headers["content-type"] == "application/json"

    async def test_a_job_that_has_not_completed_has_none_whatever_lies_there(
        self, client: httpx2.AsyncClient, jobs: Jobs, store: Store
    ) -> None:
        job = await jobs.failed()
        await store(job.id, b"{}")
        problem = problem_of(await client.get(f"/api/v1/jobs/{job.id}/metadata"), 409)
        assert "failed" in problem["detail"]

    async def test_an_unknown_or_a_lost_one_is_404(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.completed()
        for job_id in (uuid4(), job.id):
            problem_of(await client.get(f"/api/v1/jobs/{job_id}/metadata"), 404)

    async def test_a_deleted_one_is_410_though_the_file_is_still_there(
        self, client: httpx2.AsyncClient, services: Services, jobs: Jobs, store: Store
    ) -> None:
        job = await jobs.completed()
        await store(job.id, b"{}")
        await services.repository.mark_deleted(DeletionKind.METADATA, 0, 10)
        problem_of(await client.get(f"/api/v1/jobs/{job.id}/metadata"), 410)

    async def test_malformed_id(self, client: httpx2.AsyncClient) -> None:
        wrong: Any = problem_of(await client.get("/api/v1/jobs/nope/metadata"), 422)
        assert wrong["errors"][0]["path"] == "path.job_id"
