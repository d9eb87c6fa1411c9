"""A small server for PostgreSQL's protocol: what dblink and psql need, and no more.

Start-up, TLS, SCRAM-SHA-256, the simple query, terminate. One thread a connection: a search lets
the others run, and handing it to another thread would cost more than it takes. Extension ehub_link
comes through the same door, and speaks another protocol (``ehub.service.link``).

Sources: PostgreSQL documentation, "Frontend/Backend Protocol"; RFC 5802 and 7677 (SCRAM).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ehub.config import Address
from ehub.errors import ConfigurationError
from ehub.service import link

_log = logging.getLogger(__name__)

USER = "ehub"

_PROTOCOL = 3 << 16
_CANCEL, _TLS, _GSS = 80877102, 80877103, 80877104
# Strangers get little memory and little time.
_HANDSHAKE_BYTES = 1 << 16
_HANDSHAKE_SECONDS = 5.0
# So many at a time of those who have not shown that they know the secret: who comes then takes the
# place of who has been at it longest, and never that of one who has.
_STRANGERS = 64
# Four times what ehub.nearest_many sends at once.
_STATEMENT_BYTES = 1 << 26
_ITERATIONS = 4096
_TEXT = 25


class Column(NamedTuple):
    """A column of an answer; ``type`` is the oid of a type of Postgres'."""

    name: str
    type: int = _TEXT


class Answer(NamedTuple):
    """What a statement returns: rows of text, and the tag of the command."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | None]]
    tag: str = "SELECT"


class StatementError(Exception):
    """A statement that is refused: the SQLSTATE, what is wrong, and what to do."""

    def __init__(self, state: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.state, self.hint = state, hint


class _Refused(Exception):  # noqa: N818 - control flow, not an error
    """The handshake failed; what there was to say has been said."""


class Verifier:
    """The server's side of a secret: enough to check it, and to prove that one knows it."""

    def __init__(self, secret: str) -> None:
        self.salt = secrets.token_bytes(16)
        self._secret = secret.encode()
        salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), self.salt, _ITERATIONS)
        client_key = _mac(salted, b"Client Key")
        self._stored_key = hashlib.sha256(client_key).digest()
        self._server_key = _mac(salted, b"Server Key")

    def is_of(self, secret: str) -> bool:
        """Whether it was made of this secret."""
        return hmac.compare_digest(self._secret, secret.encode())

    def prove(self, who: bytes, nonces: bytes) -> bytes:
        """Return what shows that a side of the link knows the secret, for the nonces of both."""
        return _mac(self._secret, who + nonces)

    def check(self, exchange: bytes, proof: bytes) -> bytes | None:
        """Return the server's signature if the proof is right, else None."""
        signature = _mac(self._stored_key, exchange)
        if len(proof) != len(signature):
            return None
        client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
        if not hmac.compare_digest(hashlib.sha256(client_key).digest(), self._stored_key):
            return None
        return _mac(self._server_key, exchange)


class Door:
    """Listens, and lets ``answer`` say what a statement returns. Safe from any thread.

    Args:
        address: where to listen; a socket's file is made for this user and its group alone.
        verifier: returns what the secret of the only user, ``ehub``, is checked with; None lets
            nobody in.
        answer: may raise :class:`StatementError`; anything else ends that connection.
        propose: what the link's questions are answered with; without it nobody speaks that here.
        tls: with a certificate, for those who ask for it.
        limit: connections at a time; more are told that there are too many.
    """

    def __init__(
        self,
        address: Address,
        verifier: Callable[[], Verifier | None],
        answer: Callable[[str], Answer],
        tls: ssl.SSLContext | None = None,
        limit: int = 1000,
        propose: Callable[[link.Question], link.Candidates | str] | None = None,
    ) -> None:
        self._verifier, self._answer = verifier, answer
        self._link = None if propose is None else link.Answerer(propose, self._part_from)
        self._tls, self._limit = tls, limit
        self._mutex = threading.Lock()
        self._connections: set[socket.socket] = set()
        # With a second handle on each, which is good for hanging up whatever becomes of the first.
        self._strangers: dict[socket.socket, socket.socket] = {}
        self._closed = False
        self._path: Path | None = None
        self._listener = self._listen(address)
        self.address = address
        if address.path is None:
            self.address = address._replace(port=self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="ehub-door", daemon=True).start()

    @property
    def connections(self) -> int:
        """Count the connections."""
        return len(self._connections)

    def close(self) -> None:
        """Stop listening and hang up on everybody."""
        with self._mutex:
            self._closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._link is not None:
            self._link.close()
            for connection in connections:
                self._part_from(connection)

    def _listen(self, address: Address) -> socket.socket:
        try:
            if address.path is None:
                found = socket.getaddrinfo(
                    address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )
                family, _, _, _, where = found[0]
                listener = socket.create_server(where[:2], family=family, backlog=128)
            else:
                listener = self._listen_on_file(address.path)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {address}: {error}") from error
        return listener

    def _listen_on_file(self, path: Path) -> socket.socket:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                # Of one who was killed.
                path.unlink(missing_ok=True)
            except OSError:
                pass
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(path))
            # The secret guards the door; who may knock is the folder's business.
            path.chmod(0o777)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        self._path = path
        return listener

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                # Out of descriptors, most likely: others will leave.
                _log.exception("a connection could not be accepted")
                time.sleep(0.1)
                continue
            try:
                self._receive(connection)
                threading.Thread(
                    target=self._serve, args=(connection,), name="ehub-client", daemon=True
                ).start()
            except (OSError, RuntimeError):
                # No more descriptors, no more threads are to be had.
                self._part_from(connection)

    def _receive(self, connection: socket.socket) -> None:
        """Count one more stranger, in the place of one who has been it for long."""
        handle = connection.dup()
        with self._mutex:
            if len(self._strangers) >= _STRANGERS:
                longest = self._strangers.pop(next(iter(self._strangers)))
                with contextlib.suppress(OSError):
                    longest.shutdown(socket.SHUT_RDWR)
                longest.close()
            self._connections.add(connection)
            self._strangers[connection] = handle

    def _know(self, connection: socket.socket) -> bool:
        """Count one stranger less; False if there are too many connections without it."""
        with self._mutex:
            handle = self._strangers.pop(connection, None)
            if handle is not None:
                handle.close()
            return len(self._connections) - len(self._strangers) <= self._limit

    def _part_from(self, connection: socket.socket) -> None:
        self._know(connection)
        with self._mutex:
            self._connections.discard(connection)
        connection.close()

    def _serve(self, connection: socket.socket) -> None:
        raw = connection
        handed_over = False
        try:
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.settimeout(_HANDSHAKE_SECONDS)
            if self._link is not None and connection.recv(1, socket.MSG_PEEK) == link.MAGIC[:1]:
                if self._shake_hands(connection):
                    handed_over = True
                    self._link.add(connection)
                return
            connection = self._start(connection)
            self._authenticate(_Stream(connection, _HANDSHAKE_BYTES), raw)
            connection.settimeout(None)
            self._converse(_Stream(connection, _STATEMENT_BYTES))
        except (_Refused, OSError, EOFError):
            # It left, in whatever way.
            pass
        except (ValueError, struct.error) as error:
            with contextlib.suppress(OSError):
                connection.sendall(_error("08P01", f"this is not PostgreSQL's protocol: {error}"))
        except Exception:
            _log.exception("a connection failed")
        finally:
            if not handed_over:
                connection.close()
                self._part_from(raw)

    def _shake_hands(self, connection: socket.socket) -> bool:
        """Whether one who speaks the link's protocol knows the secret, and there is room."""
        verifier = self._verifier()
        if verifier is None:
            return False
        if not link.greet(connection, verifier.prove):
            _log.warning("a wrong secret was refused")
            return False
        return self._know(connection)

    def _start(self, connection: socket.socket) -> socket.socket:
        """Read the packets before the protocol proper; returns the connection, now maybe TLS."""
        for _ in range(3):
            stream = _Stream(connection, _HANDSHAKE_BYTES)
            (size,) = struct.unpack(">I", stream.read(4))
            if not 8 <= size <= _HANDSHAKE_BYTES:
                raise ValueError(f"a first packet of {size} bytes")
            code, body = struct.unpack(f">I{size - 8}s", stream.read(size - 4))
            if code in (_TLS, _GSS):
                # What came with it in the clear is not for the other side of the encryption.
                if stream.pending:
                    raise ValueError("data before the answer to a request for encryption")
                if code == _TLS and self._tls is not None:
                    connection.sendall(b"S")
                    connection = self._tls.wrap_socket(connection, server_side=True)
                else:
                    connection.sendall(b"N")
            elif code == _CANCEL:
                # A search is over sooner than it could be stopped.
                raise _Refused
            elif code >> 16 != _PROTOCOL >> 16:
                raise ValueError(f"protocol {code >> 16}.{code & 0xFFFF}")
            else:
                self._greet(connection, code, body)
                return connection
        raise ValueError("no start-up packet")

    def _greet(self, connection: socket.socket, code: int, body: bytes) -> None:
        names = body.split(b"\0")
        given = dict(zip(names[::2], names[1::2], strict=False))
        if given.get(b"user") != USER.encode():
            connection.sendall(_error("28000", f"the only user here is {USER}"))
            raise _Refused
        extras = [name for name in given if name.startswith(b"_pq_.")]
        if code > _PROTOCOL or extras:
            # A newer client: this is the version that is spoken here.
            connection.sendall(
                _message(
                    b"v",
                    struct.pack(">II", _PROTOCOL, len(extras)),
                    *(name + b"\0" for name in extras),
                )
            )

    def _authenticate(self, stream: _Stream, connection: socket.socket) -> None:
        verifier = self._verifier()
        if verifier is None:
            stream.send(_error("57P03", "the database does not know this service yet"))
            raise _Refused
        stream.send(_message(b"R", struct.pack(">I", 10), b"SCRAM-SHA-256\0\0"))
        mechanism, _, rest = stream.message(b"p").partition(b"\0")
        if mechanism != b"SCRAM-SHA-256":
            stream.send(_error("28000", "only SCRAM-SHA-256 is spoken here"))
            raise _Refused
        header, _, first = rest[4:].decode().partition(",,")
        nonce = _attributes(first)["r"] + secrets.token_urlsafe(18)
        salt = base64.b64encode(verifier.salt).decode()
        challenge = f"r={nonce},s={salt},i={_ITERATIONS}"
        stream.send(_message(b"R", struct.pack(">I", 11), challenge.encode()))
        last, _, proof = stream.message(b"p").decode().rpartition(",p=")
        final = _attributes(last)
        signature = None
        if (
            header in ("n", "y")
            and final["c"] == base64.b64encode(f"{header},,".encode()).decode()
            and hmac.compare_digest(final["r"], nonce)
        ):
            exchange = f"{first},{challenge},{last}"
            signature = verifier.check(exchange.encode(), base64.b64decode(proof))
        if signature is None:
            _log.warning("a wrong secret was refused")
            stream.send(_error("28P01", "wrong secret"))
            raise _Refused
        if not self._know(connection):
            stream.send(_error("53300", f"more than {self._limit} connections"))
            raise _Refused
        stream.send(
            _message(b"R", struct.pack(">I", 12), b"v=" + base64.b64encode(signature)),
            _message(b"R", struct.pack(">I", 0)),
            *(
                _message(b"S", f"{name}\0{value}\0".encode())
                for name, value in (
                    ("server_version", "17.0 (ehub index service)"),
                    ("server_encoding", "UTF8"),
                    ("client_encoding", "UTF8"),
                    ("standard_conforming_strings", "on"),
                    ("integer_datetimes", "on"),
                )
            ),
            _message(b"K", bytes(8)),
            _READY,
        )

    def _converse(self, stream: _Stream) -> None:
        while True:
            kind, body = stream.any_message()
            if kind == b"Q":
                stream.send(self._reply(body.rstrip(b"\0").decode()), _READY)
            elif kind == b"X":
                return
            elif kind == b"S":
                stream.send(_READY)
            elif kind in b"PBDECFH":
                # The extended protocol: refused once, and then skipped up to its Sync.
                stream.send(_error("0A000", "only simple statements are answered here"))
                while kind != b"S":
                    kind, _ = stream.any_message()
                    if kind == b"X":
                        return
                stream.send(_READY)
            else:
                raise ValueError(f"a message of type {kind!r}")

    def _reply(self, statement: str) -> bytes:
        if not statement.strip("; \t\r\n"):
            return _message(b"I")
        try:
            answer = self._answer(statement)
        except StatementError as error:
            return _error(error.state, str(error), error.hint)
        except Exception as error:
            _log.exception("a statement failed")
            return _error(
                "XX000", f"{type(error).__name__} in the index service; its log says more"
            )
        return _encode(answer)


class _Stream:
    """Messages of a socket."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        self._connection, self._limit = connection, limit
        self._buffer = b""

    @property
    def pending(self) -> bool:
        """Whether something was received that was not read yet."""
        return bool(self._buffer)

    def read(self, size: int) -> bytes:
        """Read so many bytes; raises EOFError if the other side left before."""
        buffer = self._buffer
        if len(buffer) < size:
            pieces = [buffer]
            missing = size - len(buffer)
            while missing > 0:
                piece = self._connection.recv(max(missing, 65536))
                if not piece:
                    raise EOFError
                pieces.append(piece)
                missing -= len(piece)
            buffer = b"".join(pieces)
        self._buffer = buffer[size:]
        return buffer[:size]

    def any_message(self) -> tuple[bytes, bytes]:
        """Read a message: its type and its body."""
        kind, size = struct.unpack(">cI", self.read(5))
        if not 4 <= size <= self._limit:
            raise ValueError(f"a message of {size} bytes")
        return kind, self.read(size - 4)

    def message(self, wanted: bytes) -> bytes:
        """Read a message of this type."""
        kind, body = self.any_message()
        if kind != wanted:
            raise ValueError(f"a message of type {kind!r}, where {wanted!r} was due")
        return body

    def send(self, *messages: bytes) -> None:
        """Send messages, in one piece."""
        self._connection.sendall(b"".join(messages))


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _attributes(text: str) -> dict[str, str]:
    """Read SCRAM's ``a=…,b=…``; one that is missing is an empty one."""
    pairs = (part.partition("=") for part in text.split(","))
    return {"r": "", "c": ""} | {name: value for name, _, value in pairs}


def _message(kind: bytes, *body: bytes) -> bytes:
    data = b"".join(body)
    return kind + struct.pack(">I", len(data) + 4) + data


def _error(state: str, message: str, hint: str | None = None) -> bytes:
    fields = [("S", "ERROR"), ("V", "ERROR"), ("C", state), ("M", message)]
    if hint is not None:
        fields.append(("H", hint))
    return _message(b"E", *(f"{name}{value}\0".encode() for name, value in fields), b"\0")


def _encode(answer: Answer) -> bytes:
    columns = b"".join(
        column.name.encode() + struct.pack(">xIHIhiH", 0, 0, column.type, -1, -1, 0)
        for column in answer.columns
    )
    messages = [_message(b"T", struct.pack(">H", len(answer.columns)), columns)]
    messages += [
        _message(b"D", struct.pack(">H", len(row)), *map(_value, row)) for row in answer.rows
    ]
    tag = answer.tag
    if tag == "SELECT":
        tag = f"SELECT {len(answer.rows)}"
    messages.append(_message(b"C", tag.encode() + b"\0"))
    return b"".join(messages)


def _value(text: str | None) -> bytes:
    if text is None:
        return struct.pack(">i", -1)
    data = text.encode()
    return struct.pack(">I", len(data)) + data


def array(items: Iterable[str]) -> str:
    """Return the literal of an array of text."""
    escaped = [item.replace("\\", "\\\\").replace('"', '\\"') for item in items]
    return '{"' + '","'.join(escaped) + '"}' if escaped else "{}"


_READY = _message(b"Z", b"I")
