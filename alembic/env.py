"""Alembic's entry point: runs the migrations with the service's own settings, over psycopg."""

from sqlalchemy import NullPool, create_engine, text
from sqlmodel import SQLModel

import app.jobs.models
from alembic import context
from app.config import get_settings

assert app.jobs.models  # noqa: S101 - importing it fills SQLModel.metadata

# Two migrations at once (two containers starting) wait for each other instead of failing.
MIGRATION_LOCK = 7_236_141_190


def run_offline() -> None:
    """Print the SQL instead of running it (`alembic upgrade head --sql`)."""
    context.configure(
        url=get_settings().sync_database_url,
        target_metadata=SQLModel.metadata,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run the migrations in one transaction; give up early rather than block the service."""
    engine = create_engine(get_settings().sync_database_url, poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=SQLModel.metadata)
        with context.begin_transaction():
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
            connection.execute(text("SET LOCAL lock_timeout = '4s'"))
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
