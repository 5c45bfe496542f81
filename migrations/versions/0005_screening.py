"""Trials that a finished one dominates are screened: not all of their prompts are answered.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

FIELDS = ("sampler", "screening", "warm_start")  # of a job's specification, new with this version


def upgrade() -> None:
    op.add_column(
        "trials", sa.Column("screened", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.alter_column("trials", "screened", server_default=None)


def downgrade() -> None:
    """What 0004 would take for a whole count of refusals is lost; the trials stay complete."""
    op.execute("UPDATE trials SET refusals = NULL, total = NULL WHERE screened")
    op.drop_column("trials", "screened")
    op.execute(f"UPDATE jobs SET spec = spec - '{{{','.join(FIELDS)}}}'::text[]")
