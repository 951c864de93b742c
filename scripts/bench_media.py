"""What keeping and serving a picture costs, as ratios within one run.

Usage: python scripts/bench_media.py [--rounds 5]

Keeping: a photo-like picture of 1024 x 1024 pixels, the contestants taking turns. CPU time, that of
the decoder's child included. Fails when WebP to PNG costs more than a tenth of Pillow's default, or
a PNG that passes through more than a half of decoding it. Serving: see `bench_serving.py`.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from app.jobs.outputs import DECODE_MEMORY_BYTES
from app.media.decoder import Decoder
from scripts import bench_serving
from tests.unit.media.corpus import arrive

SIDE = 1024
CONVERT_LIMIT = 0.1
PASS_LIMIT = 0.5
SERVED_REQUESTS = 300
PIECE_BYTES = 1 << 16  # about what a download comes in

Contestant = Callable[[], object]


def main() -> None:
    """Print the costs and the ratios; fail when one is above its limit, or cannot be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    costs = measure(rounds)
    for name, seconds in costs.items():
        print(f"{name:40} {seconds * 1000:8.1f} ms CPU")
    converted = costs["webp to png, ours"] / costs["webp to png, Pillow's default"]
    passed = costs["png passed through"] / costs["png decoded by Pillow"]
    print(f"webp to png: {converted:.3f} of Pillow's default (limit {CONVERT_LIMIT})")
    print(f"png passed through: {passed:.3f} of decoding it (limit {PASS_LIMIT})")
    served = bench_serving.bench(SERVED_REQUESTS, rounds)
    sys.exit(served or converted > CONVERT_LIMIT or passed > PASS_LIMIT)


def measure(rounds: int) -> dict[str, float]:
    """Return the CPU seconds of each contestant, the median of so many rounds."""
    picture = photo()
    webp, png = _encoded(picture, "WEBP"), _encoded(picture, "PNG")
    decoder = Decoder(max_pixels=SIDE * SIDE, memory_bytes=DECODE_MEMORY_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"

        def ours() -> None:
            path.write_bytes(webp)
            decoder.make_png(path, "{}")

        contestants: dict[str, Contestant] = {
            "webp to png, Pillow's default": lambda: _convert(webp, path),
            "webp to png, ours": ours,
            "png decoded by Pillow": lambda: _opened(png).close(),
            "png passed through": lambda: arrive(path, png, SIDE**2, PIECE_BYTES),
        }
        return _take_turns(contestants, rounds, decoder)


def photo() -> Image.Image:
    """Return a picture that compresses as a photograph does: soft shapes under fine noise."""
    rng = random.Random(1)
    channels = []
    for _ in range(3):
        coarse = Image.frombytes("L", (SIDE // 8,) * 2, rng.randbytes((SIDE // 8) ** 2))
        soft = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        light = Image.radial_gradient("L").resize((SIDE, SIDE))
        fine = Image.frombytes("L", (SIDE, SIDE), rng.randbytes(SIDE**2))
        channels.append(Image.blend(Image.blend(soft, light, 0.6), fine, 0.02))
    return Image.merge("RGB", channels)


def _take_turns(
    contestants: dict[str, Contestant], rounds: int, decoder: Decoder
) -> dict[str, float]:
    """Run all once for warmth, then so many rounds."""
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            before = _cpu_seconds(decoder)
            run()
            if number:
                costs[name].append(_cpu_seconds(decoder) - before)
    return {name: median(seconds) for name, seconds in costs.items()}


def _cpu_seconds(decoder: Decoder) -> float:
    """Return the CPU time of this process and of the decoder's child so far."""
    own = time.process_time()
    if decoder.child_pid is None:
        return own
    # By the process's own CPU clock, as in clock_getcpuclockid(3): /proc counts in hundredths.
    return own + time.clock_gettime(~decoder.child_pid << 3 | 2)


def _convert(webp: bytes, path: Path) -> None:
    with _opened(webp) as picture:
        picture.save(path, "PNG")


def _opened(content: bytes) -> Image.Image:
    picture = Image.open(BytesIO(content))
    picture.load()
    return picture


def _encoded(picture: Image.Image, pillow_format: str) -> bytes:
    file = BytesIO()
    picture.save(file, pillow_format, quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
