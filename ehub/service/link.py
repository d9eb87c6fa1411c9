"""The shortest way from a search in SQL to the index: what extension ``ehub_link`` speaks.

It comes to the same address as PostgreSQL's protocol, and is told apart by its first bytes. Sizes
stand before messages, numbers are as this machine writes them, vectors are their bytes. Both sides
prove that they know the secret without sending it. The other side is ``extension/ehub_link.c``,
which says how hands are shaken.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ehub.index import Plan
from ehub.types import Matrix

_log = logging.getLogger(__name__)

MAGIC = b"EHUBLNK1"
_HELLO = struct.Struct("=8sf32s")
_QUESTION = struct.Struct("=Qqiiiiiiii")
_ANSWER = struct.Struct("=Qiiii")
_SIZE = struct.Struct("=I")
_NONCE_BYTES = PROOF_BYTES = 32
# As many as ehub.nearest_many sends at once, four times.
_MOST_BYTES = 1 << 26
_BUFFER_BYTES = 1 << 16
# Candidates of a search that takes not long.
_SHORT = 100
# So many questions that take long are answered at once.
_APART = 32
_SEND_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_REASON_BYTES = 1000


class Question(NamedTuple):
    """What Postgres asks for: the ``k`` nearest of each query, by an index that is as it should be.

    Attributes:
        state: what the index must be as of: the life of the database, and of the table.
        index_id: which index.
        k: how many are wanted of each query.
        ef: what the graph is searched with, 0 for what was calibrated.
        filter: which rows are wanted, as text of JSON; None for all.
        partition: of which partition they are; None for all.
        queries: float32 of shape ``(n, dims)``.
    """

    state: str
    index_id: int
    k: int
    ef: int
    filter: str | None
    partition: str | None
    queries: Matrix

    @property
    def is_short(self) -> bool:
        """Whether to answer it takes no longer than a search does mostly."""
        return (
            len(self.queries) == 1
            and self.filter is None
            and self.partition is None
            and self.k <= _SHORT
            and self.ef <= _SHORT
        )


class Candidates(NamedTuple):
    """What an index proposes.

    Attributes:
        keys: of each query the keys that are near it, nearest first.
        watermark: the ``pg_snapshot`` as of which they are right, as text.
        plan: how they were found.
        matching: whether all of them match what was asked, and nothing else does; else they are
            just near.
    """

    keys: list[list[str]]
    watermark: str
    plan: Plan
    matching: bool

    def described(self) -> str:
        """Write how they were found, for ``ehub.explain_nearest``, as JSON."""
        plan = self.plan
        if not self.matching:
            # How many match it does not know.
            return (
                f'{{"by":"near","compared":{plan.compared},'
                '"note":"looks among the nearest for rows that match"}'
            )
        note = json.dumps(plan.note) if plan.note else '""'
        return f'{{"by":"{plan.by}","rows":{plan.rows},"compared":{plan.compared},"note":{note}}}'


def greet(connection: socket.socket, prove: Callable[[bytes, bytes], bytes]) -> bool:
    """Shake hands with who connects; False if it does not know the secret.

    ``prove`` makes the proof of a side for some nonces. Raises EOFError if the other side leaves,
    ValueError if it speaks something else, or writes numbers in another way than this machine.
    """
    magic, one, theirs = _HELLO.unpack(_receive(connection, _HELLO.size))
    if magic != MAGIC:
        raise ValueError(
            "neither PostgreSQL's protocol nor a version of the link's that is known here"
        )
    if one != 1.0:
        raise ValueError("the database writes numbers in another way than this machine")
    nonces = theirs + secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(nonces[_NONCE_BYTES:] + prove(b"service", nonces))
    proof = _receive(connection, PROOF_BYTES)
    return secrets.compare_digest(proof, prove(b"database", nonces))


class Answerer:
    """Answers the questions of everybody who has shaken hands, in one thread.

    What comes at the same time is asked of the index together, so that many clients take less than
    one after the other would: most of a search is the interpreter's work. Questions that
    take long (many queries at once, a filter, a large ``k``) are answered in threads of their own.

    Args:
        answer: returns candidates, or the reason why there are none.
        gone: is told of each connection that has ended, and closes it.
    """

    def __init__(
        self,
        answer: Callable[[Question], Candidates | str],
        gone: Callable[[socket.socket], None],
    ) -> None:
        self._answer, self._gone = answer, gone
        self._selector = selectors.DefaultSelector()
        self._apart = ThreadPoolExecutor(_APART, thread_name_prefix="ehub-link")
        self._mutex = threading.Lock()
        # Connections that come to the thread, anew or again.
        self._coming: list[_Peer] = []
        self._closed = False
        self._hears, self._wakes = socket.socketpair()
        self._hears.setblocking(False)
        self._selector.register(self._hears, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="ehub-link", daemon=True)
        self._thread.start()

    def add(self, connection: socket.socket) -> None:
        """Answer what comes from a connection, until it ends."""
        connection.setblocking(False)
        self._return(_Peer(connection))

    def close(self) -> None:
        """Answer nobody any more; connections that are left are the caller's to close."""
        with self._mutex:
            self._closed = True
        self._wake()
        self._thread.join(_CLOSE_SECONDS)
        self._apart.shutdown(wait=False, cancel_futures=True)
        self._selector.close()
        self._hears.close()
        self._wakes.close()

    def _return(self, peer: _Peer) -> None:
        with self._mutex:
            self._coming.append(peer)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wakes.send(b"x")

    def _run(self) -> None:
        while True:
            try:
                if self._turn():
                    return
            except Exception:
                # Whatever it was came from one of them, and they all come again.
                _log.exception("the link failed; it hangs up on everybody")
                for key in list(self._selector.get_map().values()):
                    if key.data is not None:
                        self._hang_up(key.data)

    def _turn(self) -> bool:
        """Answer what has come; True if this is the end."""
        waiting: list[_Asked] = []
        for key, _ in self._selector.select():
            if key.data is None:
                if self._let_in():
                    return True
                continue
            peer: _Peer = key.data
            try:
                asked = peer.receive()
            except ValueError as error:
                _log.warning("a connection of the link was ended: %s", error)
                self._hang_up(peer)
                continue
            except (OSError, EOFError):
                self._hang_up(peer)
                continue
            if asked is None:
                continue
            if asked.question.is_short:
                waiting.append(asked)
            else:
                self._selector.unregister(peer.connection)
                self._apart.submit(self._answer_apart, asked)
        if waiting:
            self._answer_together(waiting)
        return False

    def _hang_up(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        self._gone(peer.connection)

    def _let_in(self) -> bool:
        """Listen to those who have come; True if this is the end."""
        self._hears.recv(4096)
        with self._mutex:
            coming, self._coming = self._coming, []
            closed = self._closed
        for peer in coming:
            with contextlib.suppress(OSError, ValueError):
                self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        return closed

    def _answer_together(self, waiting: list[_Asked]) -> None:
        alike: dict[tuple[object, ...], list[_Asked]] = {}
        for asked in waiting:
            question = asked.question
            sort = (
                *(question.state, question.index_id, question.k, question.ef),
                question.queries.shape[1],
            )
            alike.setdefault(sort, []).append(asked)
        for group in alike.values():
            question = group[0].question
            if len(group) > 1:
                queries = np.concatenate([asked.question.queries for asked in group])
                question = question._replace(queries=queries)
            found = self._ask(question)
            for i, asked in enumerate(group):
                if isinstance(found, Candidates):
                    message = _write(asked.nonce, found._replace(keys=[found.keys[i]]))
                else:
                    message = _refuse(asked.nonce, found)
                try:
                    sent = asked.peer.connection.send(message)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    # It is gone, as the next event says.
                    continue
                if sent < len(message):
                    self._selector.unregister(asked.peer.connection)
                    self._apart.submit(self._send, asked.peer, message[sent:])

    def _answer_apart(self, asked: _Asked) -> None:
        found = self._ask(asked.question)
        if isinstance(found, Candidates):
            message = _write(asked.nonce, found)
        else:
            message = _refuse(asked.nonce, found)
        self._send(asked.peer, message)

    def _send(self, peer: _Peer, message: bytes) -> None:
        """Send what the other side takes slowly, and go on to listen to it."""
        try:
            peer.connection.settimeout(_SEND_SECONDS)
            peer.connection.sendall(message)
            peer.connection.setblocking(False)
        except OSError:
            self._gone(peer.connection)
        else:
            self._return(peer)

    def _ask(self, question: Question) -> Candidates | str:
        try:
            return self._answer(question)
        except Exception as error:
            _log.exception("a question failed")
            return f"{type(error).__name__} in the index service; its log says more"


class _Peer:
    """A connection, and the beginning of a question that has not come to its end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._begun = bytearray()

    def receive(self) -> _Asked | None:
        """Read what has come; None where more is to come.

        Raises EOFError where the other side has left, ValueError for what is no question.
        """
        try:
            data: bytes | bytearray = self.connection.recv(_BUFFER_BYTES)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        if self._begun:
            self._begun += data
            data = self._begun
        if len(data) >= _SIZE.size:
            (size,) = _SIZE.unpack_from(data)
            if not _QUESTION.size <= size <= _MOST_BYTES:
                raise ValueError(f"a question of {size} bytes")
            if len(data) > _SIZE.size + size:
                raise ValueError("more than a question")
            if len(data) == _SIZE.size + size:
                self._begun = bytearray()
                nonce, question = _parse(memoryview(data)[_SIZE.size :])
                return _Asked(self, nonce, question)
        if data is not self._begun:
            self._begun = bytearray(data)
        return None


class _Asked(NamedTuple):
    peer: _Peer
    nonce: int
    question: Question


def _receive(connection: socket.socket, size: int) -> bytes:
    """Receive just so many bytes."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _parse(data: memoryview) -> tuple[int, Question]:
    head = _QUESTION.unpack_from(data)
    nonce, index_id, n, k, ef, dims, state_bytes, filter_bytes, partition_bytes, _ = head
    if min(n, k, dims) < 1 or ef < 0 or state_bytes < 0 or min(filter_bytes, partition_bytes) < -1:
        raise ValueError("a question of numbers that cannot be")
    at = _QUESTION.size
    texts: list[str | None] = []
    for size in (state_bytes, filter_bytes, partition_bytes):
        texts.append(None if size < 0 else str(data[at : at + size], "utf-8"))
        at += max(size, 0)
    if len(data) - at != 4 * n * dims:
        raise ValueError(f"a question without its {n} vectors of {dims} dims")
    queries = np.frombuffer(data, np.float32, n * dims, at).reshape(n, dims).copy()
    state, wanted, partition = texts
    return nonce, Question(state or "", index_id, k, ef, wanted, partition, queries)


def _write(nonce: int, found: Candidates) -> bytes:
    keys = [key.encode() for one in found.keys for key in one]
    watermark, plan = found.watermark.encode(), found.described().encode()
    numbers = [*map(len, found.keys), *map(len, keys)]
    message = b"".join(
        [
            _ANSWER.pack(nonce, 0, found.matching, len(watermark), len(plan)),
            struct.pack(f"={len(numbers)}i", *numbers),
            *keys,
            watermark,
            plan,
        ]
    )
    return _SIZE.pack(len(message)) + message


def _refuse(nonce: int, reason: str) -> bytes:
    text = reason.encode()[:_REASON_BYTES].decode(errors="ignore").encode()
    return _SIZE.pack(_ANSWER.size + len(text)) + _ANSWER.pack(nonce, 1, 0, 0, 0) + text
