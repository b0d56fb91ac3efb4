"""published models

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('published_models',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('task', sa.Text(), nullable=False),
    sa.Column('stage', sa.Text(), nullable=True),
    sa.Column('metrics', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('tags', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('created_by', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("stage IS NULL OR stage IN ('staging', 'production', 'archived')", name=op.f('ck_published_models_stage')),
    sa.CheckConstraint("stage IS DISTINCT FROM 'production' OR deleted_at IS NULL", name=op.f('ck_published_models_production_is_there')),
    sa.CheckConstraint('version >= 1', name=op.f('ck_published_models_version')),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_published_models_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('name', 'version', name=op.f('pk_published_models'))
    )
    op.create_index('uq_published_models_production', 'published_models', ['name'], unique=True, postgresql_where=sa.text("stage = 'production'"))
    op.create_index('uq_published_models_job', 'published_models', ['name', 'job_id'], unique=True, postgresql_where=sa.text('deleted_at IS NULL'))


def downgrade() -> None:
    op.drop_index('uq_published_models_job', table_name='published_models', postgresql_where=sa.text('deleted_at IS NULL'))
    op.drop_index('uq_published_models_production', table_name='published_models', postgresql_where=sa.text("stage = 'production'"))
    op.drop_table('published_models')
