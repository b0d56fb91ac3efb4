"""What must be true of a job's records whatever happened on the way."""

from __future__ import annotations

from sqlmodel import col, select

from gpuyard import Client
from shared.store import Store
from shared.tables import Artifact, Attempt, Checkpoint, Lease, Shard


def assert_rows_delivered_once(client: Client, job_id: str, ids: list[str | None]) -> None:
    """Each row of the input once, in its order, with an answer or an error."""
    rows = list(client.rows(job_id))
    assert [row["row"] for row in rows] == list(range(len(ids)))
    assert [row["id"] for row in rows] == ids
    assert all((row["output"] is None) != (row["error"] is None) for row in rows)


def assert_nothing_stale_was_accepted(store: Store, job_id: str) -> None:
    """Every shard, checkpoint and artifact was committed while its attempt was out, by its token."""
    with store.transaction() as session:
        attempts = {
            a.id: a for a in session.exec(select(Attempt).where(Attempt.job_id == job_id)).all()
        }
        written = [
            *(
                (s.attempt_id, s.token, s.committed_at)
                for s in session.exec(select(Shard).where(Shard.job_id == job_id)).all()
            ),
            *(
                (row.attempt_id, row.token, row.created_at)
                for table in (Checkpoint, Artifact)
                for row in session.exec(select(table).where(table.job_id == job_id)).all()
            ),
        ]
        for attempt_id, token, at in written:
            attempt = attempts[str(attempt_id)]
            assert token == attempt.token
            assert attempt.created_at <= at
            assert attempt.finished_at is None or at <= attempt.finished_at
        assert [a.token for a in sorted(attempts.values(), key=lambda a: a.number)] == list(
            range(1, len(attempts) + 1)
        )


def assert_devices_are_free(store: Store) -> None:
    with store.transaction() as session:
        assert not session.exec(select(Lease).where(col(Lease.state) != "released")).all()
