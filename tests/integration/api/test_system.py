"""GET /, /health, /health/detailed, /metrics, /info and the documentation."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.api.deps import Services
from app.api.problems import Problem
from app.api.schemas import CREATED_JOB_EXAMPLE, JOB_EXAMPLE, CreatedJobView, JobView
from app.config import Settings
from app.providers.base import Prediction, PredictionRequest
from scripts.servers import Postgres
from tests.faults.proxy import FaultProxy
from tests.integration.api.conftest import NOWHERE, Jobs, OpenClient, problem_of

UNKNOWN = "01939f3e-7c1a-7d52-9b1e-3f6a5d0c2b11"


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """The port of a server that accepts connections and never says a word."""

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.close()


async def test_root(client: httpx2.AsyncClient) -> None:
    body = (await client.get("/")).json()
    assert body["service"] == "Fleek Media Service"
    assert body["version"] == "1.0.0"
    assert body["links"]["docs"] == "/docs"


@pytest.mark.parametrize("path", ["/", "/health"])
async def test_head_as_load_balancers_ask(client: httpx2.AsyncClient, path: str) -> None:
    response = await client.head(path)
    assert (response.status_code, response.content) == (200, b"")


async def test_health_is_exact(client: httpx2.AsyncClient) -> None:
    response = await client.get("/health")
    assert response.json() == {
        "status": "healthy",
        "service": "fleek-media-service",
        "version": "1.0.0",
    }


class TestDetailedHealth:
    async def test_everything_well(self, client: httpx2.AsyncClient, services: Services) -> None:
        await services.repository.heartbeat(uuid4(), "worker", 10, 15)
        response = await client.get("/health/detailed")
        body = response.json()
        assert (response.status_code, body["status"]) == (200, "healthy")
        assert list(body["checks"]) == ["database", "redis", "storage", "workers"]
        for check in body["checks"].values():
            assert check["status"] == "healthy"
            assert check["latency_ms"] >= 0
        assert body["checks"]["workers"]["count"] == 1

    async def test_no_worker_is_degraded(self, client: httpx2.AsyncClient) -> None:
        response = await client.get("/health/detailed")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert response.json()["checks"]["workers"]["status"] == "unhealthy"

    async def test_no_redis_is_degraded(self, settings: Settings, open_client: OpenClient) -> None:
        away = settings.model_copy(update={"redis_url": "redis://:secret-word@127.0.0.1:1/0"})
        async with open_client(away) as client:
            response = await client.get("/health/detailed")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert response.json()["checks"]["redis"]["status"] == "unhealthy"
        assert response.json()["checks"]["database"]["status"] == "healthy"
        assert "secret-word" not in response.text

    async def test_no_broker_is_degraded(self, settings: Settings, open_client: OpenClient) -> None:
        away = settings.model_copy(update={"celery_broker_url": "redis://127.0.0.1:1/0"})
        async with open_client(away) as client:
            response = await client.get("/health/detailed")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert response.json()["checks"]["redis"]["status"] == "unhealthy"

    async def test_no_database_is_unhealthy(
        self, settings: Settings, open_client: OpenClient
    ) -> None:
        away = settings.model_copy(update={"database_url": NOWHERE})
        async with open_client(away) as client:
            response = await client.get("/health/detailed")
        assert (response.status_code, response.json()["status"]) == (503, "unhealthy")
        assert response.json()["checks"]["database"]["status"] == "unhealthy"
        assert response.json()["checks"]["redis"]["status"] == "healthy"
        for inner in ("secret-word", "127.0.0.1", "refused", "Errno"):
            assert inner not in response.text

    async def test_no_storage_is_unhealthy(
        self, client: httpx2.AsyncClient, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        (settings.storage_path / ".incoming").rmdir()
        response = await client.get("/health/detailed")
        assert (response.status_code, response.json()["status"]) == (503, "unhealthy")
        assert response.json()["checks"]["storage"]["status"] == "unhealthy"
        assert "No such file or directory" in caplog.text
        assert "No such file" not in response.text

    async def test_silent_servers_are_given_up_in_time(
        self, settings: Settings, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.api.health.TIMEOUT_SECONDS", 0.3)
        monkeypatch.setattr("app.api.deps.REDIS_TIMEOUT_SECONDS", 60)
        async with silent_server() as port:
            silent = settings.model_copy(
                update={
                    "database_url": f"postgresql+asyncpg://fleek:x@127.0.0.1:{port}/x",
                    "redis_url": f"redis://127.0.0.1:{port}/0",
                }
            )
            async with open_client(silent) as client:
                response = await client.get("/health/detailed")
        assert response.status_code == 503
        checks = response.json()["checks"]
        assert checks["redis"]["status"] == checks["workers"]["status"] == "unhealthy"
        # The clients themselves would wait for 3 s and more.
        assert all(check["latency_ms"] < 1000 for check in checks.values())


class TestMetrics:
    async def test_json(self, client: httpx2.AsyncClient, services: Services, jobs: Jobs) -> None:
        await services.repository.heartbeat(uuid4(), "worker", 10, 15)
        for _ in range(2):
            await jobs.pending()
        await jobs.completed()
        body = (await client.get("/metrics")).json()
        assert body["metrics"]["jobs_total"] == 3
        assert body["metrics"]["jobs_by_status"] == {
            "pending": 2,
            "processing": 0,
            "completed": 1,
            "failed": 0,
            "cancelled": 0,
        }
        assert body["metrics"]["queue"]["depth"] == 2
        assert 0 < body["metrics"]["queue"]["oldest_age_seconds"] < 60
        assert body["metrics"]["workers"] == {"alive": 1, "slots": 10}
        assert body["metrics"]["predictions"] == {"unstored": 0, "oldest_age_seconds": 0}
        assert body["timestamp"].endswith("Z")

    async def test_what_is_paid_for_and_not_stored_is_counted(
        self, client: httpx2.AsyncClient, services: Services, jobs: Jobs
    ) -> None:
        claim = await jobs.processing()
        request = PredictionRequest("owner/name", {"prompt": "a fox"}, 60)
        attempt = await services.repository.begin_attempt(claim.lease, "replicate", request)
        await services.repository.record_prediction(
            claim.lease, attempt.id, Prediction("p1", "starting", "owner/name", request.input)
        )
        await jobs.completed()
        body = (await client.get("/metrics")).json()
        assert body["metrics"]["predictions"]["unstored"] == 1
        assert 0 < body["metrics"]["predictions"]["oldest_age_seconds"] < 60

    async def test_prometheus_text(self, client: httpx2.AsyncClient, jobs: Jobs) -> None:
        await jobs.pending()
        response = await client.get("/metrics", headers={"accept": "text/plain"})
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert samples["media_jobs", "pending"] == 1
        assert samples["media_jobs", "failed"] == 0
        assert samples["media_queue_depth",] == 1
        assert samples["media_predictions_unstored",] == 0
        assert samples["media_workers",] == 0

    async def test_openmetrics_for_prometheus_itself(self, client: httpx2.AsyncClient) -> None:
        accept = (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
            "text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
        )
        response = await client.get("/metrics", headers={"accept": accept})
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")


async def test_info_shows_settings_and_nothing_secret(
    settings: Settings, open_client: OpenClient
) -> None:
    secretive = settings.model_copy(
        update={
            "replicate_api_token": settings.__class__(
                _env_file=None, replicate_api_token="r8_secret-word"
            ).replicate_api_token,
            "flower_port": 5556,
        }
    )
    async with open_client(secretive) as client:
        response = await client.get("/info")
    body: dict[str, Any] = response.json()
    assert body["configuration"]["provider"] == "replicate"
    assert body["configuration"]["retries"]["max_retry_attempts"] == 3
    assert body["configuration"]["default_model"] == "black-forest-labs/flux-schnell"
    assert body["endpoints"]["generate"] == "POST /api/v1/generate"
    assert body["monitoring"]["flower"] == "http://localhost:5556"
    for hidden in ("secret-word", "postgresql", "redis://", "fleek123", str(settings.storage_path)):
        assert hidden not in response.text


async def test_every_endpoint_that_info_names_exists(client: httpx2.AsyncClient) -> None:
    endpoints = (await client.get("/info")).json()["endpoints"]
    documented = (await client.get("/openapi.json")).json()["paths"]
    for endpoint in endpoints.values():
        method, path = endpoint.split()
        path = path.replace("{filename}", "{name}")
        if path not in ("/docs", "/redoc", "/openapi.json"):
            assert method.lower() in documented[path]


FILE_CODES = {
    *("200", "206", "304", "307", "404", "410", "412", "416", "422", "500", "503"),
}


class TestDocumentation:
    @pytest.mark.parametrize("path", ["/docs", "/redoc"])
    async def test_pages_load(self, offline: httpx2.AsyncClient, path: str) -> None:
        response = await offline.get(path)
        assert response.status_code == 200
        assert "/openapi.json" in response.text

    async def test_every_error_is_a_documented_problem(self, offline: httpx2.AsyncClient) -> None:
        schema = (await offline.get("/openapi.json")).json()
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                errors = {
                    code: found for code, found in operation["responses"].items() if code >= "4"
                }
                assert "500" in errors
                for code, response in errors.items():
                    if path == "/health/detailed" and code == "503":
                        continue  # the health report itself
                    where = (method, path, code)
                    assert list(response["content"]) == ["application/problem+json"], where
                    example = response["content"]["application/problem+json"]["example"]
                    assert Problem.model_validate(example).status == int(code)
        assert "HTTPValidationError" not in schema["components"]["schemas"]

    @pytest.mark.parametrize(
        ("method", "path", "codes"),
        [
            ("post", "/api/v1/generate", {"201", "403", "408", "413", "422", "500", "503"}),
            ("get", "/api/v1/status/{job_id}", {"200", "404", "422", "500", "503"}),
            ("get", "/api/v1/jobs", {"200", "422", "500", "503"}),
            (
                "get",
                "/api/v1/jobs/{job_id}/metadata",
                {"200", "404", "409", "410", "422", "500", "503"},
            ),
            ("delete", "/api/v1/jobs/{job_id}", {"200", "403", "404", "409", "422", "500", "503"}),
            (
                "get",
                "/api/v1/download/{job_id}",
                FILE_CODES | {"409"},
            ),
            ("get", "/media/{name}", FILE_CODES),
        ],
    )
    async def test_codes(
        self, offline: httpx2.AsyncClient, method: str, path: str, codes: set[str]
    ) -> None:
        operation = (await offline.get("/openapi.json")).json()["paths"][path][method]
        assert operation["responses"].keys() == codes
        assert operation["summary"]
        assert operation["tags"]

    async def test_the_examples_of_answers_fit_their_schemas(self) -> None:
        assert list(JOB_EXAMPLE) == list(JobView.model_fields)
        JobView.model_validate(JOB_EXAMPLE)
        CreatedJobView.model_validate(CREATED_JOB_EXAMPLE)

    async def test_the_documented_example_is_accepted(self, client: httpx2.AsyncClient) -> None:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
        (example,) = schemas["GenerateRequest"]["examples"]
        assert (await client.post("/api/v1/generate", json=example)).status_code == 201


class TestDatabaseAway:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/api/v1/generate"),
            ("GET", f"/api/v1/status/{UNKNOWN}"),
            ("GET", "/api/v1/jobs"),
            ("GET", f"/api/v1/jobs/{UNKNOWN}/attempts"),
            ("GET", f"/api/v1/jobs/{UNKNOWN}/metadata"),
            ("DELETE", f"/api/v1/jobs/{UNKNOWN}"),
            ("GET", f"/api/v1/download/{UNKNOWN}"),
            ("GET", "/media/x.png"),
            ("GET", "/metrics"),
        ],
    )
    async def test_is_503_with_a_time_to_come_back(
        self, offline: httpx2.AsyncClient, method: str, path: str
    ) -> None:
        body = {"prompt": "x"} if method == "POST" else None
        response = await offline.request(method, path, json=body)
        problem_of(response, 503)
        assert response.headers["retry-after"] == "5"
        for inner in ("secret-word", "127.0.0.1", "Errno", "Connect"):
            assert inner not in response.text

    async def test_constant_answers_need_no_database(self, offline: httpx2.AsyncClient) -> None:
        for path in ("/", "/health", "/info", "/docs", "/openapi.json"):
            assert (await offline.get(path)).status_code == 200

    async def test_a_restarted_database_is_found_again(
        self, client: httpx2.AsyncClient, settings: Settings
    ) -> None:
        assert (await client.get("/api/v1/jobs")).status_code == 200
        await terminate_connections(settings)
        codes = [(await client.get("/api/v1/jobs")).status_code for _ in range(3)]
        assert set(codes) <= {200, 503}
        assert codes[-1] == 200

    async def test_a_silent_database_is_503_within_five_seconds(
        self,
        settings: Settings,
        database: Postgres,
        open_client: OpenClient,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """F9 has the time itself; here it is shorter, as a busy machine adds to it."""
        monkeypatch.setattr("app.api.middleware.ANSWER_SECONDS", 2.0)
        with FaultProxy(database.port) as proxy:
            url = settings.database_url.replace(f":{database.port}", f":{proxy.port}")
            async with open_client(settings.model_copy(update={"database_url": url})) as client:
                assert (await client.get("/api/v1/jobs")).status_code == 200
                proxy.hold()
                started = time.monotonic()
                answers = await asyncio.gather(
                    client.get("/api/v1/jobs"),  # on the connection that is there
                    client.get(f"/api/v1/status/{UNKNOWN}"),  # on a new one
                    client.post("/api/v1/generate", json={"prompt": "x"}),
                )
                assert time.monotonic() - started < 5
                for answer in answers:
                    problem_of(answer, 503)
                proxy.pass_on()

    async def test_requests_that_are_given_up_give_their_connections_back(
        self, client: httpx2.AsyncClient, database: Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """More of them than the pool has connections, each in the middle of its statement."""
        paths = ["/api/v1/jobs", f"/api/v1/status/{UNKNOWN}"] * 10
        with monkeypatch.context() as patch, psycopg.connect(database.sync_url) as locking:
            patch.setattr("app.api.middleware.ANSWER_SECONDS", 0.3)
            locking.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            for answer in await asyncio.gather(*(client.get(path) for path in paths)):
                problem_of(answer, 503)
        async with asyncio.timeout(20):  # to take a statement back costs the server some time
            codes = {503}
            while 503 in codes:
                answers = await asyncio.gather(*(client.get(path) for path in paths))
                codes = {answer.status_code for answer in answers}
        assert codes == {200, 404}

    async def test_wrong_credentials_are_503_too(
        self, settings: Settings, open_client: OpenClient
    ) -> None:
        wrong = settings.database_url.replace("fleek:", "nobody:", 1)
        async with open_client(settings.model_copy(update={"database_url": wrong})) as client:
            problem_of(await client.get("/api/v1/jobs"), 503)


async def terminate_connections(settings: Settings) -> None:
    """Cut every connection but our own, as a restart does."""
    url = settings.sync_database_url.replace("+psycopg", "")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
