"""POST /api/v1/webhooks/replicate/{attempt_id}, and the attempts it is about."""

import asyncio
import base64
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis
from standardwebhooks import Webhook
from starlette.types import Message

from app.api.deps import Services
from app.config import Settings
from app.jobs.models import Attempt, Charged
from app.jobs.repository import Lease
from app.jobs.settlement import Settlement
from app.providers.base import Prediction, PredictionRequest
from app.wakeups import CHANNEL
from tests.integration.api.conftest import (
    WEBHOOK_SECRET,
    FakeProvider,
    Jobs,
    OpenClient,
    problem_of,
)

OTHER_SECRET = "whsec_" + base64.b64encode(b"somebody else's").decode()
INPUT = {"prompt": "a fox", "seed": 5}


def report(prediction_id: str = "p1", **changes: Any) -> bytes:
    body: dict[str, Any] = {
        "id": prediction_id,
        "status": "starting",
        "model": "owner/name",
        "input": INPUT,
    }
    return json.dumps({**body, **changes}).encode()


def signed(
    body: bytes, secret: str = WEBHOOK_SECRET, age: timedelta = timedelta(0)
) -> dict[str, str]:
    at = datetime.now(UTC) - age
    webhook_id = f"msg_{sha256(body).hexdigest()}"
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(webhook_id, at, body.decode()),
    }


@dataclass
class Reporter:
    """Sends reports to one attempt's address."""

    client: httpx2.AsyncClient
    services: Services
    attempt: Attempt

    async def send(
        self, body: bytes, headers: dict[str, str] | None = None, to: UUID | None = None
    ) -> httpx2.Response:
        headers = signed(body) if headers is None else headers
        path = f"/api/v1/webhooks/replicate/{to or self.attempt.id}"
        return await self.client.post(path, content=body, headers=headers)

    async def reload(self) -> Attempt:
        attempt = await self.services.repository.attempt(self.attempt.id)
        assert attempt is not None
        return attempt


@pytest.fixture
async def reporter(client: httpx2.AsyncClient, services: Services, jobs: Jobs) -> Reporter:
    """Reports about an attempt whose create answer was lost."""
    claim = await jobs.processing()
    request = PredictionRequest("owner/name", INPUT, 60)
    attempt = await services.repository.begin_attempt(claim.lease, "replicate", request)
    return Reporter(client, services, attempt)


class TestGenuine:
    async def test_a_lost_prediction_is_adopted(self, reporter: Reporter) -> None:
        response = await reporter.send(report())
        assert (response.status_code, response.content) == (204, b"")
        attempt = await reporter.reload()
        assert (attempt.state, attempt.prediction_id) == ("submitted", "p1")
        job = await reporter.services.repository.get(attempt.job_id)
        assert job is not None
        assert job.external_job_id == "p1"

    async def test_repeats_and_disorder_do_no_harm(self, reporter: Reporter) -> None:
        for status in ("succeeded", "starting", "succeeded", "processing"):
            assert (await reporter.send(report(status=status))).status_code == 204
        assert (await reporter.reload()).prediction_id == "p1"

    async def test_it_does_no_harm_after_the_end(self, reporter: Reporter) -> None:
        await reporter.send(report())
        await reporter.services.repository.cancel(reporter.attempt.job_id)
        assert (await reporter.send(report(status="succeeded"))).status_code == 204
        job = await reporter.services.repository.get(reporter.attempt.job_id)
        assert job is not None
        assert job.status == "cancelled"

    async def test_the_workers_are_woken(
        self, reporter: Reporter, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.wakeups.PUBLISH_SECONDS", 10)
        redis = Redis.from_url(settings.redis_url, decode_responses=True)
        async with redis.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(CHANNEL)
            await channel.get_message(timeout=10)
            copies = await asyncio.gather(*(reporter.send(report()) for _ in range(20)))
            message = await channel.get_message(timeout=10)
            more = await channel.get_message(timeout=0.2)
        await redis.aclose()
        assert {copy.status_code for copy in copies} == {204}
        assert message is not None
        assert message["data"] == "p1"
        assert more is None, "once for all copies"

    async def test_a_rotated_secret_is_fetched(
        self,
        reporter: Reporter,
        provider: FakeProvider,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("app.providers.replicate.webhooks.REFETCH_SECONDS", 0)
        provider.webhook_secrets = [WEBHOOK_SECRET, OTHER_SECRET]
        assert (await reporter.send(report())).status_code == 204
        body = report()
        assert (await reporter.send(body, signed(body, OTHER_SECRET))).status_code == 204

    async def test_configured_secrets_are_enough(
        self, settings: Settings, open_client: OpenClient, reporter: Reporter
    ) -> None:
        both = settings.model_copy(
            update={
                "replicate_webhook_secret": type(settings.replicate_webhook_secret)(
                    f"{OTHER_SECRET}, {WEBHOOK_SECRET}"
                )
            }
        )
        async with open_client(both) as client:
            reporter.client = client
            for secret in (OTHER_SECRET, WEBHOOK_SECRET):
                body = report()
                assert (await reporter.send(body, signed(body, secret))).status_code == 204


class TestForged:
    async def _assert_refused(
        self, reporter: Reporter, body: bytes, headers: dict[str, str]
    ) -> None:
        problem_of(await reporter.send(body, headers), 401)
        assert (await reporter.reload()).prediction_id is None

    async def test_without_a_signature(self, reporter: Reporter) -> None:
        await self._assert_refused(reporter, report(), {})

    @pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
    async def test_with_a_header_missing(self, reporter: Reporter, name: str) -> None:
        headers = signed(report())
        del headers[name]
        await self._assert_refused(reporter, report(), headers)

    @pytest.mark.parametrize(
        "garbage", ["", "v1", "v1,", "v1,!!!", "v2,AAAA", ",,", "v1,AA==" * 99]
    )
    async def test_with_garbage_for_a_signature(self, reporter: Reporter, garbage: str) -> None:
        headers = {**signed(report()), "webhook-signature": garbage}
        await self._assert_refused(reporter, report(), headers)

    async def test_with_another_secret(self, reporter: Reporter) -> None:
        await self._assert_refused(reporter, report(), signed(report(), OTHER_SECRET))

    @pytest.mark.parametrize("seconds", [301, -360])  # a slow machine makes it younger
    async def test_too_old_or_from_the_future(self, reporter: Reporter, seconds: int) -> None:
        headers = signed(report(), age=timedelta(seconds=seconds))
        await self._assert_refused(reporter, report(), headers)

    @pytest.mark.parametrize(
        ("secret", "age", "reason"),
        [
            (OTHER_SECRET, 0, "No matching signature found"),
            (WEBHOOK_SECRET, 400, "Message timestamp too old"),
        ],
    )
    async def test_the_log_says_why(
        self,
        reporter: Reporter,
        caplog: pytest.LogCaptureFixture,
        secret: str,
        age: int,
        reason: str,
    ) -> None:
        await reporter.send(report(), signed(report(), secret, timedelta(seconds=age)))
        (line,) = [record.msg for record in caplog.records if "webhook_refused" in str(record.msg)]
        assert isinstance(line, dict)
        assert line["attempt_id"] == str(reporter.attempt.id)
        assert line["reason"] == reason

    async def test_with_a_changed_body(self, reporter: Reporter) -> None:
        await self._assert_refused(reporter, report("p2"), signed(report("p1")))

    async def test_with_a_body_written_anew(self, reporter: Reporter) -> None:
        anew = json.dumps(json.loads(report()), indent=1).encode()
        await self._assert_refused(reporter, anew, signed(report()))

    async def test_however_it_shows_the_input(self, reporter: Reporter) -> None:
        """With prompt and seed it can be no other's; the seed is ours."""
        shown = {**INPUT, "steps": 4}
        assert (await reporter.send(report(input=shown))).status_code == 204

    async def test_sent_to_another_attempt(self, reporter: Reporter) -> None:
        body = report(input={"prompt": "a fox", "seed": 6})
        await self._assert_refused(reporter, body, signed(body))

    async def test_about_another_prediction_than_the_attempts_own(self, reporter: Reporter) -> None:
        await reporter.services.repository.adopt(
            reporter.attempt.id, Prediction("p1", "starting", "owner/name", INPUT)
        )
        problem_of(await reporter.send(report("p2")), 401)
        assert (await reporter.reload()).prediction_id == "p1"


async def test_a_sender_that_leaves_is_no_error(
    client: httpx2.AsyncClient, api: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answers.append(message)

    answers: list[Message] = []
    path = f"/api/v1/webhooks/replicate/{uuid4()}"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    await api(scope, leave, send)
    assert answers == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class TestBadReports:
    async def test_an_unknown_attempt_is_404(self, reporter: Reporter) -> None:
        problem_of(await reporter.send(report(), to=uuid4()), 404)

    @pytest.mark.parametrize("body", [b"[]", b"{}", b"no json", b'"text"', b"[" * 100_000])
    async def test_what_is_no_prediction_is_refused(self, reporter: Reporter, body: bytes) -> None:
        problem_of(await reporter.send(body, signed(body)), 422)

    async def test_what_is_no_text_has_no_signature(self, reporter: Reporter) -> None:
        problem_of(await reporter.send(b"\xff\xfe", signed(report())), 401)

    @pytest.mark.parametrize("prediction_id", [None, 5, "", "a\0b"])
    async def test_what_has_no_id_is_refused(
        self, reporter: Reporter, prediction_id: object
    ) -> None:
        problem_of(await reporter.send(report(id=prediction_id)), 422)
        assert (await reporter.reload()).prediction_id is None


class TestAbsent:
    """The attempt was called absent before the provider reported on it."""

    @pytest.fixture
    async def absent(self, reporter: Reporter) -> Reporter:
        await reporter.services.repository.settle_orphan(
            Settlement(reporter.attempt.id, None, "absent", Charged.NO)
        )
        return reporter

    async def test_it_has_its_prediction_after_all(self, absent: Reporter) -> None:
        assert (await absent.send(report())).status_code == 204
        attempt = await absent.reload()
        assert (attempt.state, attempt.prediction_id) == ("submitted", "p1")
        assert attempt.charged == Charged.UNKNOWN

    async def test_while_the_job_has_another_the_report_shall_come_again(
        self, absent: Reporter, provider: FakeProvider
    ) -> None:
        """What it reports on is stopped meanwhile, but not before the other has its own."""
        repository = absent.services.repository
        job = await repository.get(absent.attempt.job_id)
        assert job is not None
        assert job.lease_token is not None
        lease = Lease(job.id, job.lease_token)
        again = PredictionRequest("owner/name", {**INPUT, "seed": 6}, 60)
        attempt = await repository.begin_attempt(lease, "replicate", again)
        problem_of(await absent.send(report()), 503)
        assert provider.cancelled == []
        assert await repository.adopt(attempt.id, Prediction("p2", "starting", "owner/name", {}))
        problem_of(await absent.send(report(status="processing")), 503)
        assert provider.cancelled == ["p1"]
        await repository.settle_orphan(Settlement(attempt.id, "p2", "failed", Charged.NO))
        assert (await absent.send(report())).status_code == 204


class TestAttempts:
    async def test_the_ledger_is_shown(self, reporter: Reporter) -> None:
        await reporter.send(report())
        path = f"/api/v1/jobs/{reporter.attempt.job_id}/attempts"
        [attempt] = (await reporter.client.get(path)).json()
        assert attempt["number"] == 1
        assert attempt["input"] == INPUT
        assert (attempt["state"], attempt["prediction_id"]) == ("submitted", "p1")
        assert (attempt["outcome"], attempt["charged"]) == (None, "unknown")

    async def test_a_job_without_attempts_has_an_empty_ledger(
        self, client: httpx2.AsyncClient, jobs: Jobs
    ) -> None:
        job = await jobs.pending()
        assert (await client.get(f"/api/v1/jobs/{job.id}/attempts")).json() == []

    async def test_an_unknown_job_is_404(self, client: httpx2.AsyncClient) -> None:
        problem_of(await client.get(f"/api/v1/jobs/{uuid4()}/attempts"), 404)
