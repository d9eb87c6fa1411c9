"""Grants, the audit trail, indexes over limited rows; the log is trimmed by version."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from ehub.models import RegRole, Xid8

revision = "0004"
down_revision = "0003"

_NOW = pg.TIMESTAMP(timezone=True)
# Functions whose parameters, results or ways are others now; they are made again with all the rest.
_REPLACED = (
    *("acknowledge", "candidates", "carry_rights", "changed_since", "changes", "checkpoint"),
    *("create_space", "create_version", "deciding_keys", "delete_space", "drop_checkpoint"),
    *("drop_version", "forget_replica", "freeze", "hold_log", "images", "keep_warm", "lag"),
    *("promote", "recognise", "report", "restore", "rollback", "sees_all_rows"),
    *("show_version_at_once", "switch", "trimmed_below"),
)


def upgrade() -> None:
    op.execute("DROP VIEW IF EXISTS ehub.status")
    replaced = op.get_bind().execute(
        sa.text(
            "SELECT p.oid::regprocedure::text FROM pg_proc AS p"
            " WHERE p.pronamespace = 'ehub'::regnamespace AND p.proname = ANY(:names)"
        ),
        {"names": list(_REPLACED)},
    )
    for name in replaced.scalars().all():
        op.execute(f"DROP FUNCTION {name}")
    op.execute("DROP DOMAIN IF EXISTS ehub.caller")
    op.create_table(
        "access",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("space_id", sa.BigInteger),
        sa.Column("version_id", sa.BigInteger),
        sa.Column("role", RegRole, nullable=False),
        sa.Column("privilege", sa.Text, nullable=False),
        sa.Column("rows", pg.JSONB),
        sa.Column("granted_by", sa.Text, nullable=False),
        sa.Column("granted_at", _NOW, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.ForeignKeyConstraint(
            ["space_id"], ["ehub.space.id"], name="access_space_id_fkey", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["ehub.version.id"], name="access_version_id_fkey", ondelete="CASCADE"
        ),
        sa.UniqueConstraint(
            *("space_id", "version_id", "role", "privilege", "rows"),
            name="access_space_id_version_id_role_privilege_rows_key",
            postgresql_nulls_not_distinct=True,
        ),
        sa.CheckConstraint(
            "privilege IN ('read', 'write', 'admin', 'create')",
            name=op.f("access_privilege_check"),
        ),
        schema="ehub",
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("at", _NOW, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("login", sa.Text, nullable=False),
        sa.Column("address", pg.INET),
        sa.Column("application", sa.Text, nullable=False),
        # No foreign key: what was done stays written down when the space is gone.
        sa.Column("space_id", sa.BigInteger),
        sa.Column("space", sa.Text),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("detail", pg.JSONB, nullable=False),
        schema="ehub",
    )
    op.add_column("index", sa.Column("rows", pg.ARRAY(pg.JSONB)), schema="ehub")
    op.drop_constraint("index_version_id_key", "index", schema="ehub")
    op.create_unique_constraint(
        "index_version_id_rows_key",
        "index",
        ["version_id", "rows"],
        schema="ehub",
        postgresql_nulls_not_distinct=True,
    )
    op.add_column(
        "replica",
        sa.Column("role", sa.Text, nullable=False, server_default=sa.text("CURRENT_USER")),
        schema="ehub",
    )
    op.add_column(
        "version",
        sa.Column("trimmed_below", Xid8, nullable=False, server_default="0"),
        schema="ehub",
    )
    op.execute(
        "UPDATE ehub.version SET trimmed_below = s.value::xid8"
        " FROM ehub.setting AS s WHERE s.name = 'trimmed_below'"
    )
    op.execute("DELETE FROM ehub.setting WHERE name = 'trimmed_below'")


def downgrade() -> None:
    op.drop_column("version", "trimmed_below", schema="ehub")
    op.drop_column("replica", "role", schema="ehub")
    op.execute("DELETE FROM ehub.index WHERE rows IS NOT NULL")
    op.drop_constraint("index_version_id_rows_key", "index", schema="ehub")
    op.drop_column("index", "rows", schema="ehub")
    op.create_unique_constraint("index_version_id_key", "index", ["version_id"], schema="ehub")
    op.drop_table("audit", schema="ehub")
    op.drop_table("access", schema="ehub")
