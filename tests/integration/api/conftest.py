"""The API in this process, inside its lifespan, on real servers; a fake provider for schemas."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx2
import pytest
from fastapi import FastAPI

from app.api.deps import Services
from app.config import Settings
from app.jobs.models import Charged, Job, Output
from app.jobs.repository import Claim, NewJob
from app.jobs.settlement import Settlement
from app.main import create_app
from app.providers.base import PredictionRequest, Provider
from app.storage.base import media_key

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string"},
        "width": {"type": "integer", "minimum": 256, "maximum": 1440},
        "height": {"type": "integer", "minimum": 256, "maximum": 1440},
        "guidance_scale": {"type": "number", "maximum": 20},
        "output_format": {"allOf": [{"$ref": "#/components/schemas/output_format"}]},
    },
    "components": {
        "schemas": {"output_format": {"type": "string", "enum": ["webp", "jpg", "png"]}}
    },
}


WEBHOOK_SECRET = "whsec_dGhlIGFjY291bnQncyBvd24gc2VjcmV0"


class FakeProvider:
    """A provider that knows input schemas and its webhook secret, and notes cancels."""

    def __init__(self) -> None:
        self.schemas: dict[str, dict[str, Any]] = {"black-forest-labs/flux-schnell": SCHEMA}
        self.hanging: set[str] = set()
        self.closed = False
        self.cancelled: list[str] = []
        self.webhook_secrets = [WEBHOOK_SECRET]

    async def webhook_secret(self) -> str:
        """The current secret; the next one after each call, if there is one."""
        return self.webhook_secrets.pop(0) if self.webhook_secrets[1:] else self.webhook_secrets[0]

    async def cancel(self, prediction_id: str) -> None:
        self.cancelled.append(prediction_id)

    async def input_schema(self, model_name: str) -> dict[str, Any] | None:
        if model_name in self.hanging:
            await asyncio.Event().wait()
        return self.schemas.get(model_name)

    async def aclose(self) -> None:
        self.closed = True


NOWHERE = "postgresql+asyncpg://fleek:secret-word@127.0.0.1:1/nowhere"


def problem_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The problem in an answer, after checking that it is one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail", "request_id"} <= body.keys()
    assert body["request_id"] == response.headers["x-request-id"]
    return body


OpenClient = Callable[[Settings], AbstractAsyncContextManager[httpx2.AsyncClient]]


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def rung() -> list[UUID]:
    """The job ids the doorbell was rung for."""
    return []


@pytest.fixture
def make_app(provider: FakeProvider, rung: list[UUID]) -> Callable[[Settings], FastAPI]:
    def ring(job_ids: Sequence[UUID]) -> None:
        rung.extend(job_ids)

    return lambda settings: create_app(settings, provider=cast(Provider, provider), ring=ring)


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the app, inside the app's lifespan."""
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://api.test") as client,
    ):
        yield client


@pytest.fixture
def open_client(make_app: Callable[[Settings], FastAPI]) -> OpenClient:
    """Start an API with settings of the test's own."""
    return lambda settings: running(make_app(settings))


@pytest.fixture
def api(settings: Settings, make_app: Callable[[Settings], FastAPI]) -> FastAPI:
    return make_app(settings)


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with running(api) as client:
        yield client


@pytest.fixture
def offline_settings(tmp_path: Path) -> Settings:
    """Settings without any server: whoever asks one gets 503."""
    return Settings(
        _env_file=None,
        database_url=NOWHERE,
        redis_url="redis://:secret-word@127.0.0.1:1/0",
        storage_path=tmp_path / "media",
    )


@pytest.fixture
async def offline(
    offline_settings: Settings, open_client: OpenClient
) -> AsyncIterator[httpx2.AsyncClient]:
    """An API without a database: what is refused here is refused before anything is asked."""
    async with open_client(offline_settings) as client:
        yield client


@pytest.fixture
def services(client: httpx2.AsyncClient, api: FastAPI) -> Services:
    """What the running API works with."""
    services: Services = api.state.services
    return services


class Jobs:
    """Brings jobs into any state, through the repository alone."""

    def __init__(self, services: Services, folder: Path) -> None:
        self._services = services
        self._folder = folder

    async def pending(self, prompt: str = "a fox") -> Job:
        new = NewJob(prompt, "owner/name", {"width": 512})
        return await self._services.repository.add(new, 3600)

    async def processing(self) -> Claim:
        job = await self.pending()
        claim = await self._services.repository.claim(job.id, uuid4(), 3600)
        assert claim is not None
        return claim

    async def failed(self) -> Job:
        claim = await self.processing()
        await self._services.repository.fail(
            claim.lease, error_code="invalid_input", error_message="The model said no."
        )
        return await self.read(claim.job.id)

    async def retrying(self) -> Job:
        claim = await self.processing()
        await self._services.repository.retry_later(
            claim.lease, delay_seconds=60, error_code="timeout", error_message="Slow.", retries=1
        )
        return await self.read(claim.job.id)

    async def completed(self, *files: bytes) -> Job:
        """A completed job with these outputs in the storage."""
        claim = await self.processing()
        repository = self._services.repository
        request = PredictionRequest("owner/name", {"prompt": "a fox"}, 60)
        attempt = await repository.begin_attempt(claim.lease, "mock", request)
        outputs = [
            await self._store(claim.job.id, index, data)
            for index, data in enumerate(files or (b"a picture",))
        ]
        settlement = Settlement(attempt.id, None, "succeeded", Charged.YES)
        await repository.complete(claim.lease, outputs, settlement)
        return await self.read(claim.job.id)

    async def read(self, job_id: UUID) -> Job:
        job = await self._services.repository.get(job_id)
        assert job is not None
        return job

    async def _store(self, job_id: UUID, index: int, data: bytes) -> Output:
        name = f"{job_id}.png" if index == 0 else f"{job_id}-{index}.png"
        file = self._folder / name
        file.write_bytes(data)
        await self._services.storage.put(media_key(name), file)
        return Output(
            job_id=job_id,
            index=index,
            name=name,
            media_type="image/png",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            width=64,
            height=48,
        )


@pytest.fixture
def jobs(services: Services, tmp_path: Path) -> Jobs:
    return Jobs(services, tmp_path)
