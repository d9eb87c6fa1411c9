"""The doorbell: a connection that does nothing but LISTEN, and a wait that can be cut short."""

from __future__ import annotations

import contextlib
import select
import socket
import time

import psycopg

from ehub.database import Connection, Database

CHANNEL = "ehub"
# The class and object of the advisory lock that says "somebody sleeps" (ehub.ring).
_SLEEPER = (0x65687562, 1)
# Who was rung stays awake for longer than the bell rests then.
_AWAKE_SECONDS = 0.3


class Listener:
    """Waits for changes on behalf of one thread, which also owns the ``worker`` connection.

    A sleeper must be rung, and only a sleeper is: going to sleep takes an advisory lock that
    writers look at. The lock stands on the worker connection, because statements on a connection
    that listens can swallow its notifications.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None
        self._asleep = False
        self._rung_at = float("-inf")
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def connect(self) -> None:
        """(Re)connect and listen. What was rung meanwhile is lost: read the log afterwards.

        Raises:
            UnavailableError: Postgres cannot be reached.
        """
        self.disconnect()
        self._connection = self._database.connect()
        self._connection.execute(f"LISTEN {CHANNEL}")

    def disconnect(self) -> None:
        """Drop the connection, and with it the claim to be rung."""
        self._asleep = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def asleep(self) -> bool:
        """Whether the next change rings."""
        return self._asleep

    @property
    def rung_lately(self) -> bool:
        """Whether the bell rang so short ago that it would not ring for another change."""
        return time.monotonic() - self._rung_at <= _AWAKE_SECONDS

    def fall_asleep(self, worker: Connection) -> bool:
        """Ask to be rung for the next change; read the log once more before waiting.

        False if a writer is in the middle of something, or another replica sleeps in this one's
        stead: then wait a little while only. Not while :attr:`rung_lately`.
        """
        if not self._asleep:
            row = worker.execute("SELECT pg_try_advisory_lock(%s, %s)", _SLEEPER).fetchone()
            self._asleep = row == (True,)
        return self._asleep

    def wake_up(self, worker: Connection) -> None:
        """Say that the log is being read anyway."""
        if self._asleep:
            worker.execute("SELECT pg_advisory_unlock(%s, %s)", _SLEEPER)
            self._asleep = False

    def wait(self, worker: Connection | None, seconds: float) -> bool:
        """Wait for the bell or :meth:`interrupt`; True if one of them came in time.

        Who was rung is awake: a NOTIFY with each commit would cost most of the write rate.

        Raises:
            psycopg.OperationalError: a connection was lost.
        """
        sources: list[socket.socket | Connection] = [self._receiver]
        sources += [c for c in (self._connection, worker) if c is not None and not c.closed]
        ready, _, _ = select.select(sources, [], [], max(seconds, 0))
        if self._receiver in ready:
            with contextlib.suppress(BlockingIOError):
                while self._receiver.recv(4096):
                    pass
        if worker is not None and worker in ready:
            # It was idle: all that it can have to say is that it is gone.
            raise psycopg.OperationalError("the connection was lost while it was idle")
        if self._connection is not None and self._connection in ready:
            for _ in self._connection.notifies(timeout=0):
                self._rung_at = time.monotonic()
            if worker is not None:
                self.wake_up(worker)
        return bool(ready)

    def interrupt(self) -> None:
        """End the wait of the other thread, or its next one. Safe from any thread."""
        # Full, or closed: there is nobody to wake.
        with contextlib.suppress(OSError):
            self._sender.send(b"!")

    def close(self) -> None:
        """Give everything back."""
        self.disconnect()
        self._receiver.close()
        self._sender.close()
