"""The drawn pictures: exact size, always the same, captioned, and never a crash."""

import hashlib
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from app.providers import pictures
from app.providers.pictures import draw

LONGEST = ("a very long prompt " * 600)[:10_000]


def opened(data: bytes) -> Image.Image:
    picture = Image.open(BytesIO(data))
    picture.load()
    return picture


def picture_of(prompt: str, *, seed: int = 1, width: int = 320, height: int = 240) -> Image.Image:
    return opened(draw(prompt, seed=seed, width=width, height=height))


def caption_box(prompt: str, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Where the caption is: left, top, right and bottom of all that it changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_caption", lambda *_: None)
        bare = picture_of(prompt, width=width, height=height)
    return ImageChops.difference(bare, picture_of(prompt, width=width, height=height)).getbbox()


def pixels_sha256(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("width", "height"),
    [(16, 16), (17, 64), (320, 240), (1344, 768), (2048, 16), (16, 2048)],
)
@pytest.mark.parametrize("prompt", ["lighthouse at night", "city", "forest"])
def test_has_exactly_the_size_asked_for(prompt: str, width: int, height: int) -> None:
    picture = picture_of(prompt, width=width, height=height)
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (width, height))


def test_the_largest_size_is_drawn_too() -> None:
    assert picture_of("hills", width=2048, height=2048).size == (2048, 2048)


def test_same_arguments_give_the_same_bytes() -> None:
    assert draw("a boat", seed=7, width=200, height=100) == draw(
        "a boat", seed=7, width=200, height=100
    )


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_draws_the_same_bytes(hash_seed: str) -> None:
    # Sets of strings are ordered differently in every process: none may reach the picture.
    prompts = ["a neon city in a forest by the sea", "a lighthouse", "no hint at all"]
    program = (
        "import sys; from app.providers.pictures import draw\n"
        "for prompt in sys.argv[1:]:\n"
        "    sys.stdout.buffer.write(draw(prompt, seed=3, width=160, height=160))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *prompts],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    here = [draw(prompt, seed=3, width=160, height=160) for prompt in prompts]
    assert done.stdout == b"".join(here)


def test_every_seed_gives_another_composition() -> None:
    drawn = {pixels_sha256(picture_of("a boat", seed=seed)) for seed in range(10)}
    assert len(drawn) == 10


def test_every_prompt_gives_another_picture() -> None:
    # Without a caption, so that it is the landscape that differs.
    drawn = {pixels_sha256(picture_of("日" * n)) for n in range(1, 11)}
    assert len(drawn) == 10


@pytest.mark.parametrize("seed", [-1, 0, 2**32 - 1, 2**63, 10**40])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert picture_of("a boat", seed=seed).info["seed"] == str(seed)


@pytest.mark.parametrize(
    "prompt",
    [
        "a boat",
        "",
        "  \n\t ",
        "日本の灯台",
        "🎈🎈🏳️‍🌈",
        "مرحبا بالعالم",
        "\x01\x7f\u200b\ufeff",
        LONGEST,
        "x" * 10_000,
    ],
    ids=[
        "plain",
        "empty",
        "blank",
        "japanese",
        "emoji",
        "arabic",
        "control",
        "longest",
        "unbroken",
    ],
)
def test_any_prompt_is_drawn_and_kept_in_the_file(prompt: str) -> None:
    for width, height in ((16, 16), (320, 240)):
        assert picture_of(prompt, width=width, height=height).info["prompt"] == prompt


def test_a_lone_surrogate_is_replaced() -> None:
    assert picture_of("a \ud800 boat").info["prompt"] == "a ? boat"


@pytest.mark.parametrize("prompt", ["a boat", "café 日本", LONGEST, "W" * 500, "i" * 500])
@pytest.mark.parametrize(("width", "height"), [(512, 512), (512, 160), (160, 512), (2048, 64)])
def test_caption_stays_within_the_lower_third(prompt: str, width: int, height: int) -> None:
    box = caption_box(prompt, width, height)
    assert box is not None
    left, top, right, bottom = box
    assert 0 < left < right < width
    assert bottom < height
    assert height - top < max(0.34 * height, 40)


def test_caption_is_centred() -> None:
    box = caption_box("sailing past the harbour wall", 800, 600)
    assert box is not None
    assert abs((box[0] + box[2]) / 2 - 400) <= 4


def test_a_longer_prompt_takes_more_lines_but_no_more_than_three() -> None:
    tops = []
    for prompt in ("a boat", "a boat " * 10, "a boat " * 20, "a boat " * 100):
        box = caption_box(prompt, 640, 640)
        assert box is not None
        tops.append(box[1])
    assert tops[0] > tops[1] > tops[2]
    assert abs(tops[2] - tops[3]) <= 2


@pytest.mark.parametrize("prompt", ["", "日本の灯台", "🎈"])
def test_a_prompt_the_font_cannot_write_leaves_no_caption(prompt: str) -> None:
    assert caption_box(prompt, 640, 640) is None


def test_a_tiny_picture_has_no_caption() -> None:
    assert caption_box("a boat", 32, 32) is None


@pytest.mark.parametrize("prompt", ["hills", "mountains", "forest", "city", "sea", "lighthouse"])
def test_a_picture_is_never_flat(prompt: str) -> None:
    picture = picture_of(prompt)
    assert len(picture.getcolors(maxcolors=2**24) or []) > 500
    assert ImageStat.Stat(picture.convert("L")).stddev[0] > 10


@pytest.mark.parametrize("place", ["hills", "sea", "city", "forest", "mountains"])
def test_words_choose_the_light(place: str) -> None:
    def brightness(light: str) -> float:
        return ImageStat.Stat(picture_of(f"{place} at {light}").convert("L")).mean[0]

    assert brightness("noon") > brightness("sunset") > brightness("midnight")


def test_a_very_long_strip_costs_no_more_than_a_large_square() -> None:
    def cpu_seconds(width: int, height: int) -> float:
        costs = []
        for seed in range(3):
            started = time.process_time()
            draw("a forest", seed=seed, width=width, height=height)
            costs.append(time.process_time() - started)
        return min(costs)

    assert cpu_seconds(2048, 16) < 2 * cpu_seconds(1024, 1024)
