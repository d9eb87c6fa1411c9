"""A hot standby: searches there are exact, and write nothing."""

import os
import pwd
import subprocess

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import ehub
from ehub.config import Target
from ehub.database import Database


@pytest.fixture
def standby(tmp_path):
    """A primary of its own and a standby that follows it: their connection strings."""
    # The server's user must find its way in where that is not this process' own.
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    database = Database(Target(None, tmp_path / "primary"))
    primary = database.conninfo()
    programs = database.embedded.bin_dir
    values = conninfo_to_dict(primary)
    owner = pwd.getpwuid((tmp_path / "primary" / "postgres").stat().st_uid)
    place = tmp_path / "standby"
    place.mkdir()
    os.chown(place, owner.pw_uid, owner.pw_gid)

    def run(program, *arguments):
        account = {"user": owner.pw_uid, "group": owner.pw_gid} if os.geteuid() == 0 else {}
        subprocess.run(
            [programs / program, *arguments],
            check=True,
            cwd=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **account,
        )

    run(
        "pg_basebackup",
        *("-h", values["host"], "-U", "postgres", "-D", str(place / "data"), "-R", "-c", "fast"),
    )
    options = f"-p 5433 -k {place} -c listen_addresses=''"
    run("pg_ctl", "-D", str(place / "data"), "-w", "-o", options, "-l", "log", "start")
    yield primary, make_conninfo(primary, host=str(place), port="5433")
    run("pg_ctl", "-D", str(place / "data"), "-m", "immediate", "stop")
    database.close()


def test_searches_on_a_standby(standby, tmp_path):
    primary, url = standby
    with ehub.connect("embedded", data_dir=tmp_path / "primary", index="none") as hub:
        hub.create_space("s", 2).multiset({"a": [1, 2], "b": [2, 1], "c": [3, 3]})
        with psycopg.connect(primary, autocommit=True) as db:
            # As if a service were there: the standby must not look at what it cannot read.
            db.execute("SELECT ehub.enter_incarnation()")
            (written,) = db.execute("SELECT pg_current_wal_lsn()").fetchone()
        with psycopg.connect(url, autocommit=True) as db:
            while db.execute("SELECT pg_last_wal_replay_lsn() < %s", [written]).fetchone()[0]:
                pass
            assert db.execute("SELECT key FROM ehub.nearest('s', '[1,2]', 2)").fetchall() == [
                ("a",),
                ("b",),
            ]
            assert db.execute("SELECT key FROM ehub.nearest_to('s', 'a', 1)").fetchone() == ("b",)
            assert (
                len(
                    db.execute(
                        "SELECT * FROM ehub.nearest_many('s', ARRAY['[1,2]', '[3,3]']::vector[], 2)"
                    ).fetchall()
                )
                == 4
            )
            assert db.execute("SELECT rows, in_sql FROM ehub.status").fetchone() == (
                3,
                "exact: this is a standby",
            )
        for index in ("none", "service"):
            with ehub.connect(url, data_dir=tmp_path / "x", index=index) as there:
                found = there.get_space("s").nearest_neighbors(2, vector=[1, 2])
                assert [one.key for one in found] == ["a", "b"]
