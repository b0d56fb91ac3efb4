"""best checkpoints

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('checkpoints', sa.Column('best_step', sa.Integer(), nullable=True))
    op.create_check_constraint('best_step', 'checkpoints', 'best_step >= 0 AND best_step <= step')


def downgrade() -> None:
    op.drop_constraint('best_step', 'checkpoints', type_='check')
    op.drop_column('checkpoints', 'best_step')
