"""The points of earlier jobs that a search begins with are chosen once and kept.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("warm_starts", JSONB(), nullable=True))


def downgrade() -> None:
    """The trials stay, as what earlier versions call points of the search."""
    op.execute("UPDATE trials SET origin = 'sampler' WHERE origin = 'warm_start'")
    op.drop_column("jobs", "warm_starts")
