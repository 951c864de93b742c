"""Pictures that are not PNG: whole or refused, and PNG in the end.

They are decoded with Pillow, so in a child process only: see `decoder`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import AvifImagePlugin, Image, ImageSequence
from PIL.ImageFile import ImageFile

from app.media.encode import write_png
from app.media.errors import BadPicture

FORMATS = ("JPEG", "WEBP", "GIF", "AVIF")

# A thread per core would make its own share of memory, and wait for the same two cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def make_png(path: Path, max_pixels: int, parameters: str = "") -> tuple[int, int]:
    """Decode the picture in `path` completely and make the file a PNG; return (width, height).

    Of an animation the first frame stays. The PNG carries `parameters` as text.
    Blocking: tens of milliseconds for a megapixel.
    Raises: BadPicture; OSError and MemoryError when it is not the picture's fault.
    """
    # Beside it and then into its place: whoever dies on the way leaves the picture for another try.
    converted = path.with_name(f"{path.name}.png")
    try:
        with blaming_the_picture(), path.open("rb") as file, converted.open("wb") as png_file:
            decoded = _first_frame(file, max_pixels)
            write_png(decoded, png_file, parameters)
        converted.replace(path)
    finally:
        converted.unlink(missing_ok=True)
    return decoded.size


def verify(path: Path, max_pixels: int) -> tuple[int, int]:
    """Check the picture as `make_png` does, every frame of it, but leave it what it is."""
    with blaming_the_picture(), path.open("rb") as file, _open(file, max_pixels) as picture:
        for frame in ImageSequence.Iterator(picture):
            frame.load()
        return picture.size


def _first_frame(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Return the pixels alone: an opened WebP holds three times their memory until it is closed."""
    with _open(file, max_pixels) as picture:
        picture.load()  # verify() accepts half a JPEG, load() does not
        return picture._new(picture.im)


def _open(file: BinaryIO, max_pixels: int) -> ImageFile:
    picture = Image.open(file, formats=FORMATS)
    # The header's size, before a single pixel is unpacked.
    if picture.width * picture.height > max_pixels:
        raise BadPicture("The picture has too many pixels.")
    return picture


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
