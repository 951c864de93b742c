"""Small pictures of pictures, for pages that show many. In a child process only: see `decoder`."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image

from app.media.info import PictureInfo
from app.media.picture import (
    FORMATS,
    Limits,
    blaming_the_picture,
    info_of,
    open_picture,
    turn_upright,
)

QUALITY = 80
# What can be made smaller as it is; palettes and the like would lose their colours.
SMOOTH = ("RGB", "RGBA", "L", "LA")


def make(path: Path, limits: Limits, size: int) -> PictureInfo:
    """Make the picture in `path` a WebP of at most `size` pixels each way; return what it is.

    Never enlarged. The same picture always gives the same bytes. Raises: BadPicture - it cannot be
    decoded, or is too large; OSError and MemoryError when it is not the picture's fault.
    """
    # Beside it and then into its place: whoever dies on the way leaves the picture for another try.
    smaller = path.with_name(f"{path.name}.webp")
    try:
        with blaming_the_picture(), path.open("rb") as file:
            small = _small(file, limits, size)
            turn_upright(small)
            small.save(smaller, "WEBP", quality=QUALITY)
        smaller.replace(path)
    finally:
        smaller.unlink(missing_ok=True)
    return info_of(small)


def _small(file: BinaryIO, limits: Limits, size: int) -> Image.Image:
    with open_picture(file, limits, formats=("PNG", *FORMATS)) as picture:
        picture.draft("RGB", (size, size))  # a JPEG is decoded at a fraction of its size
        small = picture if picture.mode in SMOOTH else _converted(picture)
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        return small.copy()


def _converted(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, of which WebP keeps the upper 8
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
