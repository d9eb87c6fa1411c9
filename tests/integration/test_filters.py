"""Filters on metadata against an oracle of the documented grammar, and what implies what."""

import itertools
import json
from decimal import Decimal

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(
    max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


# --- the oracle


def names_of(field):
    """Split a field at its dots, but for those behind a backslash."""
    names, name, letters = [], "", iter(field)
    for letter in letters:
        if letter == "\\":
            name += next(letters)
        elif letter == ".":
            names.append(name)
            name = ""
        else:
            name += letter
    return [*names, name]


def values_of(metadata, field):
    """All that a field names: a list on the way stands for its elements."""
    found = [metadata]
    for name in names_of(field):
        inside = []
        for one in found:
            for element in one if isinstance(one, list) else [one]:
                if isinstance(element, dict) and name in element:
                    inside.append(element[name])
        found = inside
    return found


def kind(value):
    if value is None or isinstance(value, bool):
        return type(value)
    return Decimal if isinstance(value, int | float) else type(value)


def exact(value):
    return Decimal(str(value)) if kind(value) is Decimal else value


def compares(value, operator, wanted):
    """Whether an element is what one operator asks for; one that is a list by its elements."""
    if isinstance(value, list):
        return any(compares(one, operator, wanted) for one in value if not isinstance(one, list))
    if operator in ("in", "not in"):
        return any(compares(value, "=", one) for one in wanted)
    if kind(value) is not kind(wanted) or isinstance(value, dict):
        return False
    a, b = exact(value), exact(wanted)
    return {
        "=": lambda: a == b,
        "!=": lambda: a == b,
        "<": lambda: a < b,
        "<=": lambda: a <= b,
        ">": lambda: a > b,
        ">=": lambda: a >= b,
    }[operator]()


def field_matches(metadata, field, wanted):
    asked = wanted if isinstance(wanted, dict) else {"=": wanted}
    found = values_of(metadata, field)
    elements = []
    for value in found:
        elements += value if isinstance(value, list) else [value]
    of_one = {}
    for operator, value in asked.items():
        if operator == "exists":
            if bool(found) != value:
                return False
        elif operator in ("!=", "not in"):
            if any(compares(element, operator, value) for element in elements):
                return False
        else:
            of_one[operator] = value
    return not of_one or any(
        all(compares(element, *one) for one in of_one.items()) for element in elements
    )


def matches(metadata, wanted):
    for field, value in wanted.items():
        if field == "not":
            right = not matches(metadata, value)
        elif field == "and":
            right = all(matches(metadata, one) for one in value)
        elif field == "or":
            right = any(matches(metadata, one) for one in value)
        else:
            right = field_matches(metadata, field, value)
        if not right:
            return False
    return True


# --- what is tried

NASTY = "'\"\\%$@?{}/*--\n\t\x01\x7fßü😀"
NAMES = st.sampled_from(
    [
        "a",
        "a",
        "b",
        "b",
        "c",
        "a.b",
        "and",
        "not",
        "or",
        "exists",
        "=",
        "\\",
        "a\\",
        NASTY,
        "$",
        "é",
    ]
)
NUMBERS = st.sampled_from(
    [0, 1, 2, -1, -2, 1.5, -1.5, 1.0, -0.0, 10**30, -(10**30), 10**30 + 1, 1e-7, 0.1, 1e22]
)
STRINGS = st.sampled_from(["", "a", "b", "B", "ab", "1", "true", "null", "é", "😀", "￿", NASTY])
SCALARS = st.one_of(NUMBERS, STRINGS, st.booleans(), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(NAMES, inner, max_size=3),
    ),
    max_leaves=6,
)
METADATA = st.dictionaries(st.one_of(NAMES, st.just("")), VALUES, max_size=4)


def escaped(names):
    field = ".".join(name.replace("\\", "\\\\").replace(".", "\\.") for name in names)
    return "\\" + field if field in ("and", "or", "not") else field


FIELDS = st.lists(NAMES, min_size=1, max_size=3).map(escaped) | NAMES.map(lambda n: escaped([n]))


@st.composite
def questions(draw):
    """What is asked of a field."""
    bounds = draw(st.sampled_from([NUMBERS, STRINGS]))
    asked = st.fixed_dictionaries(
        {},
        optional={
            "=": SCALARS,
            "!=": SCALARS,
            "<": bounds,
            "<=": bounds,
            ">": bounds,
            ">=": bounds,
            "in": st.lists(SCALARS, max_size=4),
            "not in": st.lists(SCALARS, max_size=4),
            "exists": st.booleans(),
        },
    ).filter(bool)
    return draw(st.one_of(SCALARS, bounds.map(lambda b: {">=": b}), asked))


FILTERS = st.recursive(
    st.dictionaries(FIELDS, questions(), max_size=2),
    lambda inner: st.one_of(
        st.builds(lambda f: {"not": f}, inner),
        st.builds(lambda fs: {"and": fs}, st.lists(inner, max_size=3)),
        st.builds(lambda fs: {"or": fs}, st.lists(inner, max_size=3)),
        st.builds(lambda f, g: {**f, **g}, inner, inner),
    ),
    max_leaves=5,
)


def text(value):
    return json.dumps(value, ensure_ascii=False)


@pytest.fixture
def space(db):
    db.execute("SELECT ehub.create_space('s', 1)")
    return "s"


def test_filters_mean_what_the_grammar_says(db, space):
    seen = []

    @QUICK
    @given(st.lists(METADATA, min_size=8, max_size=8), FILTERS)
    def check(rows, wanted):
        expected = [matches(one, wanted) for one in rows]
        found = db.execute(
            "SELECT m @@ ehub.filter_path(%s) FROM jsonb_array_elements(%s) WITH ORDINALITY AS t (m, i)"
            " ORDER BY i",
            [text(wanted), text(rows)],
        ).fetchall()
        assert [one for (one,) in found] == expected, text(wanted)
        seen.extend(expected)
        with db.transaction(force_rollback=True):
            db.execute(
                "INSERT INTO spaces.s SELECT i::text, '[1]', m"
                " FROM jsonb_array_elements(%s) WITH ORDINALITY AS t (m, i)",
                [text(rows)],
            )
            keys = db.execute(
                "SELECT key FROM ehub.nearest_exact('s', '[1]', 100, filter => %s)", [text(wanted)]
            ).fetchall()
            assert {int(key) for (key,) in keys} == {
                i for i, right in enumerate(expected, 1) if right
            }
            # As text in a statement, for sessions with either way of writing strings.
            for conforming in ("on", "off"):
                db.execute(f"SET LOCAL standard_conforming_strings = {conforming}")
                (condition,) = db.execute(
                    "SELECT ehub.filter_condition(%s)", [text(wanted)]
                ).fetchone()
                (n,) = db.execute(f"SELECT count(*) FROM spaces.s WHERE {condition}").fetchone()
                assert n == sum(expected)

    check()
    assert 0.1 < sum(seen) / len(seen) < 0.9


EXAMPLES = [
    # filter, what matches, what does not
    ({"a": 1}, [{"a": 1}, {"a": [2, 1]}, {"a": 1.0}], [{}, {"a": "1"}, {"a": True}]),
    ({"a": None}, [{"a": None}, {"a": [None]}], [{}, {"a": 0}, {"a": []}, {"a": False}]),
    ({"a": {"!=": 1}}, [{}, {"a": 2}, {"a": "1"}, {"a": []}], [{"a": 1}, {"a": [2, 1]}]),
    ({"a": {"not in": [1, 2]}}, [{}, {"a": 3}], [{"a": 2}, {"a": [3, 1]}]),
    ({"a": {"in": []}}, [], [{}, {"a": 1}]),
    ({"a": {"not in": []}}, [{}, {"a": 1}], []),
    ({"not": {"a": {">": 1}}}, [{}, {"a": 1}, {"a": "x"}], [{"a": 2}, {"a": [0, 2]}]),
    # One and the same element, but for what is of all of them.
    ({"a": {">": 1, "<": 3}}, [{"a": 2}, {"a": [9, 2]}], [{"a": [0, 4]}, {}]),
    ({"a": {">": 1, "!=": 5}}, [{"a": 2}], [{"a": [2, 5]}]),
    ({"a.b": 1}, [{"a": {"b": 1}}, {"a": [{"b": 0}, {"b": [1]}]}], [{"a.b": 1}, {"a": 1}]),
    ({"a\\.b": 1}, [{"a.b": 1}], [{"a": {"b": 1}}]),
    ({"\\and": 1}, [{"and": 1}], [{}]),
    ({"a\\\\": 1}, [{"a\\": 1}], [{"a": 1}]),
    ({"a\\\\.b": 1}, [{"a\\": {"b": 1}}], [{"a.b": 1}]),
    ({"a": {"exists": True}}, [{"a": None}, {"a": []}], [{}, {"b": 1}]),
    ({"a": {"exists": False}}, [{}], [{"a": None}]),
    ({"a": {"<": "b"}}, [{"a": "a"}, {"a": "B"}], [{"a": 1}, {"a": "b"}, {}]),
    ({}, [{}, {"a": 1}], []),
    ({"or": []}, [], [{}]),
    ({"and": []}, [{}], []),
]


def test_examples(db):
    for wanted, right, wrong in EXAMPLES:
        for rows, expected in ((right, True), (wrong, False)):
            for one in rows:
                assert matches(one, wanted) is expected, one
                found = db.execute("SELECT %s @@ ehub.filter_path(%s)", [text(one), text(wanted)])
                assert found.fetchone() == (expected,), one


# --- filters that are none


def nested(levels):
    wanted = {"a": 1}
    for _ in range(levels):
        wanted = {"not": wanted}
    return wanted


BAD = {
    "operator": ({"price": {"~": 1}}, 'field "price": there is no operator "~"'),
    "field of a field": ({"a": {"b": 1}}, 'field "a": there is no operator "b"'),
    "no operator": ({"a": {}}, 'field "a": an operator is missing'),
    "list for a value": ({"a": [1]}, 'field "a": "=" compares with a string.*not with \\[1\\]'),
    "list for =": ({"a": {"=": [1]}}, 'field "a": "=" compares with a string'),
    "list for !=": ({"a": {"!=": [1]}}, 'field "a": "!=" compares with a string'),
    "object for !=": ({"a": {"!=": {}}}, 'field "a": "!=" compares with a string'),
    "object for =": ({"a": {"=": {"b": 1}}}, 'field "a": "=" compares with a string'),
    "object in a list": ({"a": {"in": [1, {}]}}, 'field "a": "in" compares with a string'),
    "list in a list": ({"a": {"not in": [[1]]}}, 'field "a": "not in" compares with a string'),
    "bound true": ({"a": {"<": True}}, 'field "a": < compares with a number or a string.*true'),
    "bound null": ({"a": {">=": None}}, 'field "a": >= compares with a number or a string.*null'),
    "bound list": ({"a": {">": [1]}}, 'field "a": > compares with a number or a string'),
    "bounds of two kinds": ({"a": {">": 1, "<": "b"}}, 'field "a": a number and a string'),
    "in a value": ({"a": {"in": 1}}, 'field "a": "in" takes a list, not 1'),
    "not in a string": ({"a": {"not in": "b"}}, 'field "a": "not in" takes a list, not "b"'),
    "exists 1": ({"a": {"exists": 1}}, 'field "a": exists is true or false, not 1'),
    "and an object": ({"and": {"a": 1}}, '"and" takes a list of filters'),
    "or a string": ({"or": "a"}, '"or" takes a list of filters, not "a"'),
    "or of numbers": ({"or": [1]}, "an object is needed, not 1"),
    "not a list": ({"not": [{"a": 1}]}, "an object is needed, not \\["),
    "not null": ({"not": None}, "an object is needed, not null"),
    "a list": ([{"a": 1}], "an object is needed, not \\["),
    "a string": ("a", 'an object is needed, not "a"'),
    "null": (None, "an object is needed, not null"),
    "a number": (1, "an object is needed, not 1"),
    "no name": ({"": 1}, 'a field has a name, "" has an empty one'),
    "no first name": ({".a": 1}, 'a field has a name, "\\.a" has'),
    "no last name": ({"a.": 1}, 'a field has a name, "a\\." has'),
    "no last name behind a backslash": ({"a\\\\.": 1}, "a field has a name"),
    "no name between": ({"a..b": 1}, 'a field has a name, "a\\.\\.b" has'),
    "no name behind a backslash": ({"a\\\\..b": 1}, "a field has a name"),
    "backslash at the end": ({"a\\": 1}, "a field has a name"),
    "too deep": (nested(40), "30 levels deep at most"),
    "too deep by far": (nested(900), "30 levels deep at most"),
    "too long": ({"a": "x" * 100_000}, "100000 bytes at most, not 1000"),
}


def test_what_is_no_filter_is_refused(db, space):
    for name, (wanted, message) in BAD.items():
        statements = [
            "SELECT ehub.filter_path(%s)",
            "SELECT ehub.filter_condition(%s)",
            "SELECT * FROM ehub.nearest('s', '[1]', 1, filter => %s)",
            "SELECT * FROM ehub.nearest_exact('s', '[1]', 1, filter => %s)",
            "SELECT * FROM ehub.nearest_many('s', '{[1]}', 1, %s)",
            "SELECT * FROM ehub.within('s', '[1]', 1, filter => %s)",
            "SELECT * FROM ehub.explain_nearest('s', '[1]', 1, %s)",
            "SELECT * FROM ehub.indexes_for('s', %s)",
        ]
        if name not in ("too long", "too deep by far"):
            statements.append("SELECT ehub.create_index('s', 'i', %s)")
        for statement in statements:
            with pytest.raises(psycopg.DatabaseError, match=message) as caught:
                db.execute(statement, [text(wanted)]).fetchall()
            assert caught.value.sqlstate == "EH021", (name, statement)
            assert "price" in caught.value.diag.message_hint
    for wanted, message in (
        (text({"a": "x" * 3000}), "2000 bytes at most"),
        ("{}", "over the rows that match one"),
        (None, "over the rows that match one"),
    ):
        with pytest.raises(psycopg.DatabaseError, match=message) as caught:
            db.execute("SELECT ehub.create_index('s', 'i', %s)", [wanted])
        assert caught.value.sqlstate == "EH021"


def test_all_that_is_short_enough_is_answered(db):
    """Lists and conditions of as many parts as there is room for are no trouble to the stack."""
    many = 24_000
    for wanted in (
        {"a": {"in": [i % 10 for i in range(many)]}},
        {"a": {"not in": [i % 10 for i in range(many)]}},
        {"and": [{}] * many},
        {"or": [{}] * many},
        {f"{i}": {"!=": 1} for i in range(4500)},
    ):
        row = db.execute(
            "SELECT '{\"a\": 3}'::jsonb @@ ehub.filter_path(f), '{\"a\": 77}'::jsonb @@ p::text::jsonpath"
            " FROM CAST(%s AS jsonb) AS f, ehub.filter_path(f) AS p",
            [text(wanted)],
        ).fetchone()
        assert row == (matches({"a": 3}, wanted), matches({"a": 77}, wanted))


@pytest.mark.parametrize(
    "attempt",
    [
        "\"' OR 1=1 --",
        '") || (1 == 1) || ("',
        '" ? (@ == 1) || exists($.a ? (@ == "',
        "$.*",
        "$",
        "@",
        "x\\",
        '\\"',
        "/* */",
        "%s %I %L %1$s %%",
        "'; DROP TABLE ehub.space; --",
        "$$ $1",
        '" like_regex ".*',
        "\\u0022) || (1 == 1",
        "{}",
    ],
)
def test_nothing_in_a_filter_is_code(db, space, attempt):
    row = {"a": attempt, attempt: "there"}
    db.execute("INSERT INTO spaces.s VALUES ('k', '[1]', %s), ('other', '[1]', '{}')", [text(row)])
    field = escaped([attempt])
    for wanted in (
        {"a": attempt},
        {field: "there"},
        {"a": {"in": [attempt]}},
        {"a": {"<=": attempt, ">=": attempt}},
        {field: {"exists": True}},
    ):
        for function in ("nearest_exact", "nearest", "within"):
            found = db.execute(
                f"SELECT key FROM ehub.{function}('s', '[1]', 5, filter => %s)", [text(wanted)]
            ).fetchall()
            assert found == [("k",)], wanted
        (condition,) = db.execute("SELECT ehub.filter_condition(%s)", [text(wanted)]).fetchone()
        assert db.execute(f"SELECT key FROM spaces.s WHERE {condition}").fetchall() == [("k",)]
        assert (
            db.execute(
                "SELECT note FROM ehub.explain_nearest('s', '[1]', 5, %s) WHERE way = 'note'",
                [text(wanted)],
            ).fetchall()
            == []
        )
    # A partition by such a field, and of such a name.
    db.execute("SELECT ehub.create_space('p', 1, partition_by => %s)", [attempt])
    db.execute("INSERT INTO spaces.p VALUES ('k', '[1]', %s)", [text({attempt: attempt})])
    for function in ("nearest_exact", "nearest", "within"):
        found = db.execute(
            f"SELECT key FROM ehub.{function}('p', '[1]', 5, partition => %s)", [attempt]
        ).fetchall()
        assert found == [("k",)]
    assert db.execute("SELECT * FROM ehub.partitions('p')").fetchall() == [(attempt, 1)]
    assert db.execute("SELECT ehub.drop_partition('p', %s)", [attempt]).fetchone() == (1,)


# --- what implies what

FEW = [0, 1, 2, 3, "x", "y"]
ONES = st.sampled_from(FEW)
BOUNDS = st.sampled_from([0, 1, 2, 3])
PARTS = st.one_of(
    ONES,
    st.dictionaries(st.sampled_from(["<", "<=", ">", ">="]), BOUNDS, min_size=1, max_size=2),
    st.builds(lambda v: {"in": v}, st.lists(ONES, max_size=3)),
    st.builds(lambda v: {"!=": v}, ONES),
    st.builds(lambda v: {"not in": v}, st.lists(ONES, max_size=3)),
    st.builds(lambda v: {"exists": v}, st.booleans()),
    st.builds(lambda v, b: {"=": v, ">": b}, ONES, BOUNDS),
    st.builds(lambda v, b: {"in": v, "<=": b, "!=": 2}, st.lists(ONES, max_size=3), BOUNDS),
)
SIMPLE = st.dictionaries(st.sampled_from(["a", "b"]), PARTS, max_size=2)
WIDE = st.one_of(
    SIMPLE,
    st.builds(lambda f: {"not": f}, SIMPLE),
    st.builds(lambda fs: {"or": fs}, st.lists(SIMPLE, max_size=2)),
    st.builds(lambda fs: {"and": fs}, st.lists(SIMPLE, max_size=2)),
)


@st.composite
def narrowed(draw, wide):
    """A filter that is made from another one: parts of it, narrower or not, and more."""
    made = {}
    for field, wanted in wide.items():
        if field in ("and", "or", "not") or draw(st.integers(0, 3)) == 0:
            made[field] = wanted
        else:
            made[field] = draw(PARTS)
    if draw(st.booleans()):
        return {"and": [made, draw(SIMPLE)]}
    return {**draw(SIMPLE), **made}


def test_what_is_implied_matches(db):
    values = [0, 1, 2, 3, 1.5, "x", "y", None, [0, 3], [1, 2], [], ["x", 0], [[0, 3]], [[1], 2]]
    notes = [{"a": a, "b": b} for a, b in itertools.product(values, values)]
    notes += [{name: one} for one in values for name in "ab"] + [{}]
    db.execute(
        "CREATE TEMP TABLE note AS SELECT m FROM jsonb_array_elements(%s) AS m", [text(notes)]
    )
    seen = []

    @settings(QUICK, max_examples=400)
    @given(st.data())
    def check(data):
        wide = data.draw(WIDE)
        wanted = data.draw(narrowed(wide))
        implied, wrong, itself = db.execute(
            "SELECT ehub.implies(f, w), (SELECT min(m::text) FROM note, ehub.filter_path(f) AS p,"
            " ehub.filter_path(w) AS q WHERE m @@ p AND NOT m @@ q), ehub.implies(f, f)"
            " FROM CAST(%s AS jsonb) AS f, CAST(%s AS jsonb) AS w",
            [text(wanted), text(wide)],
        ).fetchone()
        assert itself is True
        assert not (implied and wrong), (wanted, wide)
        seen.append((implied, wrong is None))

    check()
    implied = sum(one for one, _ in seen)
    assert implied > 0.15 * len(seen)
    # It knows most of what there is to know.
    assert implied > 0.5 * sum(true for _, true in seen)


IMPLIED = [
    # narrow, wide
    ({"a": 1, "b": 2}, {"a": 1}),
    ({"a": 1}, {}),
    ({"b": 2, "a": 1}, {"a": 1, "b": 2}),
    ({"and": [{"a": 1}, {"b": 2}]}, {"a": 1}),
    ({"a": 1}, {"and": [{"a": 1}]}),
    ({"a": 1}, {"a": {"=": 1}}),
    ({"a": 1}, {"a": {"in": [1, 2]}}),
    ({"a": {"in": [1, 2]}}, {"a": {"in": [2, 1, 3]}}),
    ({"a": 1}, {"a": {"<": 2}}),
    ({"a": {"<": 1}}, {"a": {"<": 2}}),
    ({"a": {"<": 1}}, {"a": {"<=": 1}}),
    ({"a": {">=": 2}}, {"a": {">": 1.5}}),
    ({"a": {">": 1, "<": 2}}, {"a": {">": 0}}),
    ({"a": {">": 1, "<": 2}}, {"a": {">=": 1, "<=": 2}}),
    ({"a": {"in": [1, 2]}}, {"a": {">=": 1, "<": 3}}),
    ({"a": "en"}, {"a": {">=": "a", "<": "f"}}),
    ({"a": 1}, {"a": {"exists": True}}),
    ({"a": {">": 1}}, {"a": {"exists": True}}),
    ({"a": {"!=": 1}, "b": 2}, {"a": {"!=": 1}}),
    ({"a": {"!=": 1, ">": 0}}, {"a": {">": 0}}),
    ({"not": {"a": 1}, "b": 2}, {"not": {"a": 1}}),
    ({"or": [{"a": 1}, {"a": 2}], "b": 1}, {"or": [{"a": 1}, {"a": 2}]}),
    ({"a.b": 1}, {"a.b": {"in": [1]}}),
]
NOT_IMPLIED = [
    ({}, {"a": 1}),
    ({"a": 1}, {"b": 1}),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"a": 1, "b": 2}),
    ({"a": {"in": [1, 2]}}, {"a": 1}),
    ({"a": {"<=": 1}}, {"a": {"<": 1}}),
    ({"a": {"<": 2}}, {"a": {"<": 1}}),
    ({"a": {"<": 1}}, {"a": {"<": "b"}}),
    ({"a": {"<": 1}}, {"a": {">": 0}}),
    ({"a": {"in": []}, "b": 1}, {"b": 2}),
    ({"a": 1}, {"a": {"!=": 2}}),  # [1, 2] is both
    ({"a": 1}, {"a": {"not in": [2]}}),
    ({"a": {"!=": 1}}, {"a": {"exists": True}}),
    ({"a": {"exists": True}}, {"a": {"exists": False}}),
    ({"a": 1}, {"not": {"a": 2}}),
    ({"and": [{"a": {">": 1}}, {"a": {"<": 3}}]}, {"a": {">": 1, "<": 3}}),  # [0, 4] is both
    ({"a": 1}, {"a": "1"}),
    ({"a.b": 1}, {"a\\.b": 1}),
]


def test_what_users_write_is_known(db):
    for pairs, expected in ((IMPLIED, True), (NOT_IMPLIED, False)):
        for narrow, wide in pairs:
            found = db.execute("SELECT ehub.implies(%s, %s)", [text(narrow), text(wide)])
            assert found.fetchone() == (expected,), (narrow, wide)
