"""Keeps a worker that lives for weeks from growing."""

import ctypes
import gc

M_MMAP_THRESHOLD = -3  # <malloc.h>
LARGE_BYTES = 128 << 10  # where glibc begins, before it adapts


def keep_small() -> None:
    """Call it once all modules are loaded."""
    _give_large_buffers_back()
    _leave_modules_alone()


def _give_large_buffers_back() -> None:
    """Have glibc take large buffers from the system, and give them back, each by itself.

    asyncio reads into a new buffer of 256 KiB each time and then shrinks it to what has come.
    glibc takes such from its heap as soon as it has seen one freed, for then its threshold
    adapts; what is left between the small pieces is too small for the next. At five jobs a second
    a worker grew by 20 to 30 MiB an hour that way, with 4 MiB in use. A threshold that is set does
    not adapt. Other C libraries have neither the habit nor the call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def _leave_modules_alone() -> None:
    """Modules are not garbage: to look through them again and again takes a tenth of the time.

    The second look tells the collector how little is left: it waits for a quarter of what it last
    counted in new garbage, which without that would be a quarter of all modules.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
