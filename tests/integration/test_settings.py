"""What a session sets changes no answer."""

import json

import settings_doors as doors
from psycopg.conninfo import make_conninfo

import ehub


def test_sql(url, db):
    doors.prepare(db)
    doors.check(url, db)


def test_python(url, db, tmp_path):
    """Neither what a connection string sets, nor what a database or a role does."""
    doors.prepare(db)
    found = []
    for options in ("", "-c extra_float_digits=-10 -c DateStyle=German -c bytea_output=escape"):
        with ehub.connect(
            make_conninfo(url, options=options), data_dir=tmp_path / str(len(found)), index="local"
        ) as hub:
            said = []
            for name in ("docs", "own"):
                space = hub.get_space(name)
                space.wait_until_indexed(30)
                said.append({key: space.metadata(key) for key in ("1", "2", "NULL")})
                said.append({key: vector.tolist() for key, vector in space.items()})
                for wanted in doors.FILTERS:
                    for consistency in ("replica", "strong"):
                        near = space.nearest_neighbors(
                            30,
                            vector=[3.3, 0.1],
                            filter=json.loads(wanted),
                            metadata=True,
                            consistency=consistency,
                        )
                        said.append([(one.key, one.metadata) for one in near])
                snapshot = space.download_snapshot()
                said.append(sorted((key, note) for key, _, note in snapshot.items(metadata=True)))
            found.append(said)
    assert found[0] == found[1]
