"""Pictures that are not PNG: whole or refused, and PNG in the end.

They are decoded with Pillow, so in a child process only: see `decoder`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import AvifImagePlugin, Image, ImageSequence
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile

from app.media import webp
from app.media.encode import write_png
from app.media.errors import BadPicture, TooLargeToDecode

FORMATS = ("JPEG", "WEBP", "GIF", "AVIF")
# The most that decoding held of a pixel, with Pillow 13. MPO: several JPEGs in one file.
_PIXEL_BYTES = {"JPEG": 4.1, "MPO": 4.1, "WEBP": 16.7, "GIF": 1.5, "AVIF": 13.0, "PNG": 4.1}
_ANIMATED_BYTES = 13.0  # of a GIF: the frame before, this one, and what is common
_CMYK_BYTES = 4.1  # once more, when it becomes RGB
_PROGRESSIVE_BYTES = 6.2  # libjpeg holds every coefficient
_CONVERTED_BYTES = 6.0  # when a PNG with transparency, or of 16 bits, becomes smaller
_READ_WHOLE = ("WEBP", "AVIF")
_SPARE_BYTES = 8 << 20

# A thread per core would make its own share of memory, and wait for the same two cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture may be and take."""

    max_pixels: int
    memory_bytes: int


def make_png(path: Path, limits: Limits, parameters: str = "") -> tuple[int, int]:
    """Decode the picture in `path` completely and make the file a PNG; return (width, height).

    Of an animation the first frame stays. The PNG carries `parameters` as text.
    Blocking: tens of milliseconds for a megapixel.
    Raises: BadPicture - TooLargeToDecode by its header alone; OSError and MemoryError when it
    is not the picture's fault.
    """
    # Beside it and then into its place: whoever dies on the way leaves the picture for another try.
    converted = path.with_name(f"{path.name}.png")
    try:
        with blaming_the_picture(), path.open("rb") as file, converted.open("wb") as png_file:
            decoded = _first_frame(file, limits)
            write_png(decoded, png_file, parameters)
        converted.replace(path)
    finally:
        converted.unlink(missing_ok=True)
    return decoded.size


def verify(path: Path, limits: Limits) -> tuple[int, int]:
    """Check the picture as `make_png` does, every frame of it, but leave it what it is."""
    with blaming_the_picture(), path.open("rb") as file, open_picture(file, limits) as picture:
        for frame in ImageSequence.Iterator(picture):
            frame.load()
        return picture.size


def _first_frame(file: BinaryIO, limits: Limits) -> Image.Image:
    """Return the pixels alone: an opened WebP holds three times their memory until it is closed."""
    with open_picture(file, limits) as picture:
        picture.load()  # verify() accepts half a JPEG, load() does not
        return picture._new(picture.im)


def open_picture(file: BinaryIO, limits: Limits, formats: tuple[str, ...] = FORMATS) -> ImageFile:
    """Open it and read its header: no pixel is unpacked before its size is admitted.

    Raises: TooLargeToDecode; BadPicture; whatever Pillow raises, see `blaming_the_picture`.
    """
    size_bytes = os.fstat(file.fileno()).st_size
    canvas = webp.canvas(file.read(webp.HEAD_BYTES))
    if canvas:  # libwebp reserves it whole while Pillow still opens the file
        _admit(canvas, _PIXEL_BYTES["WEBP"], size_bytes, limits)
    picture = Image.open(file, formats=formats)
    held_bytes = size_bytes if picture.format in _READ_WHOLE else 0
    _admit(picture.size, _pixel_bytes(picture), held_bytes, limits)
    return picture


def _pixel_bytes(picture: ImageFile) -> float:
    needed = _PIXEL_BYTES[picture.format or ""]
    if isinstance(picture, GifImageFile) and picture.is_animated:
        needed = _ANIMATED_BYTES
    if picture.format == "PNG" and (picture.has_transparency_data or picture.mode.startswith("I")):
        needed += _CONVERTED_BYTES
    if picture.mode == "CMYK":
        needed += _CMYK_BYTES
    if picture.info.get("progressive"):
        needed += _PROGRESSIVE_BYTES
    return needed


def _admit(size: tuple[int, int], pixel_bytes: float, held_bytes: int, limits: Limits) -> None:
    pixels = size[0] * size[1]
    if pixels > limits.max_pixels:
        raise BadPicture("The picture has too many pixels.")
    if pixels * pixel_bytes + held_bytes + _SPARE_BYTES > limits.memory_bytes:
        raise TooLargeToDecode(*size)


@contextmanager
def blaming_the_picture() -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file into `BadPicture`.

    OSError and MemoryError pass when it is not the picture's fault.
    """
    try:
        yield
    except (BadPicture, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("The picture has too many pixels.") from error
    except Exception as error:
        # Nearly anything: SyntaxError, struct.error, ... and OSError as well, but only the
        # operating system gives one a number: our disk's fault.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadPicture from error
