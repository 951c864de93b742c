"""PNG: whole or refused, without building a pixel.

Source of the layout: the PNG specification (w3.org/TR/png-3), sections 5 and 7 to 11.
"""

import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

from app.media.colour import OneColourCheck
from app.media.errors import BadPicture
from app.media.info import PictureInfo

T = TypeVar("T")

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What is held in memory at a time, of the file and of its rows.
PIECE_BYTES = 1 << 18
# A file of 100 MB may hold eight million empty chunks: half a minute of walking.
MAX_CHUNKS = 100_000

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PALETTE_COLOUR = 3
_CRITICAL = (b"PLTE", b"IDAT", b"IEND")
_FILTERS = bytes(range(5))
# Adam7: first column and row of each pass, and the steps to the next.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


class PngCheck:
    """Checks a PNG while it arrives: every chunk and every row, without building a pixel.

    About 10 ms of CPU time for a megapixel, a third of a full decode; whatever the size of the
    picture in a few hundred kilobytes of memory.
    """

    def __init__(self, max_pixels: int) -> None:
        self._walk = _walk(max_pixels)
        self._wanted_bytes = next(self._walk)
        self._held = b""
        self._info: PictureInfo | None = None
        self.size_bytes = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the file. Raises: BadPicture."""
        held = memoryview(self._held + data)
        while self._info is None and len(held) >= self._wanted_bytes:
            piece, held = held[: self._wanted_bytes], held[self._wanted_bytes :]
            self.size_bytes += len(piece)
            try:
                self._wanted_bytes = self._walk.send(bytes(piece))
            except StopIteration as end:
                self._info = end.value
        self._held = b"" if self._info else bytes(held)

    def finish(self) -> PictureInfo:
        """Return what the picture is; `size_bytes` is where it ends in what was fed.

        What followed is nobody's business. Raises: BadPicture - the picture is not whole.
        """
        if self._info is None:
            raise BadPicture
        return self._info


# What is under way says how many bytes it needs next, and is given them.
_Walk = Generator[int, bytes, T]


def _walk(max_pixels: int) -> _Walk[PictureInfo]:
    if (yield len(SIGNATURE)) != SIGNATURE:
        raise BadPicture
    header = yield from _first_chunk()
    if header.width * header.height > max_pixels:
        raise BadPicture("The picture has too many pixels.")
    rows = _Rows(header)
    order = _Order(needs_palette=header.colour == _PALETTE_COLOUR)
    kind = b"IHDR"
    while kind != b"IEND":
        kind, length = yield from _chunk_head()
        order.admit(kind)
        yield from _chunk_body(kind, length, rows.feed if kind == b"IDAT" else _ignore)
    rows.finish()
    return PictureInfo((header.width, header.height), rows.colour.holds)


def _first_chunk() -> _Walk["_Header"]:
    if (yield from _chunk_head()) != (b"IHDR", 13):
        raise BadPicture
    body: list[bytes] = []
    yield from _chunk_body(b"IHDR", 13, body.append)
    return _header(body[0])


@dataclass(frozen=True, slots=True)
class _Header:
    width: int
    height: int
    bits_per_pixel: int
    colour: int
    interlaced: bool

    def passes(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of each pass and the bytes of a row, its filter's number included."""
        for column, row, right, down in _ADAM7 if self.interlaced else ((0, 0, 1, 1),):
            width, height = -((column - self.width) // right), -((row - self.height) // down)
            if width > 0 and height > 0:
                yield height, 1 + (width * self.bits_per_pixel + 7) // 8


def _header(body: bytes) -> _Header:
    width, height = int.from_bytes(body[:4]), int.from_bytes(body[4:8])
    depth, colour, compression, filtering, interlace = body[8:]
    if not width or not height or depth not in _BIT_DEPTHS.get(colour, ()):
        raise BadPicture
    if compression or filtering or interlace > 1:
        raise BadPicture
    return _Header(width, height, depth * _CHANNELS[colour], colour, bool(interlace))


class _Order:
    """Lets chunks pass in an order that every decoder reads."""

    def __init__(self, *, needs_palette: bool) -> None:
        self._needs_palette = needs_palette
        self._seen: set[bytes] = set()
        self._previous = b"IHDR"
        self._left = MAX_CHUNKS

    def admit(self, kind: bytes) -> None:
        is_critical = not kind[0] & 0x20
        resumes = kind == b"IDAT" and kind in self._seen and self._previous != kind
        if not self._left or resumes or (is_critical and kind not in _CRITICAL):
            raise BadPicture
        if kind == b"IDAT" and self._needs_palette and b"PLTE" not in self._seen:
            raise BadPicture
        self._seen.add(kind)
        self._previous = kind
        self._left -= 1


def _chunk_head() -> _Walk[tuple[bytes, int]]:
    head = yield 8
    return head[4:], int.from_bytes(head[:4])


def _chunk_body(kind: bytes, length: int, take: Callable[[bytes], None]) -> _Walk[None]:
    """Hand over the chunk's data in pieces, and after the last compare the checksum."""
    checksum = zlib.crc32(kind)
    while length:
        piece = yield min(length, PIECE_BYTES)
        length -= len(piece)
        checksum = zlib.crc32(piece, checksum)
        take(piece)
    if (yield 4) != checksum.to_bytes(4):
        raise BadPicture


def _ignore(_: bytes) -> None:
    """No matter what the chunk says."""


class _Rows:
    """Inflates the pixels and lets them go: as many bytes as the header says, every row whole."""

    def __init__(self, header: _Header) -> None:
        self._inflater = zlib.decompressobj()
        self._passes = header.passes()
        _, row_bytes = next(header.passes())
        self.colour = OneColourCheck(row_bytes, header.bits_per_pixel, interlaced=header.interlaced)
        self._row_bytes = 1
        self._left_bytes = 0  # of this pass
        self._filter_at = 0  # bytes to the next row's beginning

    def feed(self, data: bytes) -> None:
        while data:
            if self._inflater.eof:
                raise BadPicture
            self._take(self._inflate(data))
            data = self._inflater.unconsumed_tail or self._inflater.unused_data

    def finish(self) -> None:
        while not self._inflater.eof:
            rows = self._inflate(b"")
            if not rows:
                raise BadPicture
            self._take(rows)
        if self._left_bytes or next(self._passes, None):
            raise BadPicture

    def _inflate(self, data: bytes) -> bytes:
        try:
            return self._inflater.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            raise BadPicture from error

    def _take(self, rows: bytes) -> None:
        self._count(rows)
        self.colour.feed(rows)

    def _count(self, rows: bytes) -> None:
        while rows:
            if not self._left_bytes:
                self._begin_pass()
            part = rows[: self._left_bytes]
            # The numbers of the rows' filters; a loop in C, for there may be millions of rows.
            if part[self._filter_at :: self._row_bytes].translate(None, _FILTERS):
                raise BadPicture
            self._filter_at = (self._filter_at - len(part)) % self._row_bytes
            self._left_bytes -= len(part)
            rows = rows[len(part) :]

    def _begin_pass(self) -> None:
        height, self._row_bytes = next(self._passes, (0, 1))
        if not height:
            raise BadPicture
        self._left_bytes, self._filter_at = height * self._row_bytes, 0
