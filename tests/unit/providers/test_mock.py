"""The mock provider: beside the contract, its states over time, failures, and ids that tell all."""

import random
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers import mock
from app.providers.base import Prediction, PredictionRequest, Provider
from app.providers.mock import MockProvider
from app.providers.outcome import output_values, raise_for_outcome
from tests.contracts.provider import Provide, ProviderContract, fetched

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)


class TestContract(ProviderContract):
    finds = False

    @pytest.fixture
    def provide(self) -> Provide:
        def provide(seconds: float = 0, failing: bool = False) -> Provider:
            return MockProvider(seconds, seconds, float(failing))

        return provide


class Clock:
    """Stands in for `datetime` in the mock's module: time passes when the test says so."""

    def __init__(self) -> None:
        self.at = EPOCH

    def now(self, zone: Any) -> datetime:
        return self.at.astimezone(zone)

    def fromtimestamp(self, seconds: float, zone: Any) -> datetime:
        return datetime.fromtimestamp(seconds, zone)

    def set(self, seconds: float) -> None:
        self.at = EPOCH + timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(mock, "datetime", clock)
    return clock


@pytest.fixture
def _seeded() -> None:
    random.seed(20_260_101)


def request(**inputs: Any) -> PredictionRequest:
    return PredictionRequest("acme/painter", {"prompt": "a lighthouse"} | inputs, 60)


async def failures(rate: float, count: int) -> list[Prediction]:
    provider = MockProvider(0, 0, rate)
    created = [await provider.create(request()) for _ in range(count)]
    return [prediction for prediction in created if prediction.status == "failed"]


class TestTime:
    async def test_a_prediction_starts_runs_and_ends_as_its_delay_says(self, clock: Clock) -> None:
        provider = MockProvider(10, 10, 0)
        id_ = (await provider.create(request())).id
        # A fifth of the delay is the cold start.
        expected = [(0, "starting"), (1.9, "starting"), (2, "processing"), (9.9, "processing")]
        for seconds, status in [*expected, (10, "succeeded"), (10**6, "succeeded")]:
            clock.set(seconds)
            assert (await provider.get(id_)).status == status

    async def test_times_are_those_of_the_delay_however_late_one_looks(self, clock: Clock) -> None:
        provider = MockProvider(10, 10, 0)
        id_ = (await provider.create(request())).id
        clock.set(500)
        seen = await provider.get(id_)
        assert seen.created_at == EPOCH
        assert seen.started_at == EPOCH + timedelta(seconds=2)
        assert seen.completed_at == EPOCH + timedelta(seconds=10)
        assert seen.predict_time_seconds == 8

    async def test_nothing_is_known_before_its_time(self, clock: Clock) -> None:
        provider = MockProvider(10, 10, 1)
        created = await provider.create(request())
        assert (created.started_at, created.completed_at, created.error) == (None, None, None)
        clock.set(5)
        running = await provider.get(created.id)
        assert running.started_at is not None
        assert (running.completed_at, running.error, running.output) == (None, None, None)

    @pytest.mark.usefixtures("_seeded")
    async def test_delays_lie_between_the_two_bounds(self, clock: Clock) -> None:
        provider = MockProvider(2, 4, 0)
        created = [await provider.create(request()) for _ in range(200)]
        clock.set(10)
        ends = []
        for prediction in created:
            completed_at = (await provider.get(prediction.id)).completed_at
            assert completed_at is not None
            ends.append((completed_at - EPOCH).total_seconds())
        assert 2 <= min(ends) < 2.2
        assert 3.8 < max(ends) <= 4

    async def test_a_finished_prediction_stays_finished_when_it_is_canceled_later(
        self, clock: Clock
    ) -> None:
        provider = MockProvider(10, 10, 0)
        id_ = (await provider.create(request())).id
        clock.set(10)
        ended = await provider.get(id_)
        await provider.cancel(id_)
        assert await provider.get(id_) == ended

    async def test_a_canceled_prediction_never_finishes(self, clock: Clock) -> None:
        provider = MockProvider(10, 10, 0)
        id_ = (await provider.create(request())).id
        clock.set(5)
        await provider.cancel(id_)
        clock.set(50)
        assert (await provider.get(id_)).status == "canceled"


class TestFailures:
    async def test_none_at_a_rate_of_zero_and_all_at_one(self) -> None:
        assert await failures(0, 100) == []
        assert len(await failures(1, 100)) == 100

    @pytest.mark.usefixtures("_seeded")
    async def test_as_many_as_the_rate_says_four_in_five_worth_another_attempt(self) -> None:
        failed = await failures(0.3, 1000)
        assert len(failed) == pytest.approx(300, abs=50)
        transient = [found for found in failed if failure_class(found) is FailureClass.TRANSIENT]
        assert len(transient) / len(failed) == pytest.approx(0.8, abs=0.08)

    @pytest.mark.usefixtures("_seeded")
    async def test_they_are_transient_or_moderation(self) -> None:
        found = {(failure_class(failed), code(failed)) for failed in await failures(1, 100)}
        assert found == {
            (FailureClass.TRANSIENT, "prediction_failed"),
            (FailureClass.PERMANENT, "content_policy"),
        }


def outcome(prediction: Prediction) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        raise_for_outcome(prediction)
    return caught.value


def failure_class(prediction: Prediction) -> FailureClass:
    return outcome(prediction).failure_class


def code(prediction: Prediction) -> str:
    return outcome(prediction).code


class TestInput:
    async def test_without_a_size_it_is_the_models_default(self) -> None:
        provider = MockProvider(0, 0, 0)
        [url] = output_values((await provider.create(request())).output)
        with Image.open(BytesIO(await fetched(provider, url))) as picture:
            assert picture.size == (1024, 1024)

    async def test_the_picture_carries_the_prompt_and_the_seed(self) -> None:
        provider = MockProvider(0, 0, 0)
        prediction = await provider.create(request(seed=41, width=64, height=64, num_outputs=2))
        files = [await fetched(provider, url) for url in output_values(prediction.output)]
        found = []
        for file in files:
            with Image.open(BytesIO(file)) as picture:
                found.append((picture.info["prompt"], picture.info["seed"]))
        assert found == [("a lighthouse", "41"), ("a lighthouse", "42")]

    async def test_the_same_prompt_and_seed_are_the_same_picture_and_another_seed_is_not(
        self,
    ) -> None:
        provider = MockProvider(0, 0, 0)
        files = []
        for seed in (7, 7, 8):
            prediction = await provider.create(request(seed=seed, width=64, height=64))
            [url] = output_values(prediction.output)
            files.append(await fetched(provider, url))
        assert files[0] == files[1]
        assert files[0] != files[2]

    async def test_without_a_seed_every_picture_is_another(self) -> None:
        provider = MockProvider(0, 0, 0)
        seeds = {(await provider.create(request())).input["seed"] for _ in range(20)}
        assert len(seeds) == 20

    @pytest.mark.parametrize("value", [1.5, "64", True, [64], {}, float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["width", "height", "num_outputs", "seed"])
    async def test_what_is_no_whole_number_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(ProviderError) as caught:
            await MockProvider(0, 0, 0).create(request(**{name: value}))
        assert caught.value.failure_class is FailureClass.PERMANENT
        assert caught.value.code == "invalid_input"

    async def test_a_whole_number_may_be_written_with_a_point(self) -> None:
        """As JSON Schema has it: its `integer` takes 64.0."""
        provider = MockProvider(0, 0, 0)
        prediction = await provider.create(request(width=64.0, height=32.0, num_outputs=1.0))
        [url] = output_values(prediction.output)
        with Image.open(BytesIO(await fetched(provider, url))) as picture:
            assert picture.size == (64, 32)

    async def test_unknown_inputs_are_ignored(self) -> None:
        created = await MockProvider(0, 0, 0).create(request(nonsense={"deep": [1, None]}))
        assert created.status == "succeeded"


class TestWithoutAService:
    async def test_a_create_is_always_admitted(self) -> None:
        await MockProvider(0, 0, 0).admit()

    async def test_nothing_is_reported_so_there_is_no_secret(self) -> None:
        with pytest.raises(ProviderError) as caught:
            await MockProvider(0, 0, 0).webhook_secret()
        assert caught.value.failure_class is FailureClass.PERMANENT


class TestId:
    @pytest.mark.parametrize("prompt", ["", "a", "ünïcödé 灯台 🌅", "'\"\\\n\t", "x" * 10_000])
    async def test_it_tells_everything_to_a_process_that_never_saw_the_create(
        self, prompt: str
    ) -> None:
        given = request(prompt=prompt, width=64, height=64, num_outputs=2)
        created = await MockProvider(0, 0, 0).create(given)
        other = MockProvider(60, 60, 1)
        assert await other.get(created.id) == created
        for url in output_values(created.output):
            assert await fetched(other, url)

    async def test_it_is_safe_in_an_address_and_of_bounded_length(self) -> None:
        # Nothing of this can be compressed.
        prompt = "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x9FFF), k=10_000)))
        created = await MockProvider(0, 0, 1).create(request(prompt=prompt))
        assert created.id.startswith("mock-")
        assert created.id.replace("-", "").replace("_", "").isalnum()
        assert len(created.id) < 1500

    async def test_one_that_was_tampered_with_is_unknown(self) -> None:
        created = await MockProvider(0, 0, 0).create(request())
        for broken in (created.id[:-4], created.id[:20], created.id + "AAAA!", "mock-eJw"):
            with pytest.raises(PredictionNotFound):
                await MockProvider(0, 0, 0).get(broken)
