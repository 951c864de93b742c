"""Files as a provider should not serve them, and some that only look wrong."""

import base64
import gzip
import io
import json
import struct
import zlib
from typing import Any

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIZE = (64, 64)

Fault = dict[str, Any]  # the fields of a fault on="download"


def bad_bodies(too_large_bytes: int) -> dict[str, tuple[Fault, str]]:
    """Return what must never be stored, by a word for each kind: the fault, and the error code."""
    png, jpeg = _encoded("PNG"), _encoded("JPEG")
    page = b"<!DOCTYPE html><html><body>504 Gateway Time-out</body></html>"
    bad: dict[str, Fault] = {
        "zero-bytes": {"kind": "empty"},
        "truncated-png": _bytes(png[: len(png) // 2]),
        "half-jpeg": _bytes(jpeg[: len(jpeg) // 2]),
        "web-page": _bytes(page, content_type="text/html"),
        "json-document": _bytes(json.dumps({"detail": "gone"}).encode()),
        "junk": _bytes(bytes(range(256)) * 8),
        "bomb": _bytes(_png_header(13_370, 13_370, zlib.compress(bytes(13_371 * 13_370), 9))),
        "huge-header": _bytes(_png_header(65_535, 65_535, zlib.compress(b"\0"))),
    }
    large: dict[str, Fault] = {
        "too-large": {"kind": "flood", "size_bytes": too_large_bytes},
        "endless": {"kind": "flood", "size_bytes": None},
    }
    invalid = {word: (fault, "invalid_output") for word, fault in bad.items()}
    return invalid | {word: (fault, "output_too_large") for word, fault in large.items()}


def good_bodies() -> dict[str, Fault]:
    """Return what must be stored as a PNG, by a word for each kind."""
    png = _encoded("PNG")
    wide = Image.new("I;16", SIZE, 40_000)
    return {
        "mislabelled": _bytes(png, content_type="text/html"),
        "with-script": _bytes(png + b"<script>alert(1)</script>"),
        "animated": _bytes(_animation()),
        "press-colours": _bytes(_encoded("JPEG", Image.new("CMYK", SIZE, (10, 80, 30, 5)))),
        "sixteen-bit": _bytes(_encoded("PNG", wide)),
        "zipped": _bytes(gzip.compress(png), headers={"content-encoding": "gzip"}),
    }


def one_colour() -> Fault:
    """Return a black picture: what some models make of a prompt that they refuse."""
    return _bytes(_encoded("PNG", Image.new("RGB", SIZE)))


def _bytes(body: bytes, **fields: Any) -> Fault:
    return {"kind": "bytes", "body_base64": base64.b64encode(body).decode(), **fields}


def _encoded(kind: str, picture: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (picture or Image.effect_noise(SIZE, 80).convert("RGB")).save(file, kind)
    return file.getvalue()


def _animation() -> bytes:
    frames = [Image.new("P", SIZE, shade) for shade in (40, 80, 120)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def _png_header(width: int, height: int, data: bytes) -> bytes:
    """Return a grey PNG of that size with these pixels; its checksums are right."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
