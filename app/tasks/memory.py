"""Keeps a worker that lives for weeks from growing."""

import asyncio
import ctypes
import gc

GIVE_BACK_EVERY_SECONDS = 60
LARGE_BYTES = 1 << 16
# glibc's malloc.h.
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def use_one_heap() -> None:
    """Have glibc take large blocks from the system each time, and all others from one heap.

    asyncio reads into a new buffer of 256 KiB each time and then shrinks it to what has come. By
    itself glibc takes such from its heap as soon as it has seen one freed; what is left between
    small pieces is too small for the next, and the small pieces come to lie farther and farther
    apart. A heap for each thread only multiplies that: Python allocates in one at a time.
    Call it before there are threads. Other C libraries have neither the habit nor the call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_ARENA_MAX, 1)


def leave_modules_alone() -> None:
    """Modules are not garbage: to look through them again and again takes a tenth of the time.

    Call it once they are loaded. The second look tells the collector how little is left: it waits
    for a quarter of what it last counted in new garbage, which without that would be a quarter of
    all modules.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


async def keep_giving_back() -> None:
    """Give free memory back to the system once a minute, for ever; it takes about 3 ms."""
    while True:
        await asyncio.sleep(GIVE_BACK_EVERY_SECONDS)
        await asyncio.to_thread(give_back)


def give_back() -> None:
    """Have glibc give back every free page, also those between pieces that are in use."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
