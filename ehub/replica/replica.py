"""Keeps a set of HNSW indexes equal to Postgres.

One thread reads the change log in cycles. A cycle is one REPEATABLE READ transaction with snapshot
S: the log rows that S sees and an index's watermark W does not name the keys that changed; their
current rows are read in the same transaction, applied, shown at one moment, and W becomes S. So at
every moment an index equals its table as of W, whatever order transactions committed in, and a key
that is read twice does no harm. The bell (``ehub/listener.py``) makes cycles prompt; polling makes
them certain.

What takes long (loading, building, large backlogs, saving, measuring) is a job on a thread of its
own, at most one for each index. Meanwhile the index that was there goes on, or searches are exact.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

from ehub.database import Connection, Database, is_lost
from ehub.errors import EhubError, UnavailableError, WaitTimeoutError
from ehub.index import AnyIndex, Found, HnswIndex, PartitionedIndex, Plan
from ehub.listener import Listener
from ehub.replica.copy import Copy, Progress, Shared, State
from ehub.replica.log import Entry, read_catalogue, take_snapshot
from ehub.types import Matrix

_log = logging.getLogger(__name__)

_POLL_SECONDS = 5.0
# After changes were found, a moment for more of them: a busy log is read in larger portions.
_BUSY_SECONDS = 0.005
# While the bell is silent because it rang a moment ago.
_SILENT_SECONDS = 0.02
# Not asleep, because a writer is under way or another replica is to be rung.
_RESTLESS_SECONDS = (0.005, 0.25)
# Its own: what a program draws from the module's own numbers stays as it was seeded.
_jitter = random.Random()  # noqa: S311 - no secret
_BACKOFF_SECONDS = (0.1, 10.0)
# How long a search waits for the replica before it goes exact.
_PATIENCE_SECONDS = 1.0
# So long an index answers without having heard that its rows may still be read.
_TRUST_SECONDS = 30.0
_TRIM_SECONDS = 60.0
_LEAVE_SECONDS = 30.0
_MOST_FITTING = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Answering:
    """An index that may answer, and the version whose rows it holds."""

    index: AnyIndex
    entry: Entry
    # Over all rows, and what of the index matches, if not all of it does.
    whole: AnyIndex
    selection: str | None = None

    def search(self, queries: Matrix, k: int, partition: str | None = None) -> list[Found] | None:
        """Find the ``k`` nearest of each query among the rows that match; None where it cannot."""
        if isinstance(self.index, PartitionedIndex):
            return self.index.search(queries, k, partition)
        if partition is not None:
            return None
        return self.index.search(queries, k, self.selection)

    def plan(self, k: int, partition: str | None = None) -> Plan | None:
        """Say how it would be answered; None where it cannot."""
        if isinstance(self.index, PartitionedIndex):
            return self.index.plan(k, partition)
        if partition is not None:
            return None
        return self.index.plan(k, self.selection)


class Replica:
    """The indexes of one process, followed in the background.

    Nothing runs until the first :meth:`follow` or :meth:`follow_all`. Every method may be called
    from any thread.

    Args:
        database: what to follow.
        service: what to be called by a service, whose answers name the life of the database that
            they are of; None where searches are answered in this process alone.
        long_work: made around what lets no other thread run for long, as reading a large file.
    """

    def __init__(
        self,
        database: Database,
        service: str | None = None,
        long_work: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._database = database
        self._listener = Listener(database)
        self._shared = Shared(database, self._listener.interrupt, long_work=long_work)
        self._service = service
        if service is not None:
            self._shared.title = f"{service}, "
        self._worker: Connection | None = None
        # The cluster's system identifier and the database's oid.
        self._identity: tuple[int, int] | None = None
        # Names of spaces and addresses of versions.
        self._wanted: set[str] = set()
        self._everything = False
        # By the ids of their indexes; and what a name or address means, as of the last cycle.
        self._copies: dict[int, Copy] = {}
        self._meant: dict[str, Copy] = {}
        self._written: dict[str, set[int]] = {}
        # By what was asked among: the indexes that have all of it, and what must match still.
        self._fitting: dict[tuple[str, str | None, str | None], list[tuple[int, str | None]]] = {}
        # Copies that are kept no more, and whose leases are to end.
        self._gone: list[Copy] = []
        self._started = 0
        self._finished = 0
        # When the database last said which indexes may be kept.
        self._heard = float("-inf")
        self._begin_anew = False
        # Before anything else where processes do not live long.
        self._trimmed_at = time.monotonic() - _TRIM_SECONDS
        self._tended_at = float("-inf")
        self._thread: threading.Thread | None = None

    # --- for searches

    def follow(self, address: str) -> None:
        """Keep an index of a space, or of one version of it, from now on; returns at once.

        Of a space that is the current version, and those that are kept warm for it.
        """
        if address in self._wanted:
            return
        with self._shared.changed:
            self._wanted.add(address)
            self._begin()
        self._listener.interrupt()

    def follow_all(self) -> None:
        """Keep indexes of all spaces from now on, also of those to come; returns at once."""
        with self._shared.changed:
            self._everything = True
            self._begin()

    def _begin(self) -> None:
        if self._shared.stopping:
            raise UnavailableError("this hub is closed; connect again")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ehub-replica", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def followed(self) -> list[Copy]:
        """Return the copies that there are: those of a service's answers."""
        return list(self._copies.values())

    @property
    def followed_once(self) -> bool:
        """Whether the database is followed now, and it is known what there is to follow."""
        return self._shared.connected and self._heard > float("-inf")

    @property
    def connected(self) -> bool:
        """Whether the last that was heard of the database was an answer."""
        return self._shared.connected

    def wrote(self, address: str, xid: int) -> None:
        """Remember a transaction of this process: its indexes must see it before they answer."""
        space = _space(address)
        with self._shared.changed:
            for wanted in self._wanted:
                if _space(wanted) == space:
                    self._written.setdefault(wanted, set()).add(xid)

    def index(
        self,
        address: str,
        *,
        strong: bool = False,
        among: tuple[str | None, str | None] | None = None,
    ) -> Answering | None:
        """Return the index of a space or version where it may answer, else None.

        ``among`` is a filter, as JSON, and the name of a sub-index: then it is one that has all
        those rows, the smallest that can answer. A filter that comes again is remembered.

        It may if it is ready and sees what this process wrote; ``strong``: all that was committed
        before the call. Waits a moment for either. And only while the database was heard of half
        a minute ago at the most: what one may read can be taken away.
        """
        # A version that was not asked for by itself is followed by the name of its space.
        followed = address if address in self._wanted else _space(address)
        written: Collection[int] = self._written.get(followed, ())
        if written:
            with self._shared.changed:
                written = tuple(written)
        chosen = self._choose(address, among)
        if chosen is None or time.monotonic() - self._heard > _TRUST_SECONDS:
            return None
        watermark = chosen[0].watermark
        if strong or watermark is None or not all(watermark.sees(xid) for xid in written):
            # A backlog that is a job of its own is not waited for.
            busy = chosen[0].job == "catch up"
            cycle = None if busy else self._next_cycle(_PATIENCE_SECONDS)
            chosen = self._choose(address, among)
            if cycle is None or chosen is None or chosen[0].brought < cycle:
                return None
            watermark = chosen[0].watermark
        copy, selection = chosen
        index, whole = copy.index, self._meant[address].index
        if index is None or watermark is None or not all(watermark.sees(xid) for xid in written):
            return None
        if written:
            # Seen once is seen for good.
            with self._shared.changed:
                self._written[followed].difference_update(written)
        return Answering(index, copy.entry, index if whole is None else whole, selection)

    def _choose(
        self, address: str, among: tuple[str | None, str | None] | None
    ) -> tuple[Copy, str | None] | None:
        """Return a copy that answers, and its selection to search; None where there is none."""
        whole = self._meant.get(address)
        if among is None or whole is None:
            return None if whole is None or not whole.serving() else (whole, None)
        best: tuple[Copy, str | None] | None = None
        for index_id, rest in self._fitting_indexes(address, among):
            copy = self._copies.get(index_id)
            if copy is None or not copy.serving() or copy.index is None:
                continue
            if best is None or len(copy.index) < len(best[0].index or ()):
                best = copy, rest
        if best is None or best[1] is None:
            return best
        copy, rest = best[0], best[1]
        copy.ask(rest)
        index = copy.index
        if isinstance(index, HnswIndex) and rest in index.selections():
            return best
        return None

    def _fitting_indexes(
        self, address: str, among: tuple[str | None, str | None]
    ) -> list[tuple[int, str | None]]:
        """Return the indexes that have all those rows, and what must match still, as JSON."""
        fitting = self._fitting.get((address, *among))
        if fitting is None:
            with self._database.connection(address) as connection:
                fitting = connection.execute(
                    "SELECT index_id, rest::text FROM ehub.indexes_for(%s, %s::jsonb, %s)",
                    [address, *among],
                ).fetchall()
            if len(self._fitting) >= _MOST_FITTING:
                self._fitting.clear()
            self._fitting[(address, *among)] = fitting
        return fitting

    def _next_cycle(self, timeout: float | None) -> int | None:
        """Wait for a cycle that begins after this call; None if none ended in time."""
        with self._shared.changed:
            needed = self._started + 1
            self._listener.interrupt()
            self._shared.changed.wait_for(
                lambda: (
                    self._finished >= needed or not self._shared.connected or self._shared.stopping
                ),
                timeout,
            )
            return needed if self._finished >= needed else None

    def wait_until_ready(
        self, address: str, timeout: float | None, watch: Callable[[Progress], None] | None = None
    ) -> None:
        """Wait until the index is ready and sees all that was committed before.

        Raises:
            WaitTimeoutError: it was not in time.
            EhubError: it cannot be built; the message says why.
        """
        self.follow(address)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if self.index(address, strong=True) is not None:
                return
            progress = self.progress(address)
            if watch is not None and progress is not None:
                watch(progress)
            if progress is not None and progress.state is State.FAILED and left is None:
                raise EhubError(f"space {address!r}: no index can be made: {progress.error}")
            if left is not None and left <= 0:
                why = "" if progress is None else f": {progress.error or progress.state}"
                raise WaitTimeoutError(
                    f"space {address!r}: the index was not ready in {timeout} seconds{why}"
                )
            with self._shared.changed:
                if self._shared.stopping:
                    raise UnavailableError("this hub is closed; connect again")
                self._shared.changed.wait(0.1 if left is None else min(0.1, left))

    def refresh(self) -> None:
        """Notice what became of the spaces, as after one was deleted."""
        if self._thread is not None:
            self._next_cycle(_PATIENCE_SECONDS)

    def reconnect(self) -> None:
        """Begin anew with the database, as after a lost connection."""
        self._begin_anew = True
        self._listener.interrupt()

    def progress(self, address: str) -> Progress | None:
        """Return how far the index of a space or version is, None if it is not followed yet."""
        copy = self._meant.get(address)
        return None if copy is None else Progress(copy.state, copy.done, copy.total, copy.error)

    def close(self) -> None:
        """Save what is worth it and stop. Safe to call twice."""
        with self._shared.changed:
            if self._shared.stopping:
                return
            self._shared.stopping = True
            self._shared.changed.notify_all()
        self._listener.interrupt()
        atexit.unregister(self.close)
        if self._thread is not None:
            self._thread.join(_LEAVE_SECONDS)
        for copy in self._copies.values():
            # Where the database does not answer, what was saved before has to do.
            if copy.join(_LEAVE_SECONDS) and self._shared.connected and not self._runs():
                copy.leave()
            copy.drop(delete=False)
        if self._runs():
            _log.warning("the database does not answer; leaving without a word to it")
            return
        if self._worker is not None:
            self._worker.close()
        self._listener.close()

    # --- the thread

    def _run(self) -> None:
        failures = 0
        restless = _RESTLESS_SECONDS[0]
        while not self._shared.stopping:
            try:
                if self._begin_anew:
                    self._begin_anew = False
                    self._disconnect()
                worker = self._worker or self._connect()
                found = self._cycle(worker)
                for copy in list(self._copies.values()):
                    copy.look_after(worker)
                while self._gone:
                    self._gone[-1].forget(worker)
                    self._gone.pop()
                self._tend(worker)
                if failures:
                    _log.warning("the index follows the database again")
                    failures = 0
                if found:
                    self._listener.wake_up(worker)
                    restless = _RESTLESS_SECONDS[0]
                    self._rest(worker, _BUSY_SECONDS)
                elif self._listener.asleep:
                    self._rest(worker, _POLL_SECONDS)
                elif self._listener.rung_lately:
                    # Nobody will say so if something follows.
                    self._rest(worker, _SILENT_SECONDS)
                    restless = _RESTLESS_SECONDS[0]
                elif not self._listener.fall_asleep(worker):
                    self._rest(worker, restless)
                    restless = min(restless * 2, _RESTLESS_SECONDS[1])
            except Exception as error:
                # Whatever it was, the thread goes on: it is the one that can mend it.
                lost = is_lost(error) or isinstance(error, UnavailableError)
                if failures == 0 or not lost:
                    _log.warning(
                        "the index falls behind, searches that need the present are exact: %s",
                        error,
                        exc_info=not lost,
                    )
                self._disconnect()
                failures += 1
                longest = min(_BACKOFF_SECONDS[0] * 2**failures, _BACKOFF_SECONDS[1])
                # Jitter, so that many clients of a server that comes back do not come at once.
                self._listener.wait(None, longest * _jitter.uniform(0.5, 1))

    def _runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _rest(self, worker: Connection, seconds: float) -> None:
        if not self._shared.stopping:
            self._listener.wait(worker, seconds)

    def _connect(self) -> Connection:
        worker = self._database.connect()
        try:
            worker.execute("SET lock_timeout = '500ms'")
            row = worker.execute(
                "SELECT pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system()),"
                " (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),"
                " ehub.is_recognised(), has_function_privilege('ehub.recognise()', 'EXECUTE')"
            ).fetchone()
            assert row is not None  # noqa: S101 - a select without from
            standby, system, database, recognised, may_recognise = row
            if standby:
                # Its snapshots do not say which transactions run on the primary.
                raise UnavailableError("a standby has no watermarks to follow; searches are exact")
            if not recognised and not may_recognise:
                raise UnavailableError(
                    "this database is a copy of another one, and ehub's log is not about it;"
                    " `ehub migrate`, or the service, as its owner puts that right"
                )
            if not recognised:
                worker.execute("SELECT ehub.recognise()")
            # Copies say what they equal only after they were brought there over this connection.
            for copy in self._copies.values():
                copy.forget_stamp()
            if self._service is not None:
                row = worker.execute("SELECT ehub.enter_incarnation()::text").fetchone()
                self._shared.incarnation = row[0] if row else None
            if self._identity not in (None, (system, database)):
                _log.warning("this is another database than before; indexes are made anew")
                for copy in self._copies.values():
                    copy.drop(delete=False)
                self._copies.clear()
                self._meant.clear()
            self._identity = (system, database)
            self._listener.connect()
            self._shared.epoch += 1
            for copy in self._copies.values():
                copy.resume(worker)
        except BaseException:
            worker.close()
            raise
        self._worker = worker
        self._shared.connected = True
        return worker

    def _disconnect(self) -> None:
        self._listener.disconnect()
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        with self._shared.changed:
            self._shared.connected = False
            self._finished = self._started
            self._shared.changed.notify_all()

    # --- one cycle

    def _cycle(self, worker: Connection) -> bool:
        """Bring every index to one snapshot; True if anything had changed."""
        with self._shared.changed:
            self._started += 1
        found = False
        blocked = None
        worker.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        try:
            snapshot = take_snapshot(worker)
            self._update_copies(worker)
            self._heard = time.monotonic()
            at_rest = all(copy.settled() for copy in self._copies.values() if copy.entry.current)
            for copy in self._copies.values():
                if copy.entry.current or at_rest or copy.begun():
                    blocked = copy
                    found |= copy.bring(worker, snapshot, self._started)
            worker.execute("COMMIT")
        except Exception as error:
            if is_lost(error):
                raise
            worker.execute("ROLLBACK")
            if blocked is None or not blocked.may_fail(error):
                raise
            blocked.blocked_until = time.monotonic() + 0.5
            return True
        finally:
            with self._shared.changed:
                self._finished = self._started
                self._shared.changed.notify_all()
        return found

    def _update_copies(self, worker: Connection) -> None:
        entries = read_catalogue(worker, None if self._everything else self._wanted)
        meant = {}
        before = set(self._copies)
        for entry in entries:
            copy = self._copies.get(entry.index_id)
            if copy is None:
                assert self._identity is not None  # noqa: S101 - set when connecting
                folder = self._database.target.data_dir / "indexes"
                folder /= "-".join(map(str, self._identity))
                copy = Copy(entry, folder / str(entry.index_id), self._shared)
                self._copies[entry.index_id] = copy
            copy.entry = entry
            if not entry.whole:
                continue
            meant[entry.address] = copy
            if entry.current:
                meant[entry.space] = copy
        # From here on nobody is answered from what is to go.
        if meant != self._meant or {entry.index_id for entry in entries} != before:
            self._fitting.clear()
        self._meant = meant
        for index_id in self._copies.keys() - {entry.index_id for entry in entries}:
            gone = self._copies.pop(index_id)
            gone.drop(delete=True)
            self._gone.append(gone)

    def _tend(self, worker: Connection) -> None:
        """Do for the database what has to be done from time to time, as far as one may."""
        now = time.monotonic()
        if now - self._trimmed_at > _TRIM_SECONDS:
            self._trimmed_at = now
            worker.execute("SELECT ehub.trim()")
            if self._everything:
                worker.execute("SELECT ehub.tend()")
        entries = [copy.entry for copy in self._copies.values()]
        if now - self._tended_at > _POLL_SECONDS and any(
            entry.outdated or entry.problem for entry in entries
        ):
            # Somebody has altered a table, or switched off triggers.
            self._tended_at = now
            may = worker.execute(
                "SELECT has_function_privilege('ehub.tend_attached()', 'EXECUTE')"
            ).fetchone()
            if may == (True,):
                worker.execute("SELECT ehub.tend_triggers(), ehub.tend_attached()")


def _space(address: str) -> str:
    return address.partition("@")[0]
