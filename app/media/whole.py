"""Whether a picture's file has come to its end, by its frame alone: where it is not decoded."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from app.media.boxes import boxes

# In which the end of a JPEG is looked for: cameras and editors write behind it.
_TAIL_BYTES = 1 << 16
_JPEG_END = b"\xff\xd9"
_GIF_END = b";"


def is_whole(path: Path, media_type: str) -> bool:
    """Tell whether nothing is missing at the end of a JPEG, GIF, WebP or AVIF. Raises: OSError."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            return _ends(file, size_bytes, media_type)
        except struct.error:
            return False


def _ends(file: BinaryIO, size_bytes: int, media_type: str) -> bool:
    if media_type == "image/webp":
        [riff_bytes] = struct.unpack("<4xI", file.read(8))
        return bool(size_bytes >= 8 + riff_bytes)
    if media_type == "image/avif":
        return max((end for _, end in boxes(file, size_bytes)), default=0) == size_bytes
    # Not in the first half, where a JPEG may hold a small one, end and all.
    file.seek(max(size_bytes // 2, size_bytes - _TAIL_BYTES))
    tail = file.read()
    # Compressed, the two bytes of a JPEG's end never stand together.
    return (
        _JPEG_END in tail if media_type == "image/jpeg" else tail.rstrip(b"\0").endswith(_GIF_END)
    )
