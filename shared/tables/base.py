"""What all tables share: names of constraints, and kinds of columns."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, DateTime, ForeignKey, MetaData, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import SQLModel

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(SQLModel):
    metadata = MetaData(naming_convention=NAMING)


def one_of(column: str, states: type[StrEnum], *, nullable: bool = False) -> str:
    listed = ", ".join(f"'{state.value}'" for state in states)
    check = f"{column} IN ({listed})"
    return f"{column} IS NULL OR {check}" if nullable else check


def text_column(*, primary_key: bool = False, nullable: bool = False, **kw: Any) -> Any:
    return Column(Text, primary_key=primary_key, nullable=nullable, **kw)


def reference(
    target: str, *, primary_key: bool = False, nullable: bool = False, cascade: bool = True
) -> Any:
    key = ForeignKey(target, ondelete="CASCADE" if cascade else None)
    return Column(Text, key, primary_key=primary_key, nullable=nullable)


def time_column(*, nullable: bool = True, now: bool = False) -> Any:
    default = func.clock_timestamp() if now else None
    return Column(DateTime(timezone=True), nullable=nullable, server_default=default)


def json_column(*, nullable: bool = False) -> Any:
    return Column(JSONB(none_as_null=True), nullable=nullable)


def flag_column() -> Any:
    return Column(Boolean, nullable=False, server_default=text("false"))


def big_column(*, nullable: bool = False, default: int | None = None, **kw: Any) -> Any:
    server = None if default is None else text(str(default))
    return Column(BigInteger, nullable=nullable, server_default=server, **kw)
