"""devices that seem deaf

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('devices', sa.Column('suspect_until', sa.DateTime(timezone=True), nullable=True))
    op.add_column('devices', sa.Column('suspect_reason', sa.Text(), nullable=True))
    op.create_check_constraint(
        'suspect_says_why', 'devices', '(suspect_until IS NULL) = (suspect_reason IS NULL)'
    )


def downgrade() -> None:
    op.drop_constraint('suspect_says_why', 'devices', type_='check')
    op.drop_column('devices', 'suspect_reason')
    op.drop_column('devices', 'suspect_until')
