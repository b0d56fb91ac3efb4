"""The migrations make exactly the schema that the models say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, make_url, text

from shared.errors import Unavailable
from shared.migrate import missing_migrations, upgrade
from shared.store import Store
from shared.tables import Table

# Everything of a schema that Postgres can be asked for in words of its own.
CATALOG = {
    "columns": "SELECT table_name, column_name, data_type, is_nullable, column_default"
    " FROM information_schema.columns WHERE table_schema = 'public'",
    "constraints": "SELECT c.relname, k.conname, k.contype, k.condeferrable, k.condeferred,"
    " pg_get_constraintdef(k.oid) FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
    " WHERE c.relnamespace = 'public'::regnamespace",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
}


@pytest.fixture
def empty(database: str) -> Iterator[Engine]:
    """A database without any table, beside the migrated one of this test."""
    name = make_url(database).database
    admin = create_engine(make_url(database).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}_empty"))
    engine = create_engine(make_url(database).set(database=f"{name}_empty"))
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name}_empty WITH (FORCE)"))
    admin.dispose()


def catalog(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    with engine.connect() as connection:
        return {
            what: sorted(
                (tuple(row) for row in connection.execute(text(query))),
                key=repr,
            )
            for what, query in CATALOG.items()
        }


def test_migrations_make_what_the_models_say(store: Store, empty: Engine) -> None:
    Table.metadata.create_all(empty)
    migrated, modelled = catalog(store.engine), catalog(empty)
    for what in CATALOG:
        rows = [row for row in migrated[what] if row[0] != "alembic_version"]
        assert rows == modelled[what], what
    kinds = {row[2] for row in modelled["constraints"]}
    assert {"c", "f", "p", "u", "x"} <= kinds, "CHECKs and the exclusion constraint are compared"


def test_autogenerate_finds_nothing_to_do(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Table.metadata) == []


def test_hosts_may_migrate_at_once(empty: Engine) -> None:
    assert missing_migrations(empty) is not None
    url = empty.url.render_as_string(False)
    errors: list[BaseException] = []

    def migrate() -> None:
        try:
            upgrade(url)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert missing_migrations(empty) is None


def test_a_process_waits_for_the_migrations(empty: Engine) -> None:
    said: list[str] = []
    waiting = Store(empty.url.render_as_string(False))
    with pytest.raises(Unavailable, match="migrat"):
        waiting.wait_until_ready(announce=said.append, timeout=0.5)
    assert len(said) == 1, "said once and not with every try"
    assert "gpuyard migrate" in said[0]
    waiting.close()


def test_a_process_says_why_also_if_its_first_try_takes_longer_than_it_may_wait(
    empty: Engine,
) -> None:
    said: list[str] = []
    waiting = Store(empty.url.render_as_string(False))
    with pytest.raises(Unavailable, match="migrat"):
        waiting.wait_until_ready(announce=said.append, timeout=-1)
    assert len(said) == 1
    waiting.close()


def test_a_process_waits_for_postgres() -> None:
    said: list[str] = []
    waiting = Store("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(Unavailable, match="cannot be reached"):
        waiting.wait_until_ready(announce=said.append, timeout=0.5)
    assert "cannot be reached" in said[0]
    waiting.close()
