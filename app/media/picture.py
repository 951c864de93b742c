"""Pictures: whole or refused, and PNG in the end."""

import zlib
from pathlib import Path

from PIL import Image

from app.media.sniff import PNG

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
SIGNATURE_BYTES = 8


class BadPicture(Exception):
    """Not a whole picture that may be kept; the message is fit for the client."""


def make_png(path: Path, media_type: str, max_pixels: int) -> tuple[int, int]:
    """Check the picture in `path` completely and make the file a PNG; return (width, height).

    A PNG keeps its bytes, up to its end: what follows the last chunk is cut off. Blocking: a
    full decode is tens of milliseconds for a megapixel.
    Raises: BadPicture; OSError and MemoryError when it is not the picture's fault.
    """
    if media_type == PNG:
        _trim(path)
    try:
        return _decode(path, media_type, max_pixels)
    except (BadPicture, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("The picture has too many pixels.") from error
    except Exception as error:
        # Pillow raises nearly anything for a damaged file: SyntaxError, struct.error, ... and
        # OSError as well, but only the operating system gives one a number: our disk is full.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadPicture("The picture is damaged.") from error


def _decode(path: Path, media_type: str, max_pixels: int) -> tuple[int, int]:
    with Image.open(path, formats=FORMATS) as picture:
        # The header's size, before a single pixel is unpacked.
        if picture.width * picture.height > max_pixels:
            raise BadPicture("The picture has too many pixels.")
        picture.load()  # verify() accepts half a JPEG, load() does not
        size = picture.size
        if media_type != PNG:
            _save(picture, path)
    return size


def _save(picture: Image.Image, path: Path) -> None:
    if picture.mode in ("RGB", "RGBA", "L", "LA", "P"):
        picture.save(path, format="PNG", compress_level=3)
        return
    # The colour profile describes the mode that it had: a press's, say, for CMYK.
    picture.convert("RGB").save(path, format="PNG", compress_level=3, icc_profile=None)


def _trim(path: Path) -> None:
    """Walk the chunks with their checksums and cut the file after the last.

    Source of the layout: the PNG specification (w3.org/TR/png-3), section 5.3.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(SIGNATURE_BYTES)
        while True:
            head = file.read(8)
            length = int.from_bytes(head[:4], "big")
            if length > size:  # else `read` would reserve the gigabytes that it claims
                raise BadPicture("The picture is damaged.")
            body = head[4:] + file.read(length)
            checksum = file.read(4)
            if len(head) < 8 or len(checksum) < 4 or zlib.crc32(body) != int.from_bytes(checksum):
                raise BadPicture("The picture is damaged.")
            if head[4:] == b"IEND":
                file.truncate()
                return
