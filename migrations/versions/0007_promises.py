"""What any role may do holds no row that managing a space needs."""

import sqlalchemy as sa
from alembic import op

from ehub.models import Xid8

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "trimmed",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("version_id", sa.BigInteger, nullable=False),
        sa.Column("below", Xid8, nullable=False),
        schema="ehub",
    )
    op.create_index(
        "trimmed_version_id_below_idx", "trimmed", ["version_id", "below"], schema="ehub"
    )
    op.execute(
        "INSERT INTO ehub.trimmed (version_id, below)"
        " SELECT v.id, v.trimmed_below FROM ehub.version AS v WHERE v.trimmed_below > '0'"
    )
    op.drop_column("version", "trimmed_below", schema="ehub")
    op.execute("DELETE FROM ehub.setting WHERE name = 'trim'")
    op.drop_constraint("replica_index_id_fkey", "replica", schema="ehub")
    op.execute("DROP FUNCTION IF EXISTS ehub.add_statement_triggers(text, text, text)")


def downgrade() -> None:
    op.execute(
        "DELETE FROM ehub.replica AS r"
        " WHERE NOT EXISTS (SELECT FROM ehub.index AS i WHERE i.id = r.index_id)"
    )
    op.create_foreign_key(
        "replica_index_id_fkey",
        "replica",
        "index",
        ["index_id"],
        ["id"],
        source_schema="ehub",
        referent_schema="ehub",
        ondelete="CASCADE",
    )
    op.execute("INSERT INTO ehub.setting VALUES ('trim', '')")
    op.add_column(
        "version",
        sa.Column("trimmed_below", Xid8, nullable=False, server_default="0"),
        schema="ehub",
    )
    op.execute(
        "UPDATE ehub.version AS v SET trimmed_below = t.below FROM ("
        " SELECT DISTINCT ON (version_id) version_id, below FROM ehub.trimmed"
        " ORDER BY version_id, below DESC) AS t WHERE t.version_id = v.id"
    )
    op.drop_table("trimmed", schema="ehub")
