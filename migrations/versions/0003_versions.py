"""Several versions of a space: promotions, checkpoints, what is frozen and what is kept warm."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0003"
down_revision = "0002"

_NOW = pg.TIMESTAMP(timezone=True)


def upgrade() -> None:
    # Functions whose parameters are others now; they are made again with all the rest.
    op.execute("DROP FUNCTION IF EXISTS ehub.require_space(text)")
    op.execute(
        "DROP FUNCTION IF EXISTS"
        " ehub.acknowledge(uuid, bigint, text, pg_snapshot, uuid, bigint, interval)"
    )
    op.add_column("version", sa.Column("frozen_at", _NOW), schema="ehub")
    op.add_column(
        "version",
        sa.Column("warm", sa.Boolean, nullable=False, server_default=sa.true()),
        schema="ehub",
    )
    op.create_table(
        "promotion",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("space_id", sa.BigInteger, nullable=False),
        sa.Column("at", _NOW, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("by", sa.Text, nullable=False, server_default=sa.text("CURRENT_USER")),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("from_version", sa.Text, nullable=False),
        sa.Column("to_version", sa.Text, nullable=False),
        sa.Column("from_version_id", sa.BigInteger),
        sa.Column("undone", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.ForeignKeyConstraint(
            ["space_id"], ["ehub.space.id"], name="promotion_space_id_fkey", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["from_version_id"],
            ["ehub.version.id"],
            name="promotion_from_version_id_fkey",
            ondelete="SET NULL",
        ),
        sa.CheckConstraint("kind IN ('promote', 'rollback')", name=op.f("promotion_kind_check")),
        schema="ehub",
    )
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("version_id", sa.BigInteger, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_at", _NOW, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("created_by", sa.Text, nullable=False, server_default=sa.text("CURRENT_USER")),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["ehub.version.id"],
            name="checkpoint_version_id_fkey",
            ondelete="CASCADE",
        ),
        sa.UniqueConstraint("version_id", "name", name="checkpoint_version_id_name_key"),
        schema="ehub",
    )


def downgrade() -> None:
    op.drop_table("checkpoint", schema="ehub")
    op.drop_table("promotion", schema="ehub")
    op.drop_column("version", "warm", schema="ehub")
    op.drop_column("version", "frozen_at", schema="ehub")
