"""The size in a WebP's header is the one that Pillow finds."""

from typing import Any

import pytest
from PIL import Image

from app.media import webp
from tests.unit.media.corpus import encoded, noise


@pytest.mark.parametrize("size", [(1, 1), (61, 47), (300, 2), (1, 16_383)])
@pytest.mark.parametrize(
    "options",
    [{}, {"lossless": True}, {"icc_profile": b"profile"}, {"save_all": True}],
    ids=["VP8", "VP8L", "VP8X", "one frame"],
)
def test_it_is_the_picture_s_size(size: tuple[int, int], options: dict[str, Any]) -> None:
    content = encoded(Image.new("RGB", size), "WEBP", **options)
    assert webp.canvas(content[: webp.HEAD_BYTES]) == size


def test_of_an_animation_it_is_the_canvas() -> None:
    content = encoded(noise(), "WEBP", save_all=True, append_images=[noise().rotate(180)])
    assert content[12:16] == b"VP8X"
    assert webp.canvas(content[: webp.HEAD_BYTES]) == noise().size


@pytest.mark.parametrize(
    "head", [b"", b"RIFF", b"RIFF1234WEBP", b"RIFF1234WEBPJUNK" + bytes(14), b"\xff\xd8" * 20]
)
def test_others_have_none(head: bytes) -> None:
    assert webp.canvas(head) is None
