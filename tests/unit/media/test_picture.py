"""Pictures that are decoded: whole ones become PNG without losing a pixel, damaged ones end."""

import errno
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from app.media import picture
from app.media.errors import BadPicture, TooLargeToDecode
from app.media.picture import Limits, make_png, verify

LIMITS = Limits(1_000_000, 120 << 20)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def noise(mode: str = "RGB", size: tuple[int, int] = (61, 47)) -> Image.Image:
    """A picture without two equal pixels to speak of: every lost one shows."""
    channels = len(Image.new(mode, (1, 1)).tobytes())
    data = random.Random(mode).randbytes(size[0] * size[1] * channels)
    return Image.frombytes(mode, size, data)


def encoded(image: Image.Image, pillow_format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, pillow_format, **options)
    return file.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


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

        assert make_png(path, LIMITS).size == (61, 47)

        assert path.read_bytes().startswith(SIGNATURE)
        with Image.open(path) as stored, Image.open(BytesIO(content)) as given:
            assert stored.format == "PNG"
            wanted = "RGBA" if mode == "RGBA" else "RGB"
            assert stored.convert(wanted).tobytes() == given.convert(wanted).tobytes()
            if options.get("lossless"):
                assert stored.tobytes() == image.tobytes()

    @pytest.mark.parametrize("pillow_format", ["JPEG", "WEBP", "AVIF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_stand_upright_as_their_exif_says(
        self, path: Path, pillow_format: str, orientation: int
    ) -> None:
        """A PNG has no such note: turned as it lies it would stay."""
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        content = encoded(noise("RGB"), pillow_format, exif=exif)
        path.write_bytes(content)
        info = make_png(path, LIMITS)
        assert info.size == ((61, 47) if orientation < 5 else (47, 61))
        with Image.open(path) as stored, Image.open(BytesIO(content)) as given:
            assert stored.size == info.size
            assert stored.tobytes() == ImageOps.exif_transpose(given).convert("RGB").tobytes()

    @pytest.mark.filterwarnings("ignore")  # as the child has it
    @pytest.mark.parametrize("note", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"noise" * 9])
    def test_whatever_is_wrong_with_their_exif(self, path: Path, note: bytes) -> None:
        path.write_bytes(encoded(noise("RGB"), "JPEG", exif=note))
        assert make_png(path, LIMITS).size == (61, 47)

    def test_turning_takes_memory_as_well(self, path: Path) -> None:
        picture = Image.new("RGB", (1000, 1000))
        enough = Limits(10**6, int(4.2 * 10**6) + (8 << 20))
        path.write_bytes(encoded(picture, "JPEG"))
        assert make_png(path, enough).size == (1000, 1000)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        path.write_bytes(encoded(picture, "JPEG", exif=exif))
        with pytest.raises(TooLargeToDecode):
            make_png(path, enough)
        assert verify(path, enough).size == (1000, 1000)  # as it lies

    def test_cmyk_becomes_rgb_without_the_cmyk_profile(self, path: Path) -> None:
        content = encoded(noise("CMYK"), "JPEG", icc_profile=b"profile of a printing press")
        path.write_bytes(content)
        make_png(path, LIMITS)
        with Image.open(path) as stored, Image.open(BytesIO(content)) as given:
            assert stored.mode == "RGB"
            assert stored.tobytes() == given.convert("RGB").tobytes()
            assert "icc_profile" not in stored.info

    def test_an_rgb_profile_stays(self, path: Path) -> None:
        path.write_bytes(encoded(noise(), "JPEG", icc_profile=b"profile of a screen"))
        make_png(path, LIMITS)
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
            make_png(path, LIMITS)
        assert path.read_bytes() == content

    def test_what_follows_the_end_is_gone(self, path: Path) -> None:
        path.write_bytes(encoded(noise(), "JPEG") + b"<script>alert(1)</script>")
        make_png(path, LIMITS)
        assert b"script" not in path.read_bytes()

    @pytest.mark.parametrize("pillow_format", ["PNG", "BMP", "TIFF", "PPM", "ICO"])
    def test_other_formats_are_never_opened(self, path: Path, pillow_format: str) -> None:
        path.write_bytes(encoded(noise("RGB", (32, 32)), pillow_format))
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, LIMITS)

    def test_junk_is_refused(self, path: Path) -> None:
        path.write_bytes(random.Random(1).randbytes(5000))
        with pytest.raises(BadPicture, match="damaged"):
            make_png(path, LIMITS)


# Pillow warns of sizes well above our own limit; beyond twice its warning it refuses by itself.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
class TestBombs:
    def test_a_large_picture_in_few_bytes_is_refused_before_it_is_unpacked(
        self, path: Path
    ) -> None:
        path.write_bytes(encoded(Image.new("RGB", (2000, 2000)), "WEBP", lossless=True))
        assert path.stat().st_size < 1000
        with pytest.raises(BadPicture, match="too many pixels"):
            make_png(path, LIMITS)


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
            make_png(path, LIMITS)
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
            make_png(path, LIMITS)

    def test_a_missing_file_is_not_a_damaged_picture(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            make_png(path, LIMITS)


@pytest.mark.parametrize("pillow_format", ["GIF", "WEBP"])
def test_an_animation_that_takes_too_long_is_too_large_and_not_damaged(
    path: Path, pillow_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [noise(), noise().transpose(Image.Transpose.ROTATE_180)]
    path.write_bytes(encoded(frames[0], pillow_format, save_all=True, append_images=frames[1:]))
    assert verify(path, LIMITS).size == (61, 47)
    monkeypatch.setattr(picture, "ANIMATION_SECONDS", 0)
    with pytest.raises(TooLargeToDecode) as raised:
        verify(path, LIMITS)
    assert raised.value.size == (61, 47)
    path.write_bytes(encoded(frames[0], pillow_format))
    assert verify(path, LIMITS).size == (61, 47)  # one frame is looked at whatever it takes
