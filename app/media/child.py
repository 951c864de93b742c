"""The decoder's child process: `python -m app.media.child MAX_PIXELS MEMORY_BYTES`.

Reads one request a line and answers each with a line, both JSON (see `decoder`), until its
standard input ends. What it lacks the time or the memory for ends the process.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from app.media import picture, thumbnail
from app.media.decoder import OUT_OF_MEMORY, READY
from app.media.errors import BadPicture, TooLargeToDecode
from app.media.info import PictureInfo
from app.media.picture import Limits

TASKS: dict[str, Callable[..., PictureInfo]] = {
    "make_png": picture.make_png,
    "verify": picture.verify,
    "make_thumbnail": thumbnail.make,
}
CPU_SECONDS = 5.0
# Whatever leaks, in Pillow or below it, leaks no further.
MAX_PICTURES = 1000


def main() -> None:
    """Obey the limits, serve, end."""
    max_pixels, memory_bytes = map(int, sys.argv[1:])
    # Our own pipe; what a library may print goes to the log.
    answers = FileIO(os.dup(1), "wb")
    os.dup2(2, 1)
    # Signals to the worker's whole group are not for us: we end when it does, by our input's end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Pillow looks before it reserves the canvas. It refuses above the double, and warns below.
    Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)
    _limit_memory(memory_bytes)
    answers.write(READY)
    _serve(sys.stdin.buffer, answers, Limits(max_pixels, memory_bytes))


def _serve(requests: BinaryIO, answers: FileIO, limits: Limits) -> None:
    for _, line in zip(range(MAX_PICTURES), requests, strict=False):
        # CPU time, so that a busy machine condemns no picture. Nobody handles the signal: it
        # ends the process wherever that is, inside a library as well.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(json.loads(line), limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")


def _answer(request: dict[str, Any], limits: Limits) -> dict[str, Any]:
    try:
        task = TASKS[request["task"]]
        info = task(Path(request["path"]), limits, *request["arguments"])
    except TooLargeToDecode as error:
        return {"too_large": error.size}
    except BadPicture as error:
        return {"refused": None if error.is_damaged else str(error)}
    except OSError as error:
        return {"errno": error.errno, "strerror": error.strerror}
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
    return asdict(info)


def _limit_memory(memory_bytes: int) -> None:
    """Let the process grow by so much, from now on. Linux only: macOS does not obey."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except FileNotFoundError:
        return
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
