"""the micro-batch of an attempt

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ('jobs', 'attempts'):
        op.add_column(table, sa.Column('micro_batch', sa.Integer(), nullable=True))
        op.create_check_constraint('micro_batch', table, 'micro_batch >= 1')


def downgrade() -> None:
    for table in ('attempts', 'jobs'):
        op.drop_constraint('micro_batch', table, type_='check')
        op.drop_column(table, 'micro_batch')
