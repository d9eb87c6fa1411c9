"""One low role, or nobody at all, against the index service."""

import contextlib
import socket
import threading
import time

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from service.conftest import settled
from service.test_isolation import grant, role, space  # noqa: F401 - fixtures
from service.test_nearest import literal, nearest, vectors

PLACE = "host=127.0.0.1 port={} dbname=x sslmode=disable user=ehub"


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_strangers_take_no_places(space, db, service, role):  # noqa: F811
    """They open what they can and say nothing; who knows the secret goes in and out all the same."""
    _, reader = role("reader")
    grant(db, "ehub_reader")
    reader.execute("SET ehub.mode = 'index'")
    assert nearest(reader, vectors(1)[0], 1, "secret")[0].key == "k0"
    held = []
    try:
        for _ in range(800):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", service.address.port), 1))
        assert len(held) > 700
        (secret,) = db.execute("SELECT ehub.service_secret()").fetchone()
        for _ in range(20):
            with psycopg.connect(
                PLACE.format(service.address.port) + f" password={secret}", autocommit=True
            ) as known:
                assert known.execute("SELECT 1").fetchone() == (1,)
        assert nearest(reader, vectors(1)[0], 1, "secret")[0].key == "k0"
        deadline = time.monotonic() + 10
        while service._door.connections > 100:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for one in held:
            one.close()


def test_guesses_are_refused_and_cost_nothing(space, db, service):  # noqa: F811
    for password in ("", "guess", "x" * 60_000, "postgres", "\\x00"):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(PLACE.format(service.address.port), password=password)
    # A secret that was stolen is worth nothing once there is another.
    (stolen,) = db.execute("SELECT ehub.service_secret()").fetchone()
    db.execute("SELECT ehub.uninstall_service()")
    db.execute("SELECT ehub.install_service('127.0.0.1', %s::int)", [service.address.port])
    deadline = time.monotonic() + 10
    while True:
        try:
            psycopg.connect(PLACE.format(service.address.port), password=stolen).close()
        except psycopg.OperationalError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    settled(db, "secret")


def test_k_without_measure(space, db, service, role):  # noqa: F811
    _, reader = role("reader")
    grant(db, "ehub_reader")
    before = resident()
    for k in (501, 10_001, 2_000_000_000, 2**31 - 1):
        assert len(nearest(reader, vectors(1)[0], k, "secret")) == 500
    reader.execute("SET ehub.mode = 'index'")
    assert len(nearest(reader, vectors(1)[0], 10_000, "secret")) == 500
    with pytest.raises(psycopg.DatabaseError, match="more than 10000"):
        nearest(reader, vectors(1)[0], 2_000_000_000, "secret")
    assert resident() - before < 200e6


def test_queries_without_measure(space, db, service, role):  # noqa: F811
    _, reader = role("reader")
    grant(db, "ehub_reader")
    with pytest.raises(psycopg.DatabaseError, match="16000 dimensions"):
        nearest(reader, "[" + "1," * 25_000_000 + "1]", 1, "secret")
    with pytest.raises(psycopg.DatabaseError, match="8 dims is needed"):
        nearest(reader, "[" + "1," * 15_999 + "1]", 1, "secret")
    # A batch of 250,000 queries goes in parts.
    reader.execute("SET ehub.mode = 'index'")
    found = reader.execute(
        "SELECT count(*), max(q), min(q) FROM ehub.nearest_many('secret',"
        " (SELECT array_agg(%s::vector) FROM generate_series(1, 250000)), 1)",
        [literal(vectors(1)[0])],
    ).fetchone()
    assert found == (250_000, 250_000, 1)


def test_many_sessions_at_once(space, db, url, service, role):  # noqa: F811
    role("reader")
    grant(db, "ehub_reader")
    errors = []

    def ask(seed):
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("SET SESSION AUTHORIZATION ehub_reader")
                for query in np.random.default_rng(seed).standard_normal((20, 8)):
                    assert len(nearest(connection, query.astype(np.float32), 5, "secret")) == 5
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_forged_pulse_is_nobodys(space, db, url, service, role):  # noqa: F811
    """Searches wait for a service that shows that it lives; others may not show it in its place."""
    name, _ = role("stranger")
    db.execute(f"ALTER ROLE {name} PASSWORD 'x'")
    stranger = psycopg.connect(make_conninfo(url, user=name, password="x"), autocommit=True)
    service.close()
    deadline = time.monotonic() + 10
    while db.execute("SELECT ehub.service_missing()").fetchone() == (None,):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stranger.execute("SET application_name = 'ehub pulse'")
    for _ in range(3):
        stranger.execute("SELECT 1")
        assert stranger.execute("SHOW application_name").fetchone() == ("ehub pulse",)
        assert db.execute("SELECT ehub.service_missing()").fetchone() != (None,)
    stranger.close()
