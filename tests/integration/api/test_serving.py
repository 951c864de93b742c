"""Files behind nginx, in a bucket, remembered for a moment, and as thumbnails."""

import asyncio
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import httpx2
import pytest
from fastapi import FastAPI
from PIL import Image

from app.api import recent
from app.api.deps import Services
from app.api.files import WHOLE_BYTES
from app.config import Settings
from app.jobs.models import DeletionKind
from app.media.decoder import Decoder
from app.media.info import PictureInfo
from app.storage.base import THUMBNAIL_SIZES, media_key, thumbnail_key
from scripts.nginx import Nginx, installed
from tests.e2e.service import Service
from tests.integration.api.conftest import Jobs, problem_of, running
from tests.ports import free_port
from tests.s3_server import KEYS

DATA = bytes(range(256)) * 40
ETAG = f'"{hashlib.sha256(DATA).hexdigest()}"'


def picture(width: int = 640, height: int = 400) -> bytes:
    """A PNG with a gradient."""
    encoded = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()


class TestPreconditions:
    @pytest.mark.parametrize(
        ("if_match", "status"),
        [(ETAG, 200), ("*", 200), (f'"other", {ETAG}', 200), ('"other"', 412), (f"W/{ETAG}", 412)],
    )
    async def test_if_match(
        self, client: httpx2.AsyncClient, jobs: Jobs, if_match: str, status: int
    ) -> None:
        job = await jobs.completed(DATA)
        response = await client.get(f"/media/{job.id}.png", headers={"If-Match": if_match})
        assert response.status_code == status
        if status == 412:
            problem_of(response, 412)

    async def test_a_list_may_come_in_several_lines(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.completed(DATA)
        lines = [("If-None-Match", '"other"'), ("If-None-Match", ETAG)]
        response = await client.get(f"/media/{job.id}.png", headers=lines)
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == ETAG
        assert response.headers["cache-control"] == "public, max-age=31536000, immutable"

    @pytest.mark.parametrize(
        "asked", ["bytes=" + ",".join(f"{n}-{n}" for n in range(5000)), "bytes=" + "0" * 8000]
    )
    async def test_silly_ranges_cost_nothing_but_the_file(
        self, client: httpx2.AsyncClient, jobs: Jobs, asked: str
    ) -> None:
        job = await jobs.completed(DATA)
        started = time.process_time()
        response = await client.get(f"/media/{job.id}.png", headers={"Range": asked})
        assert (response.status_code, response.content) == (200, DATA)
        assert time.process_time() - started < 0.5


class TestAskedAgain:
    """The second answer comes from memory, and is the same."""

    @pytest.mark.parametrize("path", ["/media/{}.png", "/api/v1/download/{}"])
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Range": "bytes=5-9"},
            {"Range": "bytes=-7"},
            {"Range": "bytes=99999-"},
            {"If-None-Match": ETAG},
            {"If-Match": '"other"'},
            {"X-Request-ID": "mine"},
        ],
    )
    async def test_it_is_answered_as_before(
        self, client: httpx2.AsyncClient, jobs: Jobs, path: str, headers: dict[str, str]
    ) -> None:
        url = path.format((await jobs.completed(DATA)).id)
        for method in ("GET", "HEAD"):
            first = await client.request(method, url, headers=headers)
            again = await client.request(method, url, headers=headers)
            assert again.status_code == first.status_code
            assert _comparable(again) == _comparable(first)
            assert again.headers["x-request-id"]

    @pytest.mark.parametrize(("seconds", "looks"), [(recent.SECONDS, 1), (0.0, 2)])
    async def test_it_is_looked_up_once_in_a_while(
        self,
        client: httpx2.AsyncClient,
        jobs: Jobs,
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
        looks: int,
    ) -> None:
        monkeypatch.setattr(recent, "SECONDS", seconds)
        looked_up = AsyncMock(wraps=services.repository.output_named)
        monkeypatch.setattr(services.repository, "output_named", looked_up)
        url = f"/media/{(await jobs.completed(DATA)).id}.png"
        for _ in range(2):
            assert (await client.get(url)).content == DATA
        assert looked_up.await_count == looks

    async def test_a_file_that_has_gone_meanwhile_is_404(
        self, client: httpx2.AsyncClient, jobs: Jobs, services: Services
    ) -> None:
        job = await jobs.completed(DATA)
        url = f"/media/{job.id}.png"
        assert (await client.get(url)).status_code == 200
        await services.storage.delete(media_key(f"{job.id}.png"))
        problem_of(await client.get(url), 404)

    async def test_a_file_that_was_deleted_on_schedule_meanwhile_is_410_and_no_damage(
        self,
        client: httpx2.AsyncClient,
        jobs: Jobs,
        services: Services,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        job = await jobs.completed(DATA)
        url = f"/media/{job.id}.png"
        assert (await client.get(url)).status_code == 200
        await services.repository.mark_deleted(DeletionKind.MEDIA, -60, 10)
        await services.storage.delete(media_key(f"{job.id}.png"))
        problem_of(await client.get(url), 410)
        assert "output_damaged" not in caplog.text

    async def test_a_storage_that_has_gone_silent_meanwhile_is_503(
        self,
        client: httpx2.AsyncClient,
        jobs: Jobs,
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def silent(*_: object) -> bytes:
            await asyncio.sleep(60)
            return b""

        url = f"/media/{(await jobs.completed(DATA)).id}.png"
        assert (await client.get(url)).status_code == 200
        monkeypatch.setattr(services.storage, "load", silent)
        monkeypatch.setattr(recent, "ANSWER_SECONDS", 0.1)
        problem = problem_of(await client.get(url), 503)
        [line] = [record.msg for record in caplog.records if "answer_too_late" in str(record.msg)]
        assert isinstance(line, dict)
        assert line["request_id"] == problem["request_id"]

    async def test_only_so_many_are_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recent, "ENTRIES", 3)
        files = recent.RecentFiles()
        known = recent.KnownFile(None, {})  # type: ignore[arg-type]
        for number in range(5):
            files.add(f"/{number}", known)
        assert [files.get(f"/{number}") is known for number in range(5)] == [False] * 2 + [True] * 3

    async def test_another_origins_script_gets_its_headers(
        self, settings: Settings, make_app: Callable[[Settings], FastAPI], tmp_path: Path
    ) -> None:
        app = make_app(settings.model_copy(update={"cors_origins": "https://a.example"}))
        async with running(app) as client:
            url = f"/media/{(await Jobs(app.state.services, tmp_path).completed(DATA)).id}.png"
            for _ in range(2):
                response = await client.get(url, headers={"Origin": "https://a.example"})
                assert response.headers["access-control-allow-origin"] == "https://a.example"
                assert (await client.get(url)).headers["vary"] == "Origin"


def _comparable(response: httpx2.Response) -> tuple[object, ...]:
    changing = ("x-request-id", "date")
    headers = sorted(pair for pair in response.headers.items() if pair[0] not in changing)
    problem = response.headers.get("content-type") == "application/problem+json"
    return (headers, None if problem else response.content)


class TestInABucket:
    @pytest.fixture
    def settings(self, settings: Settings, s3_url: str, tmp_path: Path) -> Settings:
        update = {
            "storage_url": f"s3://media/{tmp_path.name.replace('_', '-')}",
            "aws_endpoint_url": s3_url,
            "aws_public_endpoint_url": s3_url.replace("127.0.0.1", "localhost"),
            "aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"],
        }
        return Settings(_env_file=None, **{**settings.model_dump(), **update})

    @pytest.mark.parametrize("path", ["/media/{}.png", "/api/v1/download/{}"])
    async def test_the_client_is_sent_there(
        self, client: httpx2.AsyncClient, jobs: Jobs, path: str
    ) -> None:
        url = path.format((await jobs.completed(DATA)).id)
        for _ in range(2):
            response = await client.get(url)
            assert (response.status_code, response.content) == (307, b"")
            assert response.headers["cache-control"] == "private, max-age=1800"
            address = response.headers["location"]
            assert address.startswith("http://localhost:")
            async with httpx2.AsyncClient(trust_env=False) as anybody:
                found = await anybody.get(address, headers={"Range": "bytes=1-3"})
            assert (found.status_code, found.content) == (206, DATA[1:4])

    async def test_a_range_outside_the_file_is_refused_here(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        url = f"/media/{(await jobs.completed(DATA)).id}.png"
        response = await client.get(url, headers={"Range": "bytes=99999-"})
        problem_of(response, 416)
        assert response.headers["content-range"] == f"bytes */{len(DATA)}"

    async def test_a_good_copy_is_not_fetched_again(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        url = f"/media/{(await jobs.completed(DATA)).id}.png"
        assert (await client.get(url, headers={"If-None-Match": ETAG})).status_code == 304

    async def test_head_is_answered_here(self, client: httpx2.AsyncClient, jobs: Jobs) -> None:
        response = await client.head(f"/media/{(await jobs.completed(DATA)).id}.png")
        assert response.status_code == 200
        assert response.headers["content-length"] == str(len(DATA))

    async def test_it_is_streamed_when_told_to(
        self, settings: Settings, make_app: Callable[[Settings], FastAPI], tmp_path: Path
    ) -> None:
        app = make_app(settings.model_copy(update={"s3_serve": "stream"}))
        large = DATA * 500
        async with running(app) as client:
            jobs = Jobs(app.state.services, tmp_path)
            for data in (DATA, large):
                url = f"/media/{(await jobs.completed(data)).id}.png"
                assert (await client.get(url)).content == data
                part = await client.get(url, headers={"Range": "bytes=10-19"})
                assert (part.status_code, part.content) == (206, data[10:20])

    @pytest.mark.parametrize("prefix", [None, "/internal-media"])
    async def test_a_large_one_that_is_streamed_is_not_remembered(
        self,
        settings: Settings,
        make_app: Callable[[Settings], FastAPI],
        tmp_path: Path,
        prefix: str | None,
    ) -> None:
        """It may fail half-way. nginx, if there is one, sends what lies in folders only."""
        app = make_app(settings.model_copy(update={"s3_serve": "stream", "x_accel_prefix": prefix}))
        data = bytes(WHOLE_BYTES + 1)
        async with running(app) as client:
            job = await Jobs(app.state.services, tmp_path).completed(data)
            path = f"/media/{job.id}.png"
            assert (await client.get(path)).content == data
            assert app.state.services.recent.get(path) is None

    async def test_thumbnails_come_from_here(
        self, client: httpx2.AsyncClient, jobs: Jobs, services: Services
    ) -> None:
        job = await jobs.completed(picture())
        response = await client.get(f"/media/{job.id}.png?size=256")
        assert response.headers["content-type"] == "image/webp"
        assert await services.storage.size(thumbnail_key(f"{job.id}.png", 256)) == len(
            response.content
        )


class TestThumbnails:
    @pytest.mark.parametrize("size", THUMBNAIL_SIZES)
    async def test_it_is_a_small_webp(
        self, client: httpx2.AsyncClient, jobs: Jobs, size: int
    ) -> None:
        url = f"/media/{(await jobs.completed(picture())).id}.png"
        response = await client.get(url, params={"size": size})
        assert response.status_code == 200
        headers = response.headers
        assert headers["content-type"] == "image/webp"
        assert headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'
        assert headers["cache-control"] == "public, max-age=31536000, immutable"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert headers["content-disposition"].endswith(f'.png.{size}.webp"')
        with Image.open(io.BytesIO(response.content)) as small:
            assert (small.format, max(small.size)) == ("WEBP", size)
            assert small.height == pytest.approx(small.width * 400 / 640, abs=1)
        assert (await client.get(url)).headers["etag"] != headers["etag"]

    async def test_a_good_copy_is_304(self, client: httpx2.AsyncClient, jobs: Jobs) -> None:
        url = f"/media/{(await jobs.completed(picture())).id}.png?size=256"
        etag = (await client.get(url)).headers["etag"]
        assert (await client.get(url, headers={"If-None-Match": etag})).status_code == 304
        assert (await client.head(url)).headers["etag"] == etag

    async def test_it_is_made_once_however_many_ask(
        self, client: httpx2.AsyncClient, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[int] = []
        make = Decoder.make_thumbnail

        def counted(self: Decoder, path: Path, size: int) -> PictureInfo:
            made.append(size)
            return make(self, path, size)

        monkeypatch.setattr(Decoder, "make_thumbnail", counted)
        url = f"/media/{(await jobs.completed(picture())).id}.png?size=256"
        answers = await asyncio.gather(*(client.get(url) for _ in range(10)))
        assert len({answer.content for answer in answers}) == 1
        assert (await client.get(url)).content == answers[0].content
        assert made == [256]

    @pytest.mark.parametrize("size", ["255", "0", "-1", "big", "", "99999999999999999999"])
    async def test_other_sizes_are_refused(
        self, client: httpx2.AsyncClient, jobs: Jobs, size: str
    ) -> None:
        job = await jobs.completed(picture())
        problem_of(await client.get(f"/media/{job.id}.png", params={"size": size}), 422)

    async def test_what_is_no_picture_has_none(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.completed(b"says that it is a PNG")
        problem_of(await client.get(f"/media/{job.id}.png?size=256"), 404)

    async def test_a_lost_picture_has_none(
        self, client: httpx2.AsyncClient, jobs: Jobs, services: Services
    ) -> None:
        job = await jobs.completed(picture())
        await services.storage.delete(media_key(f"{job.id}.png"))
        problem_of(await client.get(f"/media/{job.id}.png?size=256"), 404)
        assert list(services.storage.workspace.iterdir()) == []

    async def test_other_requests_are_answered_meanwhile(
        self, client: httpx2.AsyncClient, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running: list[Path] = []
        at_once: list[int] = []
        go_on = threading.Event()

        def slow(_: Decoder, path: Path, size: int) -> PictureInfo:
            at_once.append(len(running))
            running.append(path)
            go_on.wait(30)
            time.sleep(0.1)
            running.remove(path)
            return PictureInfo((size, size))

        monkeypatch.setattr(Decoder, "make_thumbnail", slow)
        ids = [(await jobs.completed(picture())).id for _ in range(3)]
        making = [
            asyncio.create_task(client.get(f"/media/{job_id}.png?size=256")) for job_id in ids
        ]
        async with asyncio.timeout(30):
            while not running:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (await client.get("/health")).status_code == 200
        assert not any(request.done() for request in making)
        go_on.set()
        await asyncio.gather(*making)
        assert at_once == [0, 0, 0]  # one at a time


class TestBehindNginx:
    @pytest.fixture
    async def front(
        self,
        settings: Settings,
        make_app: Callable[[Settings], FastAPI],
        tmp_path: Path,
    ) -> AsyncIterator[tuple[httpx.Client, Jobs]]:
        if not installed():
            pytest.skip("nginx is not installed")
        jobs_app = make_app(settings)
        environment = {
            "DATABASE_URL": settings.database_url,
            "REDIS_URL": settings.redis_url,
            "STORAGE_PATH": str(settings.storage_path),
            "X_ACCEL_PREFIX": "/internal-media",
            "CORS_ORIGINS": "https://a.example",
        }
        async with running(jobs_app):
            with Service(environment, tmp_path) as service:
                service.start_api()
                ports = {"port": free_port(), "static_port": free_port()}
                with (
                    Nginx(tmp_path / "nginx", api_port=service.port, **ports) as nginx,
                    httpx.Client(
                        base_url=f"http://127.0.0.1:{nginx.port}", trust_env=False, timeout=30
                    ) as client,
                ):
                    nginx.start(settings.storage_path)
                    yield client, Jobs(jobs_app.state.services, tmp_path)

    async def test_the_answers_are_those_of_the_api_alone(
        self, front: tuple[httpx.Client, Jobs]
    ) -> None:
        client, jobs = front
        job = await jobs.completed(DATA)
        for path, disposition, caching in (
            (f"/media/{job.id}.png", "inline", "public, max-age=31536000, immutable"),
            (f"/api/v1/download/{job.id}", "attachment", "private, no-cache"),
        ):
            for _ in range(2):  # the second time it is remembered
                whole = client.get(path)
                assert (whole.status_code, whole.content) == (200, DATA)
                expected = {
                    "etag": ETAG,
                    "content-type": "image/png",
                    "content-length": str(len(DATA)),
                    "content-disposition": f'{disposition}; filename="{job.id}.png"',
                    "cache-control": caching,
                    "accept-ranges": "bytes",
                    "x-content-type-options": "nosniff",
                    "content-security-policy": "sandbox; default-src 'none'",
                    "vary": "Origin",
                }
                assert {name: whole.headers.get(name) for name in expected} == expected
                assert "last-modified" not in whole.headers
                assert "x-accel-redirect" not in whole.headers
                assert whole.headers["x-request-id"]
            script = client.get(path, headers={"Origin": "https://a.example"})
            assert script.headers["access-control-allow-origin"] == "https://a.example"
            assert "ETag" in script.headers["access-control-expose-headers"]
            part = client.get(path, headers={"Range": "bytes=5-9"})
            assert (part.status_code, part.content) == (206, DATA[5:10])
            assert part.headers["content-range"] == f"bytes 5-9/{len(DATA)}"
            many = client.get(path, headers={"Range": "bytes=0-1,5-6"})
            assert (many.status_code, many.content) == (200, DATA)
            assert client.get(path, headers={"Range": "bytes=99999-"}).status_code == 416
            assert client.get(path, headers={"If-None-Match": ETAG}).status_code == 304
            assert client.get(path, headers={"If-Match": '"other"'}).status_code == 412
            head = client.head(path)
            assert (head.status_code, head.headers["content-length"]) == (200, str(len(DATA)))

    async def test_nobody_reaches_the_folder_itself(self, front: tuple[httpx.Client, Jobs]) -> None:
        client, jobs = front
        job = await jobs.completed(picture())
        assert client.get(f"/internal-media/{job.id}.png").status_code == 404
        assert client.get(f"/media/{job.id}.png?size=256").headers["content-type"] == "image/webp"
