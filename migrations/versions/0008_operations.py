"""What operators need: a bell that rings a few times a second at most."""

from alembic import op

revision = "0008"
down_revision = "0007"

EXACT_REASONS = (
    *("no_service", "service_down", "service_unreachable", "index_not_ready", "index_behind"),
    *("row_limits", "filter", "request"),
)


def upgrade() -> None:
    for reason in EXACT_REASONS:
        op.create_table(f"exact_{reason}", schema="ehub")
    op.execute("CREATE SEQUENCE ehub.bell MINVALUE 0 START WITH 0")
    for function in ("is_run_by_a_function(text)", "tend_triggers(interval)"):
        op.execute(f"DROP FUNCTION IF EXISTS ehub.{function}")


def downgrade() -> None:
    op.execute("DROP SEQUENCE ehub.bell")
    for reason in EXACT_REASONS:
        op.drop_table(f"exact_{reason}", schema="ehub")
