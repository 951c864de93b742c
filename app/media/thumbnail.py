"""Small pictures of pictures, for pages that show many. In a child process only: see `decoder`."""

from pathlib import Path

from PIL import Image

from app.media.errors import BadPicture
from app.media.picture import FORMATS, Limits, blaming_the_picture

QUALITY = 80
# What can be made smaller as it is; palettes and the like would lose their colours.
SMOOTH = ("RGB", "RGBA", "L", "LA")


def make(path: Path, limits: Limits, size: int) -> tuple[int, int]:
    """Make the picture in `path` a WebP of at most `size` pixels each way; return its size.

    Never enlarged. The same picture always gives the same bytes. Raises: BadPicture - it cannot be
    decoded, or has too many pixels; OSError and MemoryError when it is not the picture's fault.
    """
    with blaming_the_picture(), Image.open(path, formats=("PNG", *FORMATS)) as picture:
        if picture.width * picture.height > limits.max_pixels:
            raise BadPicture("The picture has too many pixels.")
        picture.draft("RGB", (size, size))  # a JPEG is decoded at a fraction of its size
        small = picture if picture.mode in SMOOTH else _converted(picture)
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        small.save(path, "WEBP", quality=QUALITY)
        return small.size


def _converted(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, of which WebP keeps the upper 8
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
