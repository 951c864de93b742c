"""How long a file plays, by what it says; whatever else it says."""

import io
import struct
import wave
from pathlib import Path

import pytest

from app.media.duration import duration_seconds

FTYP = struct.pack(">I4s", 16, b"ftyp") + b"isom\0\0\2\0"


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _large_box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content


def _header(per_second: int, duration: int) -> bytes:
    return _box(b"mvhd", struct.pack(">IIIII", 0, 1, 1, per_second, duration) + bytes(80))


LONG_HEADER = _box(b"mvhd", struct.pack(">IQQIQ", 1 << 24, 1, 1, 600, 600 * 90) + bytes(80))


def _wav(seconds: float) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(round(4 * 8000 * seconds)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("media_type", "content", "seconds"),
    [
        ("video/mp4", FTYP + _box(b"moov", _header(1000, 5200)), 5.2),
        ("video/mp4", FTYP + _box(b"mdat", bytes(99)) + _box(b"moov", _header(90_000, 90_000)), 1),
        ("video/mp4", FTYP + _large_box(b"mdat", bytes(9)) + _box(b"moov", LONG_HEADER), 90),
        ("audio/mp4", FTYP + _box(b"moov", _box(b"udta", b"x") + _header(10, 25)), 2.5),
        ("audio/wav", _wav(1.5), 1.5),
        ("audio/wav", _wav(1.5)[:-8000], 1.25),
    ],
)
def test_what_the_file_says(
    tmp_path: Path, media_type: str, content: bytes, seconds: float
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert duration_seconds(path, media_type) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("media_type", "content"),
    [
        ("image/png", _wav(1)),
        ("video/mp4", b""),
        ("video/mp4", FTYP),
        ("video/mp4", FTYP + _box(b"moov", b"")),
        ("video/mp4", FTYP + _box(b"moov", _header(0, 10))),
        ("video/mp4", FTYP + _box(b"moov", _header(1000, 0))),
        ("video/mp4", FTYP + _box(b"moov", _header(1000, 2**32 - 1))),
        ("video/mp4", (FTYP + _box(b"moov", _header(1000, 10)))[:40]),
        ("video/mp4", FTYP + struct.pack(">I4s", 3, b"moov") + bytes(100)),
        ("video/mp4", FTYP + struct.pack(">I4sQ", 1, b"mdat", 2**63) + bytes(100)),
        ("video/mp4", _box(b"free", b"") * 5000 + _box(b"moov", _header(1000, 10))),
        ("audio/wav", b"RIFF"),
        ("audio/wav", _wav(1)[:36]),
        ("audio/wav", b"RIFF\0\0\0\0WAVEdata\4\0\0\0abcd"),
    ],
)
def test_what_nobody_knows(tmp_path: Path, media_type: str, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert duration_seconds(path, media_type) is None
