"""Alembic's entry point. ``ehub migrate`` hands in the connection; see ``ehub/migrate.py``."""

from alembic import context

from ehub.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # A version table of its own, so that ehub and an application's own Alembic do not meet.
    version_table="migration",
    version_table_schema="ehub",
    include_schemas=True,
    include_name=lambda name, kind, parents: kind != "schema" or name == "ehub",
)
context.run_migrations()
