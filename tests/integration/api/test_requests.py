"""What every request meets: ids, log lines, limits, CORS, and the shape of every error."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from app.api.deps import Services
from app.config import Settings
from tests.integration.api.conftest import FakeProvider, OpenClient, problem_of

ORIGIN = "https://console.example"
UNKNOWN = "0190b5c2-0000-7000-8000-000000000000"
BODY = b'{"prompt": "x"}'


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        record.msg
        for record in caplog.records
        if record.name == "app.access" and isinstance(record.msg, dict)
    ]


class TestRequestId:
    @pytest.mark.parametrize("given", ["a", "Req-1_2.3", "x" * 64])
    async def test_a_good_one_is_kept(self, offline: httpx2.AsyncClient, given: str) -> None:
        response = await offline.get("/health", headers={"X-Request-ID": given})
        assert response.headers["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "a/b", '"', "é".encode()])
    async def test_another_is_replaced(
        self, offline: httpx2.AsyncClient, given: str | bytes
    ) -> None:
        headers: Any = {"X-Request-ID": given}
        made = (await offline.get("/health", headers=headers)).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)

    async def test_each_request_has_its_own(self, offline: httpx2.AsyncClient) -> None:
        made = {(await offline.get("/")).headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3


class TestAccessLog:
    async def test_one_line_without_query_or_prompt(
        self, client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "app")
        headers = {"X-Request-ID": "r-1"}
        body = {"prompt": "private words", "parameters": {"private_name": "private words"}}
        await client.post("/api/v1/generate?private=words", json=body, headers=headers)
        (line,) = access_lines(caplog)
        assert line["event"] == "request"
        assert line["level"] == "info"
        assert (line["method"], line["path"]) == ("POST", "/api/v1/generate")
        assert (line["status"], line["request_id"]) == (201, "r-1")
        assert line["duration_ms"] > 0
        ours = [str(record.msg) for record in caplog.records if record.name.startswith("app")]
        assert not [text for text in ours if "private" in text]

    async def test_a_refused_prompt_is_not_logged_either(
        self, client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "app")
        await client.post("/api/v1/generate", json={"prompt": "private words\x00"})
        (line,) = access_lines(caplog)
        assert line["status"] == 422
        ours = [str(record.msg) for record in caplog.records if record.name.startswith("app")]
        assert not [text for text in ours if "private" in text]

    async def test_none_for_health(
        self, client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "app")
        await client.get("/health")
        assert access_lines(caplog) == []

    async def test_a_path_cannot_break_the_line(
        self, client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "app")
        await client.get("/x%0aevent=forged" + "y" * 1000)
        (line,) = access_lines(caplog)
        assert "\n" not in line["path"]
        assert len(line["path"]) <= 200


class TestBodyLimit:
    @pytest.fixture
    async def small(
        self, settings: Settings, open_client: OpenClient
    ) -> AsyncIterator[httpx2.AsyncClient]:
        """An API that takes 2000 bytes."""
        async with open_client(settings.model_copy(update={"max_body_bytes": 2000})) as client:
            yield client

    async def test_a_declared_length_over_the_limit(self, small: httpx2.AsyncClient) -> None:
        response = await small.post("/api/v1/generate", json={"prompt": "x" * 2000})
        assert "2000" in problem_of(response, 413)["detail"]

    async def test_a_chunked_body_over_the_limit(self, small: httpx2.AsyncClient) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield b'{"prompt": "'
            for _ in range(30):
                yield b"x" * 100
            yield b'"}'

        problem_of(await small.post("/api/v1/generate", content=chunks()), 413)

    async def test_a_body_at_the_limit_passes(self, small: httpx2.AsyncClient) -> None:
        body = b'{"prompt": "%s"}' % (b"x" * (2000 - 14))
        assert len(body) == 2000
        assert (await small.post("/api/v1/generate", content=body)).status_code == 201

    async def test_a_report_may_be_larger(self, small: httpx2.AsyncClient) -> None:
        """It repeats the input of the job."""
        url = f"/api/v1/webhooks/replicate/{UNKNOWN}"
        assert (await small.post(url, content=b"x" * 8000)).status_code not in (413, 500)
        problem_of(await small.post(url, content=b"x" * 8001), 413)

    async def test_a_body_that_never_comes_is_not_our_failure(
        self,
        client: httpx2.AsyncClient,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def stalls() -> AsyncIterator[bytes]:
            yield b'{"prompt": '
            await asyncio.sleep(5)
            yield b'"x"}'

        monkeypatch.setattr("app.api.middleware.ANSWER_SECONDS", 0.2)
        problem_of(await client.post("/api/v1/generate", content=stalls()), 408)
        assert "answer_too_late" not in caplog.text

    @pytest.mark.parametrize("declared", ["9" * 30, "9" * 5000])
    async def test_an_absurd_length(self, small: httpx2.AsyncClient, declared: str) -> None:
        headers = {"content-length": declared}
        problem_of(await small.post("/api/v1/generate", content=b"{}", headers=headers), 413)


class TestOrigin:
    """A page of a stranger's makes a browser send what changes something: it must not."""

    @pytest.mark.parametrize("method", ["POST", "DELETE"])
    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://api.test:81"])
    async def test_a_strangers_page_changes_nothing(
        self, client: httpx2.AsyncClient, services: Services, method: str, origin: str
    ) -> None:
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        path = "/api/v1/generate" if method == "POST" else f"/api/v1/jobs/{UNKNOWN}"
        response = await client.request(method, path, content=BODY, headers=headers)
        problem_of(response, 403)
        assert await services.repository.count(None) == 0

    @pytest.mark.parametrize(
        "headers",
        [
            {},  # curl
            {"Origin": "http://api.test"},
            {"Origin": "https://behind.a.proxy", "Sec-Fetch-Site": "same-origin"},
            {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
        ],
    )
    async def test_everybody_else_may(
        self, settings: Settings, open_client: OpenClient, headers: dict[str, str]
    ) -> None:
        async with open_client(settings.model_copy(update={"cors_origins": ORIGIN})) as client:
            response = await client.post("/api/v1/generate", content=BODY, headers=headers)
        assert response.status_code == 201

    async def test_anybody_may_read(self, client: httpx2.AsyncClient) -> None:
        headers = {"Origin": "https://evil.example"}
        response = await client.get("/api/v1/jobs", headers=headers)
        assert response.status_code == 200
        assert "access-control-allow-origin" not in response.headers  # so its script may not


class TestErrors:
    async def test_unknown_path_and_wrong_method(self, client: httpx2.AsyncClient) -> None:
        problem_of(await client.get("/nope"), 404)
        problem_of(await client.post("/api/v1/generate/", content=BODY), 404)  # no redirect
        response = await client.put("/api/v1/jobs")
        problem_of(response, 405)
        assert response.headers["allow"] == "GET"

    async def test_an_unexpected_error_tells_only_its_id_and_is_logged_once(
        self,
        client: httpx2.AsyncClient,
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def explode(*_: object) -> None:
            raise RuntimeError("secret-word")

        monkeypatch.setattr(services.repository, "get", explode)
        response = await client.get("/api/v1/status/0190b5c2-0000-7000-8000-000000000000")
        problem = problem_of(response, 500)
        assert "secret-word" not in response.text
        assert "RuntimeError" not in response.text
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert isinstance(record.msg, dict)
        assert record.msg["event"] == "unexpected_error"
        assert record.msg["request_id"] == problem["request_id"]

    async def test_every_answer_has_the_request_id(self, client: httpx2.AsyncClient) -> None:
        for path in ("/", "/nope", "/api/v1/status/nope", "/metrics"):
            assert (await client.get(path)).headers["x-request-id"]


class TestCors:
    async def test_no_headers_without_the_setting(self, client: httpx2.AsyncClient) -> None:
        response = await client.get("/health", headers={"Origin": ORIGIN})
        assert "access-control-allow-origin" not in response.headers

    async def test_the_named_origin_may_read_what_it_needs(
        self, settings: Settings, open_client: OpenClient
    ) -> None:
        named = settings.model_copy(update={"cors_origins": f"https://a.example, {ORIGIN}"})
        async with open_client(named) as client:
            answer = await client.get("/api/v1/jobs", headers={"Origin": ORIGIN})
            error = await client.get("/nope", headers={"Origin": ORIGIN})
            other = await client.get("/health", headers={"Origin": "https://evil.example"})
            preflight = await client.options(
                "/api/v1/jobs/x",
                headers={"Origin": ORIGIN, "Access-Control-Request-Method": "DELETE"},
            )
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"]
        assert {"Link", "X-Total-Count", "X-Request-ID"} <= set(exposed.split(", "))
        assert error.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-origin" not in other.headers
        assert preflight.status_code == 200
        assert "DELETE" in preflight.headers["access-control-allow-methods"]


async def test_the_lifespan_closes_what_it_opened(
    settings: Settings, open_client: OpenClient, provider: FakeProvider
) -> None:
    async with open_client(settings) as client:
        await client.get("/health/detailed")
        closed_while_open = provider.closed
    assert (closed_while_open, provider.closed) == (False, True)
    assert "dispatcher" not in {task.get_name() for task in asyncio.all_tasks()}
