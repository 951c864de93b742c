"""Pictures: whole ones become PNG without losing a pixel, damaged ones are refused."""

import errno
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin

from app.media.errors import BadPicture
from app.media.picture import make_png

LIMIT = 1_000_000
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
}

Keep = Callable[..., Path]


def noise(mode: str = "RGB", size: tuple[int, int] = (61, 47)) -> Image.Image:
    """A picture without two equal pixels to speak of: every lost one shows."""
    channels = len(Image.new(mode, (1, 1)).tobytes())
    data = random.Random(mode).randbytes(size[0] * size[1] * channels)
    return Image.frombytes(mode, size, data)


def encoded(image: Image.Image, pillow_format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, pillow_format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


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
        image = noise("RGB").convert("P") if mode == "P" else noise(mode)
        content = encoded(image, "PNG")
        path.write_bytes(content)
        assert make_png(path, "image/png", LIMIT) == (61, 47)
        assert path.read_bytes() == content

    def test_keeps_its_text_and_an_animation(self, path: Path) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("prompt", "a lighthouse")
        more = {"save_all": True, "append_images": [noise("RGB", (61, 47))], "pnginfo": text}
        content = encoded(noise(), "PNG", **more)
        path.write_bytes(content)
        make_png(path, "image/png", LIMIT)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("tail", [b"<script>alert(1)</script>", b"PK\x03\x04" * 99, b"\0"])
    def test_what_follows_the_end_is_cut_off(self, path: Path, tail: bytes) -> None:
        content = encoded(noise(), "PNG")
        path.write_bytes(content + tail)
        make_png(path, "image/png", LIMIT)
        assert path.read_bytes() == content

    def test_a_second_picture_behind_the_first_is_cut_off(self, path: Path) -> None:
        content = encoded(noise(), "PNG")
        path.write_bytes(content * 2)
        make_png(path, "image/png", LIMIT)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    def test_a_truncated_one_is_refused(self, path: Path, share: float) -> None:
        content = encoded(noise(), "PNG")
        path.write_bytes(content[: max(8, int(len(content) * share))])
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, "image/png", LIMIT)

    def test_without_its_end_chunk_it_is_refused(self, path: Path) -> None:
        path.write_bytes(encoded(noise(), "PNG")[:-12])
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, "image/png", LIMIT)

    @pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
    def test_one_wrong_byte_is_noticed(self, path: Path, place: float) -> None:
        content = bytearray(encoded(noise(), "PNG"))
        content[int(len(content) * place)] ^= 1
        path.write_bytes(content)
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, "image/png", LIMIT)

    def test_a_wrong_checksum_behind_the_pixels_is_noticed(self, path: Path) -> None:
        """Where Pillow looks no more."""
        content = encoded(noise(), "PNG")
        text = bytearray(chunk(b"tEXt", b"Comment\0hello"))
        for wanted, last in (("whole", 0), ("damaged", 1)):
            text[-1] ^= last
            path.write_bytes(content[:-12] + text + content[-12:])
            if wanted == "whole":
                make_png(path, "image/png", LIMIT)
            else:
                with pytest.raises(BadPicture, match="damaged"):
                    make_png(path, "image/png", LIMIT)

    def test_pixels_that_are_missing_behind_right_checksums_are_noticed(self, path: Path) -> None:
        path.write_bytes(header(60, 40))
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, "image/png", LIMIT)

    def test_a_chunk_that_claims_gigabytes_is_refused_without_reserving_them(
        self, path: Path
    ) -> None:
        path.write_bytes(SIGNATURE + struct.pack(">I", 0xFFFFFFFF) + b"IDAT" + bytes(100))
        tracemalloc.start()
        try:
            with pytest.raises(BadPicture, match="damaged"):
                make_png(path, "image/png", LIMIT)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 10 << 20


class TestOthers:
    @pytest.mark.parametrize(
        ("pillow_format", "mode", "options"),
        [
            ("WEBP", "RGB", {"lossless": True}),
            ("WEBP", "RGBA", {"lossless": True, "exact": True}),
            ("WEBP", "RGB", {"quality": 60}),
            ("JPEG", "RGB", {}),
            ("JPEG", "L", {}),
            ("GIF", "P", {}),
            ("AVIF", "RGB", {}),
        ],
    )
    def test_become_a_png_of_the_same_pixels(
        self, path: Path, pillow_format: str, mode: str, options: dict[str, Any]
    ) -> None:
        image = noise("RGB").convert("P") if mode == "P" else noise(mode)
        content = encoded(image, pillow_format, **options)
        path.write_bytes(content)

        assert make_png(path, MEDIA_TYPES[pillow_format], LIMIT) == (61, 47)

        assert path.read_bytes().startswith(SIGNATURE)
        with Image.open(path) as stored, Image.open(BytesIO(content)) as given:
            assert stored.format == "PNG"
            wanted = "RGBA" if mode == "RGBA" else "RGB"
            assert stored.convert(wanted).tobytes() == given.convert(wanted).tobytes()
            if options.get("lossless"):
                assert stored.tobytes() == image.tobytes()

    def test_cmyk_becomes_rgb_without_the_cmyk_profile(self, path: Path) -> None:
        content = encoded(noise("CMYK"), "JPEG", icc_profile=b"profile of a printing press")
        path.write_bytes(content)
        make_png(path, "image/jpeg", LIMIT)
        with Image.open(path) as stored, Image.open(BytesIO(content)) as given:
            assert stored.mode == "RGB"
            assert stored.tobytes() == given.convert("RGB").tobytes()
            assert "icc_profile" not in stored.info

    def test_an_rgb_profile_stays(self, path: Path) -> None:
        path.write_bytes(encoded(noise(), "JPEG", icc_profile=b"profile of a screen"))
        make_png(path, "image/jpeg", LIMIT)
        with Image.open(path) as stored:
            assert stored.info["icc_profile"] == b"profile of a screen"

    @pytest.mark.parametrize("pillow_format", ["JPEG", "WEBP", "GIF", "AVIF"])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_a_truncated_one_is_refused_and_left_alone(
        self, path: Path, pillow_format: str, share: float
    ) -> None:
        whole = encoded(noise(), pillow_format)
        content = whole[: int(len(whole) * share)]
        path.write_bytes(content)
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, MEDIA_TYPES[pillow_format], LIMIT)
        assert path.read_bytes() == content

    def test_what_follows_the_end_is_gone(self, path: Path) -> None:
        path.write_bytes(encoded(noise(), "JPEG") + b"<script>alert(1)</script>")
        make_png(path, "image/jpeg", LIMIT)
        assert b"script" not in path.read_bytes()

    @pytest.mark.parametrize("pillow_format", ["BMP", "TIFF", "PPM", "ICO"])
    def test_other_formats_are_never_opened(self, path: Path, pillow_format: str) -> None:
        path.write_bytes(encoded(noise("RGB", (32, 32)), pillow_format))
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, "image/jpeg", LIMIT)

    @pytest.mark.parametrize("media_type", sorted(MEDIA_TYPES.values()))
    def test_junk_is_refused(self, path: Path, media_type: str) -> None:
        path.write_bytes(random.Random(1).randbytes(5000))
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, media_type, LIMIT)


# Pillow warns of sizes well above our own limit; beyond twice its warning it refuses by itself.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
class TestBombs:
    @pytest.mark.parametrize(
        ("width", "height"), [(65_535, 65_535), (13_370, 13_370), (10_000, 10_000), (1001, 1000)]
    )
    def test_a_header_that_claims_too_many_pixels_is_refused_at_once(
        self, path: Path, width: int, height: int
    ) -> None:
        path.write_bytes(header(width, height))
        with pytest.raises(BadPicture, match="too many pixels"):
            make_png(path, "image/png", LIMIT)

    def test_a_picture_of_exactly_the_limit_passes(self, path: Path) -> None:
        path.write_bytes(encoded(Image.new("L", (100, 50)), "PNG"))
        assert make_png(path, "image/png", 5000) == (100, 50)

    def test_a_large_picture_in_few_bytes_is_refused_before_it_is_unpacked(
        self, path: Path
    ) -> None:
        path.write_bytes(encoded(Image.new("RGB", (2000, 2000)), "WEBP", lossless=True))
        assert path.stat().st_size < 1000
        with pytest.raises(BadPicture, match="too many pixels"):
            make_png(path, "image/webp", LIMIT)


class TestOurOwnFaults:
    """Not the picture's: it must not be thrown away for them."""

    def test_a_full_disk_is_not_a_damaged_picture(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(_picture: Image.Image, file: Any, _parameters: str) -> None:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

        content = encoded(noise(), "JPEG")
        path.write_bytes(content)
        monkeypatch.setattr("app.media.picture.write_png", write)
        with pytest.raises(OSError, match="No space left"):
            make_png(path, "image/jpeg", LIMIT)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]

    def test_a_lack_of_memory_is_not_a_damaged_picture(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(_: Any) -> None:
            raise MemoryError

        path.write_bytes(encoded(noise(), "JPEG"))
        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
        with pytest.raises(MemoryError):
            make_png(path, "image/jpeg", LIMIT)

    def test_a_missing_file_is_not_a_damaged_picture(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            make_png(path, "image/jpeg", LIMIT)
