"""The row numbers of a batch job that runs the failed rows of another: its own rows are 0, 1, 2, … and
its results carry the numbers that these had in the first input."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from sqlmodel import Session, col, func, select

from shared.tables import RetriedRows

_CHUNK = 4096
"""Numbers of a row of the table."""


def insert_numbers(session: Session, job_id: str, numbers: array[int]) -> None:
    """Keep the numbers of all rows of a job; ``array("q")``, ascending."""
    for first in range(0, len(numbers), _CHUNK):
        chunk = numbers[first : first + _CHUNK]
        session.add(
            RetriedRows(
                job_id=job_id, first_row=first, last_number=chunk[-1], numbers=chunk.tobytes()
            )
        )
    session.flush()


def is_numbered(session: Session, job_id: str) -> bool:
    """Whether the rows of a job have other numbers than their own."""
    return session.get(RetriedRows, (job_id, 0)) is not None


def numbers_of(session: Session, job_id: str, first_row: int, rows: int) -> array[int]:
    """The numbers of so many rows of a job that :func:`is_numbered`."""
    found: array[int] = array("q")
    begin = first_row - first_row % _CHUNK
    for chunk in session.exec(
        select(RetriedRows)
        .where(
            RetriedRows.job_id == job_id,
            col(RetriedRows.first_row) >= begin,
            col(RetriedRows.first_row) < first_row + rows,
        )
        .order_by(col(RetriedRows.first_row))
    ):
        found.frombytes(chunk.numbers)
    return found[first_row - begin : first_row - begin + rows]


def rows_up_to(session: Session, job_id: str, number: int) -> int:
    """How many rows of a job that :func:`is_numbered` have a number up to ``number``."""
    whole = session.exec(
        select(func.coalesce(func.sum(func.octet_length(RetriedRows.numbers) / 8), 0)).where(
            RetriedRows.job_id == job_id, col(RetriedRows.last_number) <= number
        )
    ).one()
    row = int(whole)
    return row + sum(found <= number for found in numbers_of(session, job_id, row, _CHUNK))


def all_numbers(session: Session, job_id: str) -> array[int] | None:
    """Of all rows of a job; None where they are its own."""
    found: array[int] = array("q")
    for chunk in _chunks(session, job_id):
        found.frombytes(chunk)
    return found or None


def _chunks(session: Session, job_id: str) -> Iterator[bytes]:
    yield from session.exec(
        select(RetriedRows.numbers)
        .where(RetriedRows.job_id == job_id)
        .order_by(col(RetriedRows.first_row))
    )
