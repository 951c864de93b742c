"""If-None-Match, Range and If-Range."""

import pytest

from app.api.conditions import RangeNotSatisfiable, none_match, single_range

ETAG = '"abc"'


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        (None, False),
        ("", False),
        ('"abc"', True),
        ('W/"abc"', True),
        ('"x", "abc"', True),
        ('"x","y"', False),
        ("*", True),
        (" * ", True),
        ("abc", False),
        ('"ab', False),
        ('"abcd"', False),
        ('"a, "abc"', False),  # the first tag is `"a, "`
        ('"a,b", "abc"', True),
    ],
)
def test_none_match(header: str | None, matches: bool) -> None:
    assert none_match(header, ETAG) is matches


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, None),
        ("", None),
        ("bytes=0-9", (0, 10)),
        ("Bytes=0-9", (0, 10)),
        (" bytes=0-9 ", (0, 10)),
        ("bytes=5-", (5, 5)),
        ("bytes=5-5", (5, 1)),
        ("bytes=9-99", (9, 1)),
        ("bytes=-3", (7, 3)),
        ("bytes=-99", (0, 10)),
        ("bytes=6-5", None),
        ("bytes=60-50", None),
        ("bytes=0-1,3-4", None),
        ("bytes=-", None),
        ("bytes=", None),
        ("bytes=a-b", None),
        ("bytes=0-1x", None),
        ("bytes=\u0660-\u0661", None),
        ("items=0-1", None),
        ("bytes=-1-2", None),
        ("bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_single_range_of_ten_bytes(header: str | None, span: tuple[int, int] | None) -> None:
    assert single_range(header, 10, etag=ETAG, if_range=None) == span


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-12", "bytes=-0", "bytes=99999999-"])
def test_ranges_outside(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        single_range(header, 10, etag=ETAG, if_range=None)


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-1"])
def test_an_empty_file_has_no_ranges(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        single_range(header, 0, etag=ETAG, if_range=None)


@pytest.mark.parametrize(
    ("if_range", "honoured"),
    [('"abc"', True), (' "abc" ', True), ('W/"abc"', False), ('"x"', False), ("yesterday", False)],
)
def test_if_range_must_be_the_same_strong_tag(if_range: str, honoured: bool) -> None:
    span = single_range("bytes=0-1", 10, etag=ETAG, if_range=if_range)
    assert span == ((0, 2) if honoured else None)


def test_another_version_is_sent_whole_even_when_the_range_lies_outside() -> None:
    assert single_range("bytes=50-", 10, etag=ETAG, if_range='"old"') is None
