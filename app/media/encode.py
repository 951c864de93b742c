"""PNG as we write it: fast, without losing a pixel, with what made the picture written inside."""

import zlib
from typing import BinaryIO

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo, putchunk

try:
    import fpng  # a twentieth of Pillow's time, for a file a tenth larger
except ImportError:  # no wheel for this platform
    fpng = None

# fpng holds the raw pixels and the whole file in memory, Pillow a few rows.
FAST_PIXELS = 6_000_000
HEADER_BYTES = 33  # signature and IHDR: the other chunks come behind it

_CHANNELS = {"RGB": 3, "RGBA": 4}


def write_png(picture: Image, file: BinaryIO, parameters: str = "") -> None:
    """Write the loaded picture; `parameters` becomes the text chunk of that name.

    The name is the one where image generators and viewers look. A mode that PNG has keeps its
    colour profile; any other becomes RGB. Raises: OSError.
    """
    text = PngInfo()
    if parameters:
        text.add_text("parameters", parameters)  # tEXt if it is Latin-1, iTXt otherwise
    if picture.mode not in ("RGB", "RGBA", "L", "LA", "P"):
        # The profile describes the mode that it had: a press's, say, for CMYK.
        picture = picture.convert("RGB")
        picture.info.pop("icc_profile", None)
    is_small = picture.width * picture.height <= FAST_PIXELS
    has_alpha_key = "transparency" in picture.info  # a chunk that Pillow knows to write
    if fpng and is_small and picture.mode in _CHANNELS and not has_alpha_key:
        _write_fast(picture, file, text)
    else:
        # Run lengths take half the time of the lowest ordinary level, for a smaller file.
        picture.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE, pnginfo=text)


def _write_fast(picture: Image, file: BinaryIO, text: PngInfo) -> None:
    profile = picture.info.get("icc_profile")
    if profile:
        text.add(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))
    channels = _CHANNELS[picture.mode]
    png = memoryview(fpng.from_bytes(picture.tobytes(), *picture.size, channels))
    file.write(png[:HEADER_BYTES])
    for kind, body, *_ in text.chunks:
        putchunk(file, kind, body)
    file.write(png[HEADER_BYTES:])
