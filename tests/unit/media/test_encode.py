"""PNG as we write it: not a pixel lost, the parameters inside."""

import importlib.util
import json
import random
from io import BytesIO

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from app.media import encode
from app.media.encode import write_png
from tests.unit.media.corpus import noise

MODES = ["RGB", "RGBA", "L", "LA", "P"]


@pytest.fixture(params=["fpng", "pillow"])
def _either_encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pillow":
        monkeypatch.setattr(encode, "fpng", None)


def written(picture: Image.Image, parameters: str = "") -> PngImageFile:
    file = BytesIO()
    write_png(picture, file, parameters)
    read = Image.open(BytesIO(file.getvalue()))
    read.load()
    assert isinstance(read, PngImageFile)
    return read


def smooth(mode: str, size: tuple[int, int]) -> Image.Image:
    """What compresses: the encoders take other ways for it than for noise."""
    return Image.linear_gradient("L").resize(size).convert(mode)


def test_the_fast_encoder_is_there_where_the_tests_run() -> None:
    assert importlib.util.find_spec("fpng") is not None


@pytest.mark.usefixtures("_either_encoder")
class TestEither:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("make", [noise, smooth, Image.new])
    @pytest.mark.parametrize(
        "size", [(1, 1), (1, 2), (2, 1), (3, 1), (1, 300), (300, 1), (61, 47), (256, 256)]
    )
    def test_loses_no_pixel(self, mode: str, make: object, size: tuple[int, int]) -> None:
        assert callable(make)
        picture = make(mode, size)
        read = written(picture)
        assert (read.mode, read.size) == (mode, size)
        assert read.tobytes() == picture.tobytes()

    def test_loses_none_of_random_sizes_and_contents(self) -> None:
        rng = random.Random(4)
        for _ in range(150):
            mode, size = rng.choice(["RGB", "RGBA"]), (rng.randint(1, 90), rng.randint(1, 90))
            colours = [rng.randbytes(len(mode)) for _ in range(rng.choice([2, 5, 300]))]
            pixels = b"".join(rng.choices(colours, k=size[0] * size[1]))
            assert written(Image.frombytes(mode, size, pixels)).tobytes() == pixels

    def test_colours_that_nobody_sees_stay_too(self) -> None:
        picture = noise("RGB").convert("RGBA")
        picture.putalpha(0)
        assert written(picture).tobytes() == picture.tobytes()

    @pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "F"])
    def test_other_modes_become_rgb_without_their_profile(self, mode: str) -> None:
        picture = Image.new(mode, (20, 10))
        picture.info["icc_profile"] = b"profile of a printing press"
        read = written(picture)
        assert read.mode == "RGB"
        assert "icc_profile" not in read.info

    @pytest.mark.parametrize("mode", MODES)
    def test_a_profile_stays(self, mode: str) -> None:
        picture = noise(mode)
        picture.info["icc_profile"] = b"profile of a screen" * 200
        assert written(picture).info["icc_profile"] == picture.info["icc_profile"]

    @pytest.mark.parametrize("key", [(10, 20, 30), b"\x00\xff"])
    def test_a_transparent_colour_stays(self, key: object) -> None:
        picture = noise("RGB" if isinstance(key, tuple) else "P")
        picture.info["transparency"] = key
        read = written(picture)
        assert read.convert("RGBA").tobytes() == picture.convert("RGBA").tobytes()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "prompt", ["a lighthouse", "ein Türmchen", "灯台 🌅", "a\0b", "x" * 99_999]
    )
    def test_the_parameters_are_inside(self, mode: str, prompt: str) -> None:
        text = json.dumps({"prompt": prompt, "seed": 7}, ensure_ascii=False)
        read = written(noise(mode), text)
        assert read.text == {"parameters": text}
        assert json.loads(read.text["parameters"]) == {"prompt": prompt, "seed": 7}
        assert read.tobytes() == noise(mode).tobytes()


def test_a_large_picture_is_written_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_write_fast", None)
    large = Image.new("RGB", (3000, 2001))
    assert written(large).size == large.size
