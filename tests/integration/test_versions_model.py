"""Versions and checkpoints against plain dicts: Hypothesis looks for a way to tell them apart."""

from __future__ import annotations

import contextlib

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import check_neighbors

import ehub
from ehub.index import tail

KEYS = st.integers(0, 3).map(lambda i: f"k{i}")
SOME_KEYS = st.lists(KEYS, min_size=1, max_size=4, unique=True)
VERSIONS = st.sampled_from(["v1", "v1", "v2", "v3"])
NAMES = st.sampled_from(["a", "b", "c"])


class Version:
    """What a version is, in dicts: rows, and the rows of its checkpoints in their order."""

    def __init__(self, rows=None):
        self.rows = dict(rows or {})
        self.checkpoints = {}
        self.frozen = False


class VersionsMachine(RuleBasedStateMachine):
    url: str
    data_dir: object
    place: str

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed):
        self.random = np.random.default_rng(seed)
        self.db = psycopg.connect(self.url, autocommit=True)
        self.hub = ehub.connect(self.url, data_dir=self.data_dir, index=self.place)
        self.space = self.hub.create_space("s", 3)
        self.versions = {"v1": Version()}
        self.current = "v1"
        # What was current before each promotion that no rollback has undone.
        self.before = []
        # A transaction with a snapshot, in which nothing of ehub was read.
        self.old = None
        if self.place == "local":
            self.space.wait_until_indexed(30)

    def teardown(self):
        if hasattr(self, "hub"):
            self.close_old()
            self.hub.delete_space("s")
            self.hub.close()
            self.db.close()

    def row(self):
        note = {"n": int(self.random.integers(3))} if self.random.random() < 0.5 else {}
        return self.random.standard_normal(3).astype(np.float32), note

    def handle(self, version):
        """A version by its own name, or now and then by that of its space."""
        if version == self.current and self.random.random() < 0.5:
            return self.space
        return self.space.version(version)

    def changing(self, version):
        """Expect the version to take a change, or to refuse it because it is frozen."""
        if version not in self.versions:
            return pytest.raises(ehub.VersionNotFoundError)
        if self.versions[version].frozen:
            return pytest.raises(ehub.FrozenError)
        return None

    def change(self, version, do):
        """Do something to a version; says whether it was done."""
        refused = self.changing(version)
        if refused is None:
            do(self.handle(version))
            return True
        with refused:
            do(self.space.version(version))
        return False

    # --- rows

    @rule(version=VERSIONS, keys=SOME_KEYS)
    def write(self, version, keys):
        rows = {key: self.row() for key in keys}
        batch = [(key, vector, note) for key, (vector, note) in rows.items()]
        if self.change(version, lambda space: space.multiset(batch)):
            self.versions[version].rows.update(rows)

    @rule(version=VERSIONS, key=KEYS)
    def write_one(self, version, key):
        vector, note = self.row()
        if self.change(version, lambda space: space.set(key, vector, note)):
            self.versions[version].rows[key] = vector, note

    @rule(version=VERSIONS, keys=SOME_KEYS)
    def delete(self, version, keys):
        known = self.versions.get(version, Version()).rows
        keys = [key for key in keys if key in known]
        if keys and self.change(version, lambda space: space.multidelete(keys)):
            for key in keys:
                del known[key]

    @rule(version=VERSIONS, key=KEYS, other=KEYS)
    def rename(self, version, key, other):
        known = self.versions.get(version, Version())
        if key in known.rows and other not in known.rows and not known.frozen:
            self.db.execute(
                f'UPDATE spaces."s@{version}" SET key = %s WHERE key = %s', [other, key]
            )
            known.rows[other] = known.rows.pop(key)

    @rule(version=VERSIONS)
    def delete_all(self, version):
        if self.change(version, lambda space: space.delete_all()):
            self.versions[version].rows.clear()

    @rule(version=VERSIONS)
    def truncate(self, version):
        if version in self.versions and not self.versions[version].frozen:
            (relation,) = self.db.execute(
                "SELECT 'ehub_data.v' || version_id FROM ehub.catalogue WHERE version = %s",
                [version],
            ).fetchone()
            self.db.execute(f"TRUNCATE {relation}")
            self.versions[version].rows.clear()

    @rule(version=VERSIONS, keys=SOME_KEYS)
    def take_back(self, version, keys):
        """A transaction that rolls back leaves no trace, also not in the images."""
        if version in self.versions and not self.versions[version].frozen:
            with self.db.transaction(force_rollback=True):
                for key in keys:
                    self.db.execute(f'DELETE FROM spaces."s@{version}" WHERE key = %s', [key])

    # --- checkpoints

    @rule(version=VERSIONS, name=NAMES)
    def checkpoint(self, version, name):
        known = self.versions.get(version)
        if known is None:
            with pytest.raises(ehub.VersionNotFoundError):
                self.space.version(version).checkpoint(name)
        elif name in known.checkpoints:
            with pytest.raises(ehub.CheckpointExistsError):
                self.handle(version).checkpoint(name)
        else:
            self.handle(version).checkpoint(name)
            known.checkpoints[name] = dict(known.rows)

    @rule(version=VERSIONS, name=NAMES, keys=SOME_KEYS)
    def write_with_checkpoint(self, version, name, keys):
        known = self.versions.get(version)
        if known is None or name in known.checkpoints:
            return
        rows = {key: self.row() for key in keys}
        batch = [(key, vector, note) for key, (vector, note) in rows.items()]
        before = dict(known.rows)
        if self.change(version, lambda space: space.multiset(batch, checkpoint=name)):
            known.checkpoints[name] = before
            known.rows.update(rows)

    @rule(version=VERSIONS, name=NAMES)
    def restore(self, version, name):
        known = self.versions.get(version)
        if known is None or name not in known.checkpoints:
            with pytest.raises(ehub.NotFoundError):
                self.space.version(version).restore(name)
        elif known.frozen:
            with pytest.raises(ehub.FrozenError):
                self.handle(version).restore(name)
        else:
            self.handle(version).restore(name)
            known.rows = dict(known.checkpoints[name])

    @rule(version=VERSIONS, name=NAMES)
    def drop_checkpoint(self, version, name):
        known = self.versions.get(version)
        if known is None or name not in known.checkpoints:
            with pytest.raises(ehub.NotFoundError):
                self.space.version(version).drop_checkpoint(name)
        else:
            self.handle(version).drop_checkpoint(name)
            del known.checkpoints[name]

    # --- versions

    @rule(version=VERSIONS, source=st.none() | VERSIONS)
    def create_version(self, version, source):
        if version in self.versions:
            with pytest.raises(ehub.VersionExistsError):
                self.space.create_version(version)
        elif source is not None and source not in self.versions:
            with pytest.raises(ehub.VersionNotFoundError):
                self.space.create_version(version, from_version=source)
        else:
            self.space.create_version(version, from_version=source)
            self.versions[version] = Version(self.versions[source].rows if source else None)

    @rule(version=VERSIONS)
    def promote(self, version):
        if version not in self.versions:
            with pytest.raises(ehub.VersionNotFoundError):
                self.space.promote(version)
        elif version == self.current:
            with pytest.raises(ehub.InvalidValueError, match="current already"):
                self.space.promote(version)
        else:
            done = self.space.promote(version)
            assert done[:2] == (self.current, version)
            self.before.append(self.current)
            self.current = version

    @rule()
    def rollback(self):
        while self.before and (
            self.before[-1] not in self.versions or self.before[-1] == self.current
        ):
            self.before.pop()
        if not self.before:
            with pytest.raises(ehub.VersionNotFoundError):
                self.space.rollback()
        else:
            done = self.space.rollback()
            assert done[:2] == (self.current, self.before[-1])
            self.current = self.before.pop()

    @precondition(lambda self: hasattr(self, "versions") and len(self.versions) > 1)
    @rule(version=VERSIONS, force=st.booleans())
    def drop_version(self, version, force):
        if version not in self.versions:
            with pytest.raises(ehub.VersionNotFoundError):
                self.space.drop_version(version, force=force)
            return
        alive = [one for one in self.before if one in self.versions and one != self.current]
        needed = (alive and alive[-1] == version) or self.versions[version].checkpoints
        if version == self.current or (needed and not force):
            with pytest.raises(ehub.VersionInUseError):
                self.space.drop_version(version, force=force)
        else:
            self.space.drop_version(version, force=force)
            del self.versions[version]
            # One of the same name that comes later is another one.
            self.before = [one for one in self.before if one != version]

    @rule(version=VERSIONS)
    def freeze(self, version):
        if version in self.versions and self.random.random() < 0.3:
            self.handle(version).freeze()
            self.versions[version].frozen = True

    # --- transactions that keep their snapshot

    def close_old(self):
        if self.old is not None:
            self.old.close()
            self.old = None

    @rule(level=st.sampled_from(["REPEATABLE READ", "SERIALIZABLE"]))
    def keep_a_snapshot(self, level):
        self.close_old()
        self.old = psycopg.connect(self.url, autocommit=True)
        self.old.execute(f"BEGIN ISOLATION LEVEL {level}")
        self.old.execute("SELECT 1")

    @precondition(lambda self: getattr(self, "old", None) is not None)
    @rule(first=st.booleans(), write=st.booleans())
    def look_back(self, first, write):
        """Whatever came in between, all doors open to one version, which a view is of."""
        old = self.old
        if write:
            with contextlib.suppress(psycopg.Error), old.transaction():
                old.execute("SELECT ehub.set('s', 'new', '[1,2,3]', '{\"n\": 9}')")
        looks = [self.seen_in_view, self.seen_by_functions]
        seen = [look(old) for look in (looks if first else reversed(looks))]
        if None not in seen:
            assert seen[0] == seen[1]
        # It holds its version from here on, and those who promote would wait.
        self.close_old()

    def seen_in_view(self, connection):
        return dict(connection.execute("SELECT key, embedding::text FROM spaces.s").fetchall())

    def seen_by_functions(self, connection):
        """The same by functions; None where none of them knows the version that is current now."""
        try:
            with connection.transaction():
                found = connection.execute(
                    "SELECT n.key, ehub.get('s', n.key)::text"
                    " FROM ehub.nearest('s', '[0,0,0]', 100) AS n"
                ).fetchall()
        except psycopg.errors.SerializationFailure:
            for call in ("within('s', '[0,0,0]', 1)", "get('s', 'k1')", "delete('s', 'k1')"):
                with pytest.raises(psycopg.errors.SerializationFailure), connection.transaction():
                    connection.execute(f"SELECT * FROM ehub.{call}")
            return None
        return dict(found)

    # --- what must hold

    @invariant()
    def equals_the_model(self):
        if not hasattr(self, "versions"):
            return
        found = {one.name: one for one in self.space.versions()}
        assert set(found) == set(self.versions)
        assert [name for name, one in found.items() if one.current] == [self.current]
        for name, known in self.versions.items():
            version = found[name]
            same(version, known.rows)
            assert version.frozen == known.frozen
            assert [one.name for one in version.checkpoints()] == list(known.checkpoints)
            for checkpoint, rows in known.checkpoints.items():
                same(version.at(checkpoint), rows)
        same(self.space, self.versions[self.current].rows)
        self.images_are_few()

    def images_are_few(self):
        """No image is kept that no checkpoint needs."""
        for name, known in self.versions.items():
            (images,) = self.db.execute(
                "SELECT to_regclass('ehub_data.h' || version_id) FROM ehub.catalogue"
                " WHERE version = %s",
                [name],
            ).fetchone()
            if images is not None:
                (count,) = self.db.execute(f"SELECT count(*) FROM {images}").fetchone()
                # At most one for each key that ever was, and each checkpoint.
                assert count <= 4 * len(known.checkpoints)

    @invariant()
    def searches_right(self):
        if not hasattr(self, "versions"):
            return
        query = self.random.standard_normal(3)
        for name, known in self.versions.items():
            rows = {key: vector for key, (vector, _) in known.rows.items()}
            handle = self.handle(name)
            found = handle.nearest_neighbors(3, vector=query, consistency="strong")
            check_neighbors(found, rows, "l2", query, 3)
            for checkpoint, kept in known.checkpoints.items():
                rows = {key: vector for key, (vector, _) in kept.items()}
                found = self.space.version(name).at(checkpoint).nearest_neighbors(3, vector=query)
                check_neighbors(found, rows, "l2", query, 3)


def same(found, rows):
    items = {key: (vector.tobytes(), note) for key, vector, note in found.items(metadata=True)}
    assert items == {key: (vector.tobytes(), note) for key, (vector, note) in rows.items()}


@pytest.mark.parametrize(("place", "examples"), [("none", 30), ("local", 12)])
def test_versions_and_checkpoints_are_what_dicts_say(url, tmp_path, monkeypatch, place, examples):
    # Few rows are kept apart, so that the graph answers although there are not many.
    monkeypatch.setattr(tail, "SIZE", 3)
    machine = type(
        "Machine", (VersionsMachine,), {"url": url, "data_dir": tmp_path, "place": place}
    )
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
