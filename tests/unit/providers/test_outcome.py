"""What an ended prediction means: what is worth another paid attempt, and what is an output."""

import time
from typing import Any

import pytest

from app.errors import FailureClass, ProviderError
from app.providers.base import TERMINAL_STATES, Prediction
from app.providers.outcome import MESSAGE_CHARS, output_values, raise_for_outcome

URL, DATA = "https://files/x.png", "data:image/png;base64,iVBORw0K"
FOUND = {"files": [URL, DATA], "found": [{"box": [1, 2, 3, 4], "label": "cat"}] * 3}


def ended(
    status: str, error: str | None = None, output: Any = None, *, data_removed: bool = False
) -> Prediction:
    return Prediction(
        id="p1",
        status=status,
        model_name="acme/painter",
        input={},
        error=error,
        output=output,
        data_removed=data_removed,
    )


def outcome(prediction: Prediction) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        raise_for_outcome(prediction)
    return caught.value


class TestRaiseForOutcome:
    @pytest.mark.parametrize("output", ["https://files/x.png", ["a", "b"], {"a": 1}, [], None])
    def test_success_is_no_error_whatever_it_made(self, output: Any) -> None:
        raise_for_outcome(ended("succeeded", output=output))

    def test_an_output_deleted_by_the_provider_has_expired(self) -> None:
        error = outcome(ended("succeeded", data_removed=True))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "output_expired")

    def test_data_removed_with_the_output_still_there_is_a_success(self) -> None:
        raise_for_outcome(ended("succeeded", output="https://files/x.png", data_removed=True))

    @pytest.mark.parametrize(
        ("status", "said", "failure_class", "code"),
        [
            # Not started: nothing was computed, nothing billed.
            ("aborted", None, FailureClass.TRANSIENT, "prediction_aborted"),
            # Its own deadline, or somebody's hand: doing it again would end the same way.
            ("canceled", None, FailureClass.PERMANENT, "prediction_canceled"),
            ("failed", "E1000", FailureClass.TRANSIENT, "prediction_failed"),
            ("failed", "Prediction failed (E1000).", FailureClass.TRANSIENT, "prediction_failed"),
            ("failed", "E6716: timeout starting", FailureClass.TRANSIENT, "prediction_failed"),
            ("failed", "CUDA out of memory. Tried", FailureClass.PERMANENT, "out_of_memory"),
            ("failed", "E1001", FailureClass.PERMANENT, "out_of_memory"),
            ("failed", "NSFW content detected", FailureClass.PERMANENT, "content_policy"),
            ("failed", "flagged as sensitive (E005)", FailureClass.PERMANENT, "content_policy"),
            ("failed", "The input or output was flagged", FailureClass.PERMANENT, "content_policy"),
            ("failed", "violates our Content Policy", FailureClass.PERMANENT, "content_policy"),
            ("failed", "E005", FailureClass.PERMANENT, "content_policy"),
            ("failed", "width must be positive", FailureClass.PERMANENT, "prediction_failed"),
            ("failed", "E10001 is no E1000x", FailureClass.PERMANENT, "prediction_failed"),
            ("failed", "E0051", FailureClass.PERMANENT, "prediction_failed"),
            ("failed", None, FailureClass.PERMANENT, "prediction_failed"),
            ("failed", "", FailureClass.PERMANENT, "prediction_failed"),
        ],
    )
    def test_every_other_end_is_classified(
        self, status: str, said: str | None, failure_class: FailureClass, code: str
    ) -> None:
        error = outcome(ended(status, said))
        assert (error.failure_class, error.code) == (failure_class, code)
        assert error.message

    def test_moderation_wins_over_a_fault_of_the_platform(self) -> None:
        assert outcome(ended("failed", "E1000: NSFW")).failure_class is FailureClass.PERMANENT

    def test_the_models_own_words_reach_the_client_shortened(self) -> None:
        error = outcome(ended("failed", "x" * 10_000))
        assert error.message == "x" * MESSAGE_CHARS

    def test_no_terminal_state_but_success_passes(self) -> None:
        states = TERMINAL_STATES - {"succeeded"}
        assert states == {"failed", "canceled", "aborted"}
        for status in states:
            outcome(ended(status))


@pytest.mark.parametrize("status", ["starting", "processing", "queued", "SUCCEEDED", ""])
def test_a_state_that_is_not_known_is_not_terminal(status: str) -> None:
    assert not ended(status).is_terminal


@pytest.mark.parametrize("status", sorted(TERMINAL_STATES))
def test_terminal_states_are(status: str) -> None:
    assert ended(status).is_terminal


def test_a_long_text_costs_no_more_than_its_length() -> None:
    began = time.process_time()
    host = "https://" + "a" * 1_000_000
    for text in (f"{host} x", "data:" + ";base64" * 200_000, "https:" * 200_000):
        assert output_values(["a", text, "b"]) == [f"a{text}b"]
    assert time.process_time() - began < 5  # seconds; what is quadratic takes hours


@pytest.mark.parametrize(
    ("output", "values"),
    [
        (None, []),
        ([], []),
        ({}, []),
        ([None, [None]], []),
        ("https://files/x.png", ["https://files/x.png"]),
        (["a", "b"], ["ab"]),
        ([URL, URL, "a"], [URL, URL, "a"]),
        ([URL, "a"], [URL, "a"]),
        ([URL, "a cat", "a hat"], [URL, "a cat", "a hat"]),
        # A language model may speak of addresses.
        (["see ", URL, " first"], [f"see {URL} first"]),
        (["see ", "https: is a scheme"], ["see https: is a scheme"]),
        (f"{URL} is a good page", [f"{URL} is a good page"]),
        *((text, [text]) for text in ("https:", "https://", "http:// ", "data:", "data: a, b")),
        ({"images": [URL, DATA], "seed": 7}, [URL, DATA, 7]),
        ([[URL], {"x": {"y": DATA}}, "c", None], [URL, DATA, "c"]),
        ([None, "a"], ["a"]),
        ({"image": URL, "text": ""}, [URL]),
        ([URL, ""], [URL]),
        ({"image": URL, "words": [""] * 20}, [URL]),
        (FOUND, [URL, DATA, FOUND]),
        ({"caption": "a cat", "score": 0.5}, [{"caption": "a cat", "score": 0.5}]),
        ([0.1, 0.2, 0.3], [[0.1, 0.2, 0.3]]),
        ([{"label": "cat"}, {"label": "dog"}], [[{"label": "cat"}, {"label": "dog"}]]),
        (0, [0]),
        (False, [False]),
        ("", [""]),
        (1.5, [1.5]),
    ],
)
def test_output_values_are_files_texts_or_one_document(output: Any, values: list[Any]) -> None:
    assert output_values(output) == values
