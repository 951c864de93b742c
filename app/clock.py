"""A clock that goes on while the machine sleeps.

`time.monotonic` stands still then (on Linux), and what was a second ago may be an hour ago.
"""

import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Return seconds since some moment in the past; only differences mean anything."""
    return time.clock_gettime(_CLOCK)
