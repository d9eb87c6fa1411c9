"""Spaces, versions, indexes, the change log and replicas."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from ehub.models import PgSnapshot, Xid8

revision = "0001"
down_revision = None

_NOW = pg.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "setting",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        schema="ehub",
    )
    op.create_table(
        "space",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("current_version_id", sa.BigInteger),
        sa.Column("created_at", _NOW, nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("name", name="space_name_key"),
        schema="ehub",
    )
    op.create_table(
        "version",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("space_id", sa.BigInteger, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dims", sa.Integer, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("created_at", _NOW, nullable=False, server_default=sa.func.now()),
        sa.ForeignKeyConstraint(
            ["space_id"], ["ehub.space.id"], name="version_space_id_fkey", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("space_id", "name", name="version_space_id_name_key"),
        sa.CheckConstraint("dims BETWEEN 1 AND 16000", name="version_dims_check"),
        sa.CheckConstraint("metric IN ('l2', 'cosine', 'ip')", name="version_metric_check"),
        schema="ehub",
    )
    op.create_foreign_key(
        "space_current_version_id_fkey",
        "space",
        "version",
        ["current_version_id"],
        ["id"],
        source_schema="ehub",
        referent_schema="ehub",
        deferrable=True,
        initially="DEFERRED",
    )
    op.create_table(
        "index",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("version_id", sa.BigInteger, nullable=False),
        sa.Column("m", sa.Integer, nullable=False),
        sa.Column("ef_construction", sa.Integer, nullable=False),
        sa.Column("target_recall", pg.DOUBLE_PRECISION, nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"], ["ehub.version.id"], name="index_version_id_fkey", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("version_id", name="index_version_id_key"),
        sa.CheckConstraint("m BETWEEN 2 AND 128", name="index_m_check"),
        sa.CheckConstraint(
            "ef_construction BETWEEN 4 AND 4096", name="index_ef_construction_check"
        ),
        sa.CheckConstraint("target_recall BETWEEN 0.5 AND 0.999", name="index_target_recall_check"),
        schema="ehub",
    )
    op.create_table(
        "replica",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("index_id", sa.BigInteger, nullable=False),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("watermark", PgSnapshot, nullable=False),
        sa.Column("nonce", sa.Uuid, nullable=False),
        sa.Column(
            "acknowledged_at", _NOW, nullable=False, server_default=sa.func.clock_timestamp()
        ),
        sa.Column("applied", PgSnapshot, nullable=False),
        sa.Column("reported_at", _NOW, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("expires_at", _NOW, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("tombstones", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("ef", sa.Integer),
        sa.Column("recall", pg.DOUBLE_PRECISION),
        sa.Column("memory", sa.BigInteger),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("id", "index_id", name="replica_pkey"),
        sa.ForeignKeyConstraint(
            ["index_id"], ["ehub.index.id"], name="replica_index_id_fkey", ondelete="CASCADE"
        ),
        schema="ehub",
    )
    op.create_table(
        "change",
        sa.Column("version_id", sa.BigInteger, nullable=False),
        sa.Column("xid", Xid8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
        sa.Column("keys", pg.ARRAY(sa.Text)),
        schema="ehub",
    )
    op.create_index("change_version_id_xid_idx", "change", ["version_id", "xid"], schema="ehub")
    # Data tables and views have schemas of their own: one to grant on, one to look into.
    op.execute("CREATE SCHEMA ehub_data")
    op.execute("CREATE SCHEMA spaces")


def downgrade() -> None:
    op.execute("DROP SCHEMA spaces CASCADE")
    op.execute("DROP SCHEMA ehub_data CASCADE")
    op.drop_constraint("space_current_version_id_fkey", "space", schema="ehub")
    for table in ("change", "replica", "index", "version", "space", "setting"):
        op.drop_table(table, schema="ehub")
