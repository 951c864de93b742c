"""The async database engine, its pool and its time-outs."""

from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from app.config import Settings

Sessions = async_sessionmaker[AsyncSession]

# Within which a request gets a pooled connection, or a 503.
POOL_TIMEOUT_SECONDS = 3.0


def create_engine(
    settings: Settings,
    *,
    pool_size: int | None = None,
    pool_timeout_seconds: float = POOL_TIMEOUT_SECONDS,
) -> AsyncEngine:
    """Make an engine. It belongs to the event loop that first uses it.

    Every wait is bounded, so that a database that is away or silent gives an error instead of
    a hanging request: 3 seconds to connect, `pool_timeout_seconds` for a pooled connection, 4
    for a statement. The pool is `DATABASE_POOL_SIZE` connections unless `pool_size` is given.
    """
    return create_async_engine(
        settings.async_database_url,
        pool_size=pool_size or settings.database_pool_size,
        max_overflow=0,
        pool_timeout=pool_timeout_seconds,
        hide_parameters=True,  # an error's text ends in a log, and prompts do not belong there
        connect_args={
            "timeout": 3,
            "command_timeout": 4,
            "server_settings": {
                "application_name": "replicate-media-service",
                "idle_in_transaction_session_timeout": "10s",
            },
        },
    )


def create_sessions(engine: AsyncEngine) -> Sessions:
    """Make the factory of short sessions; loaded rows stay readable after the commit.

    No session holds rows that its own UPDATE changes, so none need look for them: a tenth of its
    time.
    """
    options = {"synchronize_session": False}
    return async_sessionmaker(engine, expire_on_commit=False, execution_options=options)


def autocommitting(sessions: Sessions) -> Sessions:
    """Make sessions on the same connections in which each statement is a transaction of its own."""
    engine: AsyncEngine = sessions.kw["bind"]
    return create_sessions(engine.execution_options(isolation_level="AUTOCOMMIT"))
