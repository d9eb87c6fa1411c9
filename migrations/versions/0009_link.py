"""What a search asks the index service: by the address of a space, and vectors as they are."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute(
        "DROP FUNCTION IF EXISTS"
        " ehub.candidates(bigint, int, int, text, jsonb, text, text, ehub.caller)"
    )
    op.execute(
        "DO $$ BEGIN IF to_regtype('ehub.caller') IS NOT NULL THEN"
        " ALTER DOMAIN ehub.caller DROP CONSTRAINT caller_check;"
        " ALTER DOMAIN ehub.caller ADD CONSTRAINT caller_check CHECK ("
        " VALUE = quote_ident(current_user)::regrole::oid"
        " || ' ' || (1000000 * date_part('epoch', statement_timestamp()))::bigint);"
        " END IF; END $$"
    )
    op.execute("DROP FUNCTION IF EXISTS ehub.this_statement()")


def downgrade() -> None:
    # The functions of a release are made anew after its migrations, and the domain means the same.
    pass
