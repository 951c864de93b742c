"""The boxes of ISO base media files (ISO/IEC 14496-12): MP4, QuickTime, AVIF."""

import struct
from collections.abc import Iterator
from typing import BinaryIO

# Whoever sent the file may have written anything: no more boxes than this are looked at.
MOST_BOXES = 1000


def boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int]]:
    """Yield the kind and the end of each box up to `end`, the file standing at its content.

    Stops at the first that would reach further. Raises: struct.error - the file ends too early.
    """
    at = file.tell()
    for _ in range(MOST_BOXES):
        if at + 8 > end:
            return
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:  # a large box: its size follows
            [size], head = struct.unpack(">Q", file.read(8)), 16
        size = size or end - at  # 0: the last box, to the end
        if size < head or at + size > end:
            return
        yield kind, at + size
        at += size
