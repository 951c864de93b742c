"""Prediction objects with whatever in them."""

from typing import Any

import pytest

from app.providers.base import Prediction, Sought
from app.providers.replicate.answers import read_prediction

BODY = {"id": "p1", "status": "succeeded"}
HASH = "5" * 64


@pytest.mark.parametrize(
    "body",
    [
        *(None, 7, "p1", [], {}, {"id": "p1"}, {"status": "succeeded"}),
        *({**BODY, "id": None}, {**BODY, "id": ""}, {**BODY, "id": 5}, {**BODY, "status": None}),
        *({**BODY, "id": "a\0b"}, {**BODY, "id": "\ud800"}),
    ],
)
def test_what_is_no_prediction(body: Any) -> None:
    with pytest.raises(ValueError, match="not a prediction"):
        read_prediction(body)


@pytest.mark.parametrize("version", [5, None, [], {"id": "x"}, True])
def test_a_version_that_is_no_text_is_none(version: Any) -> None:
    assert read_prediction({**BODY, "version": version}).version is None


@pytest.mark.parametrize(
    ("seconds", "read"),
    [(1.5, 1.5), (0, 0), (-1, None), (10**400, None), (float("inf"), None), ("2", None)],
)
def test_a_time_that_makes_no_sense_is_none(seconds: Any, read: float | None) -> None:
    metrics = {"predict_time": seconds}
    assert read_prediction({**BODY, "metrics": metrics}).predict_time_seconds == read


@pytest.mark.parametrize("metrics", [None, 5, [1], {}])
def test_metrics_that_are_none(metrics: Any) -> None:
    assert read_prediction({**BODY, "metrics": metrics}).predict_time_seconds is None


@pytest.mark.parametrize(
    ("asked", "model", "version", "is_it"),
    [
        ("a/b", "a/b", HASH, True),
        ("a/b", "a/c", None, False),
        (f"a/b:{HASH}", "a/b", HASH, True),
        (f"a/b:{HASH}", "a/b", "6" * 64, False),
        # Replicate does not always say which version it was.
        *((f"a/b:{HASH}", "a/b", version, True) for version in ("hidden", "d-123", "dp-1", None)),
        (f"a/b:{HASH}", "a/c", "hidden", False),
    ],
)
def test_of_which_model(asked: str, model: str, version: str | None, is_it: bool) -> None:
    seen = Prediction("p1", "starting", model, {}, version=version)
    assert Sought(asked, {}).is_of_model(seen) is is_it
    assert Sought(asked, {}, has_own_seed=True).is_of_model(seen)


FILE, ADDRESS = "data:image/png;base64,AA==", "https://replicate.delivery/x"


@pytest.mark.parametrize(
    ("sent", "shown", "it_may_be"),
    [
        ({"n": 1}, {"n": 1}, True),
        ({"n": 1}, {"n": 2}, False),
        ({"n": 1}, {"n": 1, "more": 0}, False),
        ({"n": 1, "image": FILE}, {"n": 1, "image": ADDRESS}, True),
        ({"n": 1, "image": [FILE]}, {"n": 1, "image": [ADDRESS]}, True),
        ({"n": 1, "image": FILE}, {"n": 2, "image": ADDRESS}, False),
        ({"n": 1, "image": ADDRESS}, {"n": 1, "image": f"{ADDRESS}y"}, False),
    ],
)
def test_of_which_input(sent: dict[str, Any], shown: dict[str, Any], it_may_be: bool) -> None:
    seen = Prediction("p1", "starting", "a/b", shown)
    sought = Sought("a/b", sent)
    assert sought.may_be(seen) is it_may_be
    assert sought.is_surely(seen) is (sent == shown)


@pytest.mark.parametrize(("name", "it_is"), [("n", True), ("prompt", False), ("seed", False)])
def test_with_a_seed_of_its_own_the_rest_may_be_shown_otherwise(name: str, it_is: bool) -> None:
    sent = {"prompt": "p", "seed": 7, "n": 1}
    seen = Prediction("p1", "starting", "a/b", {**sent, name: "x", "more": 0})
    assert Sought("a/b", sent, has_own_seed=True).may_be(seen) is it_is


@pytest.mark.parametrize("given", [None, [1], "text", 5])
def test_an_input_that_is_none_is_empty(given: Any) -> None:
    assert read_prediction({**BODY, "input": given}).input == {}
