"""Pictures of one colour: each way to store one, and what differs in a single pixel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.media.arrival import Arrival
from app.media.errors import BadPicture
from app.media.png import PngCheck
from tests.unit.media.corpus import MAX_PIXELS, encoded, grey_png, ihdr, interlaced, noise

SIDE = 70
FILTERS = range(5)


def is_one_colour(path: Path, content: bytes, piece_bytes: int = 1000) -> bool:
    arrival = Arrival(path, PngCheck(MAX_PIXELS))
    try:
        for at in range(0, len(content), piece_bytes):
            arrival.write(content[at : at + piece_bytes])
        info = arrival.finish()
    finally:
        arrival.close()
    assert info is not None
    return info.is_one_colour


def filtered(rows: list[bytes], row_filter: int, pixel_bytes: int) -> Iterator[bytes]:
    """Yield the rows as this filter stores them: the definitions of the specification, by byte."""
    above = bytes(len(rows[0]))
    for row in rows:
        left, corner = bytes(pixel_bytes) + row, bytes(pixel_bytes) + above
        predicted = [_predict(row_filter, *at) for at in zip(left, above, corner, strict=False)]
        stored = [(x - p) % 256 for x, p in zip(row, predicted, strict=True)]
        yield bytes([row_filter, *stored])
        above = row


def _predict(row_filter: int, left: int, above: int, corner: int) -> int:
    estimate = left + above - corner
    nearest = min((left, above, corner), key=lambda value: abs(estimate - value))
    return [0, left, above, (left + above) // 2, nearest][row_filter]


def png(rows: list[bytes], row_filter: int, depth: int, colour: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    pixel_bytes = max(1, depth * channels // 8)
    width = len(rows[0]) * 8 // (depth * channels)
    stored = b"".join(filtered(rows, row_filter, pixel_bytes))
    return grey_png(stored, header=ihdr(width, len(rows), depth, colour))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize("row_filter", FILTERS)
@pytest.mark.parametrize(
    ("pixel", "depth", "colour"),
    [
        (bytes(3), 8, 2),
        (bytes([7, 130, 255]), 8, 2),
        (bytes([1, 2, 3, 254]), 8, 6),
        (bytes([255, 128]), 8, 4),
        (bytes([9]), 8, 0),
        (bytes([1, 0]), 16, 0),
        (bytes(range(1, 7)), 16, 2),
        (b"\x00", 1, 0),
        (b"\xff", 1, 0),
        (b"\xaa", 2, 0),
        (b"\x77", 4, 0),
    ],
)
def test_every_filter_of_every_pixel_is_known(
    path: Path, row_filter: int, pixel: bytes, depth: int, colour: int
) -> None:
    rows = [pixel * SIDE] * SIDE
    same = png(rows, row_filter, depth, colour)
    assert is_one_colour(path, same)
    assert is_one_colour(path, same, piece_bytes=7)
    for at in (0, 1, SIDE - 1):
        other = bytearray(rows[at])
        other[-1] ^= 1
        changed = [*rows[:at], bytes(other), *rows[at + 1 :]]
        assert not is_one_colour(path, png(changed, row_filter, depth, colour))


def test_every_row_may_have_a_filter_of_its_own(path: Path) -> None:
    rows = [bytes([7, 130, 255]) * SIDE] * SIDE
    stored = [list(filtered(rows, number, 3)) for number in FILTERS]
    mixed = b"".join(stored[at * 3 % 5][at] for at in range(SIDE))
    assert is_one_colour(path, grey_png(mixed, header=ihdr(SIDE, SIDE, 8, 2)))


@pytest.mark.parametrize(("byte", "depth"), [(0x80, 1), (0x1B, 2), (0x78, 4)])
def test_pixels_that_share_a_byte_may_differ(path: Path, byte: int, depth: int) -> None:
    assert not is_one_colour(path, png([bytes([byte] * SIDE)] * SIDE, 0, depth, 0))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_as_pillow_writes_them(path: Path, mode: str) -> None:
    assert is_one_colour(path, encoded(Image.new(mode, (640, 48)), "PNG"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_of_something_is_not_one(path: Path, mode: str) -> None:
    assert not is_one_colour(path, encoded(noise(mode, (200, 50)), "PNG"))


@pytest.mark.parametrize("size", [(300_000, 3), (1, 900_000)])
def test_nothing_is_said_of_endless_rows_nor_of_endlessly_many(
    path: Path, size: tuple[int, int]
) -> None:
    assert not is_one_colour(path, encoded(Image.new("L", size), "PNG"), 1 << 20)


def test_nothing_is_said_of_an_interlaced_one(path: Path) -> None:
    """Its rows have different lengths: not even where they begin is known."""
    black = interlaced(800, 16)
    assert not is_one_colour(path, black)
    assert not is_one_colour(path, interlaced(800, 16, value=255))


def test_an_unknown_filter_is_no_picture_as_ever(path: Path) -> None:
    with pytest.raises(BadPicture):
        is_one_colour(path, grey_png(bytes([5, *bytes(8)]) * 8))
