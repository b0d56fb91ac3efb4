"""Alembic's entry: runs on the connection that ``shared.migrate`` passes in."""

from __future__ import annotations

from alembic import context

from shared.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    compare_type=True,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
