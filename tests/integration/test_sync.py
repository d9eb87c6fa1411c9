"""An index equals its table, whatever writers do: Hypothesis looks for a way that it does not.

Several sessions write at once, with savepoints, rollbacks, transactions that stay open, TRUNCATE,
upserts, deletes and changed keys; notifications get lost, the replica's connections are cut, its
process is replaced by another that loads the saved index. After every settling, what the index
holds is compared with the table, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
import uuid

import numpy as np
import psycopg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from oracle import check_neighbors, table
from settings_doors import SOME

import ehub
from ehub.index import tail

KEYS = st.integers(0, 25).map(lambda i: f"k{i}")
WRITERS = st.integers(0, 2)
UPSERT = (
    "INSERT INTO spaces.s (key, embedding) VALUES (%s, %s)"
    " ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding"
)
# What matters to writers no more than that; it would round what a reader is told.
SETTINGS = [*SOME, "extra_float_digits = -15", "search_path = pg_temp", "synchronous_commit = off"]
BLOCKED = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
)


class SyncMachine(RuleBasedStateMachine):
    database: str
    folder_root: object

    @initialize(seed=st.integers(0, 10_000), metric=st.sampled_from(["l2", "cosine", "ip"]))
    def begin(self, seed, metric):
        self.random = np.random.default_rng(seed)
        self.metric = metric
        self.folder = self.folder_root / uuid.uuid4().hex
        self.admin = psycopg.connect(self.database, autocommit=True)
        self.writers = [psycopg.connect(self.database, autocommit=True) for _ in range(3)]
        for writer in self.writers:
            # Writers that wait for each other would wait for ever: there is one thread.
            writer.execute("SET lock_timeout = '50ms'")
        self.savepoints = [0, 0, 0]
        self.hub = ehub.connect(self.database, data_dir=self.folder)
        self.space = self.hub.create_space("s", 4, metric)
        row = self.admin.execute("SELECT version_id FROM ehub.catalogue").fetchone()
        self.relation = f"ehub_data.v{row[0]}"
        self.space.wait_until_indexed(30)

    def teardown(self):
        if hasattr(self, "admin"):
            for writer in self.writers:
                writer.close()
            self.hub.close()
            self.admin.execute("SELECT ehub.delete_space('s')")
            self.admin.close()

    def vector(self):
        return str(self.random.standard_normal(4).round(4).tolist())

    def write(self, number, statement, parameters=None):
        writer = self.writers[number]
        try:
            if writer.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS:
                with writer.transaction():
                    writer.execute(statement, parameters)
            else:
                writer.execute(statement, parameters)
        except BLOCKED:
            pass

    def open(self, number):
        status = self.writers[number].info.transaction_status
        return status == psycopg.pq.TransactionStatus.INTRANS

    # --- what writers do

    @rule(number=WRITERS, key=KEYS)
    def upsert(self, number, key):
        self.write(number, UPSERT, [key, self.vector()])

    @rule(number=WRITERS, n=st.integers(2, 30))
    def upsert_many(self, number, n):
        rows = ", ".join(f"('k{i}', '{self.vector()}')" for i in self.random.permutation(30)[:n])
        self.write(
            number,
            f"INSERT INTO spaces.s (key, embedding) VALUES {rows}"
            " ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding",
        )

    @rule(number=WRITERS, key=KEYS)
    def delete(self, number, key):
        self.write(number, "DELETE FROM spaces.s WHERE key = %s", [key])

    @rule(number=WRITERS, key=KEYS, other=KEYS)
    def rename(self, number, key, other):
        self.write(number, "UPDATE spaces.s SET key = %s WHERE key = %s", [other, key])

    @rule(number=WRITERS)
    def change_metadata_only(self, number):
        self.write(number, "UPDATE spaces.s SET metadata = '{\"n\": 1}'")

    @rule(number=WRITERS)
    def truncate(self, number):
        self.write(number, f"TRUNCATE {self.relation}")

    @rule(number=WRITERS, key=KEYS, other=KEYS)
    def write_as_replication_does(self, number, key, other):
        """Other triggers fire, a row at a time."""
        self.writers[number].execute("SET session_replication_role = replica")
        self.write(number, UPSERT, [key, self.vector()])
        self.write(number, "UPDATE spaces.s SET key = %s WHERE key = %s", [other, key])
        self.write(number, "DELETE FROM spaces.s WHERE key = 'k0'")
        self.writers[number].execute("SET session_replication_role = origin")

    @rule(key=KEYS, how=st.sampled_from(["ALL", "USER", "ehub_log_update", "ehub_log_insert"]))
    def write_past_the_triggers(self, key, how):
        """What pg_restore does, and whoever thinks that he knows better."""
        with contextlib.suppress(*BLOCKED), self.admin.transaction():
            self.admin.execute("SET LOCAL lock_timeout = '50ms'")
            self.admin.execute(f"ALTER TABLE {self.relation} DISABLE TRIGGER {how}")
            self.admin.execute(UPSERT, [key, self.vector()])
            self.admin.execute(f"ALTER TABLE {self.relation} ENABLE TRIGGER {how}")
            # What the service does as soon as nobody writes: ALL are not as they were.
            self.admin.execute("SELECT ehub.fit_triggers(%s)", [int(self.relation.split("v")[-1])])

    @rule(number=WRITERS, setting=st.sampled_from(SETTINGS))
    def set_something(self, number, setting):
        self.writers[number].execute(f"SET {setting}")

    @rule(number=WRITERS)
    def begin_transaction(self, number):
        if not self.open(number):
            self.writers[number].execute("BEGIN")
            self.savepoints[number] = 0

    @rule(number=WRITERS)
    def savepoint(self, number):
        if self.open(number):
            self.savepoints[number] += 1
            self.writers[number].execute(f"SAVEPOINT s{self.savepoints[number]}")

    @rule(number=WRITERS)
    def roll_back_to_savepoint(self, number):
        if self.open(number) and self.savepoints[number]:
            self.writers[number].execute(f"ROLLBACK TO s{self.savepoints[number]}")

    @rule(number=WRITERS, commit=st.booleans())
    def end(self, number, commit):
        if self.open(number):
            self.writers[number].execute("COMMIT" if commit else "ROLLBACK")

    @rule(number=WRITERS, commit=st.booleans())
    def die(self, number, commit):
        """A writer's server process ends in the middle."""
        writer = self.writers[number]
        self.admin.execute("SELECT pg_terminate_backend(%s)", [writer.info.backend_pid])
        writer.close()
        self.writers[number] = psycopg.connect(self.database, autocommit=True)
        self.writers[number].execute("SET lock_timeout = '50ms'")

    @rule(rows=st.integers(1, 20))
    def multiset(self, rows):
        if not any(map(self.open, range(3))):
            keys = [f"k{i}" for i in self.random.permutation(30)[:rows]]
            vectors = self.random.standard_normal((rows, 4)).astype("f4")
            self.space.multiset(keys, vectors)
            # Read your own writes, however the index is.
            found = self.space.nearest_neighbors(rows, vector=vectors[0])
            assert found[0].key in keys or found[0].distance <= 1e-5 or self.metric == "ip"

    # --- what happens to the replica

    @rule()
    def lose_notifications(self):
        """The connection that listens does not; the log is all there is."""
        self.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND query = 'LISTEN ehub'"
        )

    @rule()
    def cut_connections(self):
        self.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'ehub'"
            " AND pid <> ALL(%s)",
            [[self.admin.info.backend_pid, *(w.info.backend_pid for w in self.writers)]],
        )

    @rule(saved=st.booleans())
    def restart(self, saved):
        """Another process takes over; with ``saved`` it starts from the file of the last."""
        self.hub.close()
        if not saved:
            self.folder = self.folder_root / uuid.uuid4().hex
        self.hub = ehub.connect(self.database, data_dir=self.folder)
        self.space = self.hub.get_space("s")
        if not self.truncating():
            self.space.nearest_neighbors(1, vector=[1, 1, 1, 1])

    @rule()
    def trim(self):
        self.admin.execute("SELECT ehub.trim()")

    # --- what must hold

    @rule()
    def settle_with_transactions_open(self):
        self.check()

    @rule()
    def settle(self):
        for number in range(3):
            self.end(number, True)
        self.check()

    def check(self):
        if self.truncating():
            return
        deadline = time.monotonic() + 30
        while True:
            answering = self.space._index(True)
            if answering is not None:
                answer = answering.index
                break
            assert time.monotonic() < deadline, self.hub.status()
            time.sleep(0.01)
        truth = table(self.admin, "s")
        assert set(answer.keys()) == set(truth)
        stored = {key: answer.vector(key) for key in truth}
        for key, vector in truth.items():
            if self.metric == "cosine":
                assert np.allclose(stored[key], vector / np.linalg.norm(vector), atol=1e-6)
            else:
                assert stored[key].tobytes() == vector.tobytes(), key
        query = self.random.standard_normal(4)
        found = self.space.nearest_neighbors(5, vector=query)
        check_neighbors(found, truth, self.metric, query, 5)

    def truncating(self):
        """Whether somebody holds a lock that keeps everybody from reading."""
        return self.admin.execute(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE mode = 'AccessExclusiveLock'"
            " AND relation = %s::regclass)",
            [self.relation],
        ).fetchone()[0]


def test_the_index_equals_the_table(url, tmp_path, monkeypatch):
    # Few rows are kept apart, so that the graph answers although there are not many.
    monkeypatch.setattr(tail, "SIZE", 5)
    machine = type(
        "Machine",
        (SyncMachine,),
        {"database": url + " application_name=test", "folder_root": tmp_path},
    )
    case = machine.TestCase
    case.settings = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
