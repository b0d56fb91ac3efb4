"""The server side's own commands: ``python -m scheduler api|run|migrate|keys …``.

They read the settings from the environment (``shared/settings.py``).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, NoReturn

import typer
from sqlalchemy.exc import OperationalError

from shared.errors import GpuyardError, NotFound
from shared.settings import Settings, load_settings
from shared.store import Store
from shared.store.keys import create_key, list_keys, revoke_key
from shared.tables.submission import DEFAULT_PROJECT

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The server side of gpuyard.")
keys = typer.Typer(no_args_is_help=True, help="API keys. A key is shown once, when it is made.")
app.add_typer(keys, name="keys")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def api(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
) -> None:
    """Serve the submission API."""
    from scheduler.api.server import serve

    serve(load_settings(), host, port)


@app.command()
def run() -> None:
    """Run the scheduler: admission, placement, dispatch, rescue. One of several leads."""
    from scheduler.loop import main as loop

    raise SystemExit(loop(load_settings()))


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema; waits until Postgres is up."""
    from shared.migrate import upgrade

    settings = load_settings()
    said = ""
    while True:
        try:
            upgrade(settings.database_url)
            break
        except OperationalError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            if reason != said:
                _say(f"waiting: Postgres cannot be reached: {reason}")
                said = reason
            time.sleep(1)
    _say("the database is up to date")


@keys.command("create")
def create(
    name: Annotated[str, typer.Option(help="Whose key it is.")],
    project: Annotated[
        str, typer.Option(help="What its jobs count for, in `gpuyard usage --by project`.")
    ] = DEFAULT_PROJECT,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once."""
    store = _ready_store(load_settings())
    id, key = store.call(create_key, name, project)
    print(json.dumps({"id": id, "key": key}) if as_json else f"{id}  {key}")


@keys.command("list")
def list_(as_json: AsJson = False) -> None:
    """List keys: names, projects and times, never the keys."""
    store = _ready_store(load_settings())
    rows = [
        {
            "id": row.id,
            "name": row.name,
            "project": row.project,
            "created_at": row.created_at.isoformat(),
            "revoked_at": row.revoked_at.isoformat() if row.revoked_at else None,
        }
        for row in store.call(list_keys)
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        valid = row["revoked_at"] or "valid"
        print(f"{row['id']}  {row['name']}  {row['project']}  {row['created_at']}  {valid}")


@keys.command("revoke")
def revoke(id: Annotated[str, typer.Argument(help="The key's id, not the key.")]) -> None:
    """Make a key invalid, within seconds."""
    store = _ready_store(load_settings())
    if not store.call(revoke_key, id):
        raise NotFound(f"there is no valid key {id}", hint="`keys list` shows them.")
    _say(f"{id} is revoked")


def main() -> None:
    """Run the command line; an error of the user's is a line and an exit code, no traceback."""
    try:
        app()
    except GpuyardError as error:
        _fail(error)


def _fail(error: GpuyardError) -> NoReturn:
    _say(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
    raise SystemExit(error.exit_code)


def _ready_store(settings: Settings) -> Store:
    store = Store(settings.database_url)
    store.wait_until_ready(announce=_say)
    return store


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
