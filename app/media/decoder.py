"""Decodes pictures in a child process: what kills a decoder does not kill worker or API.

A PNG that is kept is not decoded: see `png`.

One child, so that the memory it may take is all the memory that decoding takes. At 25 ms for a
megapixel it keeps up with several times what Replicate lets one account create.
"""

import json
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from app.media.errors import BadPicture, TooLargeToDecode
from app.media.info import PictureInfo

ROOT = Path(__file__).parents[2]
CHILD = "app.media.child"  # by its name: Pillow and the like are for the child alone
READY = b"ready\n"
OUT_OF_MEMORY = 3  # its exit status
# The child measures its own CPU time; this is for one that is stopped or waits for a dead disk.
ANSWER_SECONDS = 30.0
END_SECONDS = 1.0


class DecoderFailed(Exception):
    """The child process does not start or does not answer: not the picture's fault."""


class Decoder:
    """Checks and converts picture files; thread-safe, one after the other.

    The child is started at the first need, and again after each death. It knows no secrets, and
    ends by itself when this process does.
    """

    def __init__(self, *, max_pixels: int, memory_bytes: int) -> None:
        self._arguments = [str(max_pixels), str(memory_bytes)]
        self._turn = threading.Lock()
        self._child: _Child | None = None

    @property
    def child_pid(self) -> int | None:
        """The child's process id, when there is one."""
        return self._child.pid if self._child else None

    def make_png(self, path: Path, parameters: str) -> PictureInfo:
        """See `picture.make_png`; blocking, for about 5 seconds of CPU time at most.

        Raises: BadPicture - also when it takes too much time, or kills the decoder;
        TooLargeToDecode, and it is left alone; OSError; DecoderFailed.
        """
        return self._decode("make_png", path, parameters)

    def verify(self, path: Path) -> PictureInfo:
        """See `picture.verify`; otherwise as `make_png`."""
        return self._decode("verify", path)

    def make_thumbnail(self, path: Path, size: int) -> PictureInfo:
        """See `thumbnail.make`; otherwise as `make_png`: there is none of what is too large."""
        return self._decode("make_thumbnail", path, size)

    def _decode(self, task: str, path: Path, *arguments: str | int) -> PictureInfo:
        request = {"task": task, "path": str(path.absolute()), "arguments": arguments}
        with self._turn:
            answer = self._ask(request) or self._ask(request, is_last=True)
        return _info(answer)

    def _ask(self, request: dict[str, Any], *, is_last: bool = False) -> dict[str, Any]:
        """Return the answer, or an empty one if the child died of something else than the time.

        It may have been hurt by an earlier picture, or killed from outside: the first death is
        no proof. Raises: BadPicture - the child was too slow, or this was the last try;
        DecoderFailed.
        """
        if self._child is None:
            self._child = _Child(self._arguments)
        answer = self._child.ask(json.dumps(request).encode() + b"\n")
        if answer:
            return answer
        status, is_silent = self._child.end(), self._child.is_silent
        self._child = None
        if is_silent:
            raise DecoderFailed("the decoder does not answer")
        if status == -signal.SIGPROF:
            raise BadPicture("The picture takes too long to decode.")
        if is_last and status == OUT_OF_MEMORY:
            raise BadPicture("The picture takes too much memory to decode.")
        if is_last:
            raise BadPicture("The picture cannot be decoded.")
        return {}


def _info(answer: dict[str, Any]) -> PictureInfo:
    if "too_large" in answer:
        raise TooLargeToDecode(*answer["too_large"])
    if "refused" in answer:
        raise BadPicture(answer["refused"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["strerror"])
    return PictureInfo(**answer | {"size": tuple(answer["size"])})


class _Child:
    """The process and its two pipes."""

    def __init__(self, arguments: list[str]) -> None:
        """Start the process, about 0.1 s. Raises: DecoderFailed."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", CHILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env={},  # a stranger's file has no business with our passwords
            )
        except OSError as error:
            raise DecoderFailed(f"the decoder does not start: {error.strerror}") from error
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        assert self._process.stdout is not None  # noqa: S101 - likewise
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.is_silent = False
        self._end = weakref.finalize(self, _end, self._process, self._requests, self._answers)
        if self._exchange(b"") != READY:
            raise DecoderFailed(f"the decoder does not start: exit status {self.end()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: bytes) -> dict[str, Any]:
        """Return the answer; empty when the process is dead, then or by now."""
        line = self._exchange(request)
        return json.loads(line) if line.endswith(b"\n") else {}

    def end(self) -> int:
        """End the process, if it is not dead; return its exit status or -signal."""
        self._end()
        return self._process.returncode

    def _exchange(self, request: bytes) -> bytes:
        timer = threading.Timer(ANSWER_SECONDS, self._give_up)
        timer.start()
        try:
            self._requests.write(request)
            self._requests.flush()
            return self._answers.readline()
        except BrokenPipeError:
            return b""
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.is_silent = True
        self._process.kill()


def _end(process: "subprocess.Popen[bytes]", requests: IO[bytes], answers: IO[bytes]) -> None:
    with suppress(BrokenPipeError):
        requests.close()  # the child's sign to end
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    answers.close()
