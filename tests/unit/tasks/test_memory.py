"""A process does not keep what it has read."""

import ctypes
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

# Each large block is a mapping of its own, the second as well: glibc by itself takes it from its
# heap as soon as it has seen one freed. `hblks` (mallinfo(3)) counts the mappings.
MAPPINGS = """
import ctypes
from app.tasks import memory

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
{call}
for _ in range(2):
    before = mallinfo2().hblks
    block = bytearray(256 * 1024)
    print(mallinfo2().hblks - before, end=" ")
    del block
"""


def grown_kib(how: str) -> int:
    process = [sys.executable, "-c", GROWTH, how]
    return int(subprocess.run(process, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_buffers_are_given_back() -> None:
    assert grown_kib("given back") < grown_kib("as it is") / 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc 2.33 or later")
@pytest.mark.parametrize(
    ("call", "mappings"),
    [("memory.use_one_heap()", "1 1"), ("", "1 0")],
    ids=["with one heap", "by itself"],
)
def test_each_large_block_comes_from_the_system(call: str, mappings: str) -> None:
    process = [sys.executable, "-c", MAPPINGS.format(call=call)]
    done = subprocess.run(process, check=True, capture_output=True, text=True)
    assert done.stdout.split() == mappings.split()
