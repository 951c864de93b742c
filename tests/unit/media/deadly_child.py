"""The decoder's child with pictures that hurt: a file that begins with such a word is no picture.

Its limits are small, so that the tests need not wait for them.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from app.media import child, picture
from app.media.errors import BadPicture
from app.media.info import PictureInfo

make_png = picture.make_png


def hurt(path: Path, *arguments: Any) -> PictureInfo:
    """Do as the first word says, or else be the true one."""
    match path.read_bytes()[:20].split():
        case [b"DIE", number, *_]:
            os.kill(os.getpid(), int(number))
        case [b"DIE-ONCE", *_]:
            path.write_bytes(path.read_bytes()[20:])
            os.kill(os.getpid(), signal.SIGSEGV)
        case [b"SPIN", *_]:
            spin()
        case [b"SLEEP", *_]:
            time.sleep(60)
        case [b"EAT", *_]:
            bytearray(1 << 40)
        case [b"TELL", *_]:
            raise BadPicture(str(sorted(os.environ)))
        case [b"FILL", *_]:
            raise OSError(28, "No space left on device")
    return make_png(path, *arguments)


def spin() -> NoReturn:
    while True:
        pass


if __name__ == "__main__":
    sys.modules["app.media.child"].CPU_SECONDS = 0.3  # type: ignore[attr-defined]
    child.MAX_PICTURES = 3
    sys.modules["app.media.child"].TASKS["make_png"] = hurt
    child.main()
