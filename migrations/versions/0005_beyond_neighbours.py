"""Partitions, sub-indexes by name, maintained averages."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0005"
down_revision = "0004"

# Functions whose parameters or results are others now; they are made again with all the rest.
_REPLACED = (
    *("add_version", "candidates", "create_checks", "create_space", "create_version", "nearest"),
    *("nearest_exact", "nearest_exact_to", "nearest_many", "nearest_of_batch", "nearest_to"),
)


def upgrade() -> None:
    op.execute("DROP VIEW IF EXISTS ehub.status, ehub.indexes")
    replaced = op.get_bind().execute(
        sa.text(
            "SELECT p.oid::regprocedure::text FROM pg_proc AS p"
            " WHERE p.pronamespace = 'ehub'::regnamespace AND p.proname = ANY(:names)"
            " OR p.pronamespace = 'ehub_data'::regnamespace AND p.proname ~ '^check_'"
        ),
        {"names": list(_REPLACED)},
    )
    for name in replaced.scalars().all():
        op.execute(f"DROP FUNCTION {name}")
    op.add_column("version", sa.Column("partition_by", sa.Text), schema="ehub")
    op.add_column("index", sa.Column("name", sa.Text), schema="ehub")
    op.add_column("index", sa.Column("filter", pg.JSONB), schema="ehub")
    op.create_check_constraint(
        op.f("index_filter_check"), "index", "(name IS NULL) = (filter IS NULL)", schema="ehub"
    )
    op.drop_constraint("index_version_id_rows_key", "index", schema="ehub")
    op.create_unique_constraint(
        "index_version_id_name_rows_key",
        "index",
        ["version_id", "name", "rows"],
        schema="ehub",
        postgresql_nulls_not_distinct=True,
    )
    op.create_table(
        "average",
        sa.Column("space_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("source_id", sa.BigInteger, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("weight", sa.Text),
        sa.ForeignKeyConstraint(
            ["space_id"], ["ehub.space.id"], name="average_space_id_fkey", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["source_id"], ["ehub.space.id"], name="average_source_id_fkey"),
        schema="ehub",
    )


def downgrade() -> None:
    op.drop_table("average", schema="ehub")
    op.execute("DELETE FROM ehub.index WHERE name IS NOT NULL")
    op.drop_constraint("index_version_id_name_rows_key", "index", schema="ehub")
    op.drop_constraint(op.f("index_filter_check"), "index", schema="ehub")
    op.drop_column("index", "filter", schema="ehub")
    op.drop_column("index", "name", schema="ehub")
    op.create_unique_constraint(
        "index_version_id_rows_key",
        "index",
        ["version_id", "rows"],
        schema="ehub",
        postgresql_nulls_not_distinct=True,
    )
    op.drop_column("version", "partition_by", schema="ehub")
