"""How long a video or a sound plays, where its file says so in a place that is quick to find.

Files of the MP4 family (ISO/IEC 14496-12, box `mvhd`) and WAV (RIFF chunks `fmt ` and `data`).
"""

import struct
from pathlib import Path
from typing import BinaryIO

from app.media.boxes import MOST_BOXES, boxes

MP4_FAMILY = frozenset({"video/mp4", "video/quicktime", "audio/mp4"})
WAV = "audio/wav"


def duration_seconds(path: Path, media_type: str) -> float | None:
    """Return the seconds that the file plays, or None where nobody knows.

    Raises: OSError - the file cannot be read.
    """
    if media_type not in MP4_FAMILY and media_type != WAV:
        return None
    with path.open("rb") as file:
        try:
            return _of_wav(file) if media_type == WAV else _of_mp4(file)
        except struct.error:  # it ends too early
            return None


def _of_mp4(file: BinaryIO) -> float | None:
    for kind, end in boxes(file, _end_of(file)):
        if kind == b"moov":
            for inner, _ in boxes(file, end):
                if inner == b"mvhd":
                    return _of_header(file)
            return None
    return None


def _of_header(file: BinaryIO) -> float | None:
    """Read `mvhd`: two times, the units in a second, and the duration in units."""
    version = file.read(4)[:1]
    scheme, unknown = (">QQIQ", 2**64 - 1) if version == b"\1" else (">IIII", 2**32 - 1)
    _, _, per_second, duration = struct.unpack(scheme, file.read(struct.calcsize(scheme)))
    known = per_second and 0 < duration < unknown  # 0: in fragments, told elsewhere
    return duration / per_second if known else None


def _of_wav(file: BinaryIO) -> float | None:
    """Divide the bytes of sound by the bytes per second."""
    end, bytes_per_second, at = _end_of(file), 0, 12
    for _ in range(MOST_BOXES):
        if at + 8 > end:
            return None
        file.seek(at)
        kind, size = struct.unpack("<4sI", file.read(8))
        if kind == b"fmt ":
            [bytes_per_second] = struct.unpack("<8xI", file.read(12))
        if kind == b"data":
            return min(size, end - at - 8) / bytes_per_second if bytes_per_second else None
        at += 8 + size + size % 2
    return None


def _end_of(file: BinaryIO) -> int:
    end = file.seek(0, 2)
    file.seek(0)
    return end
