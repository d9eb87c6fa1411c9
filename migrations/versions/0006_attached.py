"""Attached tables."""

import sqlalchemy as sa
from alembic import op

from ehub.models import RegClass

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "attachment",
        sa.Column("version_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("relation", RegClass, nullable=False),
        sa.Column("column_name", sa.Text, nullable=False),
        sa.Column("column_number", sa.SmallInteger, nullable=False),
        sa.Column("shape", sa.Text, nullable=False),
        sa.Column("granted", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["ehub.version.id"],
            name="attachment_version_id_fkey",
            ondelete="CASCADE",
        ),
        schema="ehub",
    )


def downgrade() -> None:
    op.drop_table("attachment", schema="ehub")
