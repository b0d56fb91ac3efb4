"""footprints

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('footprints',
    sa.Column('key', sa.Text(), nullable=False),
    sa.Column('configuration', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('estimated_bytes', sa.BigInteger(), nullable=False),
    sa.Column('measured_bytes', sa.BigInteger(), nullable=True),
    sa.Column('peak_bytes', sa.BigInteger(), nullable=True),
    sa.Column('exceeded_bytes', sa.BigInteger(), nullable=True),
    sa.Column('state', sa.Text(), server_default='wanted', nullable=False),
    sa.Column('tries', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('claimed_by', sa.Text(), nullable=True),
    sa.Column('claimed_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.CheckConstraint("state IN ('wanted', 'measuring', 'measured', 'failed')", name=op.f('ck_footprints_state')),
    sa.CheckConstraint("(measured_bytes IS NOT NULL) = (state = 'measured')", name=op.f('ck_footprints_measured_iff_known')),
    sa.CheckConstraint("(error IS NOT NULL) = (state = 'failed')", name=op.f('ck_footprints_failed_says_why')),
    sa.CheckConstraint("(claimed_by IS NOT NULL) = (state = 'measuring') AND (claimed_at IS NOT NULL) = (state = 'measuring')", name=op.f('ck_footprints_claimed_iff_measuring')),
    sa.CheckConstraint("estimated_bytes > 0 AND measured_bytes > 0 AND peak_bytes > 0 AND exceeded_bytes > 0 AND tries >= 0", name=op.f('ck_footprints_numbers')),
    sa.PrimaryKeyConstraint('key', name=op.f('pk_footprints'))
    )
    op.create_index('ix_footprints_open', 'footprints', ['created_at'], unique=False, postgresql_where=sa.text("state IN ('wanted', 'measuring')"))
    op.add_column('jobs', sa.Column('footprint_key', sa.Text(), nullable=True))
    op.create_foreign_key(op.f('fk_jobs_footprint_key'), 'jobs', 'footprints', ['footprint_key'], ['key'])
    op.create_index('ix_jobs_waiting_footprint', 'jobs', ['footprint_key'], unique=False, postgresql_where=sa.text("state = 'queued'"))


def downgrade() -> None:
    op.drop_index('ix_jobs_waiting_footprint', table_name='jobs', postgresql_where=sa.text("state = 'queued'"))
    op.drop_constraint(op.f('fk_jobs_footprint_key'), 'jobs', type_='foreignkey')
    op.drop_column('jobs', 'footprint_key')
    op.drop_index('ix_footprints_open', table_name='footprints', postgresql_where=sa.text("state IN ('wanted', 'measuring')"))
    op.drop_table('footprints')
