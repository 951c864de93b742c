"""Feed damaged pictures to the decoder and see that nothing dies of it.

Usage: python scripts/fuzz_media.py [--count 20000] [--seed 1] [--seconds 3600]

Mutates good files of every format, bit by bit and piece by piece, and has each one checked as
a worker would. Fails when anything but a kept picture or a clean refusal comes out of it, when one
takes more than 5 s, when a kept file is no PNG that decodes, or when memory grows.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from app.jobs.outputs import DECODE_MEMORY_BYTES
from app.media.decoder import Decoder
from app.media.errors import BadPicture
from app.media.sniff import PNG
from tests.unit.media.corpus import SIGNATURE, Sample, arrive, corpus

HANG_SECONDS = 5.0
GROWTH_BYTES = 150 << 20
MAX_PIXELS = 50_000_000
# Every so many kept pictures are decoded here, with Pillow, once more.
RECHECK_EVERY = 10

Mutation = Callable[[random.Random, bytearray], None]


def main() -> None:
    """Fuzz, print the figures, and fail if one of them is bad."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time")
    arguments = parser.parse_args()
    report = fuzz(arguments.count, arguments.seed, arguments.seconds)
    print(report)
    sys.exit(bool(report.faults))


class Report:
    """What came of it; `faults` must stay empty."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest_seconds = 0.0
        self.children: set[int] = set()
        self.grown_bytes = 0

    def __str__(self) -> str:
        lines = [f"{count:7} {outcome}" for outcome, count in self.outcomes.most_common()]
        lines += [
            f"slowest {self.slowest_seconds:.2f} s, children {len(self.children)},"
            f" memory of parent and child together +{self.grown_bytes / 2**20:.0f} MiB",
            f"faults {len(self.faults)}",
            *self.faults[:20],
        ]
        return "\n".join(lines)


def fuzz(count: int, seed: int, seconds: float) -> Report:
    """Keep `count` mutated pictures, or as many as the time allows.

    All of them through the child, and beside every fourth a PNG, which needs none.
    """
    report, rng = Report(), random.Random(seed)
    originals = [sample for sample in corpus() if len(sample.content) < 100_000]
    others = [sample for sample in originals if sample.media_type != PNG]
    pngs = [sample for sample in originals if sample.media_type == PNG]
    decoder = Decoder(max_pixels=MAX_PIXELS, memory_bytes=DECODE_MEMORY_BYTES)
    before = _resident_bytes(os.getpid())
    ends_at = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        for number in range(count):
            if time.monotonic() > ends_at:
                break
            for sample in [rng.choice(others), *rng.choices(pngs, k=number % 4 == 0)]:
                content = mutated(rng, sample)
                name = f"#{number} of seed {seed}: {sample.name}"
                _keep(decoder, path, sample.media_type, content, report, name)
            grown = _resident_bytes(os.getpid()) - before + _child_bytes(decoder, report)
            report.grown_bytes = max(report.grown_bytes, grown)
    if report.grown_bytes > GROWTH_BYTES:
        report.faults.append("memory grew by more than 150 MiB")
    return report


def mutated(rng: random.Random, sample: Sample) -> bytes:
    """Return the file with one to four kinds of damage; its first bytes stay, or it is no picture.

    Half of the PNGs get their checksums made right again, or nothing behind those would be tried.
    """
    head, body = sample.content[:12], bytearray(sample.content[12:])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if body:
            rng.choice(MUTATIONS)(rng, body)
    if sample.media_type == PNG and rng.random() < 0.5:
        return _with_right_checksums(head + bytes(body))
    return head + bytes(body)


def _with_right_checksums(png: bytes) -> bytes:
    content, at = bytearray(png), len(SIGNATURE)
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4])
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(content)


def _keep(
    decoder: Decoder, path: Path, media_type: str, content: bytes, report: Report, name: str
) -> None:
    began = time.monotonic()
    try:
        _store(decoder, path, media_type, content)
        outcome = f"{media_type} kept"
        if report.outcomes.total() % RECHECK_EVERY == 0:
            _recheck(path, report, name)
    except BadPicture as error:
        outcome = f"{media_type} refused: {error}"
    except Exception as error:
        outcome = f"{media_type} {type(error).__name__}"
        report.faults.append(f"{name}: {error!r}")
    took = time.monotonic() - began
    report.outcomes[outcome] += 1
    report.slowest_seconds = max(report.slowest_seconds, took)
    if took > HANG_SECONDS:
        report.faults.append(f"{name}: {took:.1f} s")


def _store(decoder: Decoder, path: Path, media_type: str, content: bytes) -> None:
    if media_type == PNG:
        arrive(path, content, MAX_PIXELS)
    else:
        path.write_bytes(content)
        decoder.make_png(path, "{}")


def _recheck(path: Path, report: Report, name: str) -> None:
    try:
        with Image.open(BytesIO(path.read_bytes()), formats=["PNG"]) as picture:
            picture.load()
    except Exception as error:
        report.faults.append(f"{name}: kept, and yet {error!r}")


def _flip_bit(rng: random.Random, body: bytearray) -> None:
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)


def _set_bytes(rng: random.Random, body: bytearray) -> None:
    at = rng.randrange(len(body))
    body[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)])


def _set_early_byte(rng: random.Random, body: bytearray) -> None:
    """Where sizes and tables stand."""
    body[rng.randrange(min(60, len(body)))] = rng.randrange(256)


def _cut(rng: random.Random, body: bytearray) -> None:
    del body[rng.randrange(len(body)) :]


def _remove(rng: random.Random, body: bytearray) -> None:
    at = rng.randrange(len(body))
    del body[at : at + rng.randint(1, 50)]


def _repeat(rng: random.Random, body: bytearray) -> None:
    at = rng.randrange(len(body))
    body[at:at] = body[at : at + rng.randint(1, 200)] * rng.randint(1, 20)


def _scramble(rng: random.Random, body: bytearray) -> None:
    at = rng.randrange(len(body))
    body[at : at + 100] = rng.randbytes(len(body[at : at + 100]))


MUTATIONS: list[Mutation] = [
    *(_flip_bit, _set_bytes, _set_early_byte, _set_early_byte),
    *(_cut, _remove, _repeat, _scramble),
]


def _child_bytes(decoder: Decoder, report: Report) -> int:
    pid = decoder.child_pid
    if pid is None:
        return 0
    report.children.add(pid)
    return _resident_bytes(pid)


def _resident_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


if __name__ == "__main__":
    main()
