"""PNG: whole or refused, without building a pixel.

Source of the layout: the PNG specification (w3.org/TR/png-3), sections 5 and 7 to 11.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.media.errors import BadPicture

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


def check(path: Path, max_pixels: int) -> tuple[int, int]:
    """Check every chunk and every row of `path`, cut off what follows; return (width, height).

    Blocking: about 10 ms for a megapixel, a third of a full decode, whatever its size in a few
    hundred kilobytes of memory. Raises: BadPicture; OSError.
    """
    with path.open("r+b") as file:
        header = _walk(file, max_pixels)
        file.truncate()
    return header.width, header.height


def _walk(file: BinaryIO, max_pixels: int) -> "_Header":
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise BadPicture
    kind, length = _chunk_head(file)
    if (kind, length) != (b"IHDR", 13):
        raise BadPicture
    header = _header(b"".join(_chunk_body(file, kind, length)))
    if header.width * header.height > max_pixels:
        raise BadPicture("The picture has too many pixels.")
    rows = _Rows(header)
    for kind, length in _chunks(file, needs_palette=header.colour == _PALETTE_COLOUR):
        for piece in _chunk_body(file, kind, length):
            if kind == b"IDAT":
                rows.feed(piece)
    rows.finish()
    return header


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


def _chunks(file: BinaryIO, *, needs_palette: bool) -> Iterator[tuple[bytes, int]]:
    """Yield each chunk's kind and length up to the end, in an order that every decoder reads."""
    seen = set()
    previous = b"IHDR"
    for _ in range(MAX_CHUNKS):
        kind, length = _chunk_head(file)
        is_critical = not kind[0] & 0x20
        resumes = kind == b"IDAT" and kind in seen and previous != kind
        if resumes or (is_critical and kind not in _CRITICAL):
            raise BadPicture
        if kind == b"IDAT" and needs_palette and b"PLTE" not in seen:
            raise BadPicture
        yield kind, length
        if kind == b"IEND":
            return
        seen.add(kind)
        previous = kind
    raise BadPicture


def _chunk_head(file: BinaryIO) -> tuple[bytes, int]:
    head = file.read(8)
    if len(head) < 8:
        raise BadPicture
    return head[4:], int.from_bytes(head[:4])


def _chunk_body(file: BinaryIO, kind: bytes, length: int) -> Iterator[bytes]:
    """Yield the chunk's data in pieces, and after the last compare the checksum."""
    checksum = zlib.crc32(kind)
    while length:
        piece = file.read(min(length, PIECE_BYTES))
        if not piece:
            raise BadPicture
        length -= len(piece)
        checksum = zlib.crc32(piece, checksum)
        yield piece
    if file.read(4) != checksum.to_bytes(4):
        raise BadPicture


class _Rows:
    """Inflates the pixels and lets them go: as many bytes as the header says, every row whole."""

    def __init__(self, header: _Header) -> None:
        self._inflater = zlib.decompressobj()
        self._passes = header.passes()
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
