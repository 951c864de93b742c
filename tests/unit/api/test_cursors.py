"""Page cursors."""

import base64
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.cursors import decode_cursor, encode_cursor

INSTANTS = st.datetimes(
    min_value=datetime(1970, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
    timezones=st.just(UTC),
)


@settings(deadline=None)
@given(INSTANTS, st.uuids())
def test_decode_returns_what_was_encoded_to_the_microsecond(instant: datetime, id_: UUID) -> None:
    cursor = encode_cursor(instant, id_)
    assert len(cursor) == 32
    assert decode_cursor(cursor) == (instant, id_)


@settings(deadline=None)
@given(st.text())
def test_garbage_is_a_value_error_and_nothing_else(text: str) -> None:
    try:
        instant, id_ = decode_cursor(text)
    except ValueError:
        return  # any other exception fails the test
    assert encode_cursor(instant, id_) == text


@pytest.mark.parametrize("number", [b"\x7f" * 8, b"\x80" + b"\x00" * 7])
def test_instants_out_of_range(number: bytes) -> None:
    with pytest.raises(ValueError, match="cursor"):
        decode_cursor(base64.urlsafe_b64encode(number + b"\x00" * 16).decode())
