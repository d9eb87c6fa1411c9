"""Hypothesis looks for a search by filter, partition or sub-index that differs from brute force."""

import json

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from service.conftest import settled

KEYS = st.integers(0, 11).map(lambda i: f"k{i}")
SOME_KEYS = st.lists(KEYS, min_size=1, max_size=5, unique=True)
NOTES = st.fixed_dictionaries(
    {"p": st.sampled_from(["a", "a", "b", 7])},
    optional={"n": st.integers(0, 5), "tags": st.lists(st.sampled_from("xyz"), max_size=2)},
)
# Each with the same in Python.
FILTERS = {
    '{"n": {">=": 3}}': lambda note: note.get("n", -1) >= 3,
    '{"n": {">": 3}}': lambda note: note.get("n", -1) > 3,
    '{"n": 1}': lambda note: note.get("n") == 1,
    '{"tags": "x"}': lambda note: "x" in note.get("tags", []),
    '{"not": {"tags": "x"}}': lambda note: "x" not in note.get("tags", []),
    '{"or": [{"n": 1}, {"tags": "y"}]}': lambda note: (
        note.get("n") == 1 or "y" in note.get("tags", [])
    ),
    '{"n": {"exists": false}}': lambda note: "n" not in note,
    '{"p": "a", "n": {"!=": 0}}': lambda note: note["p"] == "a" and note.get("n") != 0,
}
INDEXES = {
    "some": '{"n": {">=": 3}}',
    "words": '{"or": [{"n": 1}, {"tags": "y"}]}',
}


class FiltersMachine(RuleBasedStateMachine):
    url: str

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed):
        self.random = np.random.default_rng(seed)
        self.db = psycopg.connect(self.url, autocommit=True)
        # One with partitions, one without, which remembers what matches instead.
        self.rows = {"parts": {}, "plain": {}}
        for space in self.rows:
            self.db.execute(
                "SELECT ehub.create_space(%s, 2, partition_by => %s)",
                [space, "p" if space == "parts" else None],
            )
        self.indexes = dict.fromkeys(self.rows, ())

    def teardown(self):
        if hasattr(self, "db"):
            for space in self.rows:
                self.db.execute("SELECT ehub.delete_space(%s)", [space])
            self.db.close()

    def put(self, space, keys, notes):
        # Whole numbers: distances are exact, and many are the same.
        new = {
            key: (self.random.integers(-4, 5, 2), note)
            for key, note in zip(keys, notes, strict=True)
        }
        for key, (vector, note) in new.items():
            self.db.execute(
                "SELECT ehub.set(%s, %s, %s, %s)",
                [space, key, str(vector.tolist()), json.dumps(note)],
            )
        return {**self.rows[space], **new}

    SPACES = st.sampled_from(["parts", "plain"])

    @rule(space=SPACES, keys=SOME_KEYS, data=st.data(), keep=st.booleans())
    def write(self, space, keys, data, keep):
        notes = [data.draw(NOTES) for _ in keys]
        with self.db.transaction(force_rollback=not keep):
            after = self.put(space, keys, notes)
            if not keep:
                self.compare(space, after, data)
        if keep:
            self.rows[space] = after

    @rule(space=SPACES, keys=SOME_KEYS, note=NOTES, data=st.data(), keep=st.booleans())
    def move(self, space, keys, note, data, keep):
        """Metadata changes alone: to another partition, into filters and out of them."""
        with self.db.transaction(force_rollback=not keep):
            self.db.execute(
                f"UPDATE spaces.{space} SET metadata = %s WHERE key = ANY(%s)",
                [json.dumps(note), keys],
            )
            rows = self.rows[space]
            after = rows | {key: (rows[key][0], note) for key in keys if key in rows}
            self.compare(space, after, data)
        if keep:
            self.rows[space] = after

    @rule(space=SPACES, keys=SOME_KEYS, data=st.data(), keep=st.booleans())
    def delete(self, space, keys, data, keep):
        with self.db.transaction(force_rollback=not keep):
            self.db.execute(f"DELETE FROM spaces.{space} WHERE key = ANY(%s)", [keys])
            after = {key: row for key, row in self.rows[space].items() if key not in keys}
            self.compare(space, after, data)
        if keep:
            self.rows[space] = after

    @rule(partition=st.sampled_from(["a", "b", "7"]))
    def drop_partition(self, partition):
        gone = [key for key, (_, note) in self.rows["parts"].items() if str(note["p"]) == partition]
        if gone:
            dropped = self.db.execute("SELECT ehub.drop_partition('parts', %s)", [partition])
            assert dropped.fetchone() == (len(gone),)
        else:
            with pytest.raises(psycopg.DatabaseError, match="has no partition"):
                self.db.execute("SELECT ehub.drop_partition('parts', %s)", [partition])
        for key in gone:
            del self.rows["parts"][key]

    @rule(space=SPACES)
    def truncate(self, space):
        (version,) = self.db.execute(
            "SELECT version_id FROM ehub.catalogue WHERE space = %s", [space]
        ).fetchone()
        self.db.execute(f"TRUNCATE ehub_data.v{version}")
        self.rows[space] = {}

    @rule(space=SPACES, name=st.sampled_from(sorted(INDEXES)))
    def make_or_drop_index(self, space, name):
        if name in self.indexes[space]:
            self.db.execute("SELECT ehub.drop_index(%s, %s)", [space, name])
            self.indexes[space] = tuple(one for one in self.indexes[space] if one != name)
        else:
            self.db.execute("SELECT ehub.create_index(%s, %s, %s)", [space, name, INDEXES[name]])
            self.indexes[space] += (name,)

    @rule(space=SPACES)
    def settle(self, space):
        settled(self.db, space)

    @rule(space=SPACES, data=st.data(), many=st.booleans())
    def search(self, space, data, many):
        for _ in range(3 if many else 1):
            self.compare(space, self.rows[space], data)

    def compare(self, space, rows, data):
        wanted = data.draw(st.none() | st.sampled_from(sorted(FILTERS)))
        partition = data.draw(st.none() | st.sampled_from(["a", "b", "7", "nobody"]))
        index = data.draw(st.sampled_from([None, *self.indexes[space]]))
        if space == "plain":
            partition = None
        k = data.draw(st.sampled_from([1, 3, 20]))
        query = np.array([data.draw(st.integers(-4, 4)), data.draw(st.integers(-4, 4))])
        expected = {
            key: float(np.linalg.norm(vector - query))
            for key, (vector, note) in rows.items()
            if (wanted is None or FILTERS[wanted](note))
            and (partition is None or str(note["p"]) == partition)
            and (index is None or FILTERS[INDEXES[index]](note))
        }
        arguments = {
            "s": space,
            "v": str(query.tolist()),
            "k": k,
            "f": wanted,
            "p": partition,
            "i": index,
        }
        tail = "filter => %(f)s, partition => %(p)s, index => %(i)s)"
        for call in (
            f"ehub.nearest(%(s)s, %(v)s, %(k)s, {tail}",
            f"ehub.nearest_exact(%(s)s, %(v)s, %(k)s, {tail}",
            f"ehub.nearest_many(%(s)s, ARRAY[%(v)s::vector], %(k)s, {tail}",
            f"ehub.within(%(s)s, %(v)s, 1e9, %(k)s, {tail}",
        ):
            found = self.db.execute(
                f"SELECT key, distance, metadata FROM {call}", arguments
            ).fetchall()
            assert len({key for key, *_ in found}) == len(found)
            for key, distance, note in found:
                assert abs(distance - expected[key]) < 1e-5, (call, key)
                assert note == rows[key][1]
            nearest = sorted(expected.values())[:k]
            assert np.allclose([distance for _, distance, _ in found], nearest), (call, found)


def test_searches_agree_with_brute_force(service, url):
    FiltersMachine.url = url
    run_state_machine_as_test(
        FiltersMachine,
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
