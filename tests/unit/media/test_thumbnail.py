"""Thumbnails of every kind of picture; what is none is refused."""

import io
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from app.media import thumbnail
from app.media.errors import BadPicture
from app.media.picture import Limits

LIMITS = Limits(1_000_000, 120 << 20)
GREY = Image.linear_gradient("L").resize((1000, 600))
RGB = Image.merge("RGB", (GREY, GREY.rotate(180), GREY))
CLEAR = Image.merge("RGBA", (*RGB.split(), GREY))
DEEP = Image.frombytes("I;16", GREY.size, bytes(b for v in GREY.tobytes() for b in (0, v)))


def save(picture: Image.Image, path: Path) -> Path:
    picture.save(path)
    return path


def small_of(path: Path, size: int) -> Image.Image:
    """Make the file a thumbnail; return it."""
    found = thumbnail.make(path, LIMITS, size)
    small = Image.open(io.BytesIO(path.read_bytes()))
    assert small.size == found.size
    return small


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        (RGB, "a.png"),
        (RGB, "a.jpg"),
        (RGB, "a.webp"),
        (RGB, "a.avif"),
        (RGB.quantize(64), "palette.png"),
        (RGB.quantize(64), "a.gif"),
        (RGB.convert("CMYK"), "cmyk.jpg"),
        (CLEAR, "clear.png"),
        (GREY, "grey.png"),
        (GREY.convert("LA"), "la.png"),
        (GREY.convert("1"), "bits.png"),
        (DEEP, "deep.png"),
    ],
)
def test_it_looks_like_the_picture(picture: Image.Image, name: str, tmp_path: Path) -> None:
    small = small_of(save(picture, tmp_path / name), 256).convert("RGB")
    assert small.size == (256, 154)
    like = picture if picture is not DEEP else GREY
    expected = like.convert("RGB").resize(small.size, Image.Resampling.BOX)
    for at in ((10, 10), (128, 77), (250, 150)):
        for value, wanted in zip(small.getpixel(at), expected.getpixel(at), strict=True):  # type: ignore[arg-type]
            assert abs(value - wanted) < 24


def test_transparency_stays(tmp_path: Path) -> None:
    small = small_of(save(CLEAR, tmp_path / "a.png"), 128)
    assert small.mode == "RGBA"
    assert small.getchannel("A").getpixel((64, 0)) in range(8)


def test_a_small_picture_is_not_enlarged(tmp_path: Path) -> None:
    path = save(RGB.resize((40, 20)), tmp_path / "a.png")
    assert small_of(path, 512).size == (40, 20)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_a_line_keeps_a_pixel(size: tuple[int, int], tmp_path: Path) -> None:
    small = small_of(save(RGB.resize(size), tmp_path / "a.png"), 128)
    assert (max(small.size), min(small.size)) == (128, 1)


def test_it_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right
    RGB.save(tmp_path / "a.jpg", exif=exif)
    small = small_of(tmp_path / "a.jpg", 256)
    assert small.size == (154, 256)
    upright = small_of(save(RGB.rotate(-90, expand=True), tmp_path / "b.jpg"), 256)
    for at in ((10, 10), (77, 128), (150, 250)):
        for value, wanted in zip(small.getpixel(at), upright.getpixel(at), strict=True):  # type: ignore[arg-type]
            assert abs(value - wanted) < 24


def test_of_an_animation_it_is_the_first_picture(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (300, 300), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    small = small_of(tmp_path / "a.gif", 128).convert("RGB")
    red, _, blue = small.getpixel((60, 60))  # type: ignore[misc]
    assert red > 200 > 50 > blue


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [save(RGB, tmp_path / name) for name in ("a.png", "b.png")]
    for path in paths:
        thumbnail.make(path, LIMITS, 256)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_too_many_pixels_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(RGB, tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(BadPicture, match="too many pixels"):
        thumbnail.make(path, Limits(1000 * 600 - 1, 120 << 20), 256)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"<svg></svg>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadPicture):
        thumbnail.make(tmp_path / "a.png", LIMITS, 256)


def test_half_a_picture_is_refused(tmp_path: Path) -> None:
    path = save(RGB, tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadPicture):
        thumbnail.make(path, LIMITS, 256)


def test_a_lost_file_is_not_the_pictures_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        thumbnail.make(tmp_path / "a.png", LIMITS, 256)
