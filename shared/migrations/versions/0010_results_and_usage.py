"""orders of results, retried rows, and what was used

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0010'
down_revision = '0009'
branch_labels = None
depends_on = None

COMMITTED = sa.text('committed_at IS NOT NULL')
CLAIMED = sa.text('claimed_at IS NOT NULL')


def upgrade() -> None:
    op.add_column('jobs', sa.Column('retry_of', sa.Text(), nullable=True))
    op.create_foreign_key('fk_jobs_retry_of', 'jobs', 'jobs', ['retry_of'], ['id'])
    op.create_table(
        'retried_rows',
        sa.Column('job_id', sa.Text(), nullable=False),
        sa.Column('first_row', sa.BigInteger(), nullable=False),
        sa.Column('last_number', sa.BigInteger(), nullable=False),
        sa.Column('numbers', sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            'first_row >= 0 AND last_number >= first_row AND octet_length(numbers) > 0'
            ' AND octet_length(numbers) % 8 = 0',
            name=op.f('ck_retried_rows_numbers'),
        ),
        sa.ForeignKeyConstraint(
            ['job_id'], ['jobs.id'], name=op.f('fk_retried_rows_job_id'), ondelete='CASCADE'
        ),
        sa.PrimaryKeyConstraint('job_id', 'first_row', name=op.f('pk_retried_rows')),
    )
    op.create_index(
        'ix_shards_by_completion',
        'shards',
        ['job_id', 'committed_at', 'first_row'],
        postgresql_where=COMMITTED,
    )
    op.create_index('ix_shards_committed', 'shards', ['committed_at'], postgresql_where=COMMITTED)
    op.create_index('ix_leases_used', 'leases', ['released_at'], postgresql_where=CLAIMED)
    op.create_index('ix_jobs_created_at', 'jobs', ['created_at'])


def downgrade() -> None:
    op.drop_index('ix_jobs_created_at', table_name='jobs')
    op.drop_index('ix_leases_used', table_name='leases', postgresql_where=CLAIMED)
    op.drop_index('ix_shards_committed', table_name='shards', postgresql_where=COMMITTED)
    op.drop_index('ix_shards_by_completion', table_name='shards', postgresql_where=COMMITTED)
    op.drop_table('retried_rows')
    op.drop_constraint('fk_jobs_retry_of', 'jobs', type_='foreignkey')
    op.drop_column('jobs', 'retry_of')
