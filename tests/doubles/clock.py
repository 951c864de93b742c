"""The double's own clock: it may be as wrong as it likes, like anybody's."""

import time

ahead_seconds = 0.0


def now() -> float:
    """Return the time, seconds since 1970."""
    return time.time() + ahead_seconds
