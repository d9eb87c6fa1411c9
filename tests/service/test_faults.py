"""A service that is killed, stopped, slow, lying or cut off: searches stay right, in bounded time."""

import contextlib
import os
import signal
import threading
import time

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors, table
from proxy import Proxy
from psycopg.conninfo import conninfo_to_dict

import ehub
from ehub.config import Address
from ehub.service.pgwire import Answer, Column, Door, Verifier
from service.conftest import free_port, install, settled
from service.test_nearest import literal, nearest, vectors

# Longer than the watchdog's deadline and a timeout together, much shorter than for ever.
BOUND = 6.0


def fill(url, data_dir, n=1500):
    with ehub.connect(url, data_dir=data_dir) as hub:
        hub.create_space("s", 8).multiset([f"k{i}" for i in range(n)], vectors(n))


def right(connection, seed=0, bound=BOUND):
    """A search answers like brute force, in bounded time; returns how long it took."""
    query = vectors(5, 100 + seed)[seed % 5]
    started = time.monotonic()
    found = nearest(connection, query, 10)
    seconds = time.monotonic() - started
    check_neighbors(found, table(connection, "s"), "l2", query, 10, recall=0.8)
    assert seconds < bound
    return seconds


def by_index(connection, seconds=30):
    """Searches are answered by the index again, without anybody's help."""
    deadline = time.monotonic() + seconds
    connection.execute("SET ehub.mode = 'index'")
    try:
        while True:
            with contextlib.suppress(psycopg.DatabaseError):
                nearest(connection, vectors(1)[0], 3)
                return
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        connection.execute("SET ehub.mode = 'auto'")


@pytest.fixture
def served(url, data_dir, db, process):
    fill(url, data_dir)
    settled(db)
    by_index(db)
    return process


def prompt(db):
    return db.execute("SELECT prompt FROM ehub.incarnation").fetchone() == (True,)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_and_started_again(served, db, url):
    until(lambda: prompt(db))
    until(lambda: list(served.folder.glob("service/indexes/*/*/manifest.json")))
    served.kill()
    with psycopg.connect(url, autocommit=True) as fresh:
        for connection in (db, fresh):
            right(connection)
        # The breaker spares the next one the attempt.
        assert right(db, 1) < 0.5
        db.execute("SELECT ehub.set('s', 'new', %s)", [literal([7] * 8)])
        served.start()
        for connection in (db, fresh):
            by_index(connection)
            assert nearest(connection, [7.0] * 8, 1)[0].key == "new"
    assert served.text().count("building its index") == 1


def test_the_worker_killed_is_started_by_its_supervisor(served, db):
    until(lambda: prompt(db))
    before = served.worker
    os.kill(before, signal.SIGKILL)
    right(db)
    by_index(db)
    assert served.worker != before
    assert "ended by signal 9; starting it again" in served.text()


@pytest.mark.parametrize("who", ["worker", "supervisor", "both"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_stopped(served, db, url, who, asked_before):
    until(lambda: prompt(db))
    pids = {"worker": [served.worker], "supervisor": [served.process.pid]}
    pids["both"] = [*pids["supervisor"], *pids["worker"]]
    with contextlib.ExitStack() as stack:
        # Sessions that have a connection to the service, sessions that are about to make one.
        sessions = [stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(3)]
        if asked_before:
            for session in sessions:
                by_index(session)
        for pid in pids[who]:
            os.kill(pid, signal.SIGSTOP)
        threads = [threading.Thread(target=right, args=(s, i)) for i, s in enumerate(sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND + 5)
            assert not thread.is_alive()
        assert right(sessions[0], 3) < 2
        with contextlib.suppress(ProcessLookupError):
            os.killpg(served.process.pid, signal.SIGCONT)
        for session in sessions:
            by_index(session)


def test_a_service_that_is_polled_and_stopped(served, db, url):
    """Through a proxy Postgres relies on nobody, and cuts the wait short itself."""
    proxy = Proxy("127.0.0.1", served.port)
    install(db, proxy.port)
    until(lambda: not prompt(db))
    by_index(db)
    os.kill(served.worker, signal.SIGSTOP)
    assert 0.9 < right(db) < 2.5
    assert right(db, 1) < 0.5
    by_index(db)
    proxy.close()


def test_cancel_and_statement_timeout_end_a_wait(served, db, url):
    proxy = Proxy("127.0.0.1", served.port)
    install(db, proxy.port)
    until(lambda: not prompt(db))
    with psycopg.connect(url, autocommit=True) as session:
        by_index(session)
        session.execute("SET ehub.service_timeout = 20000")
        proxy.stalled.clear()
        session.execute("SET statement_timeout = '700ms'")
        started = time.monotonic()
        with pytest.raises(psycopg.errors.QueryCanceled):
            nearest(session, vectors(1)[0], 3)
        assert time.monotonic() - started < 1.5
        session.execute("SET statement_timeout = 0")
        # The connection in use is given up, and the next one does not get through either.
        for _ in range(2):
            threading.Timer(0.5, session.cancel).start()
            started = time.monotonic()
            with pytest.raises(psycopg.errors.QueryCanceled):
                nearest(session, vectors(1)[0], 3)
            assert time.monotonic() - started < 1.5
        # The answers to what was given up are not taken for answers to what is asked now.
        proxy.stalled.set()
        session.execute("SET ehub.service_timeout = 1000")
        for seed in range(5):
            right(session, seed)
        by_index(session)
    proxy.close()


def test_what_somebody_writes_into_the_breaker_is_nothing(served, db):
    for garbage in ("garbage", "{1e400}", "{1,2,3}", "{NaN,1}"):
        db.execute("SELECT set_config('ehub.breaker', %s, false)", [garbage])
        right(db)
        by_index(db)


def test_a_wait_for_a_service_that_promises_can_be_cancelled(served, db, url):
    until(lambda: prompt(db))
    os.kill(served.worker, signal.SIGSTOP)
    db.execute("SET statement_timeout = '700ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        nearest(db, vectors(1)[0], 3)
    db.execute("SET statement_timeout = 0")
    right(db)
    by_index(db)


@pytest.mark.parametrize("how", ["cut", "stall", "refuse"])
def test_a_proxy_that_cuts_stalls_and_refuses(served, db, url, how):
    proxy = Proxy("127.0.0.1", served.port)
    install(db, proxy.port)
    until(lambda: not prompt(db))
    by_index(db)
    stop = threading.Event()
    problems = []

    def search(seed):
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                while not stop.is_set():
                    right(connection, seed)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.5)
        if how == "stall":
            proxy.stalled.clear()
            time.sleep(1.5)
            proxy.stalled.set()
        else:
            proxy.open = how == "cut"
            proxy.cut()
            time.sleep(0.5)
            proxy.open = True
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    by_index(db)
    proxy.close()


RUBBISH = {
    "nothing": lambda asked: Answer([Column("x")], []),
    "other columns": lambda asked: Answer([Column("x")], [["1"]]),
    "another nonce": lambda asked: _answer("0", "9:9:", "{1}", "{k1}"),
    "no watermark": lambda asked: _answer(asked[1], None, "{1}", "{k1}"),
    "no snapshot": lambda asked: _answer(asked[1], "gestern", "{1}", "{k1}"),
    "no array": lambda asked: _answer(asked[1], "9:9:", "{1", "{k1}"),
    "too few": lambda asked: _answer(asked[1], "9:9:", "{2}", "{k1}"),
    "nulls": lambda asked: _answer(asked[1], "9:9:", "{1}", "{NULL}"),
    "two rows": lambda asked: _twice(_answer(asked[1], "9:9:", "{1}", "{k1}")),
    "the future": lambda asked: _answer(asked[1], "999999:999999:", "{0}", "{}"),
    "unknown keys": lambda asked: _answer(asked[1], "3:3:", "{2}", "{nobody,NULL}"),
}
_COLUMNS = [Column(name) for name in ("nonce", "reason", "watermark", "counts", "keys")]


def _answer(nonce, watermark, counts, keys):
    return Answer(_COLUMNS, [[nonce, None, watermark, counts, keys]])


def _twice(answer):
    return Answer(answer.columns, [*answer.rows, *answer.rows])


def _lie(statement):
    raise OSError(statement[:10])


@pytest.mark.parametrize("what", [*RUBBISH, "an error"])
def test_a_service_that_lies(url, data_dir, db, what):
    """It knows the secret and the incarnation, and talks nonsense."""
    fill(url, data_dir, 50)
    port = free_port()
    install(db, port)
    (secret,) = db.execute("SELECT ehub.service_secret()").fetchone()
    db.execute("SELECT ehub.enter_incarnation()")
    verifier = Verifier(secret)

    def answer(statement):
        return _lie(statement) if what == "an error" else RUBBISH[what](statement.split(" ", 7))

    door = Door(Address("127.0.0.1", port), lambda: verifier, answer)
    try:
        with psycopg.connect(url, autocommit=True, application_name="ehub pulse") as pulse:
            stop = threading.Event()
            beat = threading.Thread(target=_beat, args=(pulse, stop))
            beat.start()
            query = vectors(1)[0]
            for _ in range(3):
                found = nearest(db, query, 10)
                rows = table(db, "s")
                true = sorted(rows, key=lambda key: float(np.linalg.norm(rows[key] - query)))[:10]
                if what not in ("nulls", "unknown keys"):
                    assert [n.key for n in found] == true
                # Whatever it proposes: rows that are there, with their distances, once.
                assert len({n.key for n in found}) == len(found)
                for near in found:
                    true_distance = np.linalg.norm(rows[near.key] - query)
                    assert near.distance == pytest.approx(true_distance, abs=1e-4)
                db.execute("SET ehub.breaker = ''")
            stop.set()
            beat.join()
    finally:
        door.close()


def _beat(pulse, stop):
    while not stop.wait(0.2):
        pulse.execute("SELECT")


def test_dropped_and_made_again(served, db, url, data_dir):
    with ehub.connect(url, data_dir=data_dir) as hub:
        for round_ in range(3):
            hub.delete_space("s")
            with pytest.raises(psycopg.DatabaseError, match="there is no space 's'"):
                nearest(db, vectors(1)[0], 3)
            space = hub.create_space("s", 8, "cosine")
            space.multiset({"a": [1, round_, 0, 0, 0, 0, 0, 0], "b": [0, 0, 1, 0, 0, 0, 0, 0]})
            assert nearest(db, [0, 0, 1, 0, 0, 0, 0, 0], 5)[0][:2] == ("b", 0.0)
    settled(db)
    by_index(db)


def test_connections_of_the_service_cut_and_notifications_lost(served, db, url):
    db.execute("SET ehub.doorbell = off")
    for round_ in range(3):
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        db.execute("SELECT ehub.set('s', %s, %s)", [f"n{round_}", literal([9 + round_] * 8)])
        assert nearest(db, [9.0 + round_] * 8, 1)[0].key == f"n{round_}"
        # The poll finds what no bell told of.
        settled(db)
    assert served.text().count("building its index") == 1


def test_the_database_crashes(served, db, url, admin):
    """Another incarnation: what the service knew is not believed before it has read again."""
    if not conninfo_to_dict(url)["host"].startswith(("127.0.0.1", "/")):
        pytest.fail("the server's processes must be on this machine: a backend of it is killed")
    token = db.execute("SELECT token FROM ehub.incarnation").fetchone()
    for round_ in range(2):
        with psycopg.connect(url, autocommit=True) as victim:
            (unflushed,) = victim.execute("SELECT pg_current_xact_id()").fetchone()
            assert unflushed
            os.kill(victim.info.backend_pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            try:
                with psycopg.connect(url, autocommit=True) as fresh:
                    key = f"c{round_}"
                    fresh.execute("SELECT ehub.set('s', %s, %s)", [key, literal([5 + round_] * 8)])
                    assert nearest(fresh, [5.0 + round_] * 8, 1)[0].key == key
                    right(fresh)
                    break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with psycopg.connect(url, autocommit=True) as fresh:
            settled(fresh)
            by_index(fresh)
            assert fresh.execute("SELECT token FROM ehub.incarnation").fetchone() != token
            rows = table(fresh, "s")
            fresh.execute("SET ehub.mode = 'index'")
            for query in vectors(10, 77):
                check_neighbors(nearest(fresh, query, 10), rows, "l2", query, 10, recall=0.8)
    assert served.text().count("building its index") == 1


def test_stopping_saves_and_a_start_goes_on_from_there(served, db):
    db.execute("SELECT ehub.set('s', 'new', %s)", [literal([7] * 8)])
    settled(db)
    assert served.stop() == 0
    assert list((served.folder / "service").glob("indexes/*/*/manifest.json"))
    db.execute("SELECT ehub.set('s', 'later', %s)", [literal([8] * 8)])
    served.start()
    by_index(db)
    assert nearest(db, [7.0] * 8, 1)[0].key == "new"
    assert nearest(db, [8.0] * 8, 1)[0].key == "later"


def test_no_connection_is_left_behind(served, db, url):
    for _ in range(30):
        with psycopg.connect(url, autocommit=True) as connection:
            right(connection)
    (count,) = db.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    ).fetchone()
    assert count < 15
