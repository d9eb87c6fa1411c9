"""What a session may set, and what every door says whatever is set.

The settings come from pg_settings: each that a user or superuser can set in a session, with other values
than its own. Left out are those whose business it is to refuse or to end something.
"""

import re

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

# They end or refuse statements, ask for other rights, or say what is logged and told.
LEFT_OUT = (
    "timeout|^log_|^debug_|^trace_|^client_min_messages|^default_transaction|^transaction_|^role$"
    "|^session_authorization|preload_libraries|^restrict_nonsystem|^row_security|tablespace"
    "|^default_table_access|^max_stack_depth|^temp_|^lo_compat|^zero_damaged|^ignore_|^allow_"
    "|^session_replication_role|^jit|^dynamic_library|^commit_|^backtrace|_mem$|^hash_mem|^lc_messages"
    "|^vacuum|^wal_|^io_|^maintenance_io|^effective_io|^backend_flush|^client_encoding|^tcp_|^in_hot"
    "|^is_superuser|^exit_on|^update_process|^compute_query|^event_triggers|^track_|^synchronous|^stats_"
    "|^seed$|^max_parallel|^min_parallel|^cursor_tuple|^geqo|^random_page|^seq_page|^cpu_|^parallel_"
    "|_collapse_limit|^effective_cache|^recursive_worktable|^log|^plan_cache_mode$"
)
# Some of them, for models to choose from.
SOME = [
    "DateStyle = 'German'",
    "standard_conforming_strings = off; SET escape_string_warning = off",
    "array_nulls = off",
    "transform_null_equals = on",
    "enable_seqscan = off",
    "enable_indexscan = off",
    "plan_cache_mode = force_generic_plan",
    "plan_cache_mode = force_custom_plan",
]
# Texts have no list of values.
TEXTS = {
    "DateStyle": ["SQL, DMY", "German", "Postgres, YMD"],
    "TimeZone": ["Asia/Tokyo", "-03:30"],
    "search_path": ["pg_temp", "odd, public"],
    "lc_monetary": ["C"],
    "lc_numeric": ["C"],
    "lc_time": ["C"],
    "default_text_search_config": ["pg_catalog.simple"],
    "timezone_abbreviations": ["India"],
}
COLUMNS = {
    "r": ("real", "0.1::real + {i}"),
    "d": ("double precision", "0.1 + {i} / 3.0"),
    "n": ("numeric", "0.1 + {i} / 3.0"),
    "rs": ("real[]", "ARRAY[0.1::real + {i}, NULL]"),
    "p": ("point", "point(0.1::real, {i} / 3.0)"),
    "c": ("circle", "circle(point(0.1::real, 1), {i} / 3.0)"),
    "fr": ("numrange", "numrange(0.1, 1 + {i})"),
    "dr": ("daterange", "daterange('2026-02-01', '2026-03-04')"),
    "tr": ("tsrange", "tsrange('2026-02-01 10:00', '2026-03-04 11:00')"),
    "t": ("timestamp", "'2026-02-01 10:00'::timestamp + {i} * interval '1 day'"),
    "tz": ("timestamptz", "'2026-02-01 10:00+00'::timestamptz"),
    "ti": ("timetz", "'10:00:00.5+02'"),
    "da": ("date", "'2026-02-01'::date + {i}"),
    "ds": ("date[]", "ARRAY['2026-02-01'::date]"),
    "iv": ("interval", "'1 day 2 hours'"),
    "m": ("money", "'12.34'"),
    "by": ("bytea", "'\\xdeadbeef'"),
    "te": ("text", "E'it''s a \\\\ \\\"NULL\\\"' || {i}"),
    "js": ("jsonb", '\'{{"x": [0.1, null], "back\\\\\\\\slash": 1}}\''),
    "b": ("boolean", "{i} % 2 = 0"),
    "ip": ("inet", "'10.0.0.1'"),
}
FILTERS = [
    '{"r": 0.1}',
    '{"r": {">": 3.05}}',
    '{"d": {"in": [0.43333333333333335, 1.1]}}',
    '{"rs": 2.1}',
    '{"p": "(0.10000000149011612,1)"}',
    '{"dr": "[2026-02-01,2026-03-04)"}',
    '{"t": {"in": ["2026-02-03T10:00:00", "x"]}}',
    '{"da": "2026-02-02"}',
    '{"not": {"te": "it\'s a \\\\ \\"NULL\\"3"}}',
    '{"js.back\\\\\\\\slash": 1}',
    '{"js.x": 0.1, "b": true}',
]
V = "'[3.3,0.1]'::public.vector"
KEYS = "ARRAY['1','2','NULL']"


def prepare(db):
    """Make an attached table and a space of ehub's own with the same rows."""
    columns = ", ".join(f"{name} {kind}" for name, (kind, _) in COLUMNS.items())
    values = ", ".join(value.format(i="i") for _, value in COLUMNS.values())
    db.execute(f"CREATE TABLE docs (id text PRIMARY KEY, e public.vector(2), {columns})")
    db.execute(
        "INSERT INTO docs SELECT CASE i WHEN 0 THEN 'NULL' ELSE i::text END,"
        f" ARRAY[0.1 * i, 1.0 / (i + 3)]::real[], {values} FROM generate_series(0, 29) AS i"
    )
    db.execute("SELECT ehub.attach('docs', 'e')")
    db.execute("SELECT ehub.create_space('own', 2)")
    db.execute(
        "INSERT INTO spaces.own SELECT n.key, ehub.get('docs', n.key), n.metadata"
        " FROM ehub.nearest_exact('docs', '[0,0]', 100) AS n"
    )
    db.execute("SELECT ehub.create_version('own', 'v2', from_version => 'v1')")
    db.execute("DELETE FROM spaces.\"own@v2\" WHERE key = '7'")
    db.execute("SELECT ehub.checkpoint('own', 'now')")
    (number,) = db.execute(
        "SELECT version_id FROM ehub.catalogue WHERE version = 'v1' AND space = 'own'"
    ).fetchone()
    db.execute(f"CREATE INDEX ON ehub_data.v{number} USING gin (metadata jsonb_path_ops)")
    db.execute(f"ANALYZE docs; ANALYZE ehub_data.v{number}")


def doors():
    """Return statements that each ask another function, or ask it in another way."""
    found = []
    for space in ("docs", "own"):
        found += [
            f"SELECT * FROM ehub.nearest('{space}', {V}, 30)",
            f"SELECT * FROM ehub.nearest('{space}', {V}, 3, {KEYS})",
            f"SELECT * FROM ehub.nearest_to('{space}', 'NULL', 4)",
            f"SELECT * FROM ehub.nearest_many('{space}', ARRAY[{V}, {V}], 3)",
            f"SELECT * FROM ehub.nearest_like('{space}', {KEYS}, 3, ARRAY['4'], ARRAY[0.1, 1e-5, 3])",
            f"SELECT ehub.get('{space}', 'NULL')::text",
            f"SELECT ehub.distance('{space}', '1', '2')",
            f"SELECT * FROM ehub.distances('{space}', {KEYS})",
            f"SELECT ehub.average('{space}', {KEYS}, ARRAY[0.1, 0.2, 0.30000000000000004])::text",
            f"SELECT value, average::text, rows FROM ehub.averages('{space}', 'd', 'r') ORDER BY 1",
            f"SELECT value, average::text, rows FROM ehub.averages('{space}', 'dr') ORDER BY 1",
            f"SELECT value, average::text, rows FROM ehub.averages('{space}', 'p', 'd') ORDER BY 1",
        ]
        for wanted in FILTERS:
            f = sql.Literal(wanted).as_string()
            found += [
                f"SELECT * FROM ehub.nearest('{space}', {V}, 30, filter => {f})",
                f"SELECT * FROM ehub.nearest_exact('{space}', {V}, 30, filter => {f})",
                f"SELECT * FROM ehub.nearest_many('{space}', ARRAY[{V}], 30, filter => {f})",
                f"SELECT * FROM ehub.within('{space}', {V}, 1e9, filter => {f})",
                f"SELECT ehub.average('{space}', filter => {f})::text",
                f"SELECT value, rows FROM ehub.averages('{space}', 'b', filter => {f}) ORDER BY 1",
                f"SELECT count(*) FROM ehub.explain_nearest('{space}', {V}, 3, {f})",
            ]
    return [
        *found,
        "SELECT (ehub.diff('own@v1', 'own@v2'))::text",
        "SELECT * FROM ehub.diff_keys('own@v1', 'own@v2') ORDER BY 1",
        "SELECT (ehub.diff('docs', 'own'))::text",
        "SELECT * FROM ehub.overlap('own@v1', 'own@v2', 3) ORDER BY 1",
        f"SELECT * FROM ehub.nearest_at('own', 'now', {V}, 5)",
        "SELECT key, embedding::text, metadata FROM ehub.rows_at('own', 'now') ORDER BY key COLLATE \"C\"",
    ]


def choices(db):
    """Yield settings with other values than they have."""
    rows = db.execute(
        "SELECT name, vartype, setting, enumvals, min_val, max_val FROM pg_settings"
        " WHERE context IN ('user', 'superuser') AND name !~* %s AND name !~ '\\.' ORDER BY name",
        [LEFT_OUT],
    )
    for name, kind, setting, values, least, most in rows.fetchall():
        if kind == "enum":
            others = values
        elif kind == "bool":
            others = ["on", "off"]
        elif kind == "string":
            others = TEXTS.get(name, [])
        else:
            others = [least, most]
        for value in others:
            if value != setting:
                yield name, value


def answers(url, statements, settings):
    """Ask all doors in a session that was begun with some settings."""
    options = " ".join(f"-c {name}={value}".replace(", ", ",\\ ") for name, value in settings)
    with psycopg.connect(make_conninfo(url, options=options), autocommit=True) as session:
        # Numbers come as they are, not as these settings write them.
        return [session.execute(statement, binary=True).fetchall() for statement in statements]


def check(url, db, door="", setting=""):
    """Whatever is set, the doors say the same: all, or those whose text has such a part."""
    statements = [statement for statement in doors() if re.search(door, statement)]
    expected = answers(url, statements, [])
    assert sum(bool(rows) for rows in expected) > len(expected) * 0.8
    seen, wrong = set(), []
    for name, value in choices(db):
        if not re.search(setting, name):
            continue
        seen.add(name)
        found = answers(url, statements, [(name, value)])
        wrong += [
            (name, value, statement)
            for statement, rows, right in zip(statements, found, expected, strict=True)
            if rows != right
        ]
    # An index may be told to find some rows only.
    few = [("enable_seqscan", "off"), ("gin_fuzzy_search_limit", "1")]
    assert answers(url, statements, few) == expected
    assert wrong == []
    # A list that has become empty checks nothing.
    assert {"extra_float_digits", "DateStyle", "array_nulls"} <= seen
