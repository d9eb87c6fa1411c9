"""Tables that are attached, written and altered in every way, and searches of them.

What a search must return is computed in numpy from what a plain SELECT returns to the same role in the
same transaction. Vectors are small whole numbers: distances are exact, and many are the same.
"""

import contextlib
import dataclasses
import json
import uuid

import numpy as np
import psycopg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from psycopg import sql
from settings_doors import SOME

TEXTS = ["a", "B", "it's", 'q"', "ü%", "a.b", "\\", "{x}", "$1", " "]
KEYS = {
    "smallint": [str(n) for n in range(-2, 8)],
    "integer": [str(n) for n in range(-2, 8)],
    "bigint": [str(n * 10**15) for n in range(-2, 8)],
    "uuid": [str(uuid.UUID(int=n << 90)) for n in range(10)],
    "text": TEXTS,
    "varchar": TEXTS,
    # A type to which several of them are the same.
    "text COLLATE public.ci": ["a", "A", "b", "B", "ü%", "Ü%", "c", "C", "d", "D"],
}
KINDS = ["plain", "plain", "LIST", "HASH", "RANGE"]
# As jsonpath sees them; %s is the name of the column.
FILTERS = [
    '{"%s": {">=": 2}}',
    '{"%s": 1}',
    '{"%s": null}',
    '{"not": {"%s": {"in": [0, 1]}}}',
    '{"or": [{"%s": 3}, {"note": "x"}]}',
    '{"note": "y", "%s": {"<": 3}}',
]
# What a table may refuse of a write: a key that is there, or whose partition is not; and two keys that are
# the same to it.
REFUSED = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.CheckViolation,
    psycopg.errors.CardinalityViolation,
)


@dataclasses.dataclass
class Names:
    """What the parts of the table are called at the moment."""

    schema: str = "here"
    table: str = "T x"
    key: str = "id"
    embedding: str = "e"
    number: str = "n"
    note: bool = True
    extra: tuple[str, ...] = ()
    attached: tuple[int, ...] = (0, 1, 2)

    @property
    def relation(self):
        return sql.Identifier(self.schema, self.table)

    def of(self, statement):
        """Return a statement with the names in it."""
        return sql.SQL(statement).format(
            t=self.relation,
            id=sql.Identifier(self.key),
            e=sql.Identifier(self.embedding),
            n=sql.Identifier(self.number),
        )


class AttachedMachine(RuleBasedStateMachine):
    url: str
    # A role that is no superuser.
    reader: str

    # --- what those that search this way or that way say

    def searches(self, connection, query, k, wanted, index):
        """Yield ways to search, each with the rows that it finds: key, distance, metadata."""
        arguments = {"s": "s", "v": str(query.tolist()), "k": k, "f": wanted, "i": index}
        tail = "filter => %(f)s, index => %(i)s)"
        for call in (
            f"ehub.nearest(%(s)s, %(v)s, %(k)s, {tail}",
            f"ehub.nearest_exact(%(s)s, %(v)s, %(k)s, {tail}",
            f"ehub.nearest_many(%(s)s, ARRAY[%(v)s::vector], %(k)s, {tail}",
            f"ehub.within(%(s)s, %(v)s, 1e9, %(k)s, {tail}",
        ):
            statement = f"SELECT key, distance, metadata FROM {call}"
            yield call, connection.execute(statement, arguments).fetchall()

    def settle_index(self):
        """Wait until the index sees all that was committed, where there is one to wait for."""

    # --- the table

    @initialize(
        type=st.sampled_from(sorted(KEYS)),
        kind=st.sampled_from(KINDS),
        metric=st.sampled_from(["l2", "cosine", "ip"]),
        half=st.booleans(),
        limited=st.booleans(),
        rows=st.integers(0, 10),
        seed=st.integers(0, 10_000),
    )
    def begin(self, type, kind, metric, half, limited, rows, seed):  # noqa: A002
        if kind == "RANGE" and type in ("text", "varchar"):
            kind = "HASH"
        if "COLLATE" in type:
            kind, type = "plain", type if self.knows_collations() else "text"  # noqa: A001
        self.random = np.random.default_rng(seed)
        self.type, self.kind, self.metric = type, kind, metric
        self.vector = "halfvec(2)" if half else "vector(2)"
        self.old = None
        self.connections = [psycopg.connect(self.url, autocommit=True) for _ in range(3)]
        self.db, self.others, self.limited = self.connections
        for connection in self.connections:
            # Nothing here waits for another; what does, fails.
            connection.execute("SET lock_timeout = '5s'")
        self.names = Names()
        self.indexes = ()
        self.numbers = iter(range(10_000))
        # What an example that failed has left goes first.
        self.db.execute(
            'SET client_min_messages = warning; DROP SCHEMA IF EXISTS here, "S\'2" CASCADE;'
            ' SELECT ehub.tend_attached(); CREATE SCHEMA here; CREATE SCHEMA "S\'2";'
            " SET search_path = here, public"
        )
        partitioned = "" if kind == "plain" else f"PARTITION BY {kind} (id)"
        self.db.execute(
            f'CREATE TABLE "T x" (id {type} PRIMARY KEY, n int, note text, e {self.vector})'
            f" {partitioned}"
        )
        if kind != "plain":
            for part in range(3):
                self.db.execute(
                    sql.SQL('CREATE TABLE {} PARTITION OF "T x" FOR VALUES ').format(
                        self.part(part)
                    )
                    + self.bounds(part)
                )
        for relation in ['"T x"'] + [f"p{part}" for part in range(3) if kind != "plain"]:
            self.db.execute(f"GRANT SELECT ON {relation} TO {self.reader}")
        self.db.execute(f'GRANT USAGE ON SCHEMA here, "S\'2" TO {self.reader}')
        if limited:
            self.db.execute(
                'ALTER TABLE "T x" ENABLE ROW LEVEL SECURITY;'
                f' CREATE POLICY p ON "T x" TO {self.reader} USING (n % 2 = 0)'
            )
        self.limited.execute(f"SET SESSION AUTHORIZATION {self.reader}")
        for i in range(rows):
            self.insert(self.db, KEYS[type][i], conflict="ON CONFLICT DO NOTHING")
        self.db.execute("SELECT ehub.attach('\"T x\"', 'e', 's', metric => %s)", [metric])

    def knows_collations(self):
        """Whether the server can take two texts for the same; makes what does."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            try:
                connection.execute(
                    "CREATE COLLATION IF NOT EXISTS public.ci"
                    " (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
                )
            except psycopg.errors.FeatureNotSupported:
                return False
        return True

    def teardown(self):
        """Detach the table: nothing may be left of it, whatever it has become."""
        if not hasattr(self, "connections"):
            return
        self.close_old()
        for connection in self.connections[1:]:
            connection.close()
        self.db.execute("SELECT ehub.detach('s')")
        left = self.db.execute(
            "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
            " UNION ALL SELECT proname FROM pg_proc"
            " WHERE pronamespace = 'ehub_data'::regnamespace"
        ).fetchall()
        self.db.close()
        assert left == []

    def part(self, number):
        return sql.Identifier("here", f"p{number}")

    def bounds(self, part):
        keys = KEYS[self.type]
        if self.kind == "HASH":
            return sql.SQL("WITH (MODULUS 3, REMAINDER {})").format(sql.Literal(part))
        if self.kind == "LIST":
            mine = sql.SQL(", ").join(map(sql.Literal, keys[part * 4 : part * 4 + 4]))
            return sql.SQL("IN ({})").format(mine)
        ends = [
            sql.SQL("MINVALUE"),
            sql.Literal(keys[4]),
            sql.Literal(keys[8]),
            sql.SQL("MAXVALUE"),
        ]
        return sql.SQL("FROM ({}) TO ({})").format(ends[part], ends[part + 1])

    def embedding(self):
        low = 0 if self.metric == "cosine" else -3
        return str(self.random.integers(low, 4, 2).tolist())

    # --- what changes rows, one statement each

    def insert(self, connection, key, *, conflict="", empty=False):
        connection.execute(
            self.names.of("INSERT INTO {t} ({id}, {e}, {n}) VALUES (%s, %s, %s) " + conflict),
            [key, None if empty else self.embedding(), int(self.random.integers(0, 5))],
        )

    def change(self, connection, data):
        """Make one statement that changes rows; what the table itself refuses is undone."""
        kind = data.draw(st.sampled_from(sorted(self.CHANGES)))
        key, other = data.draw(st.lists(self.keys(), min_size=2, max_size=2, unique=True))
        with contextlib.suppress(*REFUSED), connection.transaction():
            self.CHANGES[kind](self, connection, key, other)

    def keys(self):
        return st.sampled_from(KEYS[self.type])

    def upsert(self, connection, key, _):
        self.insert(connection, key, conflict="ON CONFLICT ({id}) DO UPDATE SET {e} = EXCLUDED.{e}")

    def insert_some(self, connection, key, other):
        self.insert(connection, key, conflict="ON CONFLICT DO NOTHING")
        self.insert(connection, other, conflict="ON CONFLICT DO NOTHING", empty=True)

    def update_vector(self, connection, key, other):
        connection.execute(
            self.names.of("UPDATE {t} SET {e} = %s WHERE {id} IN (%s, %s)"),
            [self.embedding(), key, other],
        )

    def empty_vector(self, connection, key, _):
        connection.execute(self.names.of("UPDATE {t} SET {e} = NULL WHERE {id} = %s"), [key])

    def update_number(self, connection, key, other):
        connection.execute(
            self.names.of("UPDATE {t} SET {n} = ({n} + 1) %% 5 WHERE {id} IN (%s, %s)"),
            [key, other],
        )

    def update_key(self, connection, key, other):
        connection.execute(self.names.of("UPDATE {t} SET {id} = %s WHERE {id} = %s"), [other, key])

    def delete(self, connection, key, other):
        connection.execute(self.names.of("DELETE FROM {t} WHERE {id} IN (%s, %s)"), [key, other])

    def copy(self, connection, key, other):
        statement = self.names.of("COPY {t} ({id}, {e}, {n}) FROM STDIN")
        with connection.cursor().copy(statement) as rows:
            for one in (key, other):
                rows.write_row((one, self.embedding(), int(self.random.integers(0, 5))))

    def merge(self, connection, key, other):
        connection.execute(
            self.names.of(
                "MERGE INTO {t} AS t USING (VALUES (%s::text), (%s)) AS s (k) ON t.{id}::text = s.k"
                " WHEN MATCHED AND t.{n} > 3 THEN DELETE"
                " WHEN MATCHED THEN UPDATE SET {e} = %s"
                f" WHEN NOT MATCHED THEN INSERT ({{id}}, {{e}}, {{n}}) VALUES (s.k::{self.type}, %s, 2)"
            ),
            [key, other, self.embedding(), self.embedding()],
        )

    def as_replica(self, connection, key, other):
        """As what applies changes of another server: few triggers fire, none for statements."""
        connection.execute("SET LOCAL session_replication_role = replica")
        self.upsert(connection, key, other)
        self.update_key(connection, other, key)
        connection.execute("SET LOCAL session_replication_role = origin")

    def truncate(self, connection, *_):
        self.close_old()
        connection.execute(self.names.of("TRUNCATE {t}"))

    def write_partition(self, connection, key, other):
        """Rows of partitions that are written by themselves."""
        for part in self.names.attached if self.kind != "plain" else ():
            connection.execute(
                sql.SQL("DELETE FROM {} WHERE {} = {}").format(
                    self.part(part), sql.Identifier(self.names.key), sql.Literal(other)
                )
            )
            with contextlib.suppress(*REFUSED), connection.transaction():
                connection.execute(
                    sql.SQL("INSERT INTO {} ({}, {}) VALUES ({}, {})").format(
                        self.part(part),
                        sql.Identifier(self.names.key),
                        sql.Identifier(self.names.embedding),
                        sql.Literal(key),
                        sql.Literal(self.embedding()),
                    )
                )

    CHANGES = {  # noqa: RUF012
        "upsert": upsert,
        "insert": insert_some,
        "vector": update_vector,
        "null": empty_vector,
        "number": update_number,
        "key": update_key,
        "delete": delete,
        "copy": copy,
        "merge": merge,
        "replica": as_replica,
        "truncate": truncate,
        "partition": write_partition,
    }

    # --- what changes the table

    def alter(self, connection, names, what, data):
        """Change the table; ``names`` are afterwards what its parts are called."""
        new = f"x {next(self.numbers)}"
        if what == "column":
            names.extra = (*names.extra, new)
            return names.of("ALTER TABLE {t} ADD COLUMN ") + sql.SQL("{} int DEFAULT 7").format(
                sql.Identifier(new)
            )
        if what == "drop column":
            if not names.extra:
                return None
            gone, *rest = names.extra
            names.extra = tuple(rest)
            return names.of("ALTER TABLE {t} DROP COLUMN ") + sql.Identifier(gone)
        if what in ("key", "embedding", "number"):
            before = getattr(names, what)
            setattr(names, what, new)
            return names.of("ALTER TABLE {t} RENAME COLUMN ") + sql.SQL("{} TO {}").format(
                sql.Identifier(before), sql.Identifier(new)
            )
        if what == "rewrite":
            twice = "{e} * '[-1,1]'" if self.metric != "cosine" else "{e} * '[1,2]'"
            return names.of(f"ALTER TABLE {{t}} ALTER {{e}} TYPE {self.vector} USING {twice}")
        if what == "table":
            before = names.relation
            names.table = new
            return sql.SQL("ALTER TABLE {} RENAME TO {}").format(before, sql.Identifier(new))
        if what == "schema":
            before = names.relation
            names.schema = "here" if names.schema != "here" else "S'2"
            return sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(
                before, sql.Identifier(names.schema)
            )
        if what == "swap":
            # A metadata column in the place of another, under its name.
            names.extra = (*names.extra, new)
            return sql.SQL("").join(
                [
                    names.of("ALTER TABLE {t} ADD COLUMN "),
                    sql.SQL("{} int DEFAULT 2; ").format(sql.Identifier(new)),
                    names.of("ALTER TABLE {t} RENAME COLUMN {n} TO swap; ALTER TABLE {t} RENAME "),
                    sql.SQL("{} TO {}; ").format(sql.Identifier(new), sql.Identifier(names.number)),
                    names.of("ALTER TABLE {t} RENAME swap TO "),
                    sql.Identifier(new),
                ]
            )
        if what == "truncate partition":
            if not names.attached:
                return None
            part = data.draw(st.sampled_from(names.attached))
            return sql.SQL("TRUNCATE {}").format(self.part(part))
        if what == "detach":
            if not names.attached:
                return None
            part = data.draw(st.sampled_from(names.attached))
            names.attached = tuple(one for one in names.attached if one != part)
            return names.of("ALTER TABLE {t} DETACH PARTITION ") + self.part(part)
        away = [part for part in range(3) if part not in names.attached]
        if not away:
            return None
        part = data.draw(st.sampled_from(away))
        names.attached = (*names.attached, part)
        return (
            names.of("ALTER TABLE {t} ATTACH PARTITION ")
            + self.part(part)
            + sql.SQL(" FOR VALUES ")
            + self.bounds(part)
        )

    ALTERATIONS = (
        *("column", "drop column", "key", "embedding", "number", "rewrite", "table", "schema"),
        "swap",
    )
    OF_PARTITIONS = ("truncate partition", "detach", "attach")

    def altered(self, connection, data):
        """Change the table once."""
        choices = self.ALTERATIONS
        if self.kind != "plain":
            choices += self.OF_PARTITIONS * 3
        what = data.draw(st.sampled_from(choices))
        names = dataclasses.replace(self.names)
        statement = self.alter(connection, names, what, data)
        if statement is None:
            return
        try:
            with connection.transaction():
                connection.execute(statement)
        except psycopg.Error:
            # Its columns are not any more those of the whole, or the policy is about this one.
            assert what in ("attach", "drop column")
        else:
            self.names = names

    # --- rules

    def close_old(self):
        if self.old is not None:
            self.old.close()
            self.old = None

    @rule(
        data=st.data(),
        settled=st.booleans(),
        keep=st.booleans(),
        savepoint=st.booleans(),
        n=st.integers(1, 3),
    )
    def write(self, data, settled, keep, savepoint, n):
        """A transaction, that sees what it did; others do not before it ends."""
        if settled:
            self.settle_index()
        with self.db.transaction(force_rollback=not keep):
            for _ in range(n):
                self.change(self.db, data)
            if savepoint:
                with self.db.transaction(force_rollback=True):
                    self.change(self.db, data)
                    self.compare(self.db, data)
            self.compare(self.db, data)
        self.compare(self.others, data)

    @rule(
        data=st.data(),
        before=st.booleans(),
        change=st.sampled_from(
            [
                "DELETE FROM {t} WHERE {id} IN (%(a)s, %(b)s)",
                "UPDATE {t} SET {e} = %(e)s WHERE {id} IN (%(a)s, %(b)s)",
                "INSERT INTO {t} ({id}, {e}) VALUES (%(a)s, %(e)s) ON CONFLICT DO NOTHING",
            ]
        ),
    )
    def search_while_changing(self, data, before, change):
        """A search beside a change in one statement finds what an exact one finds there."""
        a, b = data.draw(st.lists(self.keys(), min_size=2, max_size=2, unique=True))
        values = {"a": a, "b": b, "e": self.embedding(), "v": "[1,2]"}
        searches = self.names.of(
            f"WITH d AS ({change} RETURNING 1) SELECT n.distance, q.distance"
            " FROM (SELECT count(*) FROM d) AS c CROSS JOIN LATERAL ("
            " SELECT array_agg(distance) AS distance FROM ehub.nearest('s', %(v)s, 5)"
            ") AS n CROSS JOIN LATERAL ("
            " SELECT array_agg(distance) AS distance"
            "  FROM ehub.nearest_many('s', ARRAY[%(v)s::public.vector], 3)) AS q"
        )
        found = []
        with self.db.transaction(force_rollback=True):
            if before:
                self.change(self.db, data)
            for mode in ("exact", "auto"):
                with contextlib.suppress(*REFUSED), self.db.transaction(force_rollback=True):
                    self.db.execute(f"SET LOCAL ehub.mode = '{mode}'")
                    found.append(self.db.execute(searches, values).fetchall())
        assert found[1:] == found[:1]

    @rule(data=st.data())
    def write_at_once(self, data):
        self.change(self.db, data)

    @rule(
        data=st.data(),
        settled=st.booleans(),
        keep=st.booleans(),
        before=st.booleans(),
        tended=st.booleans(),
        after=st.booleans(),
    )
    def alter_table(self, data, settled, keep, before, tended, after):
        if settled:
            self.settle_index()
        self.close_old()
        known = self.names
        with self.db.transaction(force_rollback=not keep):
            if before:
                self.change(self.db, data)
            self.altered(self.db, data)
            if tended:
                self.db.execute("SELECT ehub.tend_attached()")
            if after:
                self.change(self.db, data)
            self.compare(self.db, data)
        if not keep:
            self.names = known
        self.compare(data.draw(st.sampled_from([self.db, self.others])), data)

    @rule(data=st.data())
    def rewrite(self, data):
        self.close_old()
        self.db.execute(self.names.of("VACUUM FULL {t}"))
        self.compare(self.db, data)

    @rule(data=st.data(), again=st.sampled_from(["reattach('s')", "tend_attached()"]))
    def switch_triggers_off(self, data, again):
        self.close_old()
        self.db.execute(self.names.of("ALTER TABLE {t} DISABLE TRIGGER ALL"))
        self.change(self.db, data)
        self.compare(self.db, data)
        self.db.execute(self.names.of("ALTER TABLE {t} ENABLE TRIGGER ALL"))
        self.compare(self.db, data)
        self.change(self.db, data)
        self.db.execute(f"SELECT ehub.{again}")
        self.compare(self.db, data)

    @precondition(lambda self: self.kind == "plain" and self.type in ("smallint", "integer"))
    @rule(data=st.data(), other=st.sampled_from(["bigint", "text"]))
    def change_type_of_key(self, data, other):
        """And back, for the other rules."""
        self.close_old()
        for kind in (other, self.type):
            self.db.execute(
                self.names.of(f"ALTER TABLE {{t}} ALTER {{id}} TYPE {kind} USING {{id}}::{kind}")
            )
            self.insert(self.db, KEYS[self.type][0], conflict="ON CONFLICT DO NOTHING")
            self.compare(self.db, data)
            self.db.execute("SELECT ehub.tend_attached()")
            self.compare(self.others, data)

    @rule()
    def tend(self):
        self.db.execute("SELECT ehub.tend_attached()")

    @rule(data=st.data())
    def make_or_drop_index(self, data):
        # An older snapshot does not know its name, or knows it still.
        self.close_old()
        if self.indexes:
            self.db.execute("SELECT ehub.drop_index('s', 'few')")
            self.indexes = ()
        else:
            wanted = json.dumps({self.names.number: {">=": 2}})
            self.db.execute("SELECT ehub.create_index('s', 'few', %s)", [wanted])
            self.indexes = (wanted,)

    @rule(setting=st.sampled_from(SOME))
    def set_something(self, setting):
        """What a session sets changes nothing."""
        for connection in self.connections[1:]:
            connection.execute(f"SET {setting}")

    @rule()
    def settle(self):
        self.settle_index()

    @rule(data=st.data(), look=st.booleans())
    def keep_a_snapshot(self, data, look):
        """A transaction that goes on to see what was there; unless it looks, it holds no lock."""
        self.close_old()
        self.old = psycopg.connect(self.url)
        self.old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        self.old.execute("SELECT 1")
        if look:
            self.compare(self.old, data)

    @precondition(lambda self: getattr(self, "old", None) is not None)
    @rule(data=st.data())
    def search_in_old_snapshot(self, data):
        self.compare(self.old, data)

    @rule(data=st.data(), limited=st.booleans(), many=st.booleans())
    def search(self, data, limited, many):
        for _ in range(3 if many else 1):
            self.compare(self.limited if limited else self.others, data)

    # --- what must be found

    def rows(self, connection, wanted):
        """The rows that may be found, by a way that shares nothing with ehub's: by key."""
        statement = self.names.of(
            "SELECT {id}::text, {e}::text, to_jsonb(t) - {name},"
            " coalesce(to_jsonb(t) @@ ehub.filter_path(%s), true)"
            " FROM {t} AS t WHERE {e} IS NOT NULL".replace(
                "{name}", sql.Literal(self.names.embedding).as_string()
            )
        )
        found = {}
        for key, text, note, matches in connection.execute(statement, [wanted]):
            vector = np.array(json.loads(text))
            if matches and (self.metric != "cosine" or vector.any()):
                assert key not in found
                found[key] = vector, note
        return found

    def distance(self, a, b):
        if self.metric == "l2":
            return float(np.linalg.norm(a - b))
        if self.metric == "ip":
            return -float(a @ b)
        return 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

    def compare(self, connection, data):
        wanted = data.draw(st.none() | st.sampled_from(FILTERS))
        if wanted is not None:
            wanted = wanted % self.names.number
        index = data.draw(st.sampled_from([None, *(["few"] if self.indexes else [])]))
        k = data.draw(st.sampled_from([1, 3, 20]))
        query = np.array([data.draw(st.integers(-3, 3)), data.draw(st.integers(-3, 3))])
        if self.metric == "cosine" and not query.any():
            query[0] = 1
        both = wanted
        if index is not None:
            (own,) = self.indexes
            both = own if wanted is None else f'{{"and": [{own}, {wanted}]}}'
        rows = self.rows(connection, both)
        expected = {key: self.distance(vector, query) for key, (vector, _) in rows.items()}
        nearest = sorted(expected.values())[:k]
        for way, found in self.searches(connection, query, k, wanted, index):
            assert len({key for key, *_ in found}) == len(found), (way, found)
            for key, distance, note in found:
                assert key in expected, (way, key, found)
                assert abs(distance - expected[key]) < 1e-5, (way, key, distance)
                assert note == rows[key][1], (way, key)
            assert np.allclose([one[1] for one in found], nearest, atol=1e-5), (way, found)
        self.compare_rows(connection, rows, wanted, index)

    def compare_rows(self, connection, rows, wanted, index):
        for key in list(rows)[:2]:
            (vector,) = connection.execute("SELECT ehub.get('s', %s)::text", [key]).fetchone()
            assert json.loads(vector) == rows[key][0].tolist()
