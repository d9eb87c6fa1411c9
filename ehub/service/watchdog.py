"""A service that hangs is killed and started anew, so that nobody waits for it for long.

Postgres waits for an answer without a deadline, because its only other way is to poll, which halves
the rate of searches. So the deadline is kept here, by the kernel: a timer that kills the process
unless it is put off twice a second. It goes off whether the process is stuck, stopped or frozen.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time

_log = logging.getLogger(__name__)

DEADLINE_SECONDS = 3.0
_PUT_OFF_SECONDS = 0.5
# An hour is more than any index takes to load, for which hnswlib keeps the interpreter to itself.
_LONG_SECONDS = 3600.0
_BACKOFF_SECONDS = (0.2, 10.0)
# What lived this long did not fail at its start.
_SETTLED_SECONDS = 30.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_CLOCK_MONOTONIC = 1


class Watchdog:
    """The timer of this process. Where the kernel has none such (only Linux has), it does nothing.

    :attr:`armed` says which it is.
    """

    def __init__(self) -> None:
        self.armed = False
        self._stopping = threading.Event()
        self._long_work = 0
        self._mutex = threading.Lock()
        if sys.platform.startswith("linux"):
            self._library = ctypes.CDLL(None, use_errno=True)
            self._timer = ctypes.c_void_p()
            event = _SigEvent(0, signal.SIGKILL, 0)
            self.armed = not self._library.timer_create(
                _CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
            )
        if self.armed:
            self._set(DEADLINE_SECONDS)
            threading.Thread(target=self._put_off, name="ehub-watchdog", daemon=True).start()

    def begin_long_work(self) -> None:
        """Expect nothing for a while: something begins that lets no other thread run."""
        with self._mutex:
            self._long_work += 1
            self._set(_LONG_SECONDS)

    def end_long_work(self) -> None:
        """Be strict again, once for every :meth:`begin_long_work`."""
        with self._mutex:
            self._long_work -= 1
            if not self._long_work:
                self._set(DEADLINE_SECONDS)

    def close(self) -> None:
        """Disarm."""
        with self._mutex:
            self._stopping.set()
            self._set(0)

    def _put_off(self) -> None:
        while not self._stopping.wait(_PUT_OFF_SECONDS):
            with self._mutex:
                if not self._long_work and not self._stopping.is_set():
                    self._set(DEADLINE_SECONDS)

    def _set(self, seconds: float) -> None:
        if self.armed:
            value = _Interval(0, 0, int(seconds), int(seconds % 1 * 1e9))
            self._library.timer_settime(self._timer, 0, ctypes.byref(value), None)


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_byte * 48),
    )


class _Interval(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in ("interval_seconds", "interval_nanoseconds", "seconds", "nanoseconds")
    )


def supervise() -> bool:
    """Return in a child process, and in another one whenever a signal has ended that.

    This process only waits, passes SIGTERM and SIGINT on, and ends as the last child does; the
    child ends with it. To be called before there are threads. Returns whether there was a child
    before.
    """
    child = 0
    stopped = again = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        os.kill(child, number)

    pause = _BACKOFF_SECONDS[0]
    while True:
        parent = os.getpid()
        started = time.monotonic()
        # No signal comes between a fork and knowing what to do with it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        child = os.fork()
        for number in _PASSED_ON:
            signal.signal(number, stop if child else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        if not child:
            if sys.platform.startswith("linux"):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            return again
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if stopped or code >= 0:
            os._exit(code if code >= 0 else 128 - code)
        for number in _PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        if time.monotonic() - started > _SETTLED_SECONDS:
            pause = _BACKOFF_SECONDS[0]
        _log.error("the service was ended by signal %d; starting it again", -code)
        again = True
        time.sleep(pause)
        pause = min(pause * 2, _BACKOFF_SECONDS[1])
