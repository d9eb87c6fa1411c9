"""Kept averages against numpy: Hypothesis looks for a way to make them differ from their source."""

from __future__ import annotations

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_averages import check

import ehub

KEYS = st.integers(0, 5).map(lambda i: f"k{i}")
SOME_KEYS = st.lists(KEYS, min_size=1, max_size=4, unique=True)
VERSIONS = st.sampled_from(["v1", "v1", "v2", "v3"])
NAMES = st.sampled_from(["a", "b"])
# Also what takes no part: no value, no scalar, too long, no weight, no number.
NOTES = st.fixed_dictionaries(
    {},
    optional={
        "by": st.sampled_from(["x", "x", "y", 7, True, None, ["x"], ""]),
        "weight": st.sampled_from([1, 1, 2, 0, -1, 0.5, "1", None]),
    },
)


class AveragesMachine(RuleBasedStateMachine):
    url: str

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed):
        self.random = np.random.default_rng(seed)
        self.db = psycopg.connect(self.url, autocommit=True)
        self.hub = ehub.connect(self.url, index="none")
        self.space = self.hub.create_space("s", 2)
        self.kept = self.hub.create_average("plain", "s", "by")
        self.weighted = self.hub.create_average("weighted", "s", "by", "weight", metric="cosine")
        # Rows and checkpoints, by version.
        self.versions = {"v1": ({}, {})}
        self.current, self.before = "v1", []

    def teardown(self):
        if hasattr(self, "hub"):
            self.hub.delete_space("plain")
            self.hub.delete_space("weighted")
            self.hub.delete_space("s")
            self.hub.close()
            self.db.close()

    def vector(self):
        # Sums of whole numbers are exact: what numpy finds to be a zero vector is one.
        return np.float32([self.random.integers(1, 9), self.random.integers(-4, 5)])

    def rows(self, version):
        return self.versions[version][0] if version in self.versions else None

    @rule(version=VERSIONS, keys=SOME_KEYS, data=st.data())
    def write(self, version, keys, data):
        rows = self.rows(version)
        if rows is not None:
            new = {key: (self.vector(), data.draw(NOTES)) for key in keys}
            self.space.version(version).multiset([(key, *row) for key, row in new.items()])
            rows.update(new)

    @rule(version=VERSIONS, keys=SOME_KEYS)
    def write_vectors(self, version, keys):
        rows = self.rows(version)
        if rows is not None:
            new = {key: (self.vector(), rows.get(key, (None, {}))[1]) for key in keys}
            self.space.version(version).multiset({key: row[0] for key, row in new.items()})
            rows.update(new)

    @rule(version=VERSIONS, keys=SOME_KEYS, note=NOTES, keep=st.booleans())
    def move(self, version, keys, note, keep):
        """Rows go to another value or weight; and perhaps it is taken back."""
        rows = self.rows(version)
        if rows is not None:
            with self.db.transaction(force_rollback=not keep):
                self.db.execute(
                    f'UPDATE spaces."s@{version}" SET metadata = %s WHERE key = ANY(%s)',
                    [psycopg.types.json.Jsonb(note), keys],
                )
            for key in set(keys) & rows.keys() if keep else ():
                rows[key] = rows[key][0], note

    @rule(version=VERSIONS, keys=SOME_KEYS, keep=st.booleans())
    def delete(self, version, keys, keep):
        """In a savepoint: what it has done stays or goes, what came before stays."""
        rows = self.rows(version)
        if rows is not None:
            view = f'spaces."s@{version}"'
            with self.db.transaction():
                self.db.execute(f"DELETE FROM {view} WHERE key = %s", keys[:1])
                with self.db.transaction(force_rollback=not keep):
                    self.db.execute(f"DELETE FROM {view} WHERE key = ANY(%s)", [keys])
            for key in keys if keep else keys[:1]:
                rows.pop(key, None)

    @rule(version=VERSIONS, key=KEYS, other=KEYS)
    def rename(self, version, key, other):
        rows = self.rows(version)
        if rows is not None and key in rows and other not in rows:
            self.db.execute(
                f'UPDATE spaces."s@{version}" SET key = %s WHERE key = %s', [other, key]
            )
            rows[other] = rows.pop(key)

    @rule(version=VERSIONS)
    def truncate(self, version):
        rows = self.rows(version)
        if rows is not None and self.random.random() < 0.3:
            (relation,) = self.db.execute(
                "SELECT 'ehub_data.v' || version_id FROM ehub.catalogue"
                " WHERE space = 's' AND version = %s",
                [version],
            ).fetchone()
            self.db.execute(f"TRUNCATE {relation}")
            rows.clear()

    @rule(version=VERSIONS, name=NAMES)
    def checkpoint(self, version, name):
        if version in self.versions and name not in self.versions[version][1]:
            self.space.version(version).checkpoint(name)
            self.versions[version][1][name] = dict(self.rows(version))

    @rule(version=VERSIONS, name=NAMES)
    def restore(self, version, name):
        if version in self.versions and name in self.versions[version][1]:
            self.space.version(version).restore(name)
            rows, checkpoints = self.versions[version]
            rows.clear()
            rows.update(checkpoints[name])

    @rule(version=VERSIONS, source=st.none() | VERSIONS)
    def create_version(self, version, source):
        if version not in self.versions and (source is None or source in self.versions):
            self.space.create_version(version, from_version=source)
            self.versions[version] = (dict(self.rows(source)) if source else {}, {})

    @rule(version=VERSIONS)
    def promote(self, version):
        if version in self.versions and version != self.current:
            self.space.promote(version)
            self.before.append(self.current)
            self.current = version

    @rule()
    def rollback(self):
        while self.before and self.before[-1] in (self.current, None):
            self.before.pop()
        if self.before:
            assert self.space.rollback().to_version == self.before[-1]
            self.current = self.before.pop()

    @rule(version=VERSIONS)
    def drop_version(self, version):
        if version in self.versions and version != self.current and self.random.random() < 0.5:
            self.space.drop_version(version, force=True)
            del self.versions[version]
            self.before = [one for one in self.before if one != version]

    @rule()
    def make_anew(self):
        self.hub.delete_space("plain")
        self.kept = self.hub.create_average("plain", "s", "by")

    @invariant()
    def equals_numpy(self):
        if not hasattr(self, "versions"):
            return
        for kept, weight in ((self.kept, None), (self.weighted, "weight")):
            found = {one.name: one for one in kept.versions()}
            assert found.keys() == self.versions.keys()
            assert [name for name, one in found.items() if one.current] == [self.current]
            for name, (rows, _) in self.versions.items():
                usable = [
                    (key, vector, {**note, "by": None if note.get("by") == "" else note.get("by")})
                    for key, (vector, note) in rows.items()
                ]
                check(found[name], usable, "by", weight, zero=weight is None)


def test_kept_averages_are_what_numpy_says(url):
    machine = type("Machine", (AveragesMachine,), {"url": url})
    case = machine.TestCase
    case.settings = settings(
        max_examples=25,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()


pytestmark = pytest.mark.timeout(300)
