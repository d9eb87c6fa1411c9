"""Locks of the index: many readers or one writer; and matrix products beside forks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager


class ReadWriteLock:
    """Many readers or one writer; a writer that waits goes before readers that come later."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._readers = 0
        self._writing = False
        self._waiting = 0
        self._reading = _Reading(self)

    def read(self) -> AbstractContextManager[None]:
        """Hold it beside other readers."""
        return self._reading

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Hold it alone."""
        with self._condition:
            self._waiting += 1
            try:
                while self._writing or self._readers:
                    self._condition.wait()
                self._writing = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()


class _Reading:
    """What readers enter: one for all, since making one takes as long as a small search."""

    def __init__(self, lock: ReadWriteLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock._condition:
            while lock._writing or lock._waiting:
                lock._condition.wait()
            lock._readers += 1

    def __exit__(self, *_: object) -> None:
        lock = self._lock
        with lock._condition:
            lock._readers -= 1
            if lock._waiting and not lock._readers:
                lock._condition.notify_all()


PRODUCTS = ReadWriteLock()
"""Held to read for a matrix product, to write for a fork.

OpenBLAS ends its threads before a fork (``blas_thread_shutdown``, by ``pthread_atfork``), and
whoever is waiting for one of them waits for ever.
"""
