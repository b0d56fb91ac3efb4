"""shards are leased by ranks; ranks can be asked back

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None

OPEN = sa.text('committed_at IS NULL')


def upgrade() -> None:
    op.add_column('shards', sa.Column('leased_token', sa.BigInteger(), nullable=True))
    op.add_column('shards', sa.Column('leased_rank', sa.Integer(), nullable=True))
    op.add_column(
        'shards', sa.Column('deaths', sa.BigInteger(), nullable=False, server_default=sa.text('0'))
    )
    op.create_check_constraint(
        'leased_whole',
        'shards',
        '(leased_token IS NULL) = (leased_rank IS NULL) AND deaths >= 0',
    )
    op.create_index('uq_shards_first_row', 'shards', ['job_id', 'first_row'], unique=True)
    op.drop_index('ix_shards_open', table_name='shards')
    op.create_index('ix_shards_open', 'shards', ['job_id', 'first_row'], postgresql_where=OPEN)
    op.add_column(
        'leases',
        sa.Column('asked_back', sa.Boolean(), nullable=False, server_default=sa.text('false')),
    )


def downgrade() -> None:
    op.drop_column('leases', 'asked_back')
    op.drop_index('ix_shards_open', table_name='shards')
    op.create_index('ix_shards_open', 'shards', ['job_id', 'index'], postgresql_where=OPEN)
    op.drop_index('uq_shards_first_row', table_name='shards')
    op.drop_constraint('leased_whole', 'shards', type_='check')
    op.drop_column('shards', 'deaths')
    op.drop_column('shards', 'leased_rank')
    op.drop_column('shards', 'leased_token')
