"""A picture that is not decoded is refused all the same when its end is missing."""

from pathlib import Path

import pytest

from app.media.whole import is_whole
from tests.unit.media.corpus import encoded, noise

FORMATS = ["JPEG", "GIF", "WEBP", "AVIF"]


@pytest.mark.parametrize("pillow_format", FORMATS)
def test_one_that_has_its_end_is_whole(pillow_format: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(encoded(noise(), pillow_format))
    assert is_whole(path, f"image/{pillow_format.lower()}")


def test_what_stands_behind_the_end_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for pillow_format, more in (("JPEG", b"trailer"), ("GIF", bytes(9)), ("WEBP", b"more")):
        path.write_bytes(encoded(noise(), pillow_format) + more)
        assert is_whole(path, f"image/{pillow_format.lower()}")


def test_a_jpeg_that_holds_a_small_one_is_whole_only_with_its_own_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    small = encoded(noise("RGB", (8, 8)), "JPEG")
    content = encoded(noise("RGB", (300, 300)), "JPEG", exif=b"Exif\0\0" + small)
    path.write_bytes(content[:-2])
    assert not is_whole(path, "image/jpeg")


@pytest.mark.parametrize("kept_share", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("pillow_format", FORMATS)
def test_one_that_was_cut_off_is_not(pillow_format: str, kept_share: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = encoded(noise(), pillow_format)
    path.write_bytes(content[: int(len(content) * kept_share)])
    assert not is_whole(path, f"image/{pillow_format.lower()}")


@pytest.mark.parametrize("pillow_format", FORMATS)
@pytest.mark.parametrize("content", [b"\xff\xd8\xff", b"RIFF", b"\0\0\0\1ftyp"])
def test_nor_is_the_beginning_of_one(content: bytes, pillow_format: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert not is_whole(path, f"image/{pillow_format.lower()}")
