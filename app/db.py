"""The async database engine, its pool and its time-outs."""

from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from app.config import Settings

Sessions = async_sessionmaker[AsyncSession]


def create_engine(settings: Settings) -> AsyncEngine:
    """Make the engine of this process. It belongs to the event loop that first uses it.

    Every wait is bounded (seconds), so that a database that is away or silent gives an error
    instead of a hanging request: 3 to connect, 3 for a pooled connection, 4 for a statement.
    """
    return create_async_engine(
        settings.async_database_url,
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=3,
        pool_recycle=1800,
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
    """Make the factory of short sessions; loaded rows stay readable after the commit."""
    return async_sessionmaker(engine, expire_on_commit=False)
