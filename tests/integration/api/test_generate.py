"""POST /api/v1/generate."""

import asyncio
import json
import logging
from functools import partial
from typing import Any
from uuid import UUID

import httpx2
import pytest

from app.api.deps import Services
from app.config import Settings
from app.db import create_engine
from app.jobs.repository import JobRepository
from tests.integration.api.conftest import SCHEMA, FakeProvider, OpenClient, problem_of

URL = "/api/v1/generate"

# The documented request: the parameters are a string that holds an object.
DOCUMENTED = """{
    "prompt": "A serene mountain landscape at sunset with crystal clear lake reflections",
    "model_name": "black-forest-labs/flux-schnell",
    "parameters": "{\\"width\\": 1024, \\"height\\": 1024, \\"guidance_scale\\": 3.5}"
  }"""


def paths(response: httpx2.Response) -> list[str]:
    return [error["path"] for error in problem_of(response, 422)["errors"]]


async def test_documented_request_creates_a_pending_job(
    client: httpx2.AsyncClient, services: Services, rung: list[UUID]
) -> None:
    response = await client.post(
        URL, content=DOCUMENTED, headers={"content-type": "application/json"}
    )
    assert response.status_code == 201
    job = response.json()
    assert job["prompt"].startswith("A serene mountain")
    assert job["model_name"] == "black-forest-labs/flux-schnell"
    assert job["parameters"] == {"width": 1024, "height": 1024, "guidance_scale": 3.5}
    assert job["status"] == "pending"
    assert job["created_at"].endswith("Z")
    assert job["retry_count"] == 0
    assert job["warnings"] == []
    assert response.headers["location"] == f"/api/v1/status/{job['id']}"
    await services.dispatcher.stop()
    assert rung == [UUID(job["id"])]


async def test_created_job_is_found_at_its_location(client: httpx2.AsyncClient) -> None:
    created = await client.post(URL, json={"prompt": "a fox"})
    found = await client.get(created.headers["location"])
    assert found.json() == {
        name: value for name, value in created.json().items() if name != "warnings"
    }


async def test_defaults_and_prompt_kept_as_given(client: httpx2.AsyncClient) -> None:
    job = (await client.post(URL, json={"prompt": "  a fox \n🦊 "})).json()
    assert job["prompt"] == "  a fox \n🦊 "
    assert job["model_name"] == "black-forest-labs/flux-schnell"
    assert job["parameters"] == {}


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (None, {}),
        ("{}", {}),
        ("null", {}),
        ({"seed": 1, "nested": {"a": [1, 2.5, None, True, "é"]}}, None),
        ({"seed": 2**63 - 1, "low": -(2**63)}, None),
        ({"width": None}, None),
    ],
)
async def test_parameters_are_stored_unchanged(
    client: httpx2.AsyncClient, given: Any, stored: Any
) -> None:
    created = await client.post(URL, json={"prompt": "x", "parameters": given})
    assert created.status_code == 201
    read = await client.get(created.headers["location"])
    assert read.json()["parameters"] == (given if stored is None else stored)


@pytest.mark.parametrize("label", [None, "application/x-www-form-urlencoded", "Application/JSON"])
async def test_json_with_curls_own_label_or_none(
    client: httpx2.AsyncClient, label: str | None
) -> None:
    headers = {"content-type": label} if label else {}
    response = await client.post(URL, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 201


async def test_json_labelled_as_text_is_refused_with_advice(client: httpx2.AsyncClient) -> None:
    headers = {"content-type": "text/plain"}
    response = await client.post(URL, content=b'{"prompt": "x"}', headers=headers)
    assert "application/json" in problem_of(response, 422)["detail"]


NUL = "\x00"
DEEP = json.loads("[" * 40 + "]" * 40)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "body.prompt"),
        ({"prompt": ""}, "body.prompt"),
        ({"prompt": " \t\n"}, "body.prompt"),
        ({"prompt": 5}, "body.prompt"),
        ({"prompt": None}, "body.prompt"),
        ({"prompt": ["x"]}, "body.prompt"),
        ({"prompt": DEEP}, "body.prompt"),
        ({"prompt": "x" * 10_001}, "body.prompt"),
        ({"prompt": f"a{NUL}b"}, "body.prompt"),
        ({"prompt": "x", "model_name": ""}, "body.model_name"),
        ({"prompt": "x", "model_name": "flux"}, "body.model_name"),
        ({"prompt": "x", "model_name": "../../predictions"}, "body.model_name"),
        ({"prompt": "x", "model_name": "a/b/c"}, "body.model_name"),
        ({"prompt": "x", "model_name": "a/b\n"}, "body.model_name"),
        ({"prompt": "x", "model_name": "a/b?c=d"}, "body.model_name"),
        ({"prompt": "x", "model_name": f"a/b{NUL}"}, "body.model_name"),
        ({"prompt": "x", "model_name": f"a/{'b' * 200}"}, "body.model_name"),
        ({"prompt": "x", "model_name": None}, "body.model_name"),
        ({"prompt": "x", "model_name": 1}, "body.model_name"),
        ({"prompt": "x", "parameters": []}, "body.parameters"),
        ({"prompt": "x", "parameters": 1}, "body.parameters"),
        ({"prompt": "x", "parameters": True}, "body.parameters"),
        ({"prompt": "x", "parameters": ""}, "body.parameters"),
        ({"prompt": "x", "parameters": "width=5"}, "body.parameters"),
        ({"prompt": "x", "parameters": "[1]"}, "body.parameters"),
        ({"prompt": "x", "parameters": '"{}"'}, "body.parameters"),
        ({"prompt": "x", "parameters": '{"a": NaN}'}, "body.parameters"),
        ({"prompt": "x", "parameters": '{"a": 1e999}'}, "body.parameters"),
        ({"prompt": "x", "parameters": '{"a": "\\ud800"}'}, "body.parameters"),
        (
            {"prompt": "x", "parameters": '{"a": ' + "[" * 5000 + "]" * 5000 + "}"},
            "body.parameters",
        ),
        ({"prompt": "x", "parameters": {"a": DEEP}}, "body.parameters"),
        ({"prompt": "x", "parameters": {"a": NUL}}, "body.parameters"),
        ({"prompt": "x", "parameters": {f"a{NUL}": 1}}, "body.parameters"),
        ({"prompt": "x", "parameters": {"a": [{"b": NUL}]}}, "body.parameters"),
        ({"prompt": "x", "parameters": {"a": 2**64}}, "body.parameters"),
        ({"prompt": "x", "parameters": {"a": 10**400}}, "body.parameters"),
        ({"prompt": "x", "parameters": {"a": [0] * 10_001}}, "body.parameters"),
        ({"prompt": "x", "parameters": {"prompt": "y"}}, "body.parameters.prompt"),
        ({"prompt": "x", "parameters": '{"prompt": "y"}'}, "body.parameters.prompt"),
        ({"prompt": "x", "status": "completed"}, "body.status"),
        ({"prompt": "x", "id": "0190b5c2-0000-7000-8000-000000000000"}, "body.id"),
        ({"prompt": "x", "external_job_id": "p"}, "body.external_job_id"),
        ({"prompt": "x", f"a{NUL}": 1}, f"body.a{NUL}"),
        ([], "body"),
        ("x", "body"),
        (None, "body"),
        (5, "body"),
    ],
)
async def test_wrong_bodies_are_refused_with_the_path(
    offline: httpx2.AsyncClient, body: Any, path: str
) -> None:
    response = await offline.post(URL, json=body)
    assert path in paths(response)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"prompt=x",
        b'{"prompt": "x"} trailing',
        b'{"prompt": "\xff\xfe"}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "parameters": {"a": "\\udfff"}}',
        b'{"prompt": "x", "parameters": {"\\ud800": 1}}',
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x", "model_name": "a/\\ud800"}',
        b'{"prompt": "x", "parameters": "\\ud800"}',
        b'{"prompt": "x", "parameters": "{\\"a\\": \\"\\ud800\\"}"}',
        b'{"prompt": "x", "parameters": {"a": NaN}}',
        b'{"prompt": "x", "parameters": {"a": -Infinity}}',
        b'{"prompt": "x", "parameters": {"a": 1e400}}',
        b'{"prompt": "x", "parameters": {"a": ' + b"9" * 5000 + b"}}",
        b'{"prompt": "x", "parameters": "{\\"a\\": ' + b"9" * 5000 + b'}"}',
        b'{"prompt": "x", "parameters": {"a": "' + b"\xed\xa0\x80" + b'"}}',
    ],
)
async def test_unreadable_bodies_are_refused(offline: httpx2.AsyncClient, raw: bytes) -> None:
    response = await offline.post(URL, content=raw, headers={"content-type": "application/json"})
    problem = problem_of(response, 422)
    assert problem["errors"]
    assert problem["errors"][0]["path"].startswith("body")


async def test_many_unknown_fields_are_reported_in_a_bounded_answer(
    offline: httpx2.AsyncClient,
) -> None:
    body = {"prompt": "x", "long" * 10_000: 1, **{f"field{n}": n for n in range(5000)}}
    response = await offline.post(URL, json=body)
    assert len(problem_of(response, 422)["errors"]) == 50
    assert len(response.content) < 20_000


async def test_a_value_the_model_refuses_is_refused_with_its_path(
    offline: httpx2.AsyncClient,
) -> None:
    parameters = {"width": 5000, "height": "tall", "output_format": "gif"}
    response = await offline.post(URL, json={"prompt": "x", "parameters": parameters})
    errors = {error["path"]: error["message"] for error in problem_of(response, 422)["errors"]}
    assert errors == {
        "body.parameters.width": "must be at most 1440",
        "body.parameters.height": "must be of type integer",
        "body.parameters.output_format": 'must be one of "webp", "jpg", "png"',
    }


async def test_unknown_parameters_pass_with_a_warning(client: httpx2.AsyncClient) -> None:
    parameters = {"width": 512, "sheduler": "K_EULER"}
    response = await client.post(URL, json={"prompt": "x", "parameters": parameters})
    assert response.status_code == 201
    assert response.json()["parameters"] == parameters
    assert [warning for warning in response.json()["warnings"] if "sheduler" in warning]
    assert len(response.json()["warnings"]) == 1


async def test_a_model_without_a_schema_is_not_checked(client: httpx2.AsyncClient) -> None:
    body = {"prompt": "x", "model_name": "some/other:abc123", "parameters": {"width": "any"}}
    response = await client.post(URL, json=body)
    assert response.status_code == 201
    assert response.json()["warnings"] == []


async def test_a_hanging_schema_does_not_hold_the_post_for_long(
    client: httpx2.AsyncClient, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.parameters.WAIT_SECONDS", 0.05)
    provider.hanging.add("slow/model")
    async with asyncio.timeout(5):
        response = await client.post(URL, json={"prompt": "x", "model_name": "slow/model"})
    assert response.status_code == 201


async def test_the_request_id_is_stored_with_the_job(
    client: httpx2.AsyncClient, services: Services
) -> None:
    response = await client.post(URL, json={"prompt": "x"}, headers={"X-Request-ID": "order-7.a_b"})
    assert response.headers["x-request-id"] == "order-7.a_b"
    job = await services.repository.get(UUID(response.json()["id"]))
    assert job is not None
    assert job.request_id == "order-7.a_b"


async def test_the_log_ties_the_job_to_its_request(
    client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app")
    response = await client.post(URL, json={"prompt": "x"}, headers={"X-Request-ID": "order-7"})
    (line,) = [record.msg for record in caplog.records if "job_accepted" in str(record.msg)]
    assert isinstance(line, dict)
    assert (line["job_id"], line["request_id"]) == (response.json()["id"], "order-7")


async def test_a_hundred_posts_at_once_all_exist(
    settings: Settings,
    open_client: OpenClient,
    repository: JobRepository,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ten connections for all: on a busy machine the last one waits for long.
    patient = partial(create_engine, pool_timeout_seconds=60)
    monkeypatch.setattr("app.api.deps.create_engine", patient)
    monkeypatch.setattr("app.api.middleware.ANSWER_SECONDS", 60)
    async with open_client(settings) as client:
        responses = await asyncio.gather(
            *(client.post(URL, json={"prompt": f"fox {n}"}) for n in range(100))
        )
    assert [response.status_code for response in responses] == [201] * 100
    assert len({response.json()["id"] for response in responses}) == 100
    assert await repository.count(None) == 100


class TestIdempotencyKey:
    async def post(
        self, client: httpx2.AsyncClient, key: str, prompt: str = "a fox"
    ) -> httpx2.Response:
        return await client.post(
            "/api/v1/generate", json={"prompt": prompt}, headers={"Idempotency-Key": key}
        )

    async def test_repeats_get_the_same_job(self, client: httpx2.AsyncClient) -> None:
        answers = await asyncio.gather(*(self.post(client, "order-7") for _ in range(10)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert (await client.get("/api/v1/jobs")).headers["x-total-count"] == "1"

    async def test_another_key_is_another_job(self, client: httpx2.AsyncClient) -> None:
        first, second = await self.post(client, "a"), await self.post(client, "b")
        assert first.json()["id"] != second.json()["id"]

    async def test_a_key_used_for_another_request_is_refused(
        self, client: httpx2.AsyncClient
    ) -> None:
        await self.post(client, "a")
        body = problem_of(await self.post(client, "a", prompt="an owl"), 422)
        assert body["errors"][0]["path"] == "header.Idempotency-Key"

    async def test_a_repeat_gets_its_job_though_the_model_refuses_it_by_now(
        self, settings: Settings, open_client: OpenClient, provider: FakeProvider
    ) -> None:
        body = {"prompt": "x", "model_name": "new/model", "parameters": {"width": 1}}
        headers = {"Idempotency-Key": "a"}
        async with open_client(settings) as before:
            first = await before.post(URL, json=body, headers=headers)
        provider.schemas["new/model"] = SCHEMA
        async with open_client(settings) as after:
            again = await after.post(URL, json=body, headers=headers)
            problem_of(await after.post(URL, json=body, headers={"Idempotency-Key": "b"}), 422)
        assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])

    async def test_a_repeat_shows_how_the_job_stands(self, client: httpx2.AsyncClient) -> None:
        job = (await self.post(client, "a")).json()
        await client.delete(f"/api/v1/jobs/{job['id']}")
        assert (await self.post(client, "a")).json()["status"] == "cancelled"

    @pytest.mark.parametrize("key", ["", "two words", "x" * 256])
    async def test_a_key_that_is_none_is_refused(
        self, client: httpx2.AsyncClient, key: str
    ) -> None:
        problem_of(await self.post(client, key), 422)
