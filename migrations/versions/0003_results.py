"""Jobs that search nothing keep what they found.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("result", JSONB(), nullable=True))


def downgrade() -> None:
    """Results are lost; tasks that 0002 has no name for go with them."""
    op.execute("DELETE FROM tasks WHERE kind = 'benchmark'")
    op.execute("DELETE FROM trial_responses WHERE number = -2")
    op.drop_column("jobs", "result")
