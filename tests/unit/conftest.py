"""Unit tests touch no network: a socket that is not a local pipe fails the test."""

from collections.abc import Iterator

import pytest
from pytest_socket import disable_socket, enable_socket


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    disable_socket(allow_unix_socket=True)  # asyncio's own loop wakes itself by a socket pair
    yield
    enable_socket()
