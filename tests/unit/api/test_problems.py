"""Which errors mean that the database is away."""

import socket
from typing import Any

import pytest
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.api.problems import is_database_away


class PostgresError(Exception):
    """As asyncpg's: it carries the server's code."""

    def __init__(self, sqlstate: str) -> None:
        self.sqlstate = sqlstate


def wrapped(kind: Any, origin: Exception, *, invalidated: bool = False) -> Exception:
    error: Exception = kind("SELECT 1", None, origin, connection_invalidated=invalidated)
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        socket.gaierror(),
        TimeoutError(),
        OSError("Multiple exceptions"),
        PoolTimeout(),
        wrapped(OperationalError, Exception()),
        wrapped(InterfaceError, Exception()),
        wrapped(DBAPIError, PostgresError("57P01")),  # admin shutdown
        wrapped(DBAPIError, PostgresError("57P03")),  # starting up
        wrapped(DBAPIError, PostgresError("53300")),  # too many connections
        wrapped(DBAPIError, PostgresError("08006")),
        wrapped(DBAPIError, Exception(), invalidated=True),
        PostgresError("28P01"),
        PostgresError("3D000"),
        PostgresError("25006"),
    ],
)
def test_away(error: Exception) -> None:
    assert is_database_away(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        RuntimeError(),
        wrapped(IntegrityError, PostgresError("23505")),
        wrapped(ProgrammingError, PostgresError("42P01")),
        wrapped(DBAPIError, PostgresError("22021")),
        PostgresError("22021"),
    ],
)
def test_our_own_mistakes_are_not(error: Exception) -> None:
    assert not is_database_away(error)
