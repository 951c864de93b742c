"""Conditional and range requests, as RFC 9110 (sections 13 and 14) has them. Pure."""

import re

_ENTITY_TAG = re.compile(r'(?:W/)?("[^"]*")')
_SINGLE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)


class RangeNotSatisfiable(Exception):
    """The asked range begins at or after the end of the file, or is empty."""


def is_match(header: str | None, etag: str) -> bool:
    """Tell whether `If-Match` allows the strong `etag`; if not, the answer is 412."""
    if header is None or header.strip() == "*":
        return True
    return any(found[0] == etag for found in _ENTITY_TAG.finditer(header))


def none_match(header: str | None, etag: str) -> bool:
    """Tell whether `If-None-Match` names the strong `etag`: the client's copy is good (304)."""
    if header is None:
        return False
    return header.strip() == "*" or etag in _ENTITY_TAG.findall(header)


def single_range(
    header: str | None, size: int, *, etag: str, if_range: str | None
) -> tuple[int, int] | None:
    """Return (start, length) of the one byte range asked for, or None for the whole file.

    Malformed and multiple ranges, and an `If-Range` that names another version (or a weak or
    dated one), are answered with the whole file. Raises: RangeNotSatisfiable.
    """
    asked = _SINGLE_RANGE.fullmatch(header.strip()) if header else None
    if asked is None or (if_range is not None and if_range.strip() != etag):
        return None
    first, last = asked.groups()
    if not first:
        return _suffix(int(last), size) if last else None
    if last and int(last) < int(first):
        return None
    return _between(int(first), int(last) if last else size - 1, size)


def _between(first: int, last: int, size: int) -> tuple[int, int]:
    if first >= size:
        raise RangeNotSatisfiable
    return first, min(last, size - 1) - first + 1


def _suffix(length: int, size: int) -> tuple[int, int]:
    if length == 0 or size == 0:
        raise RangeNotSatisfiable
    length = min(length, size)
    return size - length, length
