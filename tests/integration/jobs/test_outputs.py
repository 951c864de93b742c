"""Keeping outputs: from a succeeded prediction to files on disk, whatever the provider serves."""

import asyncio
import base64
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from PIL import Image

from app.errors import FailureClass, LeaseLost, ProviderError, StorageError
from app.jobs import outputs
from app.jobs.models import Attempt, Job, Output
from app.jobs.outputs import MAX_OUTPUTS, OutputKeeper
from app.providers.base import Prediction, PredictionRequest, Provider
from app.providers.mock import MockProvider
from app.providers.replicate import ReplicateProvider
from app.storage.local import LocalStorage
from tests.doubles.replicate_server import ReplicateServer
from tests.doubles.ungoverned import Ungoverned

pytestmark = pytest.mark.asyncio(loop_scope="module")

JOB_ID = UUID("01890000-0000-7000-8000-000000000001")
CREATED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MAX_BYTES = 400_000
MAX_PIXELS = 100_000

Checkpoint = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """The lease is still ours."""


def noise(seed: int = 0, size: tuple[int, int] = (61, 47)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def encoded(image: Image.Image, pillow_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, pillow_format, **options)
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


PICTURE = encoded(noise())
PICTURE_URL = data_url(PICTURE)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def succeeded(output: Any) -> Prediction:
    return Prediction(
        id="p1",
        status="succeeded",
        model_name="acme/painter",
        input={},
        output=output,
        version="v1",
        created_at=CREATED_AT,
        started_at=CREATED_AT,
        completed_at=CREATED_AT,
        predict_time_seconds=1.5,
    )


def new_job(parameters: dict[str, Any] | None = None, job_id: UUID = JOB_ID) -> Job:
    return Job(
        id=job_id,
        prompt="a lighthouse",
        model_name="acme/painter",
        parameters=parameters or {},
        created_at=CREATED_AT,
        started_at=CREATED_AT,
        deadline_at=CREATED_AT,
        ring_at=CREATED_AT,
    )


def new_attempt(parameters: dict[str, Any] | None = None) -> Attempt:
    inputs = {"prompt": "a lighthouse"} | (parameters or {})
    return Attempt(job_id=JOB_ID, number=1, provider="replicate", model_name="x/y", input=inputs)


@dataclass
class Kept:
    """A keeper, and the folders it writes to."""

    keeper: OutputKeeper
    media: Path
    metadata: Path
    provider: Provider

    async def keep(
        self, output: Any, checkpoint: Checkpoint = nothing, job_id: UUID = JOB_ID
    ) -> list[Output]:
        job, attempt = new_job(job_id=job_id), new_attempt()
        return await self.keeper.keep(job, attempt, succeeded(output), checkpoint)

    async def refuse(self, output: Any) -> ProviderError:
        """Keep what can not be kept: nothing of it may be left."""
        with pytest.raises(ProviderError) as caught:
            await self.keep(output)
        assert self.files() == []
        self.assert_tidy()
        return caught.value

    async def one(self, output: Any) -> tuple[Output, bytes]:
        """Keep one output; return its row and its file, which agree."""
        [row] = await self.keep(output)
        content = (self.media / row.name).read_bytes()
        assert (row.size_bytes, row.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        self.assert_tidy()
        return row, content

    def files(self) -> list[str]:
        """What others can see."""
        folders = (self.media, self.metadata)
        return sorted(path.name for folder in folders for path in folder.glob("[!.]*"))

    def document(self) -> Any:
        return json.loads((self.metadata / f"{JOB_ID}.json").read_text("utf-8"))

    def assert_tidy(self) -> None:
        assert list((self.media / ".incoming").iterdir()) == []


def new_keeper(provider: Provider, folder: Path, **options: Any) -> Kept:
    storage = LocalStorage(folder / "media", folder / "metadata")
    limits = {"max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS, "deadline_seconds": 10.0}
    keeper = OutputKeeper(provider, storage, **({"concurrency": 4} | limits | options))
    return Kept(keeper, folder / "media", folder / "metadata", provider)


@pytest.fixture(autouse=True)
def _doubts_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "DOUBTS_SECONDS", (0, 0))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def provider(replicate_server: ReplicateServer) -> AsyncIterator[ReplicateProvider]:
    made = ReplicateProvider(
        replicate_server.token,
        replicate_server.origin,
        timeout_seconds=5,
        prefer_wait_seconds=0,
        governor=Ungoverned(),
    )
    yield made
    await made.aclose()


@pytest.fixture
def double(replicate: ReplicateServer) -> ReplicateServer:
    replicate.configure(starting_seconds=0, latency_seconds=0)
    return replicate


@pytest.fixture
def kept(provider: ReplicateProvider, tmp_path: Path) -> Kept:
    return new_keeper(provider, tmp_path)


class TestNames:
    async def test_the_first_is_named_for_the_job_the_others_are_numbered(self, kept: Kept) -> None:
        pictures = [encoded(noise(seed)) for seed in range(3)]
        rows = await kept.keep([data_url(picture) for picture in pictures])
        names = [f"{JOB_ID}.png", f"{JOB_ID}-1.png", f"{JOB_ID}-2.png"]
        assert [row.name for row in rows] == names
        assert [row.index for row in rows] == [0, 1, 2]
        assert [(kept.media / name).read_bytes() for name in names] == pictures
        assert kept.files() == sorted([*names, f"{JOB_ID}.json"])

    @pytest.mark.parametrize(
        ("head", "media_type", "extension"),
        [
            (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "video/mp4", "mp4"),
            (b"RIFF\x24\x00\x00\x00WAVEfmt ", "audio/wav", "wav"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", "svg"),
            (b"PK\x03\x04", "application/zip", "zip"),
            (b"glTF\x02\x00", "model/gltf-binary", "glb"),
            (b"\x01\x02\x03\x04", "application/octet-stream", "bin"),
        ],
    )
    async def test_what_is_no_picture_is_kept_as_it_is(
        self, kept: Kept, head: bytes, media_type: str, extension: str
    ) -> None:
        content = head + bytes(1000)
        row, stored = await kept.one(data_url(content, "image/png"))
        assert (row.name, row.media_type) == (f"{JOB_ID}.{extension}", media_type)
        assert (row.width, row.height) == (None, None)
        assert stored == content

    async def test_the_pieces_of_a_text_are_one_output(self, kept: Kept) -> None:
        row, stored = await kept.one(["Once", " upon", " a time"])
        assert (row.name, stored) == (f"{JOB_ID}.txt", b"Once upon a time")

    @pytest.mark.parametrize("text", ["a caption", "ünïcödé 🌅", "<html>as text</html>", "\ud800"])
    async def test_a_text_is_kept_as_text(self, kept: Kept, text: str) -> None:
        row, stored = await kept.one(text)
        assert (row.name, row.media_type) == (f"{JOB_ID}.txt", "text/plain")
        assert stored == text.encode(errors="replace")

    @pytest.mark.parametrize("value", [7, 0, 1.5, True, False])
    async def test_any_other_value_is_kept_as_json(self, kept: Kept, value: Any) -> None:
        row, stored = await kept.one(value)
        assert (row.name, row.media_type) == (f"{JOB_ID}.json", "application/json")
        assert json.loads(stored) is value or json.loads(stored) == value

    async def test_an_object_is_kept_leaf_by_leaf(self, kept: Kept) -> None:
        rows = await kept.keep({"image": PICTURE_URL, "seed": 7, "words": ["a", None, "b"]})
        assert [row.name.removeprefix(str(JOB_ID)) for row in rows] == [
            ".png",
            "-1.json",
            "-2.txt",
            "-3.txt",
        ]


class TestPictures:
    async def test_a_png_keeps_every_byte(self, kept: Kept) -> None:
        row, stored = await kept.one(PICTURE_URL)
        assert stored == PICTURE
        assert (row.media_type, row.width, row.height) == ("image/png", 61, 47)

    async def test_what_follows_its_end_is_cut_off(self, kept: Kept) -> None:
        _, stored = await kept.one(data_url(PICTURE + b"<script>alert(1)</script>"))
        assert stored == PICTURE

    @pytest.mark.parametrize(
        ("pillow_format", "options"),
        [("WEBP", {"lossless": True}), ("WEBP", {}), ("JPEG", {}), ("GIF", {}), ("AVIF", {})],
    )
    async def test_any_other_picture_becomes_a_png_of_the_same_pixels(
        self, kept: Kept, pillow_format: str, options: dict[str, Any]
    ) -> None:
        given = encoded(noise(), pillow_format, **options)
        row, stored = await kept.one(data_url(given, f"image/{pillow_format.lower()}"))
        assert (row.name, row.media_type) == (f"{JOB_ID}.png", "image/png")
        assert (row.width, row.height) == (61, 47)
        with Image.open(BytesIO(stored)) as found, Image.open(BytesIO(given)) as wanted:
            assert found.format == "PNG"
            assert found.convert("RGB").tobytes() == wanted.convert("RGB").tobytes()
            if options:
                assert found.tobytes() == noise().tobytes()

    @pytest.mark.parametrize("output_format", ["png", "webp", "jpg"])
    async def test_over_http_too(
        self, kept: Kept, double: ReplicateServer, output_format: str
    ) -> None:
        request = PredictionRequest(
            "acme/painter",
            {"prompt": "x", "width": 64, "height": 96, "output_format": output_format},
            60,
        )
        prediction = await kept.provider.create(request)
        row, stored = await kept.one(prediction.output)
        assert (row.media_type, row.width, row.height) == ("image/png", 64, 96)
        with Image.open(BytesIO(stored)) as picture:
            picture.load()
            assert (picture.format, picture.size) == ("PNG", (64, 96))

    async def test_of_the_mock_too(self, tmp_path: Path) -> None:
        provider = MockProvider(0, 0, 0)
        kept = new_keeper(provider, tmp_path)
        request = PredictionRequest("x/y", {"prompt": "p", "width": 96, "height": 64}, 60)
        row, _ = await kept.one((await provider.create(request)).output)
        assert (row.name, row.width, row.height) == (f"{JOB_ID}.png", 96, 64)

    async def test_one_that_we_make_tells_what_made_it(self, kept: Kept) -> None:
        words = "ünïcödé 🌅"
        job, attempt = new_job(), new_attempt({"seed": 7, "words": words, "steps": [1, None]})
        webp = data_url(encoded(noise(), "WEBP"), "image/webp")
        await kept.keeper.keep(job, attempt, succeeded(webp), nothing)
        with Image.open(kept.media / f"{JOB_ID}.png") as picture:
            assert json.loads(picture.info["parameters"]) == {
                "prompt": "a lighthouse",
                "model_name": "acme/painter",
                "seed": 7,
                "words": words,
                "steps": [1, None],
            }

    async def test_keeping_again_gives_the_same(self, kept: Kept) -> None:
        first = await kept.keep([PICTURE_URL, "text"])
        seen = kept.files()
        assert await kept.keep([PICTURE_URL, "text"]) == first
        assert kept.files() == seen


class TestOneColour:
    """What some models make instead of refusing: it is paid for and kept, and marked."""

    async def test_a_png_is_marked_and_keeps_every_byte(self, kept: Kept) -> None:
        given = encoded(Image.new("RGB", (300, 300)))
        row, stored = await kept.one(data_url(given))
        assert (row.content_policy_suspected, stored) == (True, given)
        [output] = kept.document()["outputs"]
        assert output["content_policy_suspected"] is True

    @pytest.mark.parametrize("pillow_format", ["JPEG", "WEBP", "GIF", "AVIF"])
    async def test_so_is_any_other(self, kept: Kept, pillow_format: str) -> None:
        colour = Image.new("RGB", (300, 300), (90, 90, 90))
        row, _ = await kept.one(data_url(encoded(colour, pillow_format)))
        assert row.content_policy_suspected

    async def test_one_pixel_makes_the_difference(self, kept: Kept) -> None:
        nearly = Image.new("RGB", (300, 300))
        nearly.putpixel((299, 299), (0, 0, 1))
        row, _ = await kept.one(data_url(encoded(nearly)))
        assert not row.content_policy_suspected

    async def test_in_its_own_format_too(self, provider: ReplicateProvider, tmp_path: Path) -> None:
        kept = new_keeper(provider, tmp_path, store_original_format=True)
        row, _ = await kept.one(data_url(encoded(Image.new("RGB", (300, 300)), "WEBP")))
        assert (row.media_type, row.content_policy_suspected) == ("image/webp", True)


class TestOriginalFormat:
    @pytest.fixture
    def kept(self, provider: ReplicateProvider, tmp_path: Path) -> Kept:
        return new_keeper(provider, tmp_path, store_original_format=True)

    @pytest.mark.parametrize(
        ("pillow_format", "extension"),
        [("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpg"), ("GIF", "gif"), ("AVIF", "avif")],
    )
    async def test_every_picture_keeps_its_bytes_and_its_name(
        self, kept: Kept, pillow_format: str, extension: str
    ) -> None:
        given = encoded(noise(), pillow_format)
        row, stored = await kept.one(data_url(given))
        assert stored == given
        media_type = f"image/{pillow_format.lower()}"
        assert (row.name, row.media_type) == (f"{JOB_ID}.{extension}", media_type)
        assert (row.width, row.height) == (61, 47)

    @pytest.mark.parametrize("pillow_format", ["PNG", "WEBP", "JPEG", "AVIF"])
    async def test_half_a_picture_is_refused_all_the_same(
        self, kept: Kept, pillow_format: str
    ) -> None:
        error = await kept.refuse(data_url(half(encoded(noise(), pillow_format))))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")


class TestMetadata:
    async def test_every_parameter_stands_at_the_top_beside_what_was_learned(
        self, kept: Kept
    ) -> None:
        parameters = {
            "width": 1024,
            "guidance_scale": 3.5,
            "scheduler": "K_EULER",
            "nested": {"a": [1, None]},
            "tokens": "ünïcödé 🌅",
        }
        job, attempt = new_job(parameters), new_attempt(parameters | {"seed": 7})
        [row] = await kept.keeper.keep(job, attempt, succeeded(PICTURE_URL), nothing)
        assert kept.document() == {
            **parameters,
            "seed": 7,
            "prompt": "a lighthouse",
            "model_name": "acme/painter",
            "parameters": parameters,
            "external_job_id": "p1",
            "created_at": "2026-01-02T03:04:05Z",
            "job_id": str(JOB_ID),
            "provider": "replicate",
            "model_version": "v1",
            "attempt": 1,
            "timings": {
                "job_started_at": "2026-01-02T03:04:05Z",
                "prediction_created_at": "2026-01-02T03:04:05Z",
                "prediction_started_at": "2026-01-02T03:04:05Z",
                "prediction_completed_at": "2026-01-02T03:04:05Z",
                "predict_time_seconds": 1.5,
            },
            "outputs": [
                {
                    "index": 0,
                    "name": f"{JOB_ID}.png",
                    "media_type": "image/png",
                    "size_bytes": len(PICTURE),
                    "sha256": row.sha256,
                    "width": 61,
                    "height": 47,
                    "duration_seconds": None,
                    "content_policy_suspected": False,
                }
            ],
        }

    async def test_a_parameter_never_hides_the_services_own_names(self, kept: Kept) -> None:
        parameters = {"job_id": "mine", "outputs": [], "created_at": "never", "provider": "me"}
        job, attempt = new_job(parameters), new_attempt(parameters)
        await kept.keeper.keep(job, attempt, succeeded(PICTURE_URL), nothing)
        document = kept.document()
        assert (document["job_id"], document["provider"]) == (str(JOB_ID), "replicate")
        assert document["created_at"] == "2026-01-02T03:04:05Z"
        assert len(document["outputs"]) == 1
        assert document["parameters"] == parameters

    async def test_it_is_readable_utf_8(self, kept: Kept) -> None:
        job, attempt = new_job(), new_attempt({"words": "ünïcödé 🌅"})
        await kept.keeper.keep(job, attempt, succeeded("x"), nothing)
        text = (kept.metadata / f"{JOB_ID}.json").read_text("utf-8")
        assert "ünïcödé 🌅" in text
        assert text.startswith("{\n  ")
        assert text.endswith("}\n")

    async def test_what_is_not_known_is_null(self, kept: Kept) -> None:
        bare = Prediction("p1", "succeeded", "acme/painter", {}, output="x")
        attempt = new_attempt()
        attempt.version = "v0"
        await kept.keeper.keep(new_job(), attempt, bare, nothing)
        document = kept.document()
        assert document["model_version"] == "v0"
        assert document["timings"]["prediction_started_at"] is None
        assert document["timings"]["predict_time_seconds"] is None


class TestOrder:
    async def test_media_come_first_the_document_last_each_after_asking(self, kept: Kept) -> None:
        seen: list[list[str]] = []

        async def checkpoint() -> None:
            seen.append(kept.files())

        await kept.keep([PICTURE_URL, "text"], checkpoint)
        first, second = f"{JOB_ID}.png", f"{JOB_ID}-1.txt"
        # Before the download and before the write of each output, and before the document.
        assert seen == [[], [], [first], [first], sorted([first, second])]
        assert kept.files() == sorted([first, second, f"{JOB_ID}.json"])

    @pytest.mark.parametrize(("asked", "visible"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)])
    @pytest.mark.parametrize(
        "error",
        # The database's own troubles are neither the download's nor the disk's.
        [LeaseLost(), TimeoutError("no connection"), ConnectionRefusedError(111, "x"), KeyError()],
        ids=lambda error: type(error).__name__,
    )
    async def test_when_the_checkpoint_fails_nothing_more_becomes_visible(
        self, kept: Kept, asked: int, visible: int, error: Exception
    ) -> None:
        answers = iter([None] * asked)

        async def checkpoint() -> None:
            if next(answers, error) is error:
                raise error

        with pytest.raises(type(error)) as caught:
            await kept.keep([PICTURE_URL, "text"], checkpoint)
        assert caught.value is error
        assert len(kept.files()) == visible
        assert not (kept.metadata / f"{JOB_ID}.json").exists()
        kept.assert_tidy()

    async def test_a_bad_second_output_leaves_the_job_without_a_document(self, kept: Kept) -> None:
        with pytest.raises(ProviderError):
            await kept.keep([PICTURE_URL, data_url(b"\x89PNG\r\n\x1a\nbroken")])
        assert kept.files() == [f"{JOB_ID}.png"]
        kept.assert_tidy()

    async def test_a_stopped_run_leaves_nothing(
        self, kept: Kept, double: ReplicateServer, provider: ReplicateProvider
    ) -> None:
        double.push_fault("download", "slow", bytes_per_second=1000)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        run = asyncio.create_task(kept.keep(prediction.output))
        while not list((kept.media / ".incoming").iterdir()):
            await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert kept.files() == []
        kept.assert_tidy()


class TestNothingToKeep:
    @pytest.mark.parametrize("output", [None, [], {}, [None], {"images": []}])
    async def test_no_output_is_final(self, kept: Kept, output: Any) -> None:
        error = await kept.refuse(output)
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "no_output")

    @pytest.mark.parametrize("kind", ["none", "empty"])
    async def test_of_the_double_too(
        self, kept: Kept, double: ReplicateServer, provider: ReplicateProvider, kind: str
    ) -> None:
        double.configure(output_kind=kind)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        assert (await kept.refuse(prediction.output)).code == "no_output"

    async def test_more_files_than_anyone_wants_are_refused_before_the_first(
        self, kept: Kept
    ) -> None:
        error = await kept.refuse([PICTURE_URL] * (MAX_OUTPUTS + 1))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")
        most = [PICTURE_URL, *["data:,1"] * (MAX_OUTPUTS - 1)]
        assert len(await kept.keep(most)) == MAX_OUTPUTS


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


class TestRefused:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"<!DOCTYPE html><html><body>Not an image</body></html>",
            half(PICTURE),
            PICTURE[:-12],
            half(encoded(noise(), "JPEG")),
            half(encoded(noise(), "WEBP")),
            b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(1000),
            b"\xff\xd8\xff" + random.Random(1).randbytes(1000),
            bomb(65_535, 65_535),
            bomb(13_370, 13_370),
            bomb(400, 251),
        ],
        ids=[
            "empty",
            "html",
            "half png",
            "png without end",
            "half jpeg",
            "half webp",
            "junk as png",
            "junk as jpeg",
            "bomb 65535",
            "bomb 13370",
            "one row too many",
        ],
    )
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    async def test_what_is_no_whole_picture_is_never_kept(self, kept: Kept, content: bytes) -> None:
        error = await kept.refuse(data_url(content))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")
        assert error.message

    async def test_an_empty_text_is_no_output_either(self, kept: Kept) -> None:
        assert (await kept.refuse("")).code == "invalid_output"

    async def test_more_bytes_than_allowed_are_refused(self, kept: Kept) -> None:
        error = await kept.refuse(data_url(bytes(MAX_BYTES + 1), "video/mp4"))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "output_too_large")
        assert (await kept.one(data_url(bytes(MAX_BYTES))))[0].size_bytes == MAX_BYTES

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "mock:x/0", "data:,"])
    async def test_an_address_that_leads_nowhere_is_refused(self, kept: Kept, url: str) -> None:
        assert (await kept.refuse(url)).failure_class is FailureClass.PERMANENT

    @pytest.mark.parametrize(
        ("kind", "fields", "failure_class", "code"),
        [
            ("html", {}, FailureClass.PERMANENT, "invalid_output"),
            ("empty", {}, FailureClass.PERMANENT, "invalid_output"),
            ("truncate", {}, FailureClass.PERMANENT, "invalid_output"),
            ("cut", {}, FailureClass.TRANSIENT, "download_failed"),
            ("flood", {}, FailureClass.PERMANENT, "output_too_large"),
            ("status", {"status": 404}, FailureClass.PERMANENT, "output_expired"),
            ("status", {"status": 500}, FailureClass.TRANSIENT, "download_failed"),
            ("status", {"status": 200, "body": {"a": 1}}, FailureClass.PERMANENT, "invalid_output"),
            ("drop", {}, FailureClass.TRANSIENT, "download_failed"),
        ],
    )
    async def test_whatever_the_host_serves_is_classified(
        self,
        kept: Kept,
        double: ReplicateServer,
        provider: ReplicateProvider,
        kind: str,
        fields: dict[str, Any],
        failure_class: FailureClass,
        code: str,
    ) -> None:
        double.push_fault("download", kind, times=None, **fields)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        error = await kept.refuse(prediction.output)
        assert (error.failure_class, error.code) == (failure_class, code)
        [create] = double.creates()
        doubted = kind in ("html", "empty", "truncate") or fields.get("status") in (200, 404)
        assert len(create.downloads) == (3 if doubted else 1)

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [("html", {}), ("empty", {}), ("truncate", {}), ("status", {"status": 404})],
    )
    async def test_a_bad_moment_of_the_host_is_waited_out(
        self,
        kept: Kept,
        double: ReplicateServer,
        provider: ReplicateProvider,
        kind: str,
        fields: dict[str, Any],
    ) -> None:
        double.push_fault("download", kind, times=2, **fields)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        await kept.one(prediction.output)

    async def test_the_name_promises_a_picture(
        self, kept: Kept, double: ReplicateServer, provider: ReplicateProvider
    ) -> None:
        video = base64.b64encode(b"\x00\x00\x00\x20ftypisom" + bytes(100)).decode()
        given = {"body_base64": video, "content_type": "image/png"}
        double.push_fault("download", "bytes", times=None, **given)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        assert (await kept.refuse(prediction.output)).code == "invalid_output"

    async def test_a_picture_of_another_format_keeps_the_promise(
        self, kept: Kept, double: ReplicateServer, provider: ReplicateProvider
    ) -> None:
        jpeg = base64.b64encode(encoded(noise(), "JPEG")).decode()
        double.push_fault("download", "bytes", body_base64=jpeg)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        assert (await kept.one(prediction.output))[0].media_type == "image/png"

    async def test_what_a_server_says_about_the_type_is_not_asked(
        self, kept: Kept, double: ReplicateServer, provider: ReplicateProvider
    ) -> None:
        double.push_fault("download", "wrong_content_type", content_type="text/html")
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        assert (await kept.one(prediction.output))[0].media_type == "image/png"


class TestBounds:
    async def test_a_trickle_ends_at_the_deadline(
        self, double: ReplicateServer, provider: ReplicateProvider, tmp_path: Path
    ) -> None:
        kept = new_keeper(provider, tmp_path, deadline_seconds=0.4)
        double.push_fault("download", "slow", bytes_per_second=10)
        prediction = await provider.create(PredictionRequest("x/y", {"prompt": "p"}, 60))
        began = time.monotonic()
        error = await kept.refuse(prediction.output)
        assert 0.3 < time.monotonic() - began < 2
        assert (error.failure_class, error.code) == (FailureClass.TRANSIENT, "download_failed")

    async def test_a_refused_download_is_closed_at_once(self, tmp_path: Path) -> None:
        """And not when the garbage collector comes by: the host may go on sending for ever."""
        closed: list[bool] = []

        class Endless(MockProvider):
            async def download(self, url: str) -> AsyncIterator[bytes]:
                try:
                    while True:
                        yield bytes(100_000)
                finally:
                    closed.append(True)

        kept = new_keeper(Endless(0, 0, 0), tmp_path)
        with pytest.raises(ProviderError) as caught:
            await kept.keep("https://files/x")
        assert closed == [True]
        assert caught.value.code == "output_too_large"

    @pytest.mark.parametrize("beginning", [b"<!DOCTYPE html>", b"no picture, whatever its name"])
    async def test_a_wrong_type_is_refused_by_its_beginning(
        self, tmp_path: Path, beginning: bytes
    ) -> None:
        sent: list[int] = []

        class Endless(MockProvider):
            async def download(self, url: str) -> AsyncIterator[bytes]:
                yield beginning
                while True:
                    sent.append(1)
                    yield bytes(1000)

        kept = new_keeper(Endless(0, 0, 0), tmp_path)
        assert (await kept.refuse("https://files/x.png")).code == "invalid_output"
        assert len(sent) == 3  # once at each try

    async def test_only_so_many_are_downloaded_at_once(self, tmp_path: Path) -> None:
        running: list[int] = []

        class Counting(MockProvider):
            async def download(self, url: str) -> AsyncIterator[bytes]:
                running.append(running[-1] + 1 if running else 1)
                await asyncio.sleep(0.01)
                yield PICTURE
                running.append(running[-1] - 1)

        kept = new_keeper(Counting(0, 0, 0), tmp_path, concurrency=3)
        jobs = [UUID(int=number) for number in range(9)]
        await asyncio.gather(
            *(kept.keep(["https://files/x", "https://files/y"], job_id=job) for job in jobs)
        )
        assert max(running) == 3
        assert len(running) == 2 * 18

    async def test_a_data_url_is_not_remembered(
        self, kept: Kept, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`urlsplit` keeps its last 128 arguments: of megabytes each, that is a leak."""
        split: list[str] = []
        monkeypatch.setattr("app.jobs.outputs.urlsplit", lambda url: split.append(url))
        await kept.keep(PICTURE_URL)
        assert split == []


class TestTooLargeToDecode:
    """It is paid for: it stays what it is."""

    @pytest.fixture
    def kept(self, provider: ReplicateProvider, tmp_path: Path) -> Kept:
        return new_keeper(provider, tmp_path, decode_memory_bytes=32 << 20, max_pixels=2600**2)

    @pytest.mark.parametrize(
        ("pillow_format", "extension"), [("JPEG", "jpg"), ("WEBP", "webp"), ("AVIF", "avif")]
    )
    async def test_it_keeps_its_bytes_and_its_format(
        self, kept: Kept, pillow_format: str, extension: str
    ) -> None:
        given = encoded(Image.new("RGB", (2600, 2600)), pillow_format)
        row, stored = await kept.one(data_url(given))
        assert stored == given
        assert row.name == f"{JOB_ID}.{extension}"
        assert (row.width, row.height) == (2600, 2600)

    async def test_without_its_end_it_is_refused(self, kept: Kept) -> None:
        given = encoded(Image.new("RGB", (2600, 2600)), "JPEG")
        assert (await kept.refuse(data_url(given[:-2]))).code == "invalid_output"
        assert kept.files() == []


class TestOurOwnDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A folder on a file system of 256 KiB."""
        folder = tmp_path / "small"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small file system takes root and `mount`")
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    @pytest.mark.parametrize(
        "output",
        [
            data_url(random.Random(1).randbytes(300_000), "video/mp4"),
            # 60 KiB as a JPEG: it fits until it becomes a PNG.
            data_url(encoded(noise(1, (330, 300)), "JPEG", quality=30), "image/jpeg"),
        ],
        ids=["download", "conversion"],
    )
    async def test_a_full_disk_is_not_the_outputs_fault(
        self, provider: ReplicateProvider, small_disk: Path, output: str
    ) -> None:
        kept = new_keeper(provider, small_disk)
        with pytest.raises(StorageError, match="No space left"):
            await kept.keep(output)
        assert kept.files() == []
        kept.assert_tidy()
        # What fits is still kept.
        await kept.one(PICTURE_URL)

    async def test_a_lost_workspace_is_a_storage_error(self, kept: Kept) -> None:
        shutil.rmtree(kept.media)
        for output in (PICTURE_URL, "text"):
            with pytest.raises(StorageError):
                await kept.keep(output)

    async def test_a_lost_metadata_folder_is_a_storage_error(self, kept: Kept) -> None:
        shutil.rmtree(kept.metadata)
        with pytest.raises(StorageError):
            await kept.keep(PICTURE_URL)
        assert kept.files() == [f"{JOB_ID}.png"]
        kept.assert_tidy()
