"""Pictures that are not PNG: whole or refused, and PNG in the end.

They are decoded with Pillow, so in a child process only: see `decoder`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, ImageSequence
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile

from app.media import webp
from app.media.encode import write_png
from app.media.errors import BadPicture, TooLargeToDecode
from app.media.info import PictureInfo

FORMATS = ("JPEG", "WEBP", "GIF", "AVIF")
ANIMATED = ("WEBP", "GIF", "AVIF")
# Peak bytes per pixel while decoding, measured with Pillow 13. MPO: several JPEGs in one file.
_PIXEL_BYTES = {"JPEG": 4.1, "MPO": 4.1, "WEBP": 16.7, "GIF": 1.5, "AVIF": 13.0, "PNG": 4.1}
_ANIMATED_BYTES = 13.0  # of a GIF: the frame before, this one, and what is common
_CMYK_BYTES = 4.1  # once more, when it becomes RGB
_PROGRESSIVE_BYTES = 6.2  # libjpeg holds every coefficient
_CONVERTED_BYTES = 6.0  # when a PNG with transparency, or of 16 bits, becomes smaller
_TURNED_BYTES = 4.1  # once more, when it is turned upright
_READ_WHOLE = ("WEBP", "AVIF")
_SPARE_BYTES = 8 << 20
# Half of what the child may take for a picture.
ANIMATION_SECONDS = 2.5

# A thread per core would make its own share of memory, and wait for the same two cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture may be and take."""

    max_pixels: int
    memory_bytes: int


def make_png(path: Path, limits: Limits, parameters: str = "") -> PictureInfo:
    """Decode the picture in `path` completely and make the file a PNG; return what it is.

    An animation stays what it is: of a PNG made of it one frame would be left. The PNG carries
    `parameters` as text. Blocking: tens of milliseconds for a megapixel.
    Raises: BadPicture - TooLargeToDecode by its header alone; OSError and MemoryError when it
    is not the picture's fault.
    """
    # Beside it and then into its place: whoever dies on the way leaves the picture for another try.
    converted = path.with_name(f"{path.name}.png")
    try:
        with blaming_the_picture(), path.open("rb") as file, converted.open("wb") as png_file:
            decoded = _only_frame(file, limits)
            if decoded is None:
                return replace(verify(path, limits), is_animated=True)
            turn_upright(decoded)
            write_png(decoded, png_file, parameters)
        converted.replace(path)
    finally:
        converted.unlink(missing_ok=True)
    return info_of(decoded)


def verify(path: Path, limits: Limits) -> PictureInfo:
    """Check the picture as `make_png` does, every frame of it, but leave it what it is.

    Raises: as `make_png`; TooLargeToDecode also of an animation that would take too long.
    """
    began = time.process_time()
    with blaming_the_picture(), path.open("rb") as file, open_picture(file, limits) as picture:
        colours: set[object] = set()
        for frame in ImageSequence.Iterator(picture):
            if colours and time.process_time() - began > ANIMATION_SECONDS:
                raise TooLargeToDecode(*picture.size)
            frame.load()
            colours.add(_only_colour(frame))
        return PictureInfo(picture.size, None not in colours and len(colours) == 1)


def turn_upright(picture: Image.Image) -> None:
    """Turn a loaded picture as its EXIF says, in place: what is made of it has no EXIF.

    Raises: MemoryError.
    """
    with _sparing_the_picture():
        ImageOps.exif_transpose(picture, in_place=True)


def info_of(picture: Image.Image) -> PictureInfo:
    """Return what a loaded picture is."""
    return PictureInfo(picture.size, _only_colour(picture) is not None)


def _only_colour(picture: Image.Image) -> object:
    """Look at the pixels, up to the first that differs, without a copy of any; None if one does."""
    found = picture.getcolors(1)
    return found[0][1] if found else None


def _only_frame(file: BinaryIO, limits: Limits) -> Image.Image | None:
    """Return the pixels alone: an opened WebP holds three times their memory until it is closed.

    None of an animation. (Several JPEGs in one file are none: the first is the picture.)
    """
    with open_picture(file, limits) as picture:
        if picture.format in ANIMATED and getattr(picture, "is_animated", False):
            return None
        if _is_turned(picture):
            _admit(picture.size, _pixel_bytes(picture) + _TURNED_BYTES, 0, limits)
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


def _is_turned(picture: ImageFile) -> bool:
    orientation: object = 1
    with _sparing_the_picture():
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation != 1


def _admit(size: tuple[int, int], pixel_bytes: float, held_bytes: int, limits: Limits) -> None:
    pixels = size[0] * size[1]
    if pixels > limits.max_pixels:
        raise BadPicture("The picture has too many pixels.")
    if pixels * pixel_bytes + held_bytes + _SPARE_BYTES > limits.memory_bytes:
        raise TooLargeToDecode(*size)


@contextmanager
def _sparing_the_picture() -> Iterator[None]:
    """Whatever is wrong with its EXIF, which anybody may have written, the picture is not."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        return


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
