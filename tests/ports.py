"""Ports for what the tests start."""

from scripts import servers

_given: set[int] = set()


def free_port() -> int:
    """Return a port that nothing listens on, never the same one twice: some are bound late."""
    while (port := servers.free_port()) in _given:
        pass
    _given.add(port)
    return port
