"""The geometry of a job's residuals has a column of its own, read only where it is shown.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("geometry", JSONB(), nullable=True))
    op.execute(
        "UPDATE jobs SET geometry = NULLIF(prepared->'geometry', 'null'), "
        "prepared = prepared - 'geometry' WHERE jsonb_exists(prepared, 'geometry')"
    )


def downgrade() -> None:
    op.execute(
        "UPDATE jobs SET prepared = prepared || jsonb_build_object('geometry', geometry) "
        "WHERE prepared IS NOT NULL AND geometry IS NOT NULL"
    )
    op.drop_column("jobs", "geometry")
