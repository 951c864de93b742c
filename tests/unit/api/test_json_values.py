"""What may be stored."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.json_values import check_storable, check_text, parse_object

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
)
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner), max_leaves=20
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abc"), PLAIN, max_size=3))
def test_plain_json_passes_unchanged(value: dict[str, Any]) -> None:
    before = json.dumps(value)
    assert check_storable(value) is value
    assert json.dumps(value) == before


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"a": "\x00"}, "NUL"),
        ({"\x00": 1}, "NUL"),
        ({"a": [{"b\x00": 1}]}, "NUL"),
        ({"a": "\ud800"}, "surrogates"),
        ({"\udfff": 1}, "surrogates"),
        ({"a": float("nan")}, "finite"),
        ({"a": [float("inf")]}, "finite"),
        ({"a": 2**64}, "64 bits"),
        ({"a": -(2**63) - 1}, "64 bits"),
        ({"a": nested(32)}, "deeper"),
        ({"a": [0] * 10_000}, "at most"),
        ({str(n): 0 for n in range(10_001)}, "at most"),
    ],
)
def test_what_cannot_be_stored_is_refused(value: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_storable(value)


@pytest.mark.parametrize(
    "value", [{"a": nested(31)}, {"a": [0] * 9_000}, {"a": 2**64 - 1}, {"a": True}]
)
def test_the_limits_themselves_pass(value: dict[str, Any]) -> None:
    check_storable(value)


@pytest.mark.parametrize(
    ("given_value", "parsed"),
    [
        (None, {}),
        ("null", {}),
        (' {"a": {"b": [1]}} ', {"a": {"b": [1]}}),
        ({"a": 1}, {"a": 1}),
        ([1], [1]),
        ("[1]", [1]),
        (5, 5),
    ],
)
def test_parse_object(given_value: Any, parsed: Any) -> None:
    assert parse_object(given_value) == parsed


@pytest.mark.parametrize(
    "text", ["", "{", "a=b", '{"a": NaN}', "[" * 100_000, "9" * 5000, "\ud800", "\x00"]
)
def test_parse_object_refuses_what_is_not_json(text: str) -> None:
    with pytest.raises(ValueError, match="must be a JSON object, or a string holding one"):
        parse_object(text)


def test_check_text_returns_the_text() -> None:
    assert check_text("é🦊\n") == "é🦊\n"
