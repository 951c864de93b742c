"""Picture files, good and bad, and what must become of each. Made here, the same every time."""

import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.media.arrival import Arrival
from app.media.png import PngCheck

SIZE = (61, 47)
MAX_PIXELS = 1_000_000
SIGNATURE = b"\x89PNG\r\n\x1a\n"

DAMAGED = "damaged"
TOO_LARGE = "too many pixels"


@dataclass(frozen=True, slots=True)
class Sample:
    """A file: `refusal` is a word of the message, or empty if the picture must be kept."""

    name: str
    media_type: str
    content: bytes
    refusal: str = ""
    size: tuple[int, int] = SIZE
    kept_bytes: int | None = None
    """For a PNG: how much of it is kept, unless all."""

    def __str__(self) -> str:
        return self.name


def corpus() -> list[Sample]:
    """Return all the samples, in a fixed order."""
    return [
        *_good_pngs(),
        *_good_others(),
        *_bad_pngs(),
        *_bad_others(),
        *_bombs(),
    ]


def arrive(
    path: Path, content: bytes, max_pixels: int = MAX_PIXELS, piece_bytes: int = 1000
) -> tuple[int, int] | None:
    """Let the content arrive in the file, in pieces; return the size of the picture."""
    arrival = Arrival(path, PngCheck(max_pixels))
    try:
        for at in range(0, len(content), piece_bytes):
            arrival.write(content[at : at + piece_bytes])
        info = arrival.finish()
        return info.size if info else None
    finally:
        arrival.close()


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture without two equal pixels to speak of: every lost one shows."""
    if mode == "P":
        return noise("RGB", size).convert("P")
    channels = len(Image.new(mode, (1, 1)).tobytes())
    rows = size[1] * ((size[0] + 7) // 8 if mode == "1" else size[0] * channels)
    return Image.frombytes(mode, size, random.Random(mode).randbytes(rows))


def encoded(picture: Image.Image, pillow_format: str, **options: Any) -> bytes:
    """Return the picture as Pillow writes it."""
    file = BytesIO()
    picture.save(file, pillow_format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """Return a PNG chunk with the right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def ihdr(width: int, height: int, depth: int = 8, colour: int = 0, *rest: int) -> bytes:
    """Return a PNG header chunk; `rest`: compression, filtering, interlace (all 0)."""
    compression, filtering, interlace = rest or (0, 0, 0)
    fields = (width, height, depth, colour, compression, filtering, interlace)
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


def grey_png(rows: bytes, width: int = 8, height: int = 8, header: bytes = b"") -> bytes:
    """Return a PNG with these rows, each with its filter's number before it."""
    start = SIGNATURE + (header or ihdr(width, height))
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


ROWS = bytes(9) * 8


def _good_pngs() -> Iterator[Sample]:
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        yield _png(f"png {mode}", encoded(noise(mode), "PNG"))
    text = PngInfo()
    text.add_itxt("prompt", "a lighthouse 🌅")
    frames = {"save_all": True, "append_images": [noise().rotate(180)]}
    yield _png("png with text", encoded(noise(), "PNG", pnginfo=text))
    yield _png("animated png", encoded(noise(), "PNG", **frames))
    yield _png("png with profile", encoded(noise(), "PNG", icc_profile=bytes(3000)))
    yield _png("png with colour key", encoded(noise(), "PNG", transparency=(1, 2, 3)))
    yield _png("one pixel", encoded(noise(size=(1, 1)), "PNG"), size=(1, 1))
    yield _png("very wide", encoded(noise(size=(9000, 1)), "PNG"), size=(9000, 1))
    yield _png("very high", encoded(noise(size=(1, 9000)), "PNG"), size=(1, 9000))
    yield _png("exactly the limit", encoded(Image.new("L", (1000, 1000)), "PNG"), size=(1000, 1000))
    for width, height in ((1, 1), (3, 2), (5, 5), (8, 8), (61, 47)):
        yield _png(f"interlaced {width}x{height}", interlaced(width, height), size=(width, height))
    split = zlib.compress(ROWS)
    parts = b"".join(chunk(b"IDAT", split[at : at + 1]) for at in range(len(split)))
    single = SIGNATURE + ihdr(8, 8) + parts + chunk(b"IDAT") + chunk(b"IEND")
    yield _png("a chunk for each byte", single, size=(8, 8))
    whole = encoded(noise(), "PNG")
    for name, tail in (
        ("script", b"<script>alert(1)</script>"),
        ("picture", whole),
        ("nul", b"\0"),
    ):
        yield _png(f"png and a {name} behind", whole + tail, kept_bytes=len(whole))


def _good_others() -> Iterator[Sample]:
    for mode in ("RGB", "L", "CMYK"):
        yield _other(f"jpeg {mode}", encoded(noise(mode), "JPEG"))
    yield _other("progressive jpeg", encoded(noise(), "JPEG", progressive=True))
    yield _other("jpeg and a script", encoded(noise(), "JPEG") + b"<script>alert(1)</script>")
    press = encoded(noise("CMYK"), "JPEG", icc_profile=b"profile of a printing press")
    yield _other("jpeg with a profile", press)
    for options in ({}, {"lossless": True}, {"quality": 1}):
        yield _other(f"webp {options}", encoded(noise(), "WEBP", **options))
    see_through = encoded(noise("RGBA"), "WEBP", lossless=True, exact=True)
    yield _other("transparent webp", see_through)
    frames = {"save_all": True, "append_images": [noise().rotate(180)], "duration": 50}
    yield _other("animated webp", encoded(noise(), "WEBP", **frames))
    several = {"save_all": True, "append_images": [noise().rotate(180)]}
    yield _other("two pictures in one jpeg", encoded(noise(), "MPO", **several))
    yield _other("gif", encoded(noise("P"), "GIF"))
    yield _other("grey gif", encoded(noise("L"), "GIF"))
    yield _other("transparent gif", encoded(noise("P"), "GIF", transparency=3))
    yield _other("animated gif", encoded(noise("P"), "GIF", **frames))
    yield _other("avif", encoded(noise(), "AVIF", speed=10))
    yield _other("transparent avif", encoded(noise("RGBA"), "AVIF", speed=10))
    yield _other("animated avif", encoded(noise(), "AVIF", **frames, speed=10))


def _bad_pngs() -> Iterator[Sample]:
    whole = encoded(noise(), "PNG")
    for name, content in {
        "nothing behind the signature": SIGNATURE,
        "half a png": whole[: len(whole) // 2],
        "png without its end": whole[:-12],
        "png without its last byte": whole[:-1],
        "junk as png": SIGNATURE + random.Random(1).randbytes(5000),
        "text before the header": SIGNATURE + chunk(b"tEXt", b"a\0b") + whole[8:],
        "two headers": whole[:33] + whole[8:33] + whole[33:],
        "no pixels": SIGNATURE + ihdr(8, 8) + chunk(b"IEND"),
        "a row too few": grey_png(ROWS[:-9]),
        "a byte too few": grey_png(ROWS[:-1]),
        "a byte too many": grey_png(ROWS + b"\0"),
        "a filter that does not exist": grey_png(ROWS[:9] + b"\5" + ROWS[10:]),
        "no width": grey_png(b"", header=ihdr(0, 8)),
        "no height": grey_png(b"", header=ihdr(8, 0)),
        "a colour that does not exist": grey_png(ROWS, header=ihdr(8, 8, 8, 1)),
        "a depth that does not exist": grey_png(ROWS, header=ihdr(8, 8, 3)),
        "a compression that does not exist": grey_png(ROWS, header=ihdr(8, 8, 8, 0, 1, 0, 0)),
        "an interlacing that does not exist": grey_png(ROWS, header=ihdr(8, 8, 8, 0, 0, 0, 2)),
        "no palette": grey_png(ROWS, header=ihdr(8, 8, 8, 3)),
        "an unknown critical chunk": whole[:33] + chunk(b"CgBI", bytes(4)) + whole[33:],
        "a chunk that claims gigabytes": SIGNATURE + b"\xff\xff\xff\xffIDAT" + bytes(100),
        "pixels in two places": _with_pixels(zlib.compress(ROWS), apart=True),
        "pixels cut short": _with_pixels(zlib.compress(ROWS)[:-5]),
        "pixels with a wrong checksum": _with_pixels(zlib.compress(ROWS)[:-1] + b"\xff"),
        "pixels that are no zlib stream": _with_pixels(b"these are not pixels"),
        "more behind the pixels": _with_pixels(zlib.compress(ROWS) + b"more"),
        "an endless row of chunks": whole[:33] + chunk(b"teXt") * 200_000 + whole[33:],
    }.items():
        yield _png(name, content, refusal=DAMAGED)
    for place in (0.2, 0.5, 0.8):
        wrong = bytearray(whole)
        wrong[int(len(whole) * place)] ^= 1
        yield _png(f"a wrong bit at {place}", bytes(wrong), refusal=DAMAGED)
    text = chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!"
    yield _png("a wrong checksum at the end", whole[:-12] + text + whole[-12:], refusal=DAMAGED)


def _bad_others() -> Iterator[Sample]:
    for pillow_format in ("JPEG", "WEBP", "GIF", "AVIF"):
        whole = encoded(noise("P" if pillow_format == "GIF" else "RGB"), pillow_format)
        for share in (0.1, 0.3, 0.6, 0.9):
            content = whole[: int(len(whole) * share)]
            yield _other(f"{share} of a {pillow_format}", content, DAMAGED, pillow_format)
        junk = whole[:30] + random.Random(1).randbytes(3000)
        yield _other(f"junk as {pillow_format}", junk, DAMAGED, pillow_format)
    for pillow_format in ("BMP", "TIFF", "PPM", "ICO"):
        content = encoded(noise(size=(32, 32)), pillow_format)
        yield _other(f"{pillow_format} as JPEG", content, DAMAGED, "JPEG")


def _bombs() -> Iterator[Sample]:
    for width, height in ((65_535, 65_535), (13_370, 13_370), (1001, 1000), (2**31 - 1, 1)):
        content = grey_png(b"", width, height)
        yield _png(f"claims {width}x{height}", content, refusal=TOO_LARGE)
    yield _png("fifty megabytes of rows", grey_png(bytes(50 << 20)), refusal=DAMAGED)
    for pillow_format in ("JPEG", "WEBP", "GIF"):
        large = encoded(Image.new("L", (3000, 3000)), pillow_format)
        yield _other(f"large {pillow_format}", large, TOO_LARGE, pillow_format)
    large = encoded(Image.new("L", (3000, 3000)), "AVIF", speed=10)
    yield _other("large AVIF", large, TOO_LARGE, "AVIF")
    gif = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    yield _other("GIF that claims 65535x65535", bytes(gif), TOO_LARGE, "GIF")
    jpeg = encoded(Image.new("L", (16, 16)), "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    claims = jpeg[:start] + b"\xff\xff\xff\xff" + jpeg[start + 4 :]
    yield _other("JPEG that claims 65535x65535", claims, TOO_LARGE, "JPEG")
    webp = bytearray(encoded(noise("RGBA"), "WEBP", save_all=True, append_images=[noise("RGBA")]))
    webp[24:30] = b"\xff\x3f\0\xff\x3f\0"
    yield _other("WebP that claims 16384x16384", bytes(webp), TOO_LARGE, "WEBP")


def _png(name: str, content: bytes, **fields: Any) -> Sample:
    return Sample(name, "image/png", content, **fields)


def _other(name: str, content: bytes, refusal: str = "", pillow_format: str = "") -> Sample:
    kind = pillow_format or next(
        kind for kind in ("JPEG", "WEBP", "GIF", "AVIF") if kind in name.upper()
    )
    return Sample(name, f"image/{kind.lower()}", content, refusal)


def _with_pixels(data: bytes, *, apart: bool = False) -> bytes:
    between = chunk(b"tEXt", b"a\0b") if apart else b""
    pixels = chunk(b"IDAT", data[:5]) + between + chunk(b"IDAT", data[5:])
    return SIGNATURE + ihdr(8, 8) + pixels + chunk(b"IEND")


def interlaced(width: int, height: int, value: int = 0) -> bytes:
    """Return an Adam7 PNG, of one colour; Pillow writes none. Of the size that Pillow reads."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    rows = b""
    for column, row, right, down in (*passes, (0, 1, 1, 2)):
        across = len(range(column, width, right))
        pixels = b"\0" + bytes([value]) * 3 * across
        rows += pixels * len(range(row, height, down)) if across else b""
    return grey_png(rows, header=ihdr(width, height, 8, 2, 0, 0, 1))
