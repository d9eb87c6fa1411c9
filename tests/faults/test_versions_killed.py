"""Killed in the middle of a promotion, a restore, a write of a snapshot, a freeze: before or after."""

import subprocess
import sys
import time

import numpy as np
import psycopg
import pytest
from test_client_killed import settle
from test_postgres_killed import kill_postgres, retried

import ehub

ROWS = 20_000
NEW = 7.0

SCRIPT = """
import sys, ehub
hub = ehub.connect(sys.argv[1], data_dir=sys.argv[2], index="none")
space = hub.get_space("s")
snapshot = space.version("new").download_snapshot()
print("ready", flush=True)
sys.stdin.readline()
{statement}
print("done", flush=True)
"""

STATEMENTS = {
    "promote": 'space.promote("new")',
    "rollback": "space.rollback()",
    "restore": 'space.restore("cp")',
    "write_to_space": 'snapshot.overwrite_space("s", on_conflict="ours")',
    "create": 'snapshot.write_to_space("fresh", create=True)',
    "write_to_version": 'snapshot.write_to_version("fresh")',
    "freeze": "space.freeze()",
    "checkpoint": 'space.checkpoint("another")',
}


def state(url):
    """All that such a statement may change, as one value."""
    with psycopg.connect(url, autocommit=True) as db:
        (current,) = db.execute(
            "SELECT version FROM ehub.catalogue WHERE space='s' AND current"
        ).fetchone()
        values = db.execute("SELECT embedding::text, count(*) FROM spaces.s GROUP BY 1").fetchall()
        catalogue = db.execute(
            "SELECT space, version, rows, current, frozen FROM ehub.versions ORDER BY 1, 2"
        ).fetchall()
        promotions = db.execute("SELECT count(*) FROM ehub.promotions").fetchone()
        checkpoints = db.execute("SELECT checkpoint FROM ehub.checkpoints ORDER BY 1").fetchall()
        kept = db.execute("SELECT count(*) FROM ehub.rows_at('s@v1', 'cp')").fetchone()
        triggers = db.execute(
            "SELECT count(*) FROM pg_trigger WHERE tgname = 'ehub_frozen'"
        ).fetchone()
        tables = db.execute(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'ehub_data'::regnamespace"
            " AND relkind = 'r'"
        ).fetchone()
        views = db.execute(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'spaces'::regnamespace"
        ).fetchone()
    return current, values, catalogue, promotions, checkpoints, kept, triggers, tables, views


def prepare(hub, what):
    space = hub.create_space("s", 1)
    space.multiset([f"k{i}" for i in range(ROWS)], np.ones((ROWS, 1)))
    space.checkpoint("cp")
    space.multiset([f"k{i}" for i in range(ROWS)], np.full((ROWS, 1), 3.0))
    new = space.create_version("new")
    new.multiset([f"k{i}" for i in range(ROWS // 2)], np.full((ROWS // 2, 1), NEW))
    if what == "rollback":
        space.promote("new")


def undo(hub, what):
    space = hub.get_space("s")
    if what == "promote":
        space.rollback()
    elif what == "rollback":
        space.promote("new")
    elif what in ("restore", "write_to_space"):
        space.multiset([f"k{i}" for i in range(ROWS)], np.full((ROWS, 1), 3.0))
    elif what == "create":
        hub.delete_space("fresh")
    elif what == "write_to_version":
        space.drop_version("fresh")
    elif what == "checkpoint":
        space.drop_checkpoint("another")


def start(url, data_dir, what):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(statement=STATEMENTS[what]), url, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return time.monotonic()


def duration(url, data_dir, what):
    """Let it happen once, to know when to kill it."""
    with start(url, data_dir, what) as process:
        started = go(process)
        assert process.stdout.readline() == "done\n"
        return time.monotonic() - started


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_client_that_is_killed_leaves_it_undone_or_done(hub, url, data_dir, what):
    prepare(hub, what)
    before = state(url)
    whole = duration(url, data_dir, what)
    after = state(url)
    assert after != before
    if what == "freeze":
        # There is no way back: one try on another space would tell the same.
        return
    for share in (0.2, 0.5, 0.8):
        undo(hub, what)
        before = state(url)
        with start(url, data_dir, what) as process:
            go(process)
            time.sleep(whole * share)
            process.kill()
            acknowledged = "done" in process.stdout.read()
        settle(hub, url)
        with psycopg.connect(url, autocommit=True) as db:
            # The statement of the killed client goes on until it wants to tell it.
            while db.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND state = 'active' AND pid <> pg_backend_pid() AND query ~ 'ehub\\.'"
            ).fetchone() != (0,):
                time.sleep(0.05)
        found = comparable(state(url))
        done = found == comparable(after)
        assert done or found == comparable(before), what
        assert done or not acknowledged
        if not done:
            duration(url, data_dir, what)
            assert comparable(state(url)) == comparable(after)


def comparable(state):
    # Promotions are only added to.
    return (*state[:3], *state[4:])


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_server_that_is_killed_comes_back_before_or_after(tmp_path, what):
    with ehub.connect("embedded", data_dir=tmp_path / "data", index="none") as hub:
        prepare(hub, what)
        url = hub.conninfo
        before = state(url)
        with start(url, tmp_path / "client", what) as process:
            go(process)
            time.sleep(0.02)
            kill_postgres(tmp_path / "data")
            acknowledged = "done" in process.stdout.read()
        retried(lambda: hub.get_space("s"))
        url = hub.conninfo
        found = state(url)
        if found == before:
            assert not acknowledged
            duration(url, tmp_path / "client", what)
            found = state(url)
        current, values = found[0], dict(found[1])
        expected = {
            "promote": ("new", {"[7]": ROWS // 2}),
            "rollback": ("v1", {"[3]": ROWS}),
            "restore": ("v1", {"[1]": ROWS}),
            "write_to_space": ("v1", {"[7]": ROWS // 2}),
        }.get(what, ("v1", {"[3]": ROWS}))
        assert (current, values) == expected
        assert found[5] == (ROWS,)
        if what == "freeze":
            with pytest.raises(ehub.FrozenError):
                hub.get_space("s").set("x", [1])
