"""GET /api/v1/download/{job_id} and GET /media/{name}."""

import asyncio
import hashlib
import logging
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from fastapi import FastAPI

from app.api.deps import Services
from app.api.files import WHOLE_BYTES
from app.config import Settings
from app.jobs.models import DeletionKind
from app.jobs.retention import RetentionPolicy, enforce_retention
from app.storage.base import media_key, metadata_key
from tests.integration.api.conftest import Jobs, problem_of

DATA = bytes(range(100))
ETAG = f'"{hashlib.sha256(DATA).hexdigest()}"'


@pytest.fixture(params=["download", "media"])
async def url(request: pytest.FixtureRequest, jobs: Jobs) -> str:
    """Both addresses of one stored file."""
    job = await jobs.completed(DATA)
    return f"/api/v1/download/{job.id}" if request.param == "download" else f"/media/{job.id}.png"


async def test_the_whole_file_with_its_headers(client: httpx2.AsyncClient, url: str) -> None:
    response = await client.get(url)
    assert response.status_code == 200
    assert response.content == DATA
    headers = response.headers
    assert headers["content-type"] == "image/png"
    assert headers["content-length"] == "100"
    assert headers["etag"] == ETAG
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox; default-src 'none'"


async def test_a_download_has_a_name_and_media_is_cached_for_ever(
    client: httpx2.AsyncClient, jobs: Jobs
) -> None:
    job = await jobs.completed(DATA)
    download = (await client.get(f"/api/v1/download/{job.id}")).headers
    assert download["content-disposition"] == f'attachment; filename="{job.id}.png"'
    assert download["cache-control"] == "private, no-cache"
    media = (await client.get(f"/media/{job.id}.png")).headers
    assert media["content-disposition"] == f'inline; filename="{job.id}.png"'
    assert media["cache-control"] == "public, max-age=31536000, immutable"


async def test_further_outputs_have_names_of_their_own(
    client: httpx2.AsyncClient, jobs: Jobs
) -> None:
    job = await jobs.completed(b"first", b"second")
    assert (await client.get(f"/media/{job.id}-1.png")).content == b"second"


@pytest.mark.parametrize(
    "given", [ETAG, "*", f"W/{ETAG}", f'"other", {ETAG}', f'W/"a,b" ,W/{ETAG}']
)
async def test_a_good_copy_is_not_sent_again(
    client: httpx2.AsyncClient, url: str, given: str
) -> None:
    response = await client.get(url, headers={"If-None-Match": given, "Range": "bytes=0-1"})
    assert response.status_code == 304
    assert response.content == b""
    assert response.headers["etag"] == ETAG
    assert "cache-control" in response.headers


async def test_another_copy_is_replaced(client: httpx2.AsyncClient, url: str) -> None:
    response = await client.get(url, headers={"If-None-Match": '"other"'})
    assert response.content == DATA


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=90-", 90, 100),
        ("bytes=90-5000", 90, 100),
        ("bytes=-7", 93, 100),
        ("bytes=-5000", 0, 100),
    ],
)
async def test_one_range(
    client: httpx2.AsyncClient, url: str, asked: str, start: int, end: int
) -> None:
    response = await client.get(url, headers={"Range": asked})
    assert response.status_code == 206
    assert response.content == DATA[start:end]
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/100"
    assert response.headers["content-length"] == str(end - start)
    assert response.headers["content-type"] == "image/png"


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=500-600", "bytes=-0"])
async def test_a_range_outside_the_file(client: httpx2.AsyncClient, url: str, asked: str) -> None:
    response = await client.get(url, headers={"Range": asked})
    problem_of(response, 416)
    assert response.headers["content-range"] == "bytes */100"


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "bytes=5-2", "bytes=-", "lines=1-2", "bytes=x"])
async def test_other_ranges_are_ignored(client: httpx2.AsyncClient, url: str, asked: str) -> None:
    response = await client.get(url, headers={"Range": asked})
    assert (response.status_code, response.content) == (200, DATA)


@pytest.mark.parametrize(
    ("if_range", "status"),
    [(ETAG, 206), ('"other"', 200), (f"W/{ETAG}", 200), ("Wed, 21 Oct 2026 07:28:00 GMT", 200)],
)
async def test_if_range(client: httpx2.AsyncClient, url: str, if_range: str, status: int) -> None:
    response = await client.get(url, headers={"Range": "bytes=0-9", "If-Range": if_range})
    assert response.status_code == status
    assert response.content == (DATA[:10] if status == 206 else DATA)


async def test_head_has_the_headers_only(client: httpx2.AsyncClient, url: str) -> None:
    response = await client.head(url)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-length"] == "100"
    assert response.headers["etag"] == ETAG


async def test_a_large_file_is_streamed_whole_and_in_parts(
    client: httpx2.AsyncClient, jobs: Jobs
) -> None:
    data = b"0123456789abcdef" * (5 << 16) + b"end"
    job = await jobs.completed(data)
    url = f"/api/v1/download/{job.id}"
    whole = await client.get(url)
    assert whole.content == data
    assert whole.headers["content-length"] == str(len(data))
    part = await client.get(url, headers={"Range": "bytes=5-"})
    assert part.status_code == 206
    assert part.content == data[5:]
    assert part.headers["content-length"] == str(len(data) - 5)


async def test_a_large_file_is_sent_in_pieces_and_a_small_one_in_one(
    api: FastAPI, client: httpx2.AsyncClient, jobs: Jobs
) -> None:
    small, large = await jobs.completed(b"s" * (4 << 20)), await jobs.completed(b"l" * (5 << 20))
    assert await pieces(api, f"/media/{small.id}.png") == [4 << 20]
    assert max(await pieces(api, f"/media/{large.id}.png")) <= 1 << 20


async def pieces(api: FastAPI, path: str) -> list[int]:
    """The sizes of the messages that an answer's body comes in."""
    sizes: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sizes.append(len(message.get("body", b"")))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [],
    }
    await api(scope, receive, send)
    return [size for size in sizes if size]


async def test_a_job_without_a_file_yet(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    for job_id, status in (
        ((await jobs.pending()).id, "pending"),
        ((await jobs.processing()).job.id, "processing"),
        ((await jobs.failed()).id, "failed"),
    ):
        problem = problem_of(await client.get(f"/api/v1/download/{job_id}"), 409)
        assert status in problem["detail"]
        problem_of(await client.get(f"/media/{job_id}.png"), 404)


async def test_unknown_jobs_and_malformed_ids(client: httpx2.AsyncClient) -> None:
    problem_of(await client.get(f"/api/v1/download/{uuid4()}"), 404)
    problem_of(await client.get("/api/v1/download/nope"), 422)
    problem_of(await client.get(f"/media/{uuid4()}.png"), 404)


@pytest.mark.parametrize(
    "name",
    [
        *("%2e", "%2e%2e", "..%2f..%2fetc%2fpasswd", "..%5c..%5cetc", "%00", "a%00.png"),
        *("%2fetc%2fpasswd", "....//", ".incoming", "%ff%fe", "a" * 3000, "%F0%9F%A6%8A.png"),
        *("../metadata/x.json", ".incoming/secret", "secret.txt", "%252e%252e%252fsecret.txt"),
    ],
)
async def test_nothing_else_is_reachable(
    client: httpx2.AsyncClient, settings: Settings, name: str
) -> None:
    secret = settings.storage_path / "secret.txt"
    secret.write_text("not an output")
    response = await client.get(f"/media/{name}", follow_redirects=True)
    assert response.status_code == 404
    assert "not an output" not in response.text


async def test_a_file_that_is_gone_is_404_and_an_error_in_the_log(
    client: httpx2.AsyncClient, jobs: Jobs, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    job = await jobs.completed(DATA)
    (settings.storage_path / f"{job.id}.png").unlink()
    for url in (f"/api/v1/download/{job.id}", f"/media/{job.id}.png"):
        problem_of(await client.get(url), 404)
    assert [record.levelno for record in caplog.records if "output_damaged" in str(record.msg)] == [
        logging.ERROR,
        logging.ERROR,
    ]


async def test_a_file_that_was_cut_is_never_sent_as_whole(
    client: httpx2.AsyncClient, jobs: Jobs, settings: Settings
) -> None:
    job = await jobs.completed(DATA)
    (settings.storage_path / f"{job.id}.png").write_bytes(DATA[:50])
    problem_of(await client.get(f"/media/{job.id}.png"), 404)


async def test_a_large_file_that_goes_while_it_is_asked_for_is_the_storages_failure(
    client: httpx2.AsyncClient,
    jobs: Jobs,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = media_key(f"{(await jobs.completed(bytes(WHOLE_BYTES + 1))).id}.png")
    size = services.storage.size

    async def size_and_gone(key: str) -> int | None:
        found = await size(key)
        await services.storage.delete(key)
        return found

    monkeypatch.setattr(services.storage, "size", size_and_gone)
    with suppress(AssertionError):  # what the test's client says of an answer that breaks off
        await client.get(f"/{key}")
    assert "database_away" not in caplog.text
    assert f"{key} has gone while it was asked for" in caplog.text


async def test_a_storage_that_fails_is_503(
    client: httpx2.AsyncClient, jobs: Jobs, settings: Settings, tmp_path: Path
) -> None:
    job = await jobs.completed(DATA)
    settings.storage_path.rename(tmp_path / "elsewhere")
    settings.storage_path.write_text("a file where the folder was")
    response = await client.get(f"/media/{job.id}.png")
    assert str(tmp_path) not in problem_of(response, 503)["detail"]
    assert response.headers["retry-after"] == "5"


async def test_a_storage_that_is_slow_is_not_called_a_database_that_is_away(
    client: httpx2.AsyncClient,
    jobs: Jobs,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hang(*_: object) -> bytes:
        await asyncio.sleep(60)
        return b""

    monkeypatch.setattr("app.api.middleware.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(services.thumbnails, "get", hang)
    job = await jobs.completed(DATA)
    detail = problem_of(await client.get(f"/media/{job.id}.png?size=256"), 503)["detail"]
    assert "took too long" in detail
    assert "database_away" not in caplog.text
    assert "answer_too_late" in caplog.text


class TestDeleted:
    """A job whose files were kept for their time."""

    async def test_its_media_are_gone_and_its_status_says_so(
        self, client: httpx2.AsyncClient, jobs: Jobs, services: Services
    ) -> None:
        job = await jobs.completed(DATA, DATA[::-1])
        await services.repository.mark_deleted(DeletionKind.MEDIA, 0, 10)
        for url in (
            f"/api/v1/download/{job.id}",
            f"/media/{job.id}.png",
            f"/media/{job.id}-1.png",
            f"/media/{job.id}.png?size=256",
        ):
            assert "was deleted on" in problem_of(await client.get(url), 410)["detail"]
        body = (await client.get(f"/api/v1/status/{job.id}")).json()
        assert (body["status"], body["result_url"]) == ("completed", None)
        assert [output["url"] for output in body["outputs"]] == [None, None]
        assert all(output["deleted_at"] for output in body["outputs"])
        assert body["outputs"][0]["sha256"] == ETAG.strip('"')

    async def test_other_jobs_keep_theirs(
        self, client: httpx2.AsyncClient, jobs: Jobs, services: Services
    ) -> None:
        old = await jobs.completed(DATA)
        await services.repository.mark_deleted(DeletionKind.MEDIA, 0, 10)
        new = await jobs.completed(DATA)
        assert (await client.get(f"/media/{old.id}.png")).status_code == 410
        assert (await client.get(f"/media/{new.id}.png")).status_code == 200

    async def test_its_metadata_are_gone_by_themselves(
        self, client: httpx2.AsyncClient, jobs: Jobs, services: Services, tmp_path: Path
    ) -> None:
        job = await jobs.completed(DATA)
        document = tmp_path / "document"
        document.write_text("{}")
        await services.storage.put(metadata_key(job.id), document)
        policy = RetentionPolicy(media_days=None, metadata_days=0)
        await enforce_retention(services.repository, services.storage, policy)
        problem_of(await client.get(f"/api/v1/jobs/{job.id}/metadata"), 410)
        assert (await client.get(f"/media/{job.id}.png")).content == DATA
