"""The contract of `Provider`.

class TestContract(ProviderContract):
    @pytest.fixture
    def provide(self) -> Provide:
        return lambda seconds=0, failing=False: MockProvider(seconds, seconds, float(failing))
"""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.base import Prediction, PredictionRequest, Provider, Sought
from app.providers.outcome import output_values, raise_for_outcome

# (seconds=0, failing=False): a provider whose predictions take so long, or always fail.
Provide = Callable[..., Provider]

MODEL = "black-forest-labs/flux-schnell"
INPUT = {"prompt": "a lighthouse at dawn", "width": 96, "height": 64, "seed": 7}
REQUEST = PredictionRequest(MODEL, INPUT, cancel_after_seconds=60)
SOUGHT = Sought(MODEL, INPUT)
LONG_SECONDS = 60


async def polled(provider: Provider, ids: list[str]) -> dict[str, Prediction | None]:
    """Return all that `poll` yields; each id once."""
    told = [each async for each in provider.poll(ids)]
    assert len(dict(told)) == len(told)
    return dict(told)


class ProviderContract:
    """Derive it, and give the fixture `provide`."""

    finds = True  # off: a create whose answer was lost was never made

    async def test_a_created_prediction_has_a_name_and_a_state(self, provide: Provide) -> None:
        prediction = await provide(LONG_SECONDS).create(REQUEST)
        assert prediction.id
        assert prediction.model_name == MODEL
        assert prediction.status in ("starting", "processing")
        assert not prediction.is_terminal
        assert (prediction.output, prediction.error, prediction.completed_at) == (None, None, None)

    async def test_it_ends_with_an_output_and_its_times(self, provide: Provide) -> None:
        began = datetime.now(UTC) - timedelta(seconds=1)
        prediction = await finished(provide(0.1), REQUEST)
        assert prediction.status == "succeeded"
        assert prediction.error is None
        assert prediction.created_at is not None
        assert prediction.started_at is not None
        assert prediction.completed_at is not None
        assert began <= prediction.created_at <= prediction.started_at <= prediction.completed_at
        assert prediction.predict_time_seconds is not None
        assert 0 <= prediction.predict_time_seconds <= 0.2
        raise_for_outcome(prediction)

    async def test_its_outputs_are_pictures_of_the_size_asked_for(self, provide: Provide) -> None:
        provider = provide()
        request = PredictionRequest(MODEL, {**INPUT, "num_outputs": 3}, 60)
        prediction = await finished(provider, request)
        files = [await fetched(provider, url) for url in output_values(prediction.output)]
        assert [picture_size(file) for file in files] == [(96, 64)] * 3
        assert len(set(files)) == 3

    async def test_an_output_can_be_downloaded_again(self, provide: Provide) -> None:
        provider = provide()
        [url] = output_values((await finished(provider, REQUEST)).output)
        assert await fetched(provider, url) == await fetched(provider, url)

    async def test_a_failed_prediction_says_why_and_has_no_output(self, provide: Provide) -> None:
        prediction = await finished(provide(failing=True), REQUEST)
        assert prediction.status == "failed"
        assert prediction.error
        assert prediction.output is None
        with pytest.raises(ProviderError):
            raise_for_outcome(prediction)

    async def test_every_create_is_a_prediction_of_its_own(self, provide: Provide) -> None:
        provider = provide()
        created = await asyncio.gather(*(provider.create(REQUEST) for _ in range(5)))
        assert len({prediction.id for prediction in created}) == 5

    async def test_a_create_that_is_called_off_is_not_made(self, provide: Provide) -> None:
        provider = provide(LONG_SECONDS)

        async def no() -> bool:
            return False

        async def unsure() -> bool:
            raise ConnectionError

        for may_send in (no, unsure):
            with pytest.raises((ProviderError, ConnectionError)) as caught:
                await provider.create(REQUEST, may_send)
            if isinstance(caught.value, ProviderError):
                assert caught.value.failure_class is FailureClass.INTERNAL
        assert await provider.find(SOUGHT, 1.0) == []

    async def test_a_create_that_may_be_sent_is_made_once(self, provide: Provide) -> None:
        asked = []

        async def yes() -> bool:
            asked.append(True)
            return True

        assert (await provide(LONG_SECONDS).create(REQUEST, yes)).id
        assert asked == [True]

    async def test_an_input_of_the_wrong_type_is_refused_for_good(self, provide: Provide) -> None:
        request = PredictionRequest(MODEL, {**INPUT, "width": "wide"}, 60)
        with pytest.raises(ProviderError) as caught:
            await provide().create(request)
        assert caught.value.failure_class is FailureClass.PERMANENT
        assert caught.value.code == "invalid_input"
        assert caught.value.message

    async def test_another_process_can_go_on_with_a_prediction(self, provide: Provide) -> None:
        created = await provide(LONG_SECONDS).create(REQUEST)
        seen = await provide(LONG_SECONDS).get(created.id)
        assert (seen.id, seen.model_name) == (created.id, MODEL)
        assert seen.created_at == created.created_at

    @pytest.mark.parametrize("prediction_id", ["nosuch", "mock-", "mock-bm9zdWNo", "x" * 26])
    async def test_an_unknown_prediction_is_not_found(
        self, provide: Provide, prediction_id: str
    ) -> None:
        with pytest.raises(PredictionNotFound):
            await provide().get(prediction_id)

    @pytest.mark.parametrize("count", [0, 1, 2, 30])
    async def test_poll_reads_many(self, provide: Provide, count: int) -> None:
        provider = provide()
        created = [await provider.create(REQUEST) for _ in range(count)]
        seen = await polled(provider, [prediction.id for prediction in created])
        assert seen.keys() == {prediction.id for prediction in created}
        for prediction_id, prediction in seen.items():
            assert prediction is not None
            assert prediction.id == prediction_id
            assert prediction.status == "succeeded"
            assert prediction.output

    async def test_poll_tells_an_unknown_prediction_from_the_others(self, provide: Provide) -> None:
        provider = provide()
        created = [await provider.create(REQUEST) for _ in range(3)]
        ids = [prediction.id for prediction in created]
        seen = await polled(provider, [*ids, "x" * 26])
        assert seen.pop("x" * 26) is None
        assert {prediction.id for prediction in seen.values() if prediction} == set(ids)

    async def test_find_returns_nothing_else_than_what_was_made(self, provide: Provide) -> None:
        provider, seconds = provide(), 60.0
        await provider.create(PredictionRequest(MODEL, {**INPUT, "seed": 8}, 60))
        assert await provider.find(SOUGHT, seconds) == []
        created = await provider.create(REQUEST)
        found = [seen.id for seen in await provider.find(SOUGHT, seconds)]
        assert found == ([created.id] if self.finds else [])

    async def test_cancel_ends_a_running_prediction(self, provide: Provide) -> None:
        provider = provide(LONG_SECONDS)
        created = await provider.create(REQUEST)
        await provider.cancel(created.id)
        seen = await provider.get(created.id)
        assert (seen.status, seen.output) == ("canceled", None)
        assert seen.is_terminal

    async def test_cancel_leaves_an_ended_prediction_alone(self, provide: Provide) -> None:
        provider = provide()
        ended = await finished(provider, REQUEST)
        await provider.cancel(ended.id)
        assert await provider.get(ended.id) == ended

    async def test_cancel_twice_is_no_error(self, provide: Provide) -> None:
        provider = provide(LONG_SECONDS)
        created = await provider.create(REQUEST)
        await provider.cancel(created.id)
        await provider.cancel(created.id)

    async def test_cancel_of_an_unknown_prediction_is_no_error(self, provide: Provide) -> None:
        await provide().cancel("nosuch")

    async def test_the_input_schema_stands_alone_and_judges_inputs(self, provide: Provide) -> None:
        schema = await provide().input_schema(MODEL)
        assert schema is not None
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema)
        assert validator.is_valid({**INPUT, "output_format": "png"})
        assert not validator.is_valid({**INPUT, "output_format": "bmp"})
        assert not validator.is_valid({**INPUT, "width": "wide"})
        assert not validator.is_valid({})

    @pytest.mark.parametrize(
        "url",
        ["", "x", "file:///etc/passwd", "ftp://localhost/x.png", "mock:nosuch/0", "https://"],
    )
    async def test_an_address_that_is_none_of_its_own_is_refused_for_good(
        self, provide: Provide, url: str
    ) -> None:
        with pytest.raises(ProviderError) as caught:
            await fetched(provide(), url)
        assert caught.value.failure_class is FailureClass.PERMANENT


async def finished(provider: Provider, request: PredictionRequest) -> Prediction:
    """Create a prediction and wait for its end."""
    prediction = await provider.create(request)
    give_up_at = time.monotonic() + 10
    while not prediction.is_terminal:
        assert time.monotonic() < give_up_at, prediction
        await asyncio.sleep(0.01)
        prediction = await provider.get(prediction.id)
    return prediction


async def fetched(provider: Provider, url: Any) -> bytes:
    """Download a file whole."""
    return b"".join([chunk async for chunk in provider.download(url)])


def picture_size(content: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(content)) as picture:
        picture.load()
        return picture.size
