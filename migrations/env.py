"""Alembic's entry point: the engine of the caller (`app.database.Database.upgrade`), or of the settings."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Engine

from app.database import Database
from app.settings import get_settings
from app.tables import Base


def _is_comparable(thing: object, name: str | None, kind: str, is_reflected: bool, counterpart: object) -> bool:
    """Not on every database can an index that is sorted downwards be read back, and not on every one is metadata
    indexed."""
    return not (kind == "index" and name in ("ix_jobs_queue", "ix_jobs_metadata"))


def run() -> None:
    engine: Engine = context.config.attributes.get("engine") or Database(get_settings().resolved_database_url).engine
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            render_as_batch=connection.dialect.name == "sqlite",
            compare_type=True,
            include_object=_is_comparable,
        )
        with context.begin_transaction():
            context.run_migrations()


run()
