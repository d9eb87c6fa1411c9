"""The door: PostgreSQL's protocol as libpq and others speak it."""

import socket
import struct
import threading
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ehub
from ehub.config import Address
from ehub.service.pgwire import Answer, Column, Door, StatementError, Verifier, array
from ehub.service.run import tls_context

SECRET = "c0ffee"


def answer(statement):
    if statement.startswith("wrong"):
        raise StatementError("42601", "that is wrong", "say it otherwise")
    if statement.startswith("broken"):
        raise RuntimeError("inside")
    return Answer([Column("said"), Column("n", 23)], [[statement, "7"], [None, None]])


@pytest.fixture
def door():
    verifier = Verifier(SECRET)
    door = Door(Address("127.0.0.1", 0), lambda: verifier, answer, limit=3)
    yield door
    door.close()


def connect(door, **options):
    usual = {"user": "ehub", "password": SECRET, "sslmode": "prefer", "dbname": "any"}
    usual |= {"host": door.address.host, "port": door.address.port}
    # A client that only sends simple statements.
    return psycopg.connect(**usual | options, autocommit=True, cursor_factory=psycopg.ClientCursor)


def works(door):
    with connect(door) as connection:
        return connection.execute("x").fetchone() == ("x", 7)


def test_statements_are_answered(door):
    with connect(door) as connection:
        assert connection.execute("hello 'ü'").fetchall() == [("hello 'ü'", 7), (None, None)]
        assert connection.execute("").description is None
        for _ in range(3):
            with pytest.raises(psycopg.errors.SyntaxError, match="that is wrong") as raised:
                connection.execute("wrong")
            assert raised.value.diag.message_hint == "say it otherwise"
        with pytest.raises(psycopg.errors.InternalError_, match="RuntimeError"):
            connection.execute("broken")
        assert len(connection.execute("x" * 1_000_000).fetchall()[0][0]) == 1_000_000
        assert connection.info.server_version >= 170000


def test_the_extended_protocol_is_refused_and_the_connection_goes_on(door):
    with connect(door) as connection:
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            psycopg.Cursor(connection).execute("x %s", [1])
        assert connection.execute("after").fetchone() == ("after", 7)


@pytest.mark.parametrize(
    "options", [{"password": "guess"}, {"password": ""}, {"user": "postgres"}, {"user": "EHUB"}]
)
def test_strangers_stay_outside(door, options):
    with pytest.raises(psycopg.OperationalError):
        connect(door, **options)
    assert works(door)


def test_without_a_secret_nobody_comes_in():
    door = Door(Address("127.0.0.1", 0), lambda: None, answer)
    with pytest.raises(psycopg.OperationalError, match="does not know this service"):
        connect(door)
    door.close()


def test_too_many_are_told_so(door):
    held = [connect(door) for _ in range(3)]
    with pytest.raises(psycopg.OperationalError, match="more than 3 connections"):
        connect(door)
    held.pop().close()
    for _ in range(100):
        try:
            held.append(connect(door))
            break
        except psycopg.OperationalError:
            pass
    else:
        raise AssertionError("a place that was given back is not given out")
    for connection in held:
        connection.close()


def test_a_closed_door_hangs_up(door):
    connection = connect(door)
    door.close()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("x")
    connection.close()
    with pytest.raises(psycopg.OperationalError):
        connect(door)


def test_a_socket_of_a_killed_process_is_replaced_and_a_living_ones_not(tmp_path):
    path = tmp_path / ".s.PGSQL.6433"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    verifier = Verifier(SECRET)
    address = Address.parse(str(tmp_path), 6433)
    door = Door(address, lambda: verifier, answer)
    assert works(door)
    with pytest.raises(ehub.ConfigurationError, match="cannot listen"):
        Door(address, lambda: verifier, answer)
    assert works(door)
    door.close()
    assert not path.exists()


def test_tls_where_there_is_a_certificate(tmp_path):
    verifier = Verifier(SECRET)
    # A key and a certificate for localhost, good for nothing else.
    pem = Path(__file__).with_name("localhost.pem")
    door = Door(Address("127.0.0.1", 0), lambda: verifier, answer, tls_context(str(pem), None))
    secure = {"sslmode": "verify-full", "sslrootcert": str(pem)}
    with connect(door, host="localhost", hostaddr="127.0.0.1", **secure) as connection:
        assert connection.pgconn.ssl_in_use
        assert connection.execute("x").fetchone() == ("x", 7)
    with connect(door, sslmode="disable") as connection:
        assert not connection.pgconn.ssl_in_use
    door.close()
    (tmp_path / "empty.pem").touch()
    with pytest.raises(ehub.ConfigurationError, match=r"certificate .*empty.pem"):
        tls_context(str(tmp_path / "empty.pem"), None)


@given(st.binary(max_size=200))
def test_noise_does_no_harm(noisy, noise):
    with socket.create_connection(("127.0.0.1", noisy.address.port)) as client:
        client.sendall(noise)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(5)
        while client.recv(4096):
            pass
    assert works(noisy)


@pytest.fixture(scope="module")
def noisy():
    verifier = Verifier(SECRET)
    door = Door(Address("127.0.0.1", 0), lambda: verifier, answer)
    yield door
    door.close()


@pytest.mark.parametrize("size", [0, 3, 7, 1 << 20, 0xFFFFFFFF])
def test_sizes_are_not_believed(door, size):
    with socket.create_connection(("127.0.0.1", door.address.port)) as client:
        client.sendall(struct.pack(">II", size, 3 << 16))
        client.settimeout(5)
        assert b"08P01" in client.recv(4096)


def test_cancel_requests_and_refusals_of_encryption(door):
    with socket.create_connection(("127.0.0.1", door.address.port)) as client:
        client.sendall(struct.pack(">IIII", 16, 80877102, 1, 2))
        assert client.recv(10) == b""
    with socket.create_connection(("127.0.0.1", door.address.port)) as client:
        for code in (80877104, 80877103):
            client.sendall(struct.pack(">II", 8, code))
            assert client.recv(1) == b"N"


def test_many_at_once(noisy):
    problems = []

    def talk(n):
        with connect(noisy) as connection:
            for i in range(20):
                if connection.execute(f"{n} {i}").fetchone() != (f"{n} {i}", 7):
                    problems.append((n, i))

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_arrays_are_literals_of_postgres(items):
    text = array(items)
    assert text == "{}" if not items else text.count('"') >= 2 * len(items)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1", "127.0.0.1", 6433),
        ("db:1", "db", 1),
        (":7000", "127.0.0.1", 7000),
        ("[::1]:5", "::1", 5),
        ("/tmp/.s.PGSQL.99", "/tmp", 99),
    ],
)
def test_addresses(text, host, port):
    address = Address.parse(text, 6433)
    assert (address.host, address.port) == (host, port)


@pytest.mark.parametrize("text", ["a:b", "a:99999", "a b", "/tmp/socket", "::1:5"])
def test_bad_addresses(text):
    with pytest.raises(ehub.ConfigurationError, match=text):
        Address.parse(text, 6433)
