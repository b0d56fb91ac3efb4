"""What was used: devices by the leases on them, rows and tokens by the shards that were committed.

A device is used from the moment a rank claims it until its lease is released; where that is not yet, until
now. Of that a period has the part which lies in it; of rows and tokens what was committed in it; of jobs
what was submitted in it. A job is of the project of the key that it was submitted with. Days are those of UTC.
Everything is added up in exact microseconds, so the days of a period, its keys, or its projects, add up to the
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import text
from sqlmodel import Session

from shared.store.keys import list_keys
from shared.tables.submission import DEFAULT_PROJECT

Group = Literal["key", "project", "day"]
_Parted = Literal["key", "day"]
"""By what Postgres adds up; what the keys of a project used is added up from there."""


@dataclass(slots=True)
class Used:
    """``name``: the id of a key ("" where none was asked for), a project, a day (2026-11-24), or "" for
    all."""

    name: str
    jobs: int = 0
    device_seconds: float = 0.0
    rows: int = 0
    row_errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


_JOB_SECONDS = text(
    "SELECT coalesce(sum(extract(epoch FROM l.released_at - l.claimed_at)), 0)"
    " FROM leases l JOIN attempts a ON a.id = l.attempt_id"
    " WHERE a.job_id = :job_id AND l.claimed_at IS NOT NULL AND l.released_at IS NOT NULL"
)
_HELD = (
    "SELECT j.created_by, greatest(l.claimed_at, :since) AS begins,"
    " least(coalesce(l.released_at, :now), :until) AS ends"
    " FROM leases l JOIN attempts a ON a.id = l.attempt_id JOIN jobs j ON j.id = a.job_id"
    " WHERE l.claimed_at < :until AND (l.released_at > :since OR l.released_at IS NULL)"
)
_DAY = "to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD')"
# What a group is called: of a lease or the part of one on a day, of a shard, of a job.
_NAMES: dict[_Parted | None, tuple[str, str, str]] = {
    None: ("''", "''", "''"),
    "key": ("created_by", "j.created_by", "j.created_by"),
    "day": (_DAY.format("day"), _DAY.format("s.committed_at"), _DAY.format("j.created_at")),
}
_PIECES = (
    "SELECT created_by, day, greatest(begins, day) AS begins,"
    " least(ends, day + interval '24 hours') AS ends"
    " FROM (held) AS held CROSS JOIN LATERAL"
    " generate_series(date_trunc('day', begins, 'UTC'), ends, interval '24 hours') AS day"
).replace("(held)", f"({_HELD})")


def device_seconds(session: Session, job_id: str) -> float:
    """What a job has used of devices, over all attempts and ranks. Those that hold one still are left
    out: a job that does not change looks the same twice."""
    found = session.connection().execute(_JOB_SECONDS, {"job_id": job_id}).scalar_one()
    return round(float(found), 6)


def usage(
    session: Session, since: datetime, until: datetime, now: datetime, group: Group | None = None
) -> list[Used]:
    """What was used from ``since`` to before ``until``, by name; a group without anything is left out."""
    if group != "project":
        return _usage(session, since, until, now, group)
    projects = {key.id: key.project for key in list_keys(session)}
    found: dict[str, Used] = {}
    for used in _usage(session, since, until, now, "key"):
        name = projects.get(used.name, DEFAULT_PROJECT)
        found[name] = total(name, [found[name], used] if name in found else [used])
    return [found[name] for name in sorted(found)]


def total(name: str, parts: Sequence[Used]) -> Used:
    """What several groups used together."""
    return Used(
        name,
        jobs=sum(used.jobs for used in parts),
        device_seconds=round(sum(used.device_seconds for used in parts), 6),
        rows=sum(used.rows for used in parts),
        row_errors=sum(used.row_errors for used in parts),
        input_tokens=sum(used.input_tokens for used in parts),
        output_tokens=sum(used.output_tokens for used in parts),
    )


def _usage(
    session: Session, since: datetime, until: datetime, now: datetime, group: _Parted | None
) -> list[Used]:
    of_lease, of_shard, of_job = _NAMES[group]
    held = _PIECES if group == "day" else _HELD
    queries = (
        f"SELECT {of_lease} AS name, sum(extract(epoch FROM ends - begins)) AS device_seconds"  # noqa: S608
        f" FROM ({held}) AS used WHERE ends > begins GROUP BY 1",
        f"SELECT {of_shard} AS name, sum(s.rows) AS rows, sum(s.errors) AS row_errors,"  # noqa: S608
        " sum(s.input_tokens) AS input_tokens, sum(s.output_tokens) AS output_tokens"
        " FROM shards s JOIN jobs j ON j.id = s.job_id"
        " WHERE s.committed_at >= :since AND s.committed_at < :until GROUP BY 1",
        f"SELECT {of_job} AS name, count(*) AS jobs FROM jobs j"  # noqa: S608
        " WHERE j.created_at >= :since AND j.created_at < :until GROUP BY 1",
    )
    found: dict[str, Used] = {}
    period: dict[str, Any] = {"since": since, "until": until, "now": now}
    for query in queries:
        asked = {name: value for name, value in period.items() if f":{name}" in query}
        for row in session.connection().execute(text(query), asked).mappings():
            used = found.setdefault(row["name"] or "", Used(row["name"] or ""))
            for name, value in row.items():
                if name == "device_seconds":
                    used.device_seconds = round(float(value), 6)
                elif name != "name":
                    setattr(used, name, int(value))
    return [found[name] for name in sorted(found)]
