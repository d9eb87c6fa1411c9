"""pg_dump into another cluster: a whole hub comes out, and indexes notice where they are."""

import subprocess
import uuid

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors

import ehub

ROWS = {f"k{i}": np.array([i, i % 7, 1], np.float32) for i in range(400)}


@pytest.fixture
def hub(embedded):
    return embedded


def contents(rows):
    return {key: (vector.tobytes(), note) for key, vector, note in rows.items(metadata=True)}


def test_a_dump_is_a_whole_hub(hub, elsewhere, tmp_path):
    programs, target = elsewhere
    space = hub.create_space("items", 3)
    space.multiset(ROWS, checkpoint="empty")
    space.checkpoint("full")
    space.delete("k1")
    space.freeze()
    reader = f"ehub_dump_{uuid.uuid4().hex[:8]}"
    for where in (hub.conninfo, target):
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {reader}")
    space.grant(reader, "read", rows={"tenant": 1})
    second = space.create_version("v2", dims=2, metric="cosine")
    second.multiset({"a": [1, 0], "b": [0, 1]})
    space.promote("v2")
    hub.create_average("taste", "items", "kind")
    second.create_index("odd", {"kind": "odd"})
    parted = hub.create_space("parted", 2, partition_by="tenant")
    parted.set("a", [1, 2], partition="x")
    second.set("b", [0, 2], {"kind": "x"})
    second.set("a", [2, 0], {"kind": "x"})
    # Transaction ids that the other cluster has not reached, in the log and in what was trimmed.
    with psycopg.connect(hub.conninfo, autocommit=True) as here:
        for _ in range(3000):
            here.execute("SELECT pg_current_xact_id()")
        space.wait_until_indexed(30)
        second.set("c", [1, 1])
        here.execute("SELECT ehub.trim()")
    second.set("d", [1, 2])
    space.wait_until_indexed(30)
    before = [contents(version) for version in space.versions()]

    dump = tmp_path / "dump"
    subprocess.run([programs / "pg_dump", "-Fc", "-f", dump, hub.conninfo], check=True)
    subprocess.run([programs / "pg_restore", "--exit-on-error", "-d", target, dump], check=True)

    with ehub.connect(target, data_dir=tmp_path / "data", index="local") as other:
        found, parted, kept = other.spaces()
        assert [one.where for one in found.indexes()] == [{"kind": "odd"}]
        assert parted.partitions() == {"x": 1}
        with pytest.raises(ehub.InvalidMetadataError, match="tenant"):
            parted.set("b", [1, 2])
        assert other.kept_averages() == [ehub.KeptAverage("taste", "items", "kind", None)]
        assert kept.get("x").tolist() == [1, 1]
        assert [(grant.role, grant.rows) for grant in found.grants()] == [(reader, {"tenant": 1})]
        assert other.doctor() == []
        assert [entry.action for entry in found.audit()][-1] == "create_space"
        assert [contents(version) for version in found.versions()] == before
        assert found.current.name == "v2"
        assert found.history()[0].to_version == "v2"
        found.wait_until_indexed(30)
        found.set("new", [5, 1], {"kind": "x"})
        assert kept.metadata("x") == {"rows": 3}
        with pytest.raises(ehub.ReadOnlyError):
            kept.set("x", [1, 1])
        assert found.nearest_neighbors(1, vector=[5, 1])[0].key == "new"
        first = found.version("v1")
        assert first.frozen
        with pytest.raises(ehub.FrozenError):
            first.set("x", [1, 2, 3])
        assert [one.name for one in first.checkpoints()] == ["empty", "full"]
        assert len(first.at("empty")) == 0
        assert {key: v.tobytes() for key, v in first.at("full").items()} == {
            key: v.tobytes() for key, v in ROWS.items()
        }
        found.rollback()
        found.wait_until_indexed(30)
        table = {key: vector for key, vector in ROWS.items() if key != "k1"}
        near = found.nearest_neighbors(5, vector=[7, 7, 7])
        check_neighbors(near, table, "l2", np.array([7, 7, 7]), 5)
        with psycopg.connect(target, autocommit=True) as there:
            # Its log is that of its own transactions: of a row, and of the average that follows it.
            (logged,) = there.execute("SELECT count(*) FROM ehub.change").fetchone()
            assert logged <= 2
            there.execute("SELECT ehub.trim()")
            bound, now = there.execute(
                "SELECT coalesce(max(below::text::bigint), 0), pg_current_xact_id()::text::bigint"
                " FROM ehub.trimmed"
            ).fetchone()
            assert bound < now
    # The first one goes on as if nothing had been.
    second.set("e", [2, 1])
    space.wait_until_indexed(30)
    assert space.nearest_neighbors(1, vector=[2, 1])[0].key == "e"
