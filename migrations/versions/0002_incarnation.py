"""The incarnation of the database that index services follow."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "incarnation",
        sa.Column("token", sa.Uuid, nullable=False),
        sa.Column("started_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("database", pg.OID, nullable=False),
        sa.Column("prompt", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("token", name="incarnation_pkey"),
        schema="ehub",
        # A crash and a promotion empty it: that is what it is for.
        prefixes=["UNLOGGED"],
    )


def downgrade() -> None:
    op.drop_table("incarnation", schema="ehub")
