"""The Replicate double itself, over real HTTP: the rules it keeps and the faults it can inject."""

import asyncio
import base64
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, UnidentifiedImageError
from replicate import Replicate

from tests.doubles.replicate_ledger import LedgerEntry
from tests.doubles.replicate_server import PROJECT_ROOT, ReplicateServer

MODEL = "black-forest-labs/flux-schnell"
VERSION_ID = "5" * 64
TERMINAL = {"succeeded", "failed", "canceled", "aborted"}
GONE = (httpx.ReadError, httpx.RemoteProtocolError)
GENEROUS_SECONDS = 30  # also for a busy machine; only a failing test takes as long


@pytest.fixture(scope="module")
def running() -> Iterator[ReplicateServer]:
    with ReplicateServer() as server:
        yield server


@pytest.fixture
def server(running: ReplicateServer) -> ReplicateServer:
    """The double, empty, and finishing every prediction at once."""
    running.reset()
    running.configure(starting_seconds=0, latency_seconds=0)
    return running


@pytest.fixture(scope="module")
def connections(running: ReplicateServer) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {running.token}"}
    with httpx.Client(base_url=running.origin, headers=headers, timeout=5) as client:
        yield client


@pytest.fixture
def client(server: ReplicateServer, connections: httpx.Client) -> httpx.Client:
    """A client with the right token, of a double that has just been reset."""
    return connections


def create(client: httpx.Client, **inputs: Any) -> httpx.Response:
    return post(client, {"prompt": "a lighthouse"} | inputs)


def post(client: httpx.Client, inputs: dict[str, Any], **headers: str) -> httpx.Response:
    path = f"/v1/models/{MODEL}/predictions"
    return client.post(path, json={"input": inputs}, headers=headers)


def get(client: httpx.Client, prediction: dict[str, Any]) -> dict[str, Any]:
    body = client.get(prediction["urls"]["get"]).raise_for_status().json()
    assert isinstance(body, dict)
    return body


def later(
    server: ReplicateServer, client: httpx.Client, prediction: dict[str, Any], *seconds: float
) -> list[dict[str, Any]]:
    """What the prediction looks like when the double's clock is this far ahead of ours."""
    bodies = []
    for ahead_seconds in seconds:
        server.configure(clock_ahead_seconds=ahead_seconds)
        bodies.append(get(client, prediction))
    return bodies


def finished(client: httpx.Client, prediction: dict[str, Any]) -> dict[str, Any]:
    give_up_at = time.monotonic() + GENEROUS_SECONDS
    while (body := get(client, prediction))["status"] not in TERMINAL:
        assert time.monotonic() < give_up_at, body
        time.sleep(0.01)
    return body


def created(server: ReplicateServer) -> LedgerEntry:
    """The first create, as soon as it has come in: its client may have left before."""
    give_up_at = time.monotonic() + GENEROUS_SECONDS
    while not (creates := server.creates()):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
    return creates[0]


def cancel_all(server: ReplicateServer, ids: list[str]) -> None:
    headers = {"authorization": f"Bearer {server.token}"}
    with httpx.Client(base_url=server.origin, headers=headers) as client:
        for prediction_id in ids:
            client.post(f"/v1/predictions/{prediction_id}/cancel").raise_for_status()


def fetch(url: str) -> httpx.Response:
    # Loading certificates would take longer than everything else here.
    return httpx.get(url, timeout=5, verify=False)


def image_size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return image.size


class TestPredictions:
    def test_create_answers_with_a_starting_body_without_output(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(starting_seconds=60, latency_seconds=60)

        reply = create(client, seed=7)

        body = reply.json()
        assert (reply.status_code, body["status"]) == (201, "starting")
        assert reply.headers["location"] == body["urls"]["get"]
        assert reply.headers["ratelimit-remaining"] == "599"
        assert body.keys().isdisjoint({"output", "data_removed"})
        assert (body["model"], body["version"]) == (MODEL, "hidden")
        assert body["input"] == {"prompt": "a lighthouse", "seed": 7}

    def test_a_full_starting_body_can_be_asked_for(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(starting_seconds=60, latency_seconds=60, bare_starting_bodies=False)

        body = create(client).json()

        assert (body["output"], body["data_removed"]) == (None, False)

    def test_a_prediction_goes_through_its_states_in_time(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(starting_seconds=100, latency_seconds=300)
        prediction = create(client).json()

        bodies = later(server, client, prediction, 50, 150, 250, 350)

        seen = [body["status"] for body in bodies]
        assert seen == ["starting", "processing", "processing", "succeeded"]
        body = bodies[-1]
        assert body["metrics"] == {"total_time": 300, "predict_time": 200}
        assert body["created_at"] < body["started_at"] < body["completed_at"]
        assert (body["error"], body["data_removed"]) == (None, False)

    def test_unknown_prediction_is_404(self, client: httpx.Client) -> None:
        reply = client.get("/v1/predictions/nosuch")

        assert reply.status_code == 404
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json().keys() == {"title", "detail", "status"}

    @pytest.mark.parametrize(
        ("version", "model", "shown"),
        [
            (MODEL, MODEL, "hidden"),
            (f"{MODEL}:{VERSION_ID}", MODEL, VERSION_ID),
            (VERSION_ID, "acme/unlisted", VERSION_ID),
        ],
    )
    def test_version_takes_three_forms(
        self, client: httpx.Client, version: str, model: str, shown: str
    ) -> None:
        body = {"version": version, "input": {"prompt": "x"}}

        prediction = client.post("/v1/predictions", json=body).json()

        assert (prediction["model"], prediction["version"]) == (model, shown)

    def test_a_bare_version_belongs_to_the_model_that_published_it(
        self, client: httpx.Client
    ) -> None:
        version = client.get(f"/v1/models/{MODEL}").json()["latest_version"]["id"]

        body = {"version": version, "input": {"prompt": "x"}}
        prediction = client.post("/v1/predictions", json=body).json()

        assert prediction["model"] == MODEL

    def test_models_that_are_not_official_need_a_version(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(all_official=False, official_models=["acme/official"])

        by_model = create(client)
        by_name = client.post("/v1/predictions", json={"version": MODEL, "input": {"prompt": "x"}})
        official = client.post(
            "/v1/predictions", json={"version": "acme/official", "input": {"prompt": "x"}}
        )

        assert (by_model.status_code, by_name.status_code) == (404, 422)
        assert by_name.json()["title"] == "Invalid version or not permitted"
        assert official.status_code == 201
        assert client.get(f"/v1/models/{MODEL}").json()["is_official"] is False

    def test_unknown_models_are_refused_everywhere(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(unknown_models=[MODEL])

        named = {"version": f"{MODEL}:{VERSION_ID}", "input": {"prompt": "x"}}

        assert create(client).status_code == 404
        assert client.post("/v1/predictions", json=named).status_code == 422
        assert client.get(f"/v1/models/{MODEL}").status_code == 404
        assert server.creates() == []

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"{", 400),
            (b"[]", 422),
            (b'{"input": {"prompt": "x"}}', 422),
            (b'{"version": "a/b"}', 422),
            (b'{"version": "a/b", "input": "x"}', 422),
            (b'{"version": 1, "input": {"prompt": "x"}}', 422),
            (b'{"version": "a/b", "input": {"prompt": "x"}, "seed": 1}', 422),
            (b'{"version": "a/b", "input": {"prompt": "x"}, "webhook": 1}', 422),
            (b'{"version": "a/b", "input": {"prompt": "x"}, "webhook_events_filter": ["no"]}', 422),
            (b'{"version": "a/b", "input": {"prompt": "x", "width": 63}}', 422),
            (b'{"version": "a/b", "input": {"prompt": "x", "output_format": "gif"}}', 422),
        ],
    )
    def test_a_body_that_breaks_the_schema_is_refused_and_not_in_the_ledger(
        self, server: ReplicateServer, client: httpx.Client, body: bytes, status: int
    ) -> None:
        reply = client.post("/v1/predictions", content=body)

        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/problem+json"
        assert server.creates() == []

    def test_an_invalid_input_names_its_field(self, client: httpx.Client) -> None:
        problem = create(client, width=5000).json()

        assert problem["title"] == "Input validation failed"
        assert [field["field"] for field in problem["invalid_fields"]] == ["input.width"]

    @pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Token r8_test", "r8_test"])
    def test_every_call_needs_a_known_bearer_token(
        self, server: ReplicateServer, authorization: str | None
    ) -> None:
        headers = {} if authorization is None else {"authorization": authorization}

        reply = httpx.get(f"{server.origin}/v1/account", headers=headers)

        assert reply.status_code == 401
        assert reply.json()["detail"] == "You did not pass a valid authentication token"

    def test_tokens_can_be_replaced(self, server: ReplicateServer, client: httpx.Client) -> None:
        server.configure(tokens=["r8_other"])

        refused = client.get("/v1/account")
        accepted = client.get("/v1/account", headers={"authorization": "Bearer r8_other"})

        assert (refused.status_code, accepted.status_code) == (401, 200)

    def test_models_publish_their_input_schema(self, client: httpx.Client) -> None:
        latest = client.get(f"/v1/models/{MODEL}").json()["latest_version"]
        version = client.get(f"/v1/models/{MODEL}/versions/{latest['id']}").json()

        assert version == latest
        properties = version["openapi_schema"]["components"]["schemas"]["Input"]["properties"]
        assert properties["width"]["maximum"] == 2048
        assert "seed" in properties

    def test_without_schemas_nothing_is_published_or_checked(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(schemas=False)

        assert client.get(f"/v1/models/{MODEL}").json()["latest_version"] is None
        assert client.get(f"/v1/models/{MODEL}/versions/{VERSION_ID}").status_code == 404
        assert create(client, width="wide").status_code == 201

    def test_the_webhook_secret_has_the_standard_form(self, client: httpx.Client) -> None:
        prefix, _, key = client.get("/v1/webhooks/default/secret").json()["key"].partition("_")

        assert prefix == "whsec"
        assert len(base64.b64decode(key)) == 24

    def test_data_is_removed_after_the_retention_time(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        prediction = create(client).json()
        server.configure(retention_seconds=0)

        body = get(client, prediction)

        assert (body["data_removed"], body["output"], body["input"]) == (True, None, {})


class TestWaiting:
    def test_wait_answers_201_with_the_output_as_soon_as_it_is_there(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(latency_seconds=0.2)
        began_at = time.monotonic()

        reply = post(client, {"prompt": "x"}, prefer="wait")

        assert 0.2 <= time.monotonic() - began_at < GENEROUS_SECONDS
        assert (reply.status_code, reply.json()["status"]) == (201, "succeeded")
        assert reply.headers["preference-applied"] == "wait"
        assert len(reply.json()["output"]) == 1

    def test_wait_ends_with_202_when_the_time_is_up(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(latency_seconds=60)
        began_at = time.monotonic()

        reply = post(client, {"prompt": "x"}, prefer="wait=1")

        assert 1 <= time.monotonic() - began_at < GENEROUS_SECONDS
        assert (reply.status_code, reply.json()["status"]) == (202, "processing")

    @pytest.mark.parametrize("prefer", ["wait=0", "wait=", "wait=5s", "respond-async", "wait=100"])
    def test_other_preferences_are_refused(
        self, server: ReplicateServer, client: httpx.Client, prefer: str
    ) -> None:
        assert post(client, {"prompt": "x"}, prefer=prefer).status_code == 422
        assert server.creates() == []

    def test_a_cancel_ends_the_wait(self, server: ReplicateServer, client: httpx.Client) -> None:
        server.configure(latency_seconds=60)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, client, {"prompt": "x"}, prefer="wait")
            client.post(f"/v1/predictions/{created(server).id}/cancel")
            reply = waiting.result()

        assert (reply.status_code, reply.json()["status"]) == (201, "canceled")

    async def test_a_thousand_waits_are_held_at_once(self, server: ReplicateServer) -> None:
        server.configure(latency_seconds=60)
        body = b'{"input": {"prompt": "x"}}'
        request = (
            f"POST /v1/models/{MODEL}/predictions HTTP/1.1\r\nhost: double\r\n"
            f"authorization: Bearer {server.token}\r\nprefer: wait\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()

        async def status_line() -> bytes:
            port = int(server.origin.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request + body)
            line, *_ = (await reader.read()).partition(b"\r\n")
            writer.close()
            return line

        held = [asyncio.create_task(status_line()) for _ in range(1000)]
        async with asyncio.timeout(GENEROUS_SECONDS):
            while len(creates := server.creates()) < 1000:
                await asyncio.sleep(0.05)
        assert not any(create.reply_delivered for create in creates)
        await asyncio.to_thread(cancel_all, server, [create.id for create in creates])

        assert set(await asyncio.gather(*held)) == {b"HTTP/1.1 201 Created"}
        creates = server.creates()
        assert len(creates) == 1000
        assert all(create.reply_delivered for create in creates)


class TestCancel:
    def test_cancel_ends_a_running_prediction(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(latency_seconds=60)
        prediction = create(client).json()

        reply = client.post(prediction["urls"]["cancel"])

        assert (reply.status_code, reply.json()["status"]) == (200, "canceled")
        assert get(client, prediction)["completed_at"] is not None

    def test_cancel_leaves_a_terminal_prediction_alone_and_is_recorded(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        prediction = create(client).json()

        reply = client.post(prediction["urls"]["cancel"])

        assert (reply.status_code, reply.json()["status"]) == (200, "succeeded")
        assert len(server.creates()[0].cancel_calls) == 1

    @pytest.mark.parametrize(
        ("starting_seconds", "status"), [(60, "aborted"), (0, "canceled")], ids=["boot", "run"]
    )
    def test_cancel_after_ends_it_at_the_deadline(
        self, server: ReplicateServer, client: httpx.Client, starting_seconds: float, status: str
    ) -> None:
        server.configure(
            starting_seconds=starting_seconds, latency_seconds=60, minimum_cancel_after_seconds=1
        )

        prediction = post(client, {"prompt": "x"}, **{"cancel-after": "1s"}).json()
        body = finished(client, prediction)

        assert body["status"] == status
        lifetime = time_of(body["deadline"]) - time_of(body["created_at"])
        assert lifetime == pytest.approx(1)
        assert body["completed_at"] == body["deadline"]

    @pytest.mark.parametrize(
        ("text", "seconds"), [("30", 30), ("30s", 30), ("5m", 300), ("1h30m45s", 5445)]
    )
    def test_cancel_after_takes_every_documented_form(
        self, client: httpx.Client, text: str, seconds: float
    ) -> None:
        body = post(client, {"prompt": "x"}, **{"cancel-after": text}).json()

        assert time_of(body["deadline"]) - time_of(body["created_at"]) == pytest.approx(seconds)

    @pytest.mark.parametrize("text", ["4", "0.5m", "5 m", "5d", "m", "", "-30"])
    def test_other_forms_and_less_than_five_seconds_are_refused(
        self, server: ReplicateServer, client: httpx.Client, text: str
    ) -> None:
        assert post(client, {"prompt": "x"}, **{"cancel-after": text}).status_code == 422
        assert server.creates() == []


class TestList:
    def test_pages_of_a_hundred_lead_through_everything_newest_first(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        ids = [create(client).json()["id"] for _ in range(250)]

        pages = [client.get("/v1/predictions").json()]
        while pages[-1]["next"] is not None:
            pages.append(client.get(pages[-1]["next"]).json())

        assert [len(page["results"]) for page in pages] == [100, 100, 50]
        assert [entry["id"] for page in pages for entry in page["results"]] == ids[::-1]
        assert pages[0]["previous"] is None
        assert client.get(pages[1]["previous"]).json()["results"] == pages[0]["results"]
        assert "logs" not in pages[0]["results"][0]

    def test_created_filters_keep_their_window_on_the_next_page(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        made = [create(client).json() for _ in range(120)]
        window = {
            "created_after": made[5]["created_at"],
            "created_before": made[110]["created_at"],
        }

        first = client.get("/v1/predictions", params=window).json()
        second = client.get(first["next"]).json()

        found = [entry["id"] for entry in first["results"] + second["results"]]
        assert found == [prediction["id"] for prediction in made[5:110]][::-1]
        assert second["next"] is None

    def test_the_list_can_lag_behind_the_creates(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        create(client)
        server.configure(list_lag_seconds=60)

        assert client.get("/v1/predictions").json()["results"] == []

    @pytest.mark.parametrize("query", ["cursor=zzz", "cursor=b2xkZXIgeA==", "created_after=noon"])
    def test_bad_queries_are_refused(self, client: httpx.Client, query: str) -> None:
        assert client.get(f"/v1/predictions?{query}").status_code == 400


class TestOutputs:
    @pytest.mark.parametrize(
        ("inputs", "size", "file_format"),
        [
            ({}, (64, 64), "PNG"),
            ({"width": 320, "height": 200}, (320, 200), "PNG"),
            ({"output_format": "webp"}, (64, 64), "WEBP"),
            ({"output_format": "jpg"}, (64, 64), "JPEG"),
        ],
    )
    def test_files_are_real_images_of_the_asked_size(
        self,
        client: httpx.Client,
        inputs: dict[str, Any],
        size: tuple[int, int],
        file_format: str,
    ) -> None:
        [url] = get(client, create(client, **inputs).json())["output"]

        reply = fetch(url)

        with Image.open(io.BytesIO(reply.content)) as image:
            image.load()
            assert (image.size, image.format) == (size, file_format)
            assert reply.headers["content-type"] == image.get_format_mimetype()

    def test_files_are_deterministic_and_differ_by_prediction_and_index(
        self, client: httpx.Client
    ) -> None:
        urls = [
            url
            for _ in range(2)
            for url in get(client, create(client, num_outputs=2, seed=1).json())["output"]
        ]

        first, second = ([fetch(url).content for url in urls] for _ in range(2))

        assert first == second
        assert len(set(first)) == 4

    def test_downloads_are_noted_with_whether_they_carried_a_token(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        [url] = get(client, create(client).json())["output"]

        fetch(url)
        client.get(url)

        [entry] = server.creates()
        assert [note.authorization for note in entry.downloads] == [False, True]
        assert {note.name for note in entry.downloads} == {"out-0.png"}
        assert server.ledger().requests["download"] == 2

    def test_files_expire(self, server: ReplicateServer, client: httpx.Client) -> None:
        [url] = get(client, create(client).json())["output"]
        assert fetch(url).status_code == 200

        server.configure(file_lifetime_seconds=0)

        assert fetch(url).status_code == 404

    def test_there_is_no_file_before_success_nor_under_another_name(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        url = get(client, create(client).json())["output"][0]
        server.configure(latency_seconds=60)
        unfinished = create(client).json()["id"]

        urls = [
            url.replace("out-0", "out-1"),
            url.replace(".png", ".jpg"),
            f"{server.origin}/files/{unfinished}/out-0.png",
        ]

        assert [fetch(url).status_code for url in urls] == [404, 404, 404]

    def test_files_can_be_named_on_another_host(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        other_origin = server.origin.replace("127.0.0.1", "localhost")
        server.configure(files_origin=other_origin)

        [url] = get(client, create(client).json())["output"]

        assert url.startswith(f"{other_origin}/files/")

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("none", None), ("empty", []), ("html", "<html><body>Not a URL</body></html>")],
    )
    def test_outputs_without_a_file(
        self, server: ReplicateServer, client: httpx.Client, kind: str, expected: object
    ) -> None:
        server.configure(output_kind=kind)

        assert get(client, create(client).json())["output"] == expected

    def test_outputs_of_other_shapes(self, server: ReplicateServer, client: httpx.Client) -> None:
        def output_of(kind: str) -> Any:
            server.configure(output_kind=kind)
            return get(client, create(client).json())["output"]

        assert image_size(fetch(output_of("string")).content) == (64, 64)
        assert image_size(fetch(output_of("object")["images"][0]).content) == (64, 64)
        header, _, encoded = output_of("data_url").partition(",")
        assert header == "data:image/png;base64"
        assert image_size(base64.b64decode(encoded)) == (64, 64)


class TestExchangeFaults:
    @pytest.mark.parametrize(
        ("reset", "error"), [(True, httpx.ReadError), (False, httpx.RemoteProtocolError)]
    )
    def test_accept_then_drop_creates_and_says_nothing(
        self,
        server: ReplicateServer,
        client: httpx.Client,
        reset: bool,
        error: type[httpx.TransportError],
    ) -> None:
        server.push_fault("create", "accept_then_drop", reset=reset)

        with pytest.raises(error):
            create(client)

        [entry] = server.creates()
        assert entry.reply_delivered is False
        assert create(client).status_code == 201  # the fault is used up

    def test_accept_then_drop_does_not_wait_for_the_output(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(latency_seconds=60)
        server.push_fault("create", "accept_then_drop")

        with pytest.raises(GONE):
            post(client, {"prompt": "x"}, prefer="wait")

        assert len(server.creates()) == 1

    @pytest.mark.parametrize("reset", [True, False])
    def test_drop_creates_nothing(
        self, server: ReplicateServer, client: httpx.Client, reset: bool
    ) -> None:
        server.push_fault("create", "drop", reset=reset)

        with pytest.raises(GONE):
            create(client)

        assert server.creates() == []
        assert server.ledger().faults_fired == {"create drop": 1}

    def test_accept_then_delay_creates_before_it_answers(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "accept_then_delay", seconds=0.5)

        with pytest.raises(httpx.ReadTimeout):
            client.post(
                f"/v1/models/{MODEL}/predictions",
                json={"input": {"prompt": "x"}},
                timeout=httpx.Timeout(GENEROUS_SECONDS, read=0.1),
            )

        created(server)
        time.sleep(0.6)  # past the delay: the reply then goes to nobody
        assert server.creates()[0].reply_delivered is False

    def test_delay_answers_late(self, server: ReplicateServer, client: httpx.Client) -> None:
        server.push_fault("get", "delay", seconds=0.2)
        prediction = create(client).json()
        began_at = time.monotonic()

        assert get(client, prediction)["status"] == "succeeded"
        assert time.monotonic() - began_at >= 0.2

    def test_accept_then_status_creates_behind_an_error(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "accept_then_status", status=502, body="<h1>Bad Gateway</h1>")

        reply = create(client)

        assert (reply.status_code, reply.text) == (502, "<h1>Bad Gateway</h1>")
        assert reply.headers["content-type"].startswith("text/html")
        [entry] = server.creates()
        assert entry.reply_delivered is False

    def test_status_takes_headers_and_any_body(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        headers = {"retry-after": "5"}
        server.push_fault("create", "status", status=429, headers=headers, body=["slow down"])
        server.push_fault("create", "status", status=402)
        server.push_fault("create", "status", status=520)

        throttled, unpaid, nameless = (create(client) for _ in range(3))

        assert (throttled.status_code, throttled.headers["retry-after"]) == (429, "5")
        assert throttled.json() == ["slow down"]
        assert "ratelimit-remaining" not in throttled.headers
        assert unpaid.json()["title"] == "Payment Required"
        assert nameless.status_code == 520
        assert server.creates() == []

    @pytest.mark.parametrize("on", ["get", "list", "cancel", "models", "download"])
    def test_every_kind_of_request_can_fail(
        self, server: ReplicateServer, client: httpx.Client, on: str
    ) -> None:
        prediction = get(client, create(client).json())
        server.push_fault(on, "status", status=503, times=None)

        replies = {
            "get": client.get(prediction["urls"]["get"]),
            "list": client.get("/v1/predictions"),
            "cancel": client.post(prediction["urls"]["cancel"]),
            "models": client.get(f"/v1/models/{MODEL}"),
            "download": fetch(prediction["output"][0]),
        }

        assert {name for name, reply in replies.items() if reply.status_code == 503} == {on}

    def test_a_cancel_whose_reply_is_lost_has_still_happened(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(latency_seconds=60)
        prediction = create(client).json()
        server.push_fault("cancel", "accept_then_drop")

        with pytest.raises(GONE):
            client.post(prediction["urls"]["cancel"])

        assert get(client, prediction)["status"] == "canceled"

    def test_faults_strike_in_order_as_often_as_they_say(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "status", status=500, times=2)
        server.push_fault("create", "status", status=503)

        statuses = [create(client).status_code for _ in range(4)]

        assert statuses == [500, 500, 503, 201]

    def test_probability_is_drawn_from_the_seed(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        def statuses() -> list[int]:
            server.clear_faults()
            server.push_fault("list", "status", status=500, times=None, probability=0.5, seed=3)
            return [client.get("/v1/predictions").status_code for _ in range(20)]

        first = statuses()

        assert set(first) == {200, 500}
        assert statuses() == first

    def test_a_fault_can_pick_its_prompt(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "status", status=500, prompt_contains="unlucky")
        server.push_fault("get", "status", status=500, prompt_contains="lighthouse")

        assert create(client).status_code == 201
        assert post(client, {"prompt": "an unlucky one"}).status_code == 500
        prediction = create(client).json()
        assert client.get(prediction["urls"]["get"]).status_code == 500

    def test_the_rate_limit_refuses_with_the_time_to_wait(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(creates_per_minute=6, creates_burst=2)

        replies = [create(client) for _ in range(3)]

        assert [reply.status_code for reply in replies] == [201, 201, 429]
        assert replies[2].headers["retry-after"] == "10"
        assert replies[2].json()["retry_after"] == 10
        ledger = server.ledger()
        assert (len(ledger.creates), ledger.requests["throttled"]) == (2, 1)
        assert client.get("/v1/predictions").status_code == 200

    def test_the_rate_limit_lets_creates_through_again(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.configure(creates_per_minute=40, creates_burst=1)
        assert [create(client).status_code for _ in range(2)] == [201, 429]

        give_up_at = time.monotonic() + GENEROUS_SECONDS
        while create(client).status_code == 429:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)

        assert len(server.creates()) == 2


class TestFateFaults:
    def test_fail_ends_with_the_error_text(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "fail", error="NSFW content detected (E005)")

        body = finished(client, create(client).json())

        assert (body["status"], body["output"]) == ("failed", None)
        assert body["error"] == "NSFW content detected (E005)"
        assert finished(client, create(client).json())["error"] is None

    def test_status_sequence_shows_any_words_at_their_times(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        sequence = [[0, "booting"], [100, "processing"], [200, "starting"], [300, "aborted"]]
        server.push_fault("create", "status_sequence", sequence=sequence)
        prediction = create(client).json()

        bodies = later(server, client, prediction, 50, 150, 250, 350)

        seen = [prediction["status"], *(body["status"] for body in bodies)]
        assert seen == ["booting", "booting", "processing", "starting", "aborted"]

    def test_processing_with_output_is_complete_before_it_is_terminal(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "processing_with_output", seconds=0.5)

        reply = post(client, {"prompt": "x"}, prefer="wait")

        body = reply.json()
        assert (reply.status_code, body["status"]) == (201, "processing")
        assert "completed_at" not in body
        assert fetch(body["output"][0]).status_code == 200
        assert finished(client, body)["output"] == body["output"]

    def test_an_output_can_be_anything(self, server: ReplicateServer, client: httpx.Client) -> None:
        server.push_fault("create", "output", output=["file:///etc/passwd", 5])

        assert get(client, create(client).json())["output"] == ["file:///etc/passwd", 5]

    def test_a_fate_and_a_lost_reply_can_strike_together(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "accept_then_drop")
        server.push_fault("create", "fail")

        with pytest.raises(GONE):
            create(client)

        assert [entry.status for entry in server.creates()] == ["failed"]


class TestFileFaults:
    @pytest.fixture
    def url(self, client: httpx.Client) -> str:
        [url] = get(client, create(client).json())["output"]
        assert isinstance(url, str)
        return url

    def test_truncate_sends_half_an_image(self, server: ReplicateServer, url: str) -> None:
        server.push_fault("download", "truncate")

        half = fetch(url)

        assert half.status_code == 200
        with pytest.raises((OSError, UnidentifiedImageError)):
            image_size(half.content)
        assert image_size(fetch(url).content) == (64, 64)

    def test_cut_ends_the_connection_midway(self, server: ReplicateServer, url: str) -> None:
        server.push_fault("download", "cut")

        with pytest.raises(httpx.RemoteProtocolError, match=r"received \d+ bytes, expected"):
            fetch(url)

    @pytest.mark.parametrize(
        ("kind", "fields", "content_type", "is_image"),
        [
            ("html", {}, "text/html; charset=utf-8", False),
            ("empty", {}, "image/png", False),
            ("wrong_content_type", {}, "text/plain; charset=utf-8", True),
            ("wrong_content_type", {"content_type": "video/mp4"}, "video/mp4", True),
            ("bytes", {"body_base64": "AAAA"}, "image/png", False),
            ("flood", {"size_bytes": 200_000}, "image/png", True),
        ],
    )
    def test_the_content_can_be_something_else(
        self,
        server: ReplicateServer,
        url: str,
        kind: str,
        fields: dict[str, Any],
        content_type: str,
        is_image: bool,
    ) -> None:
        true_content = fetch(url).content
        server.push_fault("download", kind, **fields)

        reply = fetch(url)

        assert reply.status_code == 200
        assert reply.headers["content-type"] == content_type
        assert reply.content.startswith(true_content) is is_image
        assert len(reply.content) == fields.get("size_bytes", len(reply.content))

    def test_bytes_are_sent_with_their_own_headers(self, server: ReplicateServer, url: str) -> None:
        headers = {"content-encoding": "gzip"}
        body = base64.b64encode(b"not gzip").decode()
        server.push_fault("download", "bytes", body_base64=body, headers=headers)

        with pytest.raises(httpx.DecodingError):
            fetch(url)

    def test_slow_trickles(self, server: ReplicateServer, url: str) -> None:
        size = len(fetch(url).content)
        server.push_fault("download", "slow", bytes_per_second=size * 4)
        began_at = time.monotonic()

        assert image_size(fetch(url).content) == (64, 64)
        assert 0.2 < time.monotonic() - began_at < 2

    def test_an_endless_flood_goes_on_until_the_client_leaves(
        self, server: ReplicateServer, url: str
    ) -> None:
        server.push_fault("download", "flood")
        received = 0

        with httpx.stream("GET", url) as reply:
            for chunk in reply.iter_raw():
                received += len(chunk)
                if received > 5_000_000:
                    break

        assert received > 5_000_000
        assert server.ledger().requests["download"] == 1  # and the double still answers


class TestLedger:
    def test_it_holds_what_was_asked_and_how(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        body = {
            "version": f"{MODEL}:{VERSION_ID}",
            "input": {"seed": 7, "prompt": "a lighthouse"},
            "webhook": "https://example.org/hook?attempt=1",
            "webhook_events_filter": ["start", "completed"],
        }
        headers = {"prefer": "wait=5", "cancel-after": "5m"}

        reply = client.post("/v1/predictions", json=body, headers=headers)

        [entry] = server.creates()
        assert (entry.id, entry.created_at) == (reply.json()["id"], reply.json()["created_at"])
        assert (entry.model, entry.version, entry.input) == (MODEL, VERSION_ID, body["input"])
        assert (entry.headers, entry.webhook) == (headers, body["webhook"])
        assert entry.webhook_events_filter == ["start", "completed"]
        assert (entry.status, entry.reply_delivered) == ("succeeded", True)
        assert (entry.cancel_calls, entry.downloads) == ([], [])

    def test_requests_are_counted_by_kind_also_refused_ones(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        create(client)
        create(client, width=1)
        httpx.post(f"{server.origin}/v1/predictions")
        client.get("/v1/predictions")
        client.get(f"/v1/models/{MODEL}")

        assert server.ledger().requests == {"create": 3, "list": 1, "models": 1}

    def test_reset_forgets_everything(self, server: ReplicateServer, client: httpx.Client) -> None:
        server.configure(tokens=["r8_other"])
        server.push_fault("create", "drop")

        server.reset()

        assert create(client).status_code == 201
        assert server.ledger().requests == {"create": 1}

    def test_what_was_held_back_during_a_reset_never_arrives(
        self, server: ReplicateServer, client: httpx.Client
    ) -> None:
        server.push_fault("create", "delay", seconds=1)
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(create, client)
            while not server.ledger().faults_fired:
                time.sleep(0.01)
            server.reset()
            with pytest.raises(GONE):
                held.result()

        assert server.creates() == []

    @pytest.mark.parametrize(
        ("on", "kind", "fields"),
        [
            ("get", "fail", {}),
            ("create", "truncate", {}),
            ("create", "nonsense", {}),
            ("delete", "drop", {}),
            ("create", "drop", {"tmies": 1}),
        ],
    )
    def test_a_fault_that_can_not_be_is_refused(
        self, server: ReplicateServer, on: str, kind: str, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(httpx.HTTPStatusError, match="422"):
            server.push_fault(on, kind, **fields)

    @pytest.mark.parametrize("setting", [{"latency": 1}, {"output_kind": "song"}])
    def test_a_setting_that_is_not_known_is_refused(
        self, server: ReplicateServer, setting: dict[str, Any]
    ) -> None:
        with pytest.raises(httpx.HTTPStatusError, match="422"):
            server.configure(**setting)


class TestOfficialClient:
    def test_replicates_own_package_can_talk_to_it(self, server: ReplicateServer) -> None:
        server.configure(latency_seconds=60)
        owner, name = MODEL.split("/")
        with Replicate(
            bearer_token=server.token, base_url=f"{server.origin}/v1", max_retries=0
        ) as replicate:
            made = replicate.models.predictions.create(
                model_owner=owner, model_name=name, input={"prompt": "x"}, cancel_after="5m"
            )
            listed = [prediction.id for prediction in replicate.predictions.list()]
            canceled = replicate.predictions.cancel(prediction_id=made.id)
            model = replicate.models.get(model_owner=owner, model_name=name)

        assert (listed, canceled.status) == ([made.id], "canceled")
        assert server.creates()[0].headers == {"cancel-after": "5m"}
        assert model.to_dict()["owner"] == owner


class TestProcess:
    def test_sigterm_ends_it_at_once_while_a_wait_is_held(self) -> None:
        with ReplicateServer() as server:
            server.configure(latency_seconds=60)
            url = f"{server.origin}/v1/models/{MODEL}/predictions"
            headers = {"authorization": f"Bearer {server.token}", "prefer": "wait"}
            timeout = httpx.Timeout(GENEROUS_SECONDS, read=0.2)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json={"input": {"prompt": "x"}}, headers=headers, timeout=timeout)
            created(server)
            server.process.send_signal(signal.SIGTERM)

            # The wait would last for a minute.
            assert server.process.wait(GENEROUS_SECONDS) == -signal.SIGTERM

    def test_it_dies_with_a_test_process_that_is_killed(self, tmp_path: Path) -> None:
        script = (
            "import os, pathlib, sys\n"
            "from tests.doubles.replicate_server import ReplicateServer\n"
            "server = ReplicateServer().__enter__()\n"
            "server.reset()\n"
            "pathlib.Path(sys.argv[1]).write_text(server.origin)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        origin_file = tmp_path / "origin"

        killed = subprocess.run(
            [sys.executable, "-c", script, str(origin_file)],
            env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
            check=False,
        )

        assert killed.returncode == -signal.SIGKILL
        origin = origin_file.read_text()
        give_up_at = time.monotonic() + 5
        while answers(origin) and time.monotonic() < give_up_at:
            time.sleep(0.02)
        assert not answers(origin)


def answers(origin: str) -> bool:
    try:
        return httpx.get(f"{origin}/_ledger").is_success
    except httpx.TransportError:
        return False


def time_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
