"""What a session sets changes no answer that comes by the index either."""

import settings_doors as doors

from service.conftest import settled


def test_sql(service, url, db):
    doors.prepare(db)
    settled(db, "docs")
    settled(db, "own")
    doors.check(
        url,
        db,
        door=r"nearest(_many|_to|_like)?\(",
        setting="(?i)^(array|bytea|datestyle|extra|quote|search_path|standard|transform)",
    )
