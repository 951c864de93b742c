"""Makes the database ready, as often as you like: waits for PostgreSQL, creates, migrates.

Uses DATABASE_URL_SYNC, or else DATABASE_URL, from the environment or config.env.
"""

import sys
import time
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.errors import DuplicateDatabase, InsufficientPrivilege, UniqueViolation
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from alembic import command
from app.config import get_settings

ROOT = Path(__file__).resolve().parents[1]
WAIT_SECONDS = 30.0
PAUSE_SECONDS = 0.5
MAINTENANCE_DATABASE = "postgres"


class NotReady(Exception):
    """The database cannot be made ready; the message says why."""


def main() -> int:
    """Returns the exit code: 0 when the schema is up to date."""
    url = make_url(get_settings().sync_database_url)
    try:
        wait_for_database(url)
        migrate()
    except NotReady as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def wait_for_database(url: URL) -> None:
    """Return when the database exists and answers; create it when it is missing.

    Raises: NotReady.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    announced = False
    while True:
        try:
            created = _create_if_missing(url)
            print(f"Database {url.database} {'created' if created else 'is there'}.")
            return
        except psycopg.Error as error:
            if _is_final(error) or time.monotonic() > deadline:
                raise NotReady(f"{_place(url)} cannot be used: {_reason(error)}.") from error
        if not announced:
            print(f"Waiting for {_place(url)} ...")
            announced = True
        time.sleep(PAUSE_SECONDS)


def _create_if_missing(url: URL) -> bool:
    try:
        _connect(url).close()
    except psycopg.OperationalError as refusal:
        # A refused connection has no error code: whether the database is missing must be asked.
        try:
            maintenance = _connect(url.set(database=MAINTENANCE_DATABASE))
        except psycopg.OperationalError:
            raise refusal from None
        with maintenance:
            if _exists(maintenance, url):
                raise
            return _create(maintenance, url)
    return False


def _connect(url: URL) -> "psycopg.Connection[tuple[object, ...]]":
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(dsn, autocommit=True, connect_timeout=5)


def _exists(maintenance: "psycopg.Connection[tuple[object, ...]]", url: URL) -> bool:
    query = "SELECT 1 FROM pg_database WHERE datname = %s"
    return maintenance.execute(query, [url.database]).fetchone() is not None


def _create(maintenance: "psycopg.Connection[tuple[object, ...]]", url: URL) -> bool:
    name = url.database or ""
    try:
        maintenance.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except (DuplicateDatabase, UniqueViolation):
        return False  # somebody else was faster
    except InsufficientPrivilege as error:
        raise NotReady(
            f"The database {name} does not exist and {url.username} may not create it;"
            f' as an administrator: CREATE DATABASE "{name}" OWNER "{url.username}";'
        ) from error
    return True


def _is_final(error: psycopg.Error) -> bool:
    """Whether waiting is useless: a malformed URL, or a server that has asked for the password."""
    if not isinstance(error, psycopg.OperationalError):
        return True
    return error.pgconn is not None and error.pgconn.used_password


def _place(url: URL) -> str:
    return f"PostgreSQL at {url.host or 'the local socket'}:{url.port or 5432}"


def _reason(error: Exception) -> str:
    """The first line, without what libpq puts before the server's own words."""
    line = str(error).strip().partition("\n")[0]
    return line.rpartition("FATAL:")[2].strip().rstrip(".")


def migrate() -> None:
    """Bring the schema up to date. Raises: NotReady."""
    config = Config(ROOT / "alembic.ini")
    try:
        command.upgrade(config, "head")
    except DBAPIError as error:
        raise NotReady(f"The migration failed: {_reason(error.orig or error)}.") from error
    except CommandError as error:
        raise NotReady(f"The migration failed: {_reason(error)}.") from error
    revision = ScriptDirectory.from_config(config).get_current_head()
    print(f"The schema is up to date (revision {revision}).")


if __name__ == "__main__":
    sys.exit(main())
