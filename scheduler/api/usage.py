"""What was used, by API key, project or day."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from sqlmodel import Session, func, select

from scheduler.api.context import ContextDep
from shared.errors import InvalidRequest
from shared.store.keys import list_keys
from shared.store.usage import Group, Used, total, usage
from shared.tables import ApiKey
from shared.tables.submission import DEFAULT_PROJECT
from shared.views import UsageReport, UsageView

router = APIRouter(tags=["usage"])
Time = Annotated[
    str | None,
    Query(
        description="A day (`2026-11-24`, from its beginning) or a time as ISO 8601 has it; without a "
        "zone UTC.",
        examples=["2026-11-24", "2026-11-24T12:00:00Z"],
    ),
]
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


@router.get("/usage", summary="Devices, rows and tokens that were used")
def get_usage(
    context: ContextDep,
    since: Time = None,
    until: Time = None,
    group: Annotated[Group | None, Query(description="Without it, all in one.")] = None,
) -> UsageReport:
    """From `since` (else the beginning) to before `until` (else now).

    `device_seconds` counts each device from the moment a rank of a job claimed it until it was free
    again, whatever came of it; of that the part which lies in the period. Rows and tokens are those of
    batch jobs that were committed in the period, `jobs` those that were submitted in it. A job is of
    the project of its API key (`default`, where it has none). Days are those of UTC. The items add up to
    `total`.
    """
    now = context.store.call(_now)
    begin = _BEGINNING if since is None else _moment(since, "since")
    end = now if until is None else _moment(until, "until")
    if begin > end:
        raise InvalidRequest(
            "since is after until", param="since", hint=f"It is {now.isoformat()} now."
        )
    found = context.store.call(usage, begin, end, now, group)
    keys = {key.id: key for key in context.store.call(list_keys)} if group == "key" else {}
    items = [_view(used, group, keys.get(used.name)) for used in found]
    return UsageReport(
        since=begin, until=end, group=group, items=items, total=_view(total("", found), None, None)
    )


def _now(session: Session) -> datetime:
    now: datetime = session.exec(select(func.clock_timestamp())).one()
    return now


def _moment(text: str, param: str) -> datetime:
    try:
        given = datetime.fromisoformat(text)
        return given if given.tzinfo else given.replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequest(
            f"{param} is neither a day nor a time: {text[:40]!r}",
            param=param,
            hint="For instance 2026-11-24, or 2026-11-24T12:00:00Z.",
        ) from None


def _view(used: Used, group: Group | None, key: ApiKey | None) -> UsageView:
    project = key.project if key is not None else DEFAULT_PROJECT
    return UsageView(
        key=used.name or None if group == "key" else None,
        key_name=key.name if key is not None else None,
        project={"key": project, "project": used.name}.get(group or ""),
        day=date.fromisoformat(used.name) if group == "day" else None,
        jobs=used.jobs,
        device_seconds=used.device_seconds,
        rows=used.rows,
        row_errors=used.row_errors,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
    )
