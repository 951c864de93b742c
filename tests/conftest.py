"""Real servers for the tests: each xdist worker runs its own PostgreSQL and Valkey."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from alembic.config import Config
from sqlalchemy.ext.asyncio import AsyncEngine

from alembic import command
from app.config import Settings, get_settings
from app.db import create_engine, create_sessions
from app.jobs.repository import JobRepository
from scripts.servers import Postgres, Valkey
from tests.doubles.replicate_server import ReplicateServer
from tests.s3_server import s3_server

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A running PostgreSQL with the schema that Alembic builds."""
    with Postgres(tmp_path_factory.mktemp("postgres")) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DATABASE_URL", server.url)
            get_settings.cache_clear()
            command.upgrade(Config(ROOT / "alembic.ini"), "head")
        get_settings.cache_clear()
        with psycopg.connect(server.sync_url, autocommit=True) as connection:
            # Tests kill processes, never the kernel; on a busy disk one flush may take seconds.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A running Valkey."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def database(postgres: Postgres) -> Postgres:
    """PostgreSQL with empty tables."""
    with psycopg.connect(postgres.sync_url, autocommit=True) as connection:
        connection.execute(
            "TRUNCATE jobs, attempts, outputs, deletions, workers, job_counts CASCADE"
        )
    return postgres


@pytest.fixture
def settings(database: Postgres, valkey: Valkey, tmp_path: Path) -> Settings:
    """Settings for the test's own servers and folders; the mock answers at once, never fails."""
    return Settings(
        _env_file=None,
        database_url=database.url,
        redis_url=valkey.url,
        storage_path=tmp_path / "media",
        replicate_mock_delay_min=0,
        replicate_mock_delay_max=0,
        replicate_mock_failure_rate=0,
    )


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine on the test's own event loop."""
    engine = create_engine(settings)
    yield engine
    await engine.dispose()


@pytest.fixture
def repository(engine: AsyncEngine) -> JobRepository:
    """The repository on the test's database."""
    return JobRepository(create_sessions(engine))


@pytest.fixture(scope="session")
def replicate_server() -> Iterator[ReplicateServer]:
    """The double of Replicate, in a process of its own."""
    with ReplicateServer() as server:
        yield server


@pytest.fixture
def replicate(replicate_server: ReplicateServer) -> ReplicateServer:
    """The double of Replicate with an empty ledger."""
    replicate_server.reset()
    return replicate_server


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real S3 server with a bucket `media`."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url
