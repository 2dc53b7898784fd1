"""Indexes for what grew with the table: lists and quotas of a project, metadata, retention, orphans.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

HAVE_FILES = ("models", "datasets", "artifacts", "checkpoints", "upload_parts")


def upgrade() -> None:
    op.drop_index("ix_jobs_project", "jobs")
    op.create_index("ix_jobs_project", "jobs", ["project", "id"])
    op.create_index("ix_jobs_project_state", "jobs", ["project", "state", "id"])
    op.create_index("ix_checkpoints_created_at", "checkpoints", ["created_at"])
    for table in HAVE_FILES:
        op.create_index(f"ix_{table}_storage_key", table, ["storage_key"])
    if op.get_bind().dialect.name == "postgresql":
        ops = {"metadata": "jsonb_path_ops"}
        op.create_index("ix_jobs_metadata", "jobs", ["metadata"], postgresql_using="gin", postgresql_ops=ops)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_jobs_metadata", "jobs")
    for table in HAVE_FILES:
        op.drop_index(f"ix_{table}_storage_key", table)
    op.drop_index("ix_checkpoints_created_at", "checkpoints")
    op.drop_index("ix_jobs_project_state", "jobs")
    op.drop_index("ix_jobs_project", "jobs")
    op.create_index("ix_jobs_project", "jobs", ["project"])
