"""Whether a picture's file has come to its end, by its frame alone: where it is not decoded."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from app.media.boxes import boxes

_TAILS = {"image/jpeg": b"\xff\xd9", "image/gif": b";"}


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
    tail = _TAILS[media_type]
    file.seek(-len(tail), os.SEEK_END)
    return file.read() == tail
