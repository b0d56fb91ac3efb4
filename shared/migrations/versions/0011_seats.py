"""batch jobs share devices: a lease may be for a seat

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0011'
down_revision = '0010'
branch_labels = None
depends_on = None

PLACES = (
    'int8range((hashtextextended(device_id, 0) / 32) * 16 + COALESCE(seat, 0),'
    ' (hashtextextended(device_id, 0) / 32) * 16 + COALESCE(seat + 1, 16))'
)


def upgrade() -> None:
    op.add_column('leases', sa.Column('seat', sa.Integer(), nullable=True))
    op.create_check_constraint('seat', 'leases', 'seat >= 0 AND seat < 16')
    _exclude('gist', f'{PLACES} WITH &&')


def downgrade() -> None:
    _exclude('btree', 'device_id WITH =')
    op.drop_constraint('seat', 'leases', type_='check')
    op.drop_column('leases', 'seat')


def _exclude(using: str, what: str) -> None:
    op.drop_constraint('ex_leases_device', 'leases')
    op.execute(
        f'ALTER TABLE leases ADD CONSTRAINT ex_leases_device EXCLUDE USING {using} ({what})'
        " WHERE (state <> 'released') DEFERRABLE INITIALLY IMMEDIATE"
    )
