"""Extension ehub_link against services that fail, lie and hang, and against what it remembers."""

import contextlib
import hmac
import os
import random
import socket
import struct
import threading
import time

import numpy as np
import psycopg
import pytest

import ehub
from service.conftest import free_port, install, settled
from service.test_isolation import role  # noqa: F401 - a fixture
from service.test_nearest import literal, nearest, vectors

pytestmark = pytest.mark.embedded_postgres("extension ehub_link")

# As in extension/ehub_link.c.
HELLO = struct.Struct("=8sf32s")
QUESTION = struct.Struct("=Qqiiiiiiii")
ANSWER = struct.Struct("=Qiiii")
ASK = (
    "SELECT * FROM ehub.link_ask('state', 1, %(k)s, 0, NULL, NULL,"
    " array_fill(%(q)s::vector, ARRAY[%(n)s]), %(ms)s)"
)


def answer(nonce, n=1, keys=("a", "b"), watermark="10:12:10,11", plan="{}", **changed):
    """What a service that is right answers, but for what is changed."""
    counts = changed.get("counts", [len(keys)] * n)
    flat = [key.encode() if isinstance(key, str) else key for key in keys] * n
    lengths = changed.get("lengths", [len(key) for key in flat])
    watermark, plan = watermark.encode(), plan.encode()
    head = ANSWER.pack(
        changed.get("answered", nonce),
        changed.get("refused", 0),
        1,
        changed.get("watermark_bytes", len(watermark)),
        changed.get("plan_bytes", len(plan)),
    )
    body = head + struct.pack(f"={len(counts)}i", *counts)
    body += struct.pack(f"={len(lengths)}i", *lengths)
    body += b"".join([*flat, watermark, plan])
    return struct.pack("=I", changed.get("size", len(body))) + body


class Liar:
    """Shakes hands as a service does, and answers each question by a function of its nonce and n."""

    def __init__(self, secret, reply, hello=None, slice_=1 << 20):
        self.secret, self.reply, self.hello, self.slice = secret.encode(), reply, hello, slice_
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError, EOFError, struct.error), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, one, theirs = HELLO.unpack(self.read(connection, HELLO.size))
            assert one == 1.0
            nonces = theirs + b"s" * 32
            proof = hmac.digest(self.secret, b"service" + nonces, "sha256")
            connection.sendall(b"s" * 32 + proof if self.hello is None else self.hello)
            proof = self.read(connection, 32)
            assert proof == hmac.digest(self.secret, b"database" + nonces, "sha256")
            while True:
                (size,) = struct.unpack("=I", self.read(connection, 4))
                question = self.read(connection, size)
                nonce, _, n, *_ = QUESTION.unpack_from(question)
                data = self.reply(nonce, n)
                for start in range(0, len(data), self.slice):
                    connection.sendall(data[start : start + self.slice])

    def read(self, connection, size):
        data = b""
        while len(data) < size:
            piece = connection.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def close(self):
        self.listener.close()


@pytest.fixture
def lying(db):
    """Let Postgres ask a service that replies as a function says."""
    with contextlib.ExitStack() as stack:

        def make(reply, **options):
            port = free_port()
            install(db, port)
            (secret,) = db.execute("SELECT ehub.service_secret()").fetchone()
            liar = Liar(secret, reply, **options)
            stack.callback(liar.close)
            install(db, liar.port)
            return liar

        yield make


def ask(db, n=1, k=10, ms=1000, dims=8):
    query = "[" + ",".join(["1"] * dims) + "]"
    cursor = db.execute(ASK, {"k": k, "n": n, "q": query, "ms": ms})
    names = [column.name for column in cursor.description]
    return dict(zip(names, cursor.fetchone(), strict=True))


def test_what_is_answered_arrives(lying, db):
    keys = ["a", "", "Größe", "x" * 1024, 'quote " and \\', "日本"]
    liar = lying(lambda nonce, n: answer(nonce, n, keys, "10:12:10,11", '{"by": "ü"}'), slice_=3)
    for n in (1, 3):
        found = ask(db, n)
        assert found["failure"] is None
        assert found["keys"] == keys * n
        assert found["counts"] == [len(keys)] * n
        assert (found["watermark"], found["plan"], found["matching"]) == (
            "10:12:10,11",
            '{"by": "ü"}',
            True,
        )
    assert liar.connections == 1
    found = ask(db, 40, dims=16_000)
    assert found["keys"] == keys * 40


LIES = {
    "another nonce": {"answered": 7},
    "too long": {"size": 1 << 30},
    "longer than all memory": {"size": 0xFFFFFFFF},
    "too short": {"size": 3},
    "a count less": {"counts": [1]},
    "a count more": {"counts": [3]},
    "a negative count": {"counts": [-2]},
    "a huge count": {"counts": [2**31 - 1]},
    "a negative length": {"lengths": [-1, 3]},
    "a huge length": {"lengths": [2**31 - 1, 1]},
    "a length more": {"lengths": [1, 2]},
    "a negative watermark": {"watermark_bytes": -1},
    "a longer watermark": {"watermark_bytes": 12},
    "a negative plan": {"plan_bytes": -2},
    "keys that are no text": {"keys": (b"\xff\xfe", b"b")},
    "a character in two keys": {"keys": (b"a\xc3", b"\xa9b")},
    "a key with a zero": {"keys": (b"a\0b", b"b")},
    "no watermark": {"watermark": ""},
    "a plan with a zero": {"plan": "\0"},
    "a refusal without a reason": {
        "refused": 1,
        "keys": (),
        "watermark": "",
        "plan": "",
        "counts": [],
    },
    "a refusal that is no text": {"refused": 1, "keys": (b"\xff",)},
    "a refusal without an end": {"refused": 1, "keys": ("x" * 2000,)},
    **{
        f"watermark {text}": {"watermark": text}
        for text in (
            *("x", "1:2", "10:12", "10:12:9", "10:12:12", "12:10:", "0:0:", "10:12:11,10"),
            *(
                "10:12:10,",
                "10:12:,10",
                "-10:12:",
                "10:12:10,10",
                "9999999999999999999999:1:",
                "10 :12:",
            ),
            *("10:12:10 ", "10:12:10:10", "::", "2:2:"),
        )
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_wrong_is_no_answer(lying, db, lie):
    """A reason and never an error; the connection is not used again, and the backend lives."""
    liar = lying(lambda nonce, n: answer(nonce, n, **LIES[lie]))
    pid = db.info.backend_pid
    for _ in range(2):
        found = ask(db, ms=300)
        assert found["failure"] is not None, found
        assert {found[name] for name in ("reason", "watermark", "counts", "keys")} == {None}
    assert liar.connections >= 2
    assert db.execute("SELECT pg_backend_pid()").fetchone() == (pid,)


def test_more_than_an_answer_is_none(lying, db):
    lying(lambda nonce, n: answer(nonce, n) * 2)
    assert "more than an answer" in ask(db)["failure"]


def test_who_does_not_know_the_secret_is_not_asked(lying, db):
    asked = []
    lying(lambda nonce, n: asked.append(n) or answer(nonce, n), hello=b"x" * 64)
    assert ask(db)["failure"] == "whoever listens there does not know the secret"
    assert asked == []


@pytest.mark.parametrize("piece", [0, 1, 30])
def test_a_deadline_is_kept_whatever_trickles_in(lying, db, piece):
    def reply(nonce, n):
        whole = answer(nonce, n)
        time.sleep(0.5 if piece else 5)
        return whole[:piece]

    lying(reply)
    started = time.monotonic()
    assert ask(db, ms=200)["failure"] == "no answer in time"
    assert time.monotonic() - started < 0.5


def test_a_wait_is_cancelled_and_the_connection_given_up(lying, db):
    slow = threading.Event()
    liar = lying(lambda nonce, n: (slow.wait(3), answer(nonce, n))[1])
    db.execute("SET statement_timeout = '100ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        ask(db, ms=10_000)
    db.execute("SET statement_timeout = 0")
    slow.set()
    assert ask(db)["keys"] == ["a", "b"]
    assert liar.connections == 2


def test_memory_grows_with_what_comes_alone(lying, db):
    """A service that announces much and sends little, and one that sends much."""

    def resident():
        with open(f"/proc/{db.info.backend_pid}/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    lying(lambda nonce, n: struct.pack("=I", 200 << 20) + b"x" * 100)
    ask(db, n=1000, k=1000, ms=200)
    before = resident()
    ask(db, n=1000, k=1000, ms=200)
    assert resident() - before < 5e6
    lying(lambda nonce, n: struct.pack("=I", 2 << 20) + b"x" * (2 << 20))
    for _ in range(5):
        assert "size" in ask(db, k=1)["failure"] or "fit" in ask(db, k=1)["failure"]
    assert resident() - before < 20e6


def test_a_thousand_damaged_answers(lying, db):
    """The long run is tests/faults/fuzz_link.py."""
    rng = random.Random(5)
    damaged = Damage(rng)
    lying(damaged)
    pid = db.info.backend_pid
    whole = 0
    for _ in range(1000):
        found = ask(db, n=rng.choice([1, 1, 2, 7]), k=rng.choice([1, 3, 100]), ms=20)
        whole += found["failure"] is None
    assert db.execute("SELECT pg_backend_pid()").fetchone() == (pid,)
    # Some that were changed are answers still.
    assert 0 < whole < 1000


class Damage:
    """Answers that were cut, turned over, made longer, or mixed with others."""

    def __init__(self, rng):
        self.rng, self.last = rng, b""

    def __call__(self, nonce, n):
        rng = self.rng
        keys = [
            bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
            if rng.random() < 0.1
            else f"k{rng.randrange(1000)}"
            for _ in range(rng.randrange(5))
        ]
        data = bytearray(answer(nonce, n, keys, rng.choice(["10:12:10,11", "5:5:", "7:9:8"])))
        for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
            how = rng.randrange(5)
            at = rng.randrange(len(data))
            if how == 0:
                data[at] = rng.randrange(256)
            elif how == 1:
                data[at] ^= 1 << rng.randrange(8)
            elif how == 2:
                del data[at:]
                data = data or bytearray(b"x")
            elif how == 3:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
            else:
                at = min(at & ~3, max(len(data) - 4, 0))
                data[at : at + 4] = struct.pack(
                    "=i", rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), 300])
                )
        self.last = bytes(data)
        return self.last


def fill(url, data_dir, name="s", n=300):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        space = hub.create_space(name, 8)
        space.multiset([f"k{i}" for i in range(n)], vectors(n))
    return space


@pytest.fixture
def reader(url, data_dir, service, db, role):  # noqa: F811
    """Somebody who searches, and whose session has remembered the space."""
    fill(url, data_dir)
    settled(db)
    name, connection = role("reader")
    db.execute("SELECT ehub.grant('s', %s, 'read')", [name])
    connection.execute("SET ehub.mode = 'index'")
    for _ in range(2):
        assert nearest(connection, vectors(1)[0], 1)[0].key == "k0"
    return connection


def test_nobody_but_the_owner_may_ask_the_service_itself(reader):
    for call in (
        "link_recall('s', 10)",
        "link_remember('s', 10, 1, 1, 'x', false, '{}')",
        "link_ask('', 1, 1, 0, NULL, NULL, '{}', 1)",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(f"SELECT ehub.{call}")


def test_what_is_revoked_is_forgotten(reader, db):
    with reader.transaction():
        assert nearest(reader, vectors(1)[0], 1)[0].key == "k0"
        db.execute("SELECT ehub.revoke('s', %s)", ["ehub_reader"])
        with pytest.raises(psycopg.DatabaseError, match="no space 's'"), reader.transaction():
            nearest(reader, vectors(1)[0], 1)


def test_a_limit_is_noticed(reader, db):
    db.execute("UPDATE spaces.s SET metadata = '{\"mine\": 1}' WHERE key = 'k7'")
    db.execute("SELECT ehub.revoke('s', %s)", ["ehub_reader"])
    db.execute("SELECT ehub.grant('s', %s, 'read', rows => '{\"mine\": 1}')", ["ehub_reader"])
    reader.execute("SET ehub.mode = 'auto'")
    assert [n.key for n in nearest(reader, vectors(1)[0], 10)] == ["k7"]


def test_a_group_that_is_left_is_noticed(url, data_dir, service, db, role):  # noqa: F811
    fill(url, data_dir)
    settled(db)
    group, _ = role("group")
    name, member = role("member")
    db.execute("SELECT ehub.grant('s', %s, 'read')", [group])
    db.execute(f"GRANT {group} TO {name}")
    member.execute("SET ehub.mode = 'index'")
    for _ in range(2):
        assert nearest(member, vectors(1)[0], 1)[0].key == "k0"
    db.execute(f"REVOKE {group} FROM {name}")
    with pytest.raises(psycopg.DatabaseError, match="no space 's'"):
        nearest(member, vectors(1)[0], 1)


def test_another_version_is_noticed(reader, db, service):
    db.execute("SELECT ehub.create_version('s', 'v2')")
    db.execute(
        "INSERT INTO spaces.\"s@v2\" (key, embedding) VALUES ('new', %s)", [literal([1] * 8)]
    )
    settled(db, "s@v2")
    for version, key in (("v2", "new"), ("v1", "k0"), ("v2", "new")):
        db.execute("SELECT ehub.promote('s', %s)", [version])
        assert nearest(reader, vectors(1)[0], 1)[0].key == key
    # Also one of this transaction, and of a savepoint that is gone.
    db.execute("SET ehub.mode = 'index'")
    for _ in range(2):
        assert nearest(db, vectors(1)[0], 1)[0].key == "new"
    with contextlib.suppress(ZeroDivisionError), db.transaction():
        with contextlib.suppress(ZeroDivisionError), db.transaction():
            db.execute("SELECT ehub.promote('s', 'v1')")
            assert nearest(db, vectors(1)[0], 1)[0].key == "k0"
            raise ZeroDivisionError
        assert nearest(db, vectors(1)[0], 1)[0].key == "new"
    assert nearest(db, vectors(1)[0], 1)[0].key == "new"


def test_triggers_that_are_switched_off_are_noticed(reader, db):
    """Nothing logs what is written then; the index is not believed any more."""
    for _ in range(2):
        nearest(db, vectors(1)[0], 1)
    db.execute("ALTER TABLE ehub_data.v1 DISABLE TRIGGER USER")
    db.execute(
        "INSERT INTO spaces.s (key, embedding) VALUES ('unlogged', %s)", [literal(vectors(1)[0])]
    )
    db.execute("ALTER TABLE ehub_data.v1 ENABLE TRIGGER USER")
    reader.execute("SET ehub.mode = 'auto'")
    assert {n.key for n in nearest(reader, vectors(1)[0], 2)} == {"k0", "unlogged"}


def test_a_space_that_is_deleted_and_made_again_is_noticed(reader, db, url, data_dir):
    db.execute("SELECT ehub.delete_space('s')")
    with pytest.raises(psycopg.DatabaseError, match="no space 's'"):
        nearest(reader, vectors(1)[0], 1)
    fill(url, data_dir, n=1)
    with pytest.raises(psycopg.DatabaseError, match="no space 's'"):
        nearest(reader, vectors(1)[0], 1)
    db.execute("SELECT ehub.grant('s', %s, 'read')", ["ehub_reader"])
    settled(db)
    assert [n.key for n in nearest(reader, vectors(1)[0], 3)] == ["k0"]


def test_roles_of_one_session_are_told_apart(reader, db, role):  # noqa: F811
    name, _ = role("other")
    for _ in range(2):
        assert nearest(db, vectors(1)[0], 1)[0].key == "k0"
    db.execute(f"SET ROLE {name}")
    with pytest.raises(psycopg.DatabaseError, match="no space 's'"):
        nearest(db, vectors(1)[0], 1)
    db.execute("RESET ROLE")


def test_more_spaces_than_are_remembered(url, data_dir, service, db):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        for i in range(20):
            hub.create_space(f"s{i}", 8).set("a", np.full(8, i + 1, np.float32))
    for i in range(20):
        settled(db, f"s{i}")
    db.execute("SET ehub.mode = 'index'")
    for _ in range(3):
        for i in range(20):
            assert nearest(db, [1.0] * 8, 1, f"s{i}")[0].distance == pytest.approx(i * 8**0.5)


def test_another_address_and_another_secret_are_noticed(reader, db, service):
    db.execute("SELECT ehub.install_service('127.0.0.1', 1)")
    with pytest.raises(psycopg.DatabaseError, match="cannot answer"):
        nearest(reader, vectors(1)[0], 1)
    install(db, service.address.port)
    reader.execute("SET ehub.breaker = ''")
    assert nearest(reader, vectors(1)[0], 1)[0].key == "k0"


def test_dblink_is_not_needed_and_the_link_can_be_ruled_out(reader, db):
    reader.execute("SET ehub.link = off")
    with pytest.raises(psycopg.DatabaseError, match="no extension dblink: ehub.link is off"):
        nearest(reader, vectors(1)[0], 1)
    reader.execute("RESET ehub.link; SET ehub.breaker = ''")
    assert nearest(reader, vectors(1)[0], 1)[0].key == "k0"
    (said,) = db.execute("SELECT in_sql FROM ehub.status").fetchone()
    assert said == "by the index service"


def test_who_does_not_speak_it_is_shown_out(reader, service):
    """Damaged questions end a connection, and no other."""
    rng = random.Random(3)
    for length in (0, 1, 4, 8, 44, 300):
        with socket.create_connection(("127.0.0.1", service.address.port), 5) as connection:
            connection.sendall(b"EHUBLNK1" + os.urandom(length))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
    secret = service._secret
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", service.address.port), 5) as connection:
            connection.sendall(HELLO.pack(b"EHUBLNK1", 1.0, b"c" * 32))
            nonces = b"c" * 32 + connection.recv(64, socket.MSG_WAITALL)[:32]
            connection.sendall(secret.prove(b"database", nonces))
            body = bytearray(QUESTION.pack(1, 1, 1, 3, 0, 8, 2, -1, -1, 0) + b"xy" + bytes(32))
            for _ in range(rng.choice([1, 2, 5])):
                body[rng.randrange(len(body))] = rng.randrange(256)
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("=I", len(body)) + body)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
    assert nearest(reader, vectors(1)[0], 1)[0].key == "k0"
