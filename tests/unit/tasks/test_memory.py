"""A process that gives back does not keep what it has read."""

import subprocess
import sys

import pytest

# As asyncio reads: into a large buffer, of which a small piece stays for a while; once glibc has
# seen a large one freed. Prints by how many KiB the process has grown.
GROWTH = """
import sys
from pathlib import Path
from app.tasks.memory import give_back
def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l)
    return int(line.split()[1])
import os, random
random.seed(1)
bytes(1 << 20)
reading, writing = os.pipe()
pieces = [b""] * 500
before = resident()
for n in range(20_000):
    size = random.choice((600, 3_000, 9_000, 40_000))
    os.write(writing, bytes(size))
    pieces[random.randrange(len(pieces))] = os.read(reading, 256 << 10)
if sys.argv[1] == "given back":
    give_back()
print(resident() - before - sum(map(len, pieces)) // 1024)
"""


def grown_kib(how: str) -> int:
    process = [sys.executable, "-c", GROWTH, how]
    return int(subprocess.run(process, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_buffers_are_given_back() -> None:
    assert grown_kib("given back") < grown_kib("as it is") / 2
