"""Small pictures of pictures, for pages that show many. Blocking: run it in a thread."""

import io
from pathlib import Path

from PIL import Image

from app.media.errors import BadPicture
from app.media.picture import FORMATS

SIZES = (128, 256, 512)
QUALITY = 80
# Decoded, four bytes each: 200 MB.
MAX_PIXELS = 50_000_000
# What can be made smaller as it is; palettes and the like would lose their colours.
SMOOTH = ("RGB", "RGBA", "L", "LA")


def make(path: Path, size: int) -> bytes:
    """Return the picture as WebP, at most `size` pixels wide and high; never enlarged.

    The same file always gives the same bytes. Raises: BadPicture - it cannot be decoded, or
    has too many pixels; OSError and MemoryError when it is not the picture's fault.
    """
    try:
        return _make(path, size)
    except (BadPicture, MemoryError):
        raise
    except Exception as error:
        # As in `picture.make_png`: only the operating system gives an OSError a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadPicture("The picture cannot be decoded.") from error


def _make(path: Path, size: int) -> bytes:
    with Image.open(path, formats=("PNG", *FORMATS)) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise BadPicture("The picture has too many pixels.")
        picture.draft("RGB", (size, size))  # a JPEG is decoded at a fraction of its size
        small = picture if picture.mode in SMOOTH else _converted(picture)
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        small.save(encoded, "WEBP", quality=QUALITY)
        return encoded.getvalue()


def _converted(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, of which WebP keeps the upper 8
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
