"""the job store

Revision ID: 0001
Revises: 
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('api_keys',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_api_keys')),
    sa.UniqueConstraint('sha256', name=op.f('uq_api_keys_sha256'))
    )
    op.create_table('files',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('path', sa.Text(), nullable=False),
    sa.Column('created_by', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.CheckConstraint('size >= 0', name=op.f('ck_files_size')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_files'))
    )
    op.create_table('jobs',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('task', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=True),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('spec', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('resolved', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('priority', sa.Integer(), nullable=False),
    sa.Column('token', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('waiting_reason', sa.Text(), nullable=True),
    sa.Column('not_before', sa.DateTime(timezone=True), nullable=True),
    sa.Column('cancel_requested_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('cancel_reason', sa.Text(), nullable=True),
    sa.Column('failure_class', sa.Text(), nullable=True),
    sa.Column('failure', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    sa.Column('progress', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    sa.Column('summary', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    sa.Column('idempotency_key', sa.Text(), nullable=True),
    sa.Column('spec_sha256', sa.Text(), nullable=False),
    sa.Column('created_by', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))", name=op.f('ck_jobs_finished_iff_terminal')),
    sa.CheckConstraint("failure_class IS NULL OR failure_class IN ('user_error', 'data_error', 'out_of_memory', 'lost_device', 'lost_worker', 'preempted', 'cancelled', 'deadline', 'infrastructure', 'unclaimed')", name=op.f('ck_jobs_failure_class')),
    sa.CheckConstraint("kind IN ('train', 'infer')", name=op.f('ck_jobs_kind')),
    sa.CheckConstraint("state <> 'cancelling' OR cancel_requested_at IS NOT NULL", name=op.f('ck_jobs_cancelling_was_asked')),
    sa.CheckConstraint("state <> 'failed' OR failure_class IS NOT NULL", name=op.f('ck_jobs_failed_says_why')),
    sa.CheckConstraint("state IN ('queued', 'dispatched', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')", name=op.f('ck_jobs_state')),
    sa.CheckConstraint('token >= 0', name=op.f('ck_jobs_token')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_jobs'))
    )
    op.create_index('ix_jobs_state_id', 'jobs', ['state', 'id'], unique=False)
    op.create_index('ix_jobs_waiting', 'jobs', [sa.literal_column('priority DESC'), 'created_at'], unique=False, postgresql_where=sa.text("state = 'queued'"))
    op.create_index('uq_jobs_idempotency', 'jobs', ['created_by', 'idempotency_key'], unique=True, postgresql_where=sa.text('idempotency_key IS NOT NULL'))
    op.create_table('leader',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('holder', sa.Text(), nullable=False),
    sa.Column('term', sa.BigInteger(), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("name = 'scheduler'", name=op.f('ck_leader_one')),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_leader'))
    )
    op.create_table('workers',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('device_id', sa.Text(), nullable=False),
    sa.Column('host', sa.Text(), nullable=False),
    sa.Column('pid', sa.Integer(), nullable=False),
    sa.Column('version', sa.Text(), nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('heartbeat_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('ended_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_workers'))
    )
    op.create_index(op.f('ix_workers_device_id'), 'workers', ['device_id'], unique=False)
    op.create_table('attempts',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('token', sa.BigInteger(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('world_size', sa.Integer(), nullable=False),
    sa.Column('rendezvous', sa.Text(), nullable=True),
    sa.Column('failure_class', sa.Text(), nullable=True),
    sa.Column('failure', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(finished_at IS NOT NULL) = (state NOT IN ('dispatched', 'running'))", name=op.f('ck_attempts_finished_iff_terminal')),
    sa.CheckConstraint("failure_class IS NULL OR failure_class IN ('user_error', 'data_error', 'out_of_memory', 'lost_device', 'lost_worker', 'preempted', 'cancelled', 'deadline', 'infrastructure', 'unclaimed')", name=op.f('ck_attempts_failure_class')),
    sa.CheckConstraint("state IN ('dispatched', 'running', 'succeeded', 'failed', 'cancelled', 'lost')", name=op.f('ck_attempts_state')),
    sa.CheckConstraint("state NOT IN ('failed', 'lost') OR failure_class IS NOT NULL", name=op.f('ck_attempts_failed_says_why')),
    sa.CheckConstraint('number >= 1 AND token >= 1 AND world_size >= 1', name=op.f('ck_attempts_numbers')),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_attempts_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_attempts'))
    )
    op.create_index('uq_attempts_number', 'attempts', ['job_id', 'number'], unique=True)
    op.create_index('uq_attempts_one_active', 'attempts', ['job_id'], unique=True, postgresql_where=sa.text("state IN ('dispatched', 'running')"))
    op.create_index('uq_attempts_token', 'attempts', ['job_id', 'token'], unique=True)
    op.create_table('devices',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('host', sa.Text(), nullable=False),
    sa.Column('worker_id', sa.Text(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('accelerator', sa.Text(), nullable=False),
    sa.Column('model', sa.Text(), nullable=False),
    sa.Column('uuid', sa.Text(), nullable=True),
    sa.Column('compute_capability', sa.Integer(), nullable=False),
    sa.Column('memory_bytes', sa.BigInteger(), nullable=False),
    sa.Column('queue', sa.Text(), nullable=False),
    sa.Column('simulated', sa.Boolean(), nullable=False),
    sa.Column('warm', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('registered_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.CheckConstraint("accelerator IN ('cpu', 'cuda')", name=op.f('ck_devices_accelerator')),
    sa.CheckConstraint("state IN ('up', 'draining', 'gone')", name=op.f('ck_devices_state')),
    sa.CheckConstraint('memory_bytes > 0 AND compute_capability >= 0', name=op.f('ck_devices_numbers')),
    sa.ForeignKeyConstraint(['worker_id'], ['workers.id'], name=op.f('fk_devices_worker_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_devices'))
    )
    op.create_index(op.f('ix_devices_host'), 'devices', ['host'], unique=False)
    op.create_index(op.f('ix_devices_queue'), 'devices', ['queue'], unique=False)
    op.create_table('events',
    sa.Column('id', sa.BigInteger(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=True),
    sa.Column('type', sa.Text(), nullable=False),
    sa.Column('message', sa.Text(), nullable=False),
    sa.Column('data', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_events_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_events'))
    )
    op.create_index('ix_events_job', 'events', ['job_id', 'id'], unique=False)
    op.create_table('log_chunks',
    sa.Column('id', sa.BigInteger(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('rank', sa.Integer(), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_log_chunks_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_log_chunks'))
    )
    op.create_index('ix_log_chunks_job', 'log_chunks', ['job_id', 'id'], unique=False)
    op.create_table('metrics',
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('split', sa.Text(), nullable=False),
    sa.Column('step', sa.Integer(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('values', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.CheckConstraint("split IN ('train', 'validation')", name=op.f('ck_metrics_split')),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_metrics_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('job_id', 'split', 'step', name=op.f('pk_metrics'))
    )
    op.create_table('artifacts',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('attempt_id', sa.Text(), nullable=False),
    sa.Column('token', sa.BigInteger(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('path', sa.Text(), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.CheckConstraint("name !~ '(^/|(^|/)\\.\\.(/|$))'", name=op.f('ck_artifacts_name_stays_inside')),
    sa.CheckConstraint('size >= 0', name=op.f('ck_artifacts_size')),
    sa.ForeignKeyConstraint(['attempt_id'], ['attempts.id'], name=op.f('fk_artifacts_attempt_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_artifacts_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_artifacts'))
    )
    op.create_index('ix_artifacts_job', 'artifacts', ['job_id'], unique=False)
    op.create_index('uq_artifacts_name', 'artifacts', ['attempt_id', 'name'], unique=True)
    op.create_table('checkpoints',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('attempt_id', sa.Text(), nullable=False),
    sa.Column('token', sa.BigInteger(), nullable=False),
    sa.Column('step', sa.Integer(), nullable=False),
    sa.Column('path', sa.Text(), nullable=False),
    sa.Column('manifest', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.CheckConstraint('step >= 0 AND size >= 0', name=op.f('ck_checkpoints_numbers')),
    sa.ForeignKeyConstraint(['attempt_id'], ['attempts.id'], name=op.f('fk_checkpoints_attempt_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_checkpoints_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_checkpoints'))
    )
    op.create_index('ix_checkpoints_job', 'checkpoints', ['job_id', 'step'], unique=False)
    op.create_index('uq_checkpoints_step', 'checkpoints', ['attempt_id', 'step'], unique=True)
    op.create_table('leases',
    sa.Column('attempt_id', sa.Text(), nullable=False),
    sa.Column('rank', sa.Integer(), nullable=False),
    sa.Column('device_id', sa.Text(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('worker_id', sa.Text(), nullable=True),
    sa.Column('succeeded', sa.Boolean(), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('claimed_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('released_at', sa.DateTime(timezone=True), nullable=True),
    postgresql.ExcludeConstraint((sa.column('device_id'), '='), where=sa.text("state <> 'released'"), deferrable=True, initially='IMMEDIATE', using='btree', name='ex_leases_device'),
    sa.CheckConstraint("(released_at IS NOT NULL) = (state = 'released')", name=op.f('ck_leases_released')),
    sa.CheckConstraint("state <> 'held' OR worker_id IS NOT NULL", name=op.f('ck_leases_held_by_someone')),
    sa.CheckConstraint("state IN ('reserved', 'held', 'released')", name=op.f('ck_leases_state')),
    sa.CheckConstraint("succeeded = false OR state = 'released'", name=op.f('ck_leases_succeeded_is_over')),
    sa.ForeignKeyConstraint(['attempt_id'], ['attempts.id'], name=op.f('fk_leases_attempt_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['device_id'], ['devices.id'], name=op.f('fk_leases_device_id')),
    sa.PrimaryKeyConstraint('attempt_id', 'rank', name=op.f('pk_leases'))
    )
    op.create_index('ix_leases_open', 'leases', ['expires_at'], unique=False, postgresql_where=sa.text("state <> 'released'"))
    op.create_table('outbox',
    sa.Column('attempt_id', sa.Text(), nullable=False),
    sa.Column('rank', sa.Integer(), nullable=False),
    sa.Column('queue', sa.Text(), nullable=False),
    sa.Column('label', sa.Text(), nullable=False),
    sa.Column('hint', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('priority', sa.Integer(), nullable=False),
    sa.Column('published', sa.Integer(), nullable=False),
    sa.Column('due_at', sa.DateTime(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['attempt_id'], ['attempts.id'], name=op.f('fk_outbox_attempt_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('attempt_id', 'rank', name=op.f('pk_outbox'))
    )
    op.create_index('ix_outbox_due', 'outbox', ['due_at'], unique=False)
    op.create_table('shards',
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('index', sa.Integer(), nullable=False),
    sa.Column('first_row', sa.BigInteger(), nullable=False),
    sa.Column('rows', sa.Integer(), nullable=False),
    sa.Column('offset', sa.BigInteger(), nullable=False),
    sa.Column('length', sa.BigInteger(), nullable=False),
    sa.Column('attempt_id', sa.Text(), nullable=True),
    sa.Column('token', sa.BigInteger(), nullable=True),
    sa.Column('results', sa.LargeBinary(), nullable=True),
    sa.Column('errors', sa.Integer(), nullable=False),
    sa.Column('input_tokens', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('output_tokens', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('seconds', sa.Float(), nullable=False),
    sa.Column('committed_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('(results IS NULL) = (committed_at IS NULL) AND (results IS NULL) = (attempt_id IS NULL) AND (results IS NULL) = (token IS NULL)', name=op.f('ck_shards_committed_whole')),
    sa.CheckConstraint('rows > 0 AND first_row >= 0 AND length > 0 AND "offset" >= 0', name=op.f('ck_shards_numbers')),
    sa.ForeignKeyConstraint(['attempt_id'], ['attempts.id'], name=op.f('fk_shards_attempt_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_shards_job_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('job_id', 'index', name=op.f('pk_shards'))
    )
    op.create_index('ix_shards_open', 'shards', ['job_id', 'index'], unique=False, postgresql_where=sa.text('committed_at IS NULL'))


def downgrade() -> None:
    op.drop_index('ix_shards_open', table_name='shards', postgresql_where=sa.text('committed_at IS NULL'))
    op.drop_table('shards')
    op.drop_index('ix_outbox_due', table_name='outbox')
    op.drop_table('outbox')
    op.drop_index('ix_leases_open', table_name='leases', postgresql_where=sa.text("state <> 'released'"))
    op.drop_table('leases')
    op.drop_index('uq_checkpoints_step', table_name='checkpoints')
    op.drop_index('ix_checkpoints_job', table_name='checkpoints')
    op.drop_table('checkpoints')
    op.drop_index('uq_artifacts_name', table_name='artifacts')
    op.drop_index('ix_artifacts_job', table_name='artifacts')
    op.drop_table('artifacts')
    op.drop_table('metrics')
    op.drop_index('ix_log_chunks_job', table_name='log_chunks')
    op.drop_table('log_chunks')
    op.drop_index('ix_events_job', table_name='events')
    op.drop_table('events')
    op.drop_index(op.f('ix_devices_queue'), table_name='devices')
    op.drop_index(op.f('ix_devices_host'), table_name='devices')
    op.drop_table('devices')
    op.drop_index('uq_attempts_token', table_name='attempts')
    op.drop_index('uq_attempts_one_active', table_name='attempts', postgresql_where=sa.text("state IN ('dispatched', 'running')"))
    op.drop_index('uq_attempts_number', table_name='attempts')
    op.drop_table('attempts')
    op.drop_index(op.f('ix_workers_device_id'), table_name='workers')
    op.drop_table('workers')
    op.drop_table('leader')
    op.drop_index('uq_jobs_idempotency', table_name='jobs', postgresql_where=sa.text('idempotency_key IS NOT NULL'))
    op.drop_index('ix_jobs_waiting', table_name='jobs', postgresql_where=sa.text("state = 'queued'"))
    op.drop_index('ix_jobs_state_id', table_name='jobs')
    op.drop_table('jobs')
    op.drop_table('files')
    op.drop_table('api_keys')
