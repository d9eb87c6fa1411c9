"""The database behind a proxy that cuts, stalls and refuses connections."""

import contextlib
import threading
import time

import pytest
from oracle import table
from proxy import Proxy
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import ehub


@pytest.fixture
def proxy(url):
    values = conninfo_to_dict(url)
    proxy = Proxy(values["host"], int(values.get("port", 5432)))
    proxy.url = make_conninfo(url, host="127.0.0.1", port=proxy.port, sslmode="disable")
    yield proxy
    proxy.close()


@pytest.fixture
def space(proxy, tmp_path):
    with ehub.connect(proxy.url, data_dir=tmp_path) as hub:
        space = hub.create_space("s", 2)
        space.multiset({f"k{i}": [i, 1] for i in range(100)})
        space.wait_until_indexed(30)
        yield space


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ehub.UnavailableError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def equal(space, db):
    answering = space._index(True)
    return answering is not None and set(answering.index.keys()) == set(table(db, "s"))


def test_changes_during_an_outage_are_caught_up(proxy, space, db, caplog):
    for round_ in range(3):
        proxy.open = False
        proxy.cut()
        db.execute("INSERT INTO spaces.s VALUES (%s, '[500,500]')", [f"new{round_}"])
        db.execute("DELETE FROM spaces.s WHERE key = %s", [f"k{round_}"])
        # As of its watermark it goes on answering.
        until(lambda: not space._replica._shared.connected)
        assert space.nearest_neighbors(1, vector=[50, 1])[0].key == "k50"
        if round_ == 0:
            with pytest.raises(ehub.UnavailableError):
                space.nearest_neighbors(1, vector=[50, 1], consistency="strong")
        proxy.open = True
        until(lambda: equal(space, db))
        until(lambda: space.nearest_neighbors(3, vector=[500, 500])[round_].distance == 0)
    # Once each time it falls behind and once when it is back, not with every attempt.
    assert 3 <= sum("falls behind" in record.message for record in caplog.records) <= 8
    assert "follows the database again" in caplog.text


def test_a_stalled_connection_costs_a_bounded_time(proxy, space):
    proxy.stalled.clear()
    started = time.monotonic()
    assert space.nearest_neighbors(1, vector=[50, 1])[0].key == "k50"
    assert time.monotonic() - started < 0.5
    proxy.stalled.set()


def test_pooled_connections_that_died_idle_are_replaced(proxy, space):
    for _ in range(5):
        assert space.get("k1").tolist() == [1, 1]
        proxy.cut()
        time.sleep(0.1)
        space.set("k1", [1, 1])


def test_a_write_whose_fate_is_unknown_says_so(proxy, space, db):
    with db.transaction():
        db.execute("LOCK TABLE ehub_data.v1")
        failures = []

        def write():
            try:
                space.set("k1", [2, 2])
            except ehub.UnavailableError as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.3)
        proxy.cut()
        writer.join()
    assert len(failures) == 1


def test_the_log_says_once_that_postgres_is_away(proxy, data_dir, caplog):
    """However often the pool tries meanwhile."""
    with ehub.connect(proxy.url, data_dir=data_dir, index="none") as hub:
        space = hub.create_space("s", 2)
        proxy.open = False
        proxy.cut()
        with pytest.raises(ehub.UnavailableError):
            space.set("a", [1, 2])
        proxy.open = True
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(ehub.UnavailableError):
                space.set("a", [1, 2])
                break
            assert time.monotonic() < deadline
    said = [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]
    assert [text.partition(":")[0] for text in said if "connect" in text or "reach" in text] == [
        "Postgres cannot be reached",
        "Postgres can be reached again",
    ]
