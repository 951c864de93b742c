"""PNG while it arrives: a whole one keeps every byte, a damaged one is refused."""

import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from app.media.arrival import Arrival
from app.media.decoder import ROOT
from app.media.errors import BadPicture
from app.media.png import PngCheck
from tests.unit.media.corpus import MAX_PIXELS, SIGNATURE, arrive, chunk, encoded, noise


def header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return SIGNATURE + ihdr + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


class TestPng:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
    def test_keeps_every_byte(self, path: Path, mode: str) -> None:
        content = encoded(noise(mode), "PNG")
        assert arrive(path, content) == (61, 47)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("piece_bytes", [1, 7, 8, 100, 1 << 20])
    def test_however_it_arrives(self, path: Path, piece_bytes: int) -> None:
        content = encoded(noise(), "PNG")
        assert arrive(path, content + b"tail", piece_bytes=piece_bytes) == (61, 47)
        assert path.read_bytes() == content

    def test_anything_else_is_left_alone(self, path: Path) -> None:
        for content in (b"\x89PIG\r\n\x1a\n", encoded(noise(), "JPEG")):
            assert arrive(path, content, piece_bytes=3) is None
            assert path.read_bytes() == content

    def test_damage_is_noticed_before_the_end_has_come(self, path: Path) -> None:
        arrival = Arrival(path, PngCheck(MAX_PIXELS))
        content = bytearray(encoded(noise(), "PNG"))
        content[20] ^= 1
        with pytest.raises(BadPicture, match="damaged"):
            arrival.write(bytes(content[:40]))
        arrival.close()

    def test_keeps_its_text_and_an_animation(self, path: Path) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("prompt", "a lighthouse")
        more = {"save_all": True, "append_images": [noise("RGB", (61, 47))], "pnginfo": text}
        content = encoded(noise(), "PNG", **more)
        arrive(path, content)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("tail", [b"<script>alert(1)</script>", b"PK\x03\x04" * 99, b"\0"])
    def test_what_follows_the_end_is_cut_off(self, path: Path, tail: bytes) -> None:
        content = encoded(noise(), "PNG")
        arrive(path, content + tail)
        assert path.read_bytes() == content

    def test_a_second_picture_behind_the_first_is_cut_off(self, path: Path) -> None:
        content = encoded(noise(), "PNG")
        arrive(path, content * 2)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    def test_a_truncated_one_is_refused(self, path: Path, share: float) -> None:
        content = encoded(noise(), "PNG")
        with pytest.raises(BadPicture, match="damaged"):
            arrive(path, content[: max(8, int(len(content) * share))])

    def test_without_its_end_chunk_it_is_refused(self, path: Path) -> None:
        with pytest.raises(BadPicture, match="damaged"):
            arrive(path, encoded(noise(), "PNG")[:-12])

    @pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
    def test_one_wrong_byte_is_noticed(self, path: Path, place: float) -> None:
        content = bytearray(encoded(noise(), "PNG"))
        content[int(len(content) * place)] ^= 1
        with pytest.raises(BadPicture, match="damaged"):
            arrive(path, bytes(content))

    def test_a_wrong_checksum_behind_the_pixels_is_noticed(self, path: Path) -> None:
        """Where Pillow looks no more."""
        content = encoded(noise(), "PNG")
        text = bytearray(chunk(b"tEXt", b"Comment\0hello"))
        for wanted, last in (("whole", 0), ("damaged", 1)):
            text[-1] ^= last
            if wanted == "whole":
                arrive(path, content[:-12] + text + content[-12:])
            else:
                with pytest.raises(BadPicture, match="damaged"):
                    arrive(path, content[:-12] + text + content[-12:])

    def test_pixels_that_are_missing_behind_right_checksums_are_noticed(self, path: Path) -> None:
        with pytest.raises(BadPicture, match="damaged"):
            arrive(path, header(60, 40))

    def test_a_chunk_that_claims_gigabytes_is_refused_without_reserving_them(
        self, path: Path
    ) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(BadPicture, match="damaged"):
                arrive(path, SIGNATURE + struct.pack(">I", 0xFFFFFFFF) + b"IDAT" + bytes(100))
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 10 << 20


class TestSize:
    @pytest.mark.parametrize(
        ("width", "height"), [(65_535, 65_535), (13_370, 13_370), (10_000, 10_000), (1001, 1000)]
    )
    def test_a_header_that_claims_too_many_pixels_is_refused_at_once(
        self, path: Path, width: int, height: int
    ) -> None:
        with pytest.raises(BadPicture, match="too many pixels"):
            arrive(path, header(width, height))

    def test_a_picture_of_exactly_the_limit_passes(self, path: Path) -> None:
        assert arrive(path, encoded(Image.new("L", (100, 50)), "PNG"), 5000) == (100, 50)

    @pytest.mark.skipif(not Path("/proc").exists(), reason="ru_maxrss has other units elsewhere")
    def test_one_of_any_size_takes_next_to_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(encoded(Image.new("RGB", (7000, 7000)), "PNG"))
        script = (
            "import resource, sys; from app.media.png import PngCheck\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before, check = peak(), PngCheck(10**9)\n"
            "with open(sys.argv[1], 'rb') as file:\n"
            "    while data := file.read(1 << 16): check.feed(data)\n"
            "check.finish(); print(peak() - before)"
        )
        command = [sys.executable, "-c", script, str(path)]
        found = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
        assert int(found.stdout) < 8 << 10  # KiB
