"""Searches inside a statement that changes what they search: what the exact search gives there."""

import psycopg
import pytest

from service.conftest import settled

TABLES = {
    "own": "SELECT ehub.create_space('s', 2)",
    "attached": "CREATE TABLE docs (id text PRIMARY KEY, emb vector(2), n int DEFAULT 0);"
    "SELECT ehub.attach('docs', 'emb', 's')",
    "partitioned": "CREATE TABLE docs (id text PRIMARY KEY, emb vector(2), n int DEFAULT 0)"
    " PARTITION BY HASH (id);"
    "CREATE TABLE docs_0 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
    "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
    "SELECT ehub.attach('docs', 'emb', 's')",
}
# What a statement meets: the table, its key, and which rows there are: 20 clusters of 4 near points.
ROWS = (
    "INSERT INTO {t} ({key}, {emb}) SELECT 'c' || i || '_' || j, ARRAY[i * 10, j * 0.01]::real[]"
    " FROM generate_series(1, 20) i, generate_series(1, 4) j"
)
NEAR = "(SELECT string_agg(key || ' ' || round(distance::numeric, 3), ',') FROM ehub.nearest('s', {q}, {k}) AS n)"


def near(q, k=3):
    return NEAR.format(q=q, k=k)


STATEMENTS = {
    "delete where near": "DELETE FROM {t} AS d WHERE EXISTS ("
    "SELECT FROM ehub.nearest_to('s', d.{key}, 1) AS n WHERE n.distance < 0.1)",
    "update where near": "UPDATE {t} AS d SET {emb} = '[-1,-1]' WHERE EXISTS ("
    "SELECT FROM ehub.nearest_to('s', d.{key}, 1) AS n WHERE n.distance < 0.1)",
    "insert what is far": "INSERT INTO {t} ({key}, {emb}) SELECT 'new' || i, ARRAY[i, 7]::real[]::vector"
    " FROM generate_series(1, 30) i WHERE NOT EXISTS (SELECT FROM"
    " ehub.nearest('s', ARRAY[i, 7]::real[]::vector, 1) AS n WHERE n.distance < 5)",
    "with delete": "WITH d AS (DELETE FROM {t} WHERE {key} LIKE 'c1\\_%' RETURNING {key})"
    " INSERT INTO seen SELECT {key} || " + near("'[10,0]'") + " FROM d",
    "with insert": "WITH d AS (INSERT INTO {t} ({key}, {emb}) VALUES ('x', '[10,0]'), ('y', '[10,0.001]')"
    " RETURNING {key}) INSERT INTO seen SELECT {key} || " + near("'[10,0]'") + " FROM d",
    "with update": "WITH d AS (UPDATE {t} SET {emb} = '[0,5]' WHERE {key} LIKE 'c1\\_%' RETURNING {key})"
    " INSERT INTO seen SELECT {key} || " + near("'[10,0]'") + " FROM d",
    "many": "WITH d AS (DELETE FROM {t} WHERE {key} LIKE 'c1\\_%' RETURNING {key})"
    " INSERT INTO seen SELECT d.{key} || n.key || n.q FROM d, ehub.nearest_many('s',"
    " ARRAY['[10,0]', '[20,0]']::vector[], 3) AS n",
    "within": "WITH d AS (DELETE FROM {t} WHERE {key} LIKE 'c1\\_%' RETURNING {key})"
    " INSERT INTO seen SELECT d.{key} || n.key FROM d, ehub.within('s', '[10,0]', 15, complete => false) AS n",
    "returning": "WITH d AS (DELETE FROM {t} WHERE {key} LIKE 'c1\\_%' RETURNING "
    + near("'[10,0]'")
    + " AS found)"
    " INSERT INTO seen SELECT found FROM d",
    # A function that the statement calls writes to the table as well, and searches then.
    "nested in where": "UPDATE {t} SET {emb} = '[10,0.0007]' WHERE {key} LIKE 'c2\\_%'"
    " AND write_and_look({key}) <> ''",
    "nested in with": "WITH d AS (UPDATE {t} SET {emb} = '[0,5]' WHERE {key} LIKE 'c1\\_%' RETURNING {key}),"
    " w AS MATERIALIZED (SELECT write_and_look({key}) AS found FROM d) INSERT INTO seen SELECT found FROM w",
    "nested in returning": "WITH d AS (DELETE FROM {t} WHERE {key} LIKE 'c1\\_%'"
    " RETURNING write_and_look({key}) AS found) INSERT INTO seen SELECT found FROM d",
    "nested insert": "INSERT INTO {t} ({key}, {emb}) SELECT 'new' || i, '[10,0]' FROM generate_series(1, 4) i"
    " WHERE write_and_look(i::text) <> ''",
    "by a function alone": "SELECT write_and_look('')",
    # Triggers of the user's write down what they see.
    "insert": "INSERT INTO {t} ({key}, {emb}) VALUES ('x', '[10,0]'), ('y', '[10,0.001]'), ('z', '[10,0.002]')",
    "upsert": "INSERT INTO {t} ({key}, {emb}) VALUES ('x', '[10,0]'), ('c1_1', '[20,0]')"
    " ON CONFLICT ({key}) DO UPDATE SET {emb} = '[20,0.001]'",
    "merge": "MERGE INTO {t} AS t USING (VALUES ('x', '[10,0]'::vector), ('c1_1', '[20,0]'), ('c2_1', NULL))"
    " AS v (k, e) ON v.k = t.{key} WHEN MATCHED AND v.e IS NULL THEN DELETE"
    " WHEN MATCHED THEN UPDATE SET {emb} = v.e"
    " WHEN NOT MATCHED THEN INSERT ({key}, {emb}) VALUES (v.k, v.e)",
    "update": "UPDATE {t} SET {emb} = '[30,0]' WHERE {key} LIKE 'c1\\_%'",
    "change a key": "UPDATE {t} SET {key} = 'new' || {key} WHERE {key} LIKE 'c1\\_%'",
    "delete": "DELETE FROM {t} WHERE {key} LIKE 'c1\\_%'",
    "nothing": "DELETE FROM {t} WHERE {key} = 'unknown'",
}
TRIGGERS = {
    # Before ehub's own by their names, and after.
    "aaa after row": "AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH ROW",
    "zzz after row": "AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH ROW",
    "aaa before row": "BEFORE INSERT OR UPDATE OR DELETE ON {t} FOR EACH ROW",
    "aaa after": "AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH STATEMENT",
    "zzz after": "AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH STATEMENT",
}
# A trigger that changes the table as well.
NESTED = "AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH ROW WHEN (pg_trigger_depth() < 1)"


@pytest.fixture(params=TABLES)
def table(request, service, db):
    db.execute(TABLES[request.param])
    names = {"t": "docs", "key": "id", "emb": "emb"}
    if request.param == "own":
        names = {"t": "spaces.s", "key": "key", "emb": "embedding"}
        (number,) = db.execute("SELECT version_id FROM ehub.catalogue").fetchone()
        names["data"] = f"ehub_data.v{number}"
    names.setdefault("data", "docs")
    db.execute(ROWS.format(**names))
    db.execute("CREATE TABLE seen (line text)")
    db.execute(
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO seen SELECT concat_ws(' ', TG_NAME, TG_OP, n.key, round(n.distance::numeric, 3))"
        " FROM unnest(ARRAY['[10,0]', '[20,0]', '[30,0]']::vector[]) AS q, ehub.nearest('s', q, 5) AS n;"
        " IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END $$;"
        f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" INSERT INTO {names['t']} ({names['key']}, {names['emb']})"
        f"  VALUES ('nested' || (SELECT count(*) FROM {names['t']}), '[10,0.0005]');"
        f" INSERT INTO seen SELECT 'nested' || {near(chr(39) + '[10,0]' + chr(39), 5)};"
        f" RETURN NULL; END $$;"
        f"CREATE FUNCTION write_and_look(after text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        f" INSERT INTO {names['t']} ({names['key']}, {names['emb']})"
        f"  VALUES ('n' || (SELECT count(*) FROM seen), '[10,0.0005]');"
        f" INSERT INTO seen SELECT after || {near(chr(39) + '[10,0]' + chr(39), 9)};"
        f" RETURN after || {near(chr(39) + '[0,5]' + chr(39), 5)}; END $$"
    )
    settled(db)
    return names


def both(db, names, *statements):
    """Run statements and take them back, exactly and by the index: what each left."""
    found = []
    for mode in ("exact", "auto"):
        # What earlier transactions have counted of partitions that a statement locks and leaves alone.
        db.execute("SELECT pg_stat_force_next_flush()")
        with db.transaction(force_rollback=True):
            db.execute(f"SET LOCAL ehub.mode = '{mode}'")
            for statement in statements:
                db.execute(statement.format(**names))
            found.append(
                [
                    db.execute("SELECT line FROM seen ORDER BY line").fetchall(),
                    db.execute(
                        "SELECT {key}, {emb}::text FROM {t} ORDER BY 1".format(**names)
                    ).fetchall(),
                ]
            )
            # When the statement is over its changes are logged, and the index helps again.
            db.execute("SET LOCAL ehub.mode = 'index'")
            found[-1].append(
                db.execute(
                    "SELECT key, round(distance::numeric, 3) FROM ehub.nearest('s', '[10,0]', 5)"
                ).fetchall()
            )
    exact, indexed = found
    assert indexed == exact, statements
    return exact


def test_statements(table, db):
    for name, statement in STATEMENTS.items():
        _, rows, _ = both(db, table, statement)
        if name == "delete where near":
            assert len(rows) == 20


def test_triggers(table, db):
    for trigger, when in TRIGGERS.items():
        db.execute(
            f'CREATE TRIGGER "{trigger}" {when.format(t=table["data"])} EXECUTE FUNCTION look()'
        )
        for name, statement in STATEMENTS.items():
            seen, _, _ = both(db, table, statement)
            # Triggers on rows are not called for none.
            assert seen or name == "nothing", trigger
        db.execute(f'DROP TRIGGER "{trigger}" ON {table["data"]}')


def test_a_trigger_that_changes_the_table_as_well(table, db):
    db.execute(
        f"CREATE TRIGGER meddle {NESTED.format(t=table['data'])} EXECUTE FUNCTION meddle();"
        f"CREATE TRIGGER zzz {NESTED.format(t=table['data'])} EXECUTE FUNCTION look()"
    )
    for name in ("insert", "update", "delete", "upsert"):
        both(db, table, STATEMENTS[name])


def test_several_statements_and_savepoints(table, db):
    both(db, table, STATEMENTS["insert"], STATEMENTS["with delete"], STATEMENTS["with update"])
    with db.transaction(force_rollback=True):
        with db.transaction(force_rollback=True):
            db.execute(STATEMENTS["insert"].format(**table))
        db.execute("SET LOCAL ehub.mode = 'auto'")
        found = db.execute("SELECT key FROM ehub.nearest('s', '[10,0]', 2)").fetchall()
        assert found == [("c1_1",), ("c1_2",)]


def test_what_functions_write_is_found_by_the_index(table, db):
    """Statements of functions, one after the other, in a session that writes all the time."""
    # What it has written otherwise, a moment ago.
    db.execute("SELECT pg_stat_force_next_flush()")
    for _ in range(3):
        with db.transaction(force_rollback=True):
            db.execute("SELECT write_and_look('')")
            db.execute("SELECT write_and_look('')")
            db.execute("SET LOCAL ehub.mode = 'index'")
            found = db.execute("SELECT key FROM ehub.nearest('s', '[10,0.0005]', 2)").fetchall()
            assert {key[0] for (key,) in found} == {"n"}


def test_what_a_cascade_takes(table, db):
    if table["t"] == "spaces.s":
        return
    db.execute(
        "CREATE TABLE owner (id int PRIMARY KEY); INSERT INTO owner VALUES (0);"
        "ALTER TABLE docs ADD FOREIGN KEY (n) REFERENCES owner ON DELETE CASCADE"
    )
    settled(db)
    both(
        db,
        table,
        "WITH d AS (DELETE FROM owner RETURNING id) INSERT INTO seen SELECT "
        + near("'[10,0]'")
        + " FROM d",
    )


def test_by_direct_writes_of_a_partition(table, db):
    if not db.execute("SELECT to_regclass('docs_0')").fetchone()[0]:
        return
    names = table | {"t": "docs_0"}
    for statement in ("with delete", "with insert", "with update", "delete where near"):
        with db.transaction(force_rollback=True):
            text = STATEMENTS[statement].replace("'x'", "'x0'").replace("'y'", "'y0'")
            try:
                with db.transaction(force_rollback=True):
                    db.execute(text.format(**names))
            except psycopg.errors.CheckViolation:
                continue
            both(db, names, text)


def test_replica_mode(table, db, url):
    """What replication applies fires other triggers."""
    for statement in ("with delete", "with insert", "with update", "delete where near"):
        db.execute("SET session_replication_role = replica")
        both(db, table, STATEMENTS[statement])
        db.execute("RESET session_replication_role")


def test_a_search_costs_the_index_only_within_the_statement(table, db):
    """Also where the session has written before, and other tables in this transaction."""
    db.execute(STATEMENTS["insert"].format(**table))
    settled(db)
    db.execute("CREATE TABLE other (a int)")
    with db.transaction():
        db.execute("INSERT INTO other VALUES (1)")
        db.execute("SET LOCAL ehub.mode = 'index'")
        assert len(db.execute("SELECT * FROM ehub.nearest('s', '[10,0]', 3)").fetchall()) == 3
        db.execute("INSERT INTO other SELECT n.distance FROM ehub.nearest('s', '[10,0]', 3) AS n")
        db.execute(
            "CREATE FUNCTION pg_temp.look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " PERFORM FROM ehub.nearest('s', '[10,0]', 3); RETURN NULL; END $$;"
            "CREATE TRIGGER look AFTER INSERT ON other EXECUTE FUNCTION pg_temp.look();"
            "INSERT INTO other VALUES (2)"
        )


def test_without_statistics(table, db):
    db.execute("SET track_counts = off")
    for statement in ("with delete", "with insert", "insert", "delete where near"):
        exact, auto = [], []
        for mode, into in (("exact", exact), ("auto", auto)):
            with db.transaction(force_rollback=True):
                db.execute(f"SET LOCAL ehub.mode = '{mode}'")
                db.execute(STATEMENTS[statement].format(**table))
                into += db.execute("SELECT line FROM seen ORDER BY line").fetchall()
                into += db.execute("SELECT {key} FROM {t} ORDER BY 1".format(**table)).fetchall()
        assert auto == exact
