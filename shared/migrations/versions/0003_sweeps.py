"""sweeps

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('sweeps',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=True),
    sa.Column('spec', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('spec_sha256', sa.Text(), nullable=False),
    sa.Column('idempotency_key', sa.Text(), nullable=True),
    sa.Column('created_by', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_sweeps'))
    )
    op.create_index('uq_sweeps_idempotency', 'sweeps', ['created_by', 'idempotency_key'], unique=True, postgresql_where=sa.text('idempotency_key IS NOT NULL'))
    op.create_table('sweep_trials',
    sa.Column('sweep_id', sa.Text(), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('parameters', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.CheckConstraint('number >= 1', name=op.f('ck_sweep_trials_number')),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_sweep_trials_job_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['sweep_id'], ['sweeps.id'], name=op.f('fk_sweep_trials_sweep_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('sweep_id', 'number', name=op.f('pk_sweep_trials'))
    )
    op.create_index('uq_sweep_trials_job', 'sweep_trials', ['job_id'], unique=True)


def downgrade() -> None:
    op.drop_index('uq_sweep_trials_job', table_name='sweep_trials')
    op.drop_table('sweep_trials')
    op.drop_index('uq_sweeps_idempotency', table_name='sweeps', postgresql_where=sa.text('idempotency_key IS NOT NULL'))
    op.drop_table('sweeps')
