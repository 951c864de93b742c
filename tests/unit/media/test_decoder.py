"""The decoder child: every file of the corpus ends as it must, and nothing hurts the parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from app.media import child, decoder
from app.media.decoder import Decoder, DecoderFailed
from app.media.errors import BadPicture, TooLargeToDecode
from app.media.info import PictureInfo
from tests.unit.media.corpus import MAX_PIXELS, SIZE, Sample, arrive, corpus, encoded, noise

MEMORY_BYTES = 120 << 20
GROWTH_BYTES = 150 << 20
CORPUS = corpus()
PNGS = [sample for sample in CORPUS if sample.media_type == "image/png"]
OTHERS = [sample for sample in CORPUS if sample not in PNGS]
GOOD = [sample for sample in OTHERS if not sample.refusal]
ANIMATED = [sample for sample in GOOD if sample.name.startswith("animated")]
STILL = [sample for sample in GOOD if sample not in ANIMATED]
JPEG = encoded(noise(), "JPEG")

Write = Callable[[bytes], Path]


@pytest.fixture(scope="module")
def shared() -> Decoder:
    """One decoder for the whole corpus, as in a worker: the bad must not spoil the good."""
    return Decoder(max_pixels=MAX_PIXELS, memory_bytes=MEMORY_BYTES)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A decoder whose child does what the files say."""
    monkeypatch.setattr(decoder, "CHILD", "tests.unit.media.deadly_child")
    return Decoder(max_pixels=MAX_PIXELS, memory_bytes=MEMORY_BYTES)


def black(pillow_format: str, side: int) -> tuple[bytes, tuple[int, int]]:
    """Return a file of few bytes, and its size in pixels."""
    picture = Image.new("L" if pillow_format == "GIF" else "RGB", (side, side))
    return encoded(picture, pillow_format, method=0), picture.size


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def child_pid(used: Decoder) -> int:
    assert used.child_pid is not None
    return used.child_pid


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


class TestCorpus:
    def test_is_large_enough_and_has_no_two_of_a_name(self) -> None:
        assert len({sample.name for sample in CORPUS}) == len(CORPUS) >= 60
        assert sum(bool(sample.refusal) for sample in CORPUS) >= 30
        assert sum(not sample.refusal for sample in CORPUS) >= 30

    @pytest.mark.parametrize("sample", [s for s in OTHERS if s.refusal], ids=str)
    def test_the_bad_are_refused_and_left_alone(
        self, shared: Decoder, write: Write, sample: Sample
    ) -> None:
        path = write(sample.content)
        for _ in range(2):
            with pytest.raises(BadPicture, match=sample.refusal):
                shared.make_png(path, "")
            with pytest.raises(BadPicture):
                shared.verify(path)
        assert path.read_bytes() == sample.content

    @pytest.mark.parametrize("sample", STILL, ids=str)
    def test_the_good_become_a_png_of_the_same_pixels(
        self, shared: Decoder, write: Write, sample: Sample
    ) -> None:
        path = write(sample.content)
        assert shared.verify(path).size == sample.size
        assert path.read_bytes() == sample.content
        assert shared.make_png(path, "{}").size == sample.size
        stored = path.read_bytes()
        with Image.open(BytesIO(stored)) as found, Image.open(BytesIO(sample.content)) as given:
            assert (found.format, found.size) == ("PNG", sample.size)
            assert found.convert("RGBA").tobytes() == given.convert("RGBA").tobytes()
        # What we write we would keep.
        assert arrive(path, stored) == sample.size
        assert path.read_bytes() == stored

    @pytest.mark.parametrize("sample", ANIMATED, ids=str)
    def test_an_animation_stays_what_it_is(
        self, shared: Decoder, write: Write, sample: Sample
    ) -> None:
        path = write(sample.content)
        assert shared.make_png(path, "{}") == PictureInfo(sample.size, is_animated=True)
        assert list(path.parent.iterdir()) == [path]
        assert path.read_bytes() == sample.content

    @pytest.mark.parametrize("sample", [s for s in PNGS if s.refusal], ids=str)
    def test_a_bad_png_is_refused(self, tmp_path: Path, sample: Sample) -> None:
        with pytest.raises(BadPicture, match=sample.refusal):
            arrive(tmp_path / "file", sample.content)

    @pytest.mark.parametrize("sample", [s for s in PNGS if not s.refusal], ids=str)
    def test_a_good_png_keeps_its_bytes(self, tmp_path: Path, sample: Sample) -> None:
        path = tmp_path / "file"
        assert arrive(path, sample.content) == sample.size
        assert path.read_bytes() == sample.content[: sample.kept_bytes]
        with Image.open(path) as picture:
            picture.load()

    @pytest.mark.parametrize("pillow_format", ["JPEG", "WEBP", "GIF", "AVIF"])
    def test_one_colour_is_told_from_any_other_picture(
        self, shared: Decoder, write: Write, pillow_format: str
    ) -> None:
        content, _ = black(pillow_format, 200)
        assert shared.verify(write(content)).is_one_colour
        assert shared.make_png(write(content), "").is_one_colour
        assert not shared.verify(write(self._blinking())).is_one_colour
        content = encoded(noise(), pillow_format)
        assert not shared.verify(write(content)).is_one_colour
        assert not shared.make_png(write(content), "").is_one_colour

    def _blinking(self) -> bytes:
        """Return an animation whose frames have one colour each, and not the same."""
        frames = [Image.new("RGB", (200, 200), colour) for colour in ("red", "blue")]
        return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])

    def test_every_frame_is_verified(self, shared: Decoder, write: Write) -> None:
        frames = {"save_all": True, "append_images": [noise().rotate(180)]}
        content = encoded(noise(), "GIF", **frames)
        path = write(content[: int(len(content) * 0.9)])
        for check in (shared.verify, lambda path: shared.make_png(path, "")):
            with pytest.raises(BadPicture):
                check(path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited on Linux only")
class TestMemory:
    def test_worker_and_child_stay_in_bounds_whatever_comes(self, write: Write) -> None:
        """Not only with the corpus: these are pictures within the limit that need far more."""
        too_large = [black("JPEG", 6500), black("WEBP", 4000)]
        large = [black("JPEG", 3800), black("JPEG", 2400), black("WEBP", 2400), black("GIF", 6500)]
        before = resident_bytes(os.getpid())
        used = Decoder(max_pixels=50_000_000, memory_bytes=MEMORY_BYTES)
        for content, size in too_large:
            for use in (used.verify, lambda path: used.make_png(path, "")):
                path = write(content)
                with pytest.raises(TooLargeToDecode) as refused:
                    use(path)
                assert refused.value.size == size
                assert path.read_bytes() == content
        grown = 0
        for content, size in large:
            assert used.make_png(write(content), "").size == size
            grown = max(grown, resident_bytes(child_pid(used), "VmHWM"))
        grown += resident_bytes(os.getpid()) - before
        assert grown < GROWTH_BYTES

    def test_an_animation_is_known_to_take_more(self, write: Write) -> None:
        still = Image.new("L", (2000, 2000))
        frames = {"save_all": True, "append_images": [still.point(lambda _: 9)]}
        used = Decoder(max_pixels=50_000_000, memory_bytes=32 << 20)
        with pytest.raises(TooLargeToDecode):
            used.verify(write(encoded(still, "GIF", **frames)))
        assert used.verify(write(encoded(still, "GIF"))).size == (2000, 2000)

    def test_a_thumbnail_is_not_tried_of_what_is_too_large(self, write: Write) -> None:
        clear, plain = (Image.new(mode, (2000, 2000)) for mode in ("RGBA", "RGB"))
        used = Decoder(max_pixels=50_000_000, memory_bytes=32 << 20)
        with pytest.raises(TooLargeToDecode):
            used.make_thumbnail(write(encoded(clear, "PNG")), 128)
        assert used.make_thumbnail(write(encoded(plain, "PNG")), 128).size == (128, 128)


class TestDeath:
    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
    def test_a_picture_that_kills_its_decoder_is_refused(
        self, deadly: Decoder, write: Write, number: int
    ) -> None:
        with pytest.raises(BadPicture, match="cannot be decoded"):
            deadly.make_png(write(b"DIE %2d" % number), "")
        assert deadly.make_png(write(JPEG), "").size == SIZE

    def test_one_that_was_killed_by_something_else_is_tried_again(
        self, deadly: Decoder, write: Write
    ) -> None:
        path = write(b"DIE-ONCE".ljust(20) + JPEG)
        assert deadly.make_png(path, "").size == SIZE
        os.kill(child_pid(deadly), signal.SIGKILL)
        assert deadly.make_png(write(JPEG), "").size == SIZE

    def test_one_that_takes_too_long_is_refused(self, deadly: Decoder, write: Write) -> None:
        began = time.monotonic()
        with pytest.raises(BadPicture, match="too long"):
            deadly.make_png(write(b"SPIN"), "")
        assert time.monotonic() - began < child.CPU_SECONDS
        assert deadly.make_png(write(JPEG), "").size == SIZE

    def test_one_that_takes_too_much_memory_is_refused(self, deadly: Decoder, write: Write) -> None:
        with pytest.raises(BadPicture, match="too much memory"):
            deadly.make_png(write(b"EAT"), "")
        assert deadly.make_png(write(JPEG), "").size == SIZE

    def test_a_silent_decoder_is_not_the_pictures_fault(
        self, deadly: Decoder, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert deadly.make_png(write(JPEG), "").size == SIZE
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "ANSWER_SECONDS", 0.3)
            with pytest.raises(DecoderFailed, match="does not answer"):
                deadly.make_png(write(b"SLEEP"), "")
        assert deadly.make_png(write(JPEG), "").size == SIZE

    def test_nor_is_one_that_does_not_start(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoder, "ROOT", Path("/"))
        used = Decoder(max_pixels=MAX_PIXELS, memory_bytes=MEMORY_BYTES)
        with pytest.raises(DecoderFailed, match="does not start: exit status 1"):
            used.make_png(write(JPEG), "")

    def test_our_full_disk_is_not_either(self, deadly: Decoder, write: Write) -> None:
        with pytest.raises(OSError, match="No space left") as caught:
            deadly.make_png(write(b"FILL"), "")
        assert caught.value.errno == 28

    def test_a_child_is_replaced_now_and_then(self, deadly: Decoder, write: Write) -> None:
        seen = set()
        for _ in range(7):
            assert deadly.make_png(write(JPEG), "").size == SIZE
            seen.add(child_pid(deadly))
        assert len(seen) == 3


class TestProcess:
    def test_knows_no_secrets(
        self, deadly: Decoder, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_secret")
        with pytest.raises(BadPicture) as told:
            deadly.make_png(write(b"TELL"), "")
        assert "REPLICATE" not in str(told.value)

    def test_signals_to_the_workers_group_do_not_end_it(
        self, shared: Decoder, write: Write
    ) -> None:
        shared.make_png(write(JPEG), "")
        pid = child_pid(shared)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        assert shared.make_png(write(JPEG), "").size == SIZE
        assert child_pid(shared) == pid

    def test_ends_with_its_decoder(self, write: Write) -> None:
        used = Decoder(max_pixels=MAX_PIXELS, memory_bytes=MEMORY_BYTES)
        used.make_png(write(JPEG), "")
        pid = child_pid(used)
        assert is_running(pid)
        del used
        assert_ends(pid)

    def test_ends_when_the_worker_is_killed(self, write: Write) -> None:
        script = (
            "import sys, time; from pathlib import Path; from app.media.decoder import Decoder\n"
            f"used = Decoder(max_pixels={MAX_PIXELS}, memory_bytes={MEMORY_BYTES})\n"
            "used.make_png(Path(sys.argv[1]), '')\n"
            "print(used.child_pid, flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, write(JPEG)], stdout=subprocess.PIPE, cwd=decoder.ROOT
        ) as worker:
            assert worker.stdout is not None
            pid = int(worker.stdout.readline())
            worker.kill()
        assert_ends(pid)

    def test_knows_any_name(self, shared: Decoder, tmp_path: Path) -> None:
        path = tmp_path / 'ünï"c\nödé 🌅'
        path.write_bytes(JPEG)
        assert shared.make_png(path, "").size == SIZE
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_serves_any_number_of_threads(self, shared: Decoder, tmp_path: Path) -> None:
        def convert(number: int) -> tuple[int, int]:
            path = tmp_path / str(number)
            path.write_bytes(encoded(noise(size=(40 + number, 30)), "JPEG"))
            return shared.make_png(path, "x" * 200_000).size

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(convert, range(24)))
        assert found == [(40 + number, 30) for number in range(24)]
