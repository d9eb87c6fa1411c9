"""Arrays that count from another number than one, have several dimensions, or NULLs in them."""

import psycopg
import pytest

# Each with {a} for a list of texts and {w} of numbers; what it gives must not depend on how it counts.
CALLS = {
    "leave_out": "SELECT * FROM ehub.nearest('s', '[1,0]', 3, {a})",
    "leave_out, exact": "SELECT * FROM ehub.nearest_exact('s', '[1,0]', 3, {a})",
    "leave_out, within": "SELECT * FROM ehub.within('s', '[1,0]', 9, leave_out => {a})",
    "distances": "SELECT * FROM ehub.distances('s', {a})",
    "average": "SELECT ehub.average('s', {a})",
    "weighted average": "SELECT ehub.average('s', {a}, {w})",
    "nearest_like": "SELECT * FROM ehub.nearest_like('s', {a}, 3)",
    "weighted likes": "SELECT * FROM ehub.nearest_like('s', {a}, 3, weights => {w})",
    "unlikes": "SELECT * FROM ehub.nearest_like('s', '{{k5}}', 3, {a}, unlike_weights => {w})",
    "example_query": "SELECT ehub.example_query('s', {a}, '{{k5}}', {w})",
    "rows_at": "SELECT key FROM ehub.rows_at('s', 'now', {a}) ORDER BY key",
    "overlap": "SELECT * FROM ehub.overlap('s@v1', 's@v2', 3, {a}) ORDER BY 1",
    "nearest_many": "SELECT * FROM ehub.nearest_many('s', {v}, 3)",
    "overlap_of_queries": "SELECT * FROM ehub.overlap_of_queries('s@v1', 's@v2', {v})",
    "later_queries": "SELECT * FROM ehub.overlap_of_queries('s@v1', 's@v2', {v}, {v})",
}


def arrays(bounds="", null=False, twice=False):
    """Write the arrays of a call: with a lower bound, with a NULL, or as two dimensions."""

    def array(kind, *elements):
        inner = ",".join(elements)
        if null:
            inner = f"{elements[0]},NULL,{elements[1]}"
        if twice:
            inner = f"{{{inner}}},{{{inner}}}"
        return f"'{bounds}{{{inner}}}'::{kind}[]"

    return {
        "a": array("text", "k1", "k2"),
        "w": array("float8", "0.25", "0.75"),
        "v": array("vector", '"[1,0]"', '"[4,0]"'),
    }


@pytest.fixture
def space(hub, db):
    space = hub.create_space("s", 2)
    space.multiset({f"k{i}": [i, i % 3] for i in range(1, 9)})
    space.create_version("v2", from_version="v1")
    space.checkpoint("now")
    return space


@pytest.mark.parametrize("name", CALLS)
def test_arrays(space, db, name):
    def ask(**how):
        return db.execute(CALLS[name].format(**arrays(**how))).fetchall()

    expected = ask()
    assert expected
    for bounds in ("[0:1]=", "[5:6]=", "[-3:-2]="):
        assert ask(bounds=bounds) == expected, bounds
    # Of several dimensions: refused, and what is wrong is named.
    with pytest.raises(psycopg.Error, match="list") as caught:
        ask(twice=True)
    assert caught.value.sqlstate == "EH005"
    if name.startswith("leave_out") or name == "rows_at":
        # No key is NULL.
        assert ask(null=True) == expected
    elif name != "overlap":
        with pytest.raises(psycopg.Error) as caught:
            ask(null=True)
        assert caught.value.sqlstate in ("EH004", "EH005", "EH008"), caught.value


def test_nothing_but_null_is_nothing_to_leave_out(space, db):
    for statement in (
        "SELECT count(*) FROM ehub.nearest('s', '[1,0]', 30, ARRAY[NULL])",
        "SELECT count(*) FROM ehub.nearest('s', '[1,0]', 30, '{}')",
        "SELECT count(*) FROM ehub.nearest_exact('s', '[1,0]', 30, ARRAY[NULL])",
        "SELECT count(*) FROM ehub.within('s', '[1,0]', 1000, leave_out => ARRAY[NULL])",
    ):
        assert db.execute(statement).fetchone() == (8,)


def test_queries_are_counted_from_one(space, db):
    found = db.execute(
        "SELECT q, key FROM ehub.nearest_many('s', '[0:1]={\"[1,0]\",\"[8,2]\"}'::vector[], 1)"
    ).fetchall()
    assert found == [(1, "k1"), (2, "k8")]
