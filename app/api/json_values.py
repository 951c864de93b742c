"""What a client's JSON must be, to be stored in PostgreSQL and sent on unchanged."""

import math
from typing import Any

from pydantic_core import from_json

MAX_DEPTH = 32
MAX_VALUES = 10_000
INTEGERS = range(-(2**63), 2**64)


def check_text(text: str) -> str:
    """Return the text. Raises: ValueError - it holds what PostgreSQL cannot store."""
    if "\x00" in text:
        raise ValueError("must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


def parse_object(value: Any) -> Any:
    """Return the object that a string holds, `{}` for null, anything else as it is.

    Raises: ValueError - a string that is not JSON.
    """
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    try:
        parsed = from_json(check_text(value), allow_inf_nan=False)
    except ValueError:
        raise ValueError("must be a JSON object, or a string holding one") from None
    return {} if parsed is None else parsed


def check_storable(root: dict[str, Any]) -> dict[str, Any]:
    """Return the object. Raises: ValueError - too large, too deep, or not plain finite JSON."""
    pending: list[tuple[Any, int]] = [(root, 1)]
    seen = 1
    while pending:
        value, depth = pending.pop()
        if not isinstance(value, dict | list):
            _check_scalar(value)
            continue
        seen += len(value)
        if depth > MAX_DEPTH:
            raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
        if seen > MAX_VALUES:
            raise ValueError(f"must hold at most {MAX_VALUES} values")
        pending.extend((child, depth + 1) for child in _children(value))
    return root


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    if isinstance(value, list):
        return value
    for name in value:
        check_text(name)
    return list(value.values())


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must hold finite numbers only")
    elif isinstance(value, int) and value not in INTEGERS:
        raise ValueError("must hold integers of at most 64 bits")
