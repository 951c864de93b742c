"""A file while it arrives: its first bytes are kept, and a PNG is checked on the way."""

from pathlib import Path

from app.media import sniff
from app.media.info import PictureInfo
from app.media.png import SIGNATURE, PngCheck


class Arrival:
    """The file that is being written. Every method blocks: call them in a thread.

    `head` holds the first `sniff.HEAD_BYTES`; `size_bytes` tells how many have come.
    """

    def __init__(self, path: Path, png_check: PngCheck | None) -> None:
        """`png_check` is for files that may be a PNG. Raises: OSError."""
        self.head = b""
        self.size_bytes = 0
        self._png = png_check
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        """Raises: BadPicture - a PNG, and damaged; OSError."""
        self.head += data[: sniff.HEAD_BYTES - len(self.head)]
        self.size_bytes += len(data)
        if self._png and not self.head.startswith(SIGNATURE[: len(self.head)]):
            self._png = None
        if self._png:
            self._png.feed(data)
        self._file.write(data)

    def finish(self) -> PictureInfo | None:
        """Return what a PNG is, and cut off what follows it; None for anything else.

        Raises: BadPicture - a PNG, and not whole; OSError.
        """
        if self._png is None:
            return None
        info = self._png.finish()
        self._file.truncate(self._png.size_bytes)
        return info

    def close(self) -> None:
        """Raises: OSError."""
        self._file.close()
