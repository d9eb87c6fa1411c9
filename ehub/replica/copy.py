"""One index here: what answers, what it equals, and the work that keeps it so."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psycopg
from psycopg import errors as pg

from ehub.database import Connection, Database, repeatable_read
from ehub.errors import EhubError, IndexFileError
from ehub.index import (
    AnyIndex,
    HnswIndex,
    IndexStore,
    Manifest,
    Members,
    PartitionedIndex,
    build_index,
    build_partitioned,
    calibrate,
)
from ehub.replica.filters import Filters, Selected, read_selected
from ehub.replica.log import (
    Batch,
    Behind,
    Entry,
    acknowledged_nonce,
    changed_keys,
    estimated_rows,
    has_log_since,
    read_entry,
    read_rows,
    stream_rows,
    take_snapshot,
)
from ehub.replica.spool import Spool
from ehub.types import Matrix
from ehub.watermark import Watermark

_log = logging.getLogger(__name__)

_SAVE_SECONDS = 300.0
_ACKNOWLEDGE_SECONDS = 30.0
_MANY_KEYS = 100_000
# So many changes, and such a part of the rows, are too many for a search to look at
# (sql/nearest.sql).
_MANY_CHANGED = 1000
_CHANGED_PART = 50
_REPORT_SECONDS = 10.0
# A saved index is worth its log for a day; one that lives in memory has to show that it lives.
_SAVED_LEASE = "1 day"
_MEMORY_LEASE = "5 minutes"
# Beside the parameters in a manifest: what the table was when the index equalled it.
_EQUAL_UNDER = "equal_under"

# A backlog from here on is a job.
_LARGE_BACKLOG = 5000
_RECALIBRATE_CHANGES = 0.2
_FEW = 1000
# A search in an older snapshot knows the table as another one too, and would each time.
_DOUBT_SECONDS = 0.5
# The graphs of partitions are looked after so often.
_GRAPHS_SECONDS = 1.0


class State(enum.StrEnum):
    """What a copy of an index is doing."""

    LOADING = "loading"
    BUILDING = "building"
    COMPARING = "comparing"
    READY = "ready"
    FAILED = "failed"


class Progress(NamedTuple):
    """How far the work on an index is.

    Attributes:
        state: what is being done.
        done: rows that are done; ``total``: rows in all, 0 while that is unknown.
        error: the last failure, None if there was none.
    """

    state: State
    done: int
    total: int
    error: str | None


class _Stopped(Exception):  # noqa: N818 - control flow, not an error
    """The process is leaving; a job ends where it is."""


class Stamp(NamedTuple):
    """What the rows of an index equal: the table at a watermark.

    ``state`` names the life of the database, and of an attached table what it was then; None where
    nobody asks who would have to compare it. ``shape`` is what columns the table had, by which rows
    may be chosen.
    """

    state: str | None
    watermark: Watermark
    shape: str | None = None


@dataclasses.dataclass
class Fresh:
    """An index that a job has made, and the watermark that it equals."""

    index: AnyIndex
    watermark: Watermark
    # What its entry said of the table then.
    state: tuple[str | None, str]
    # Whether a file on disk holds just this.
    saved: bool = False
    # Keys applied since the acknowledged watermark, and those to read again.
    applied: set[str] = dataclasses.field(default_factory=set)
    redo: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Shared:
    """What the copies of one replica share with its thread."""

    database: Database
    interrupt: Callable[[], None]
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    connected: bool = False
    stopping: bool = False
    # Counts connections: what was read through an earlier one may have been undone.
    epoch: int = 0
    # The life of the database that the present connection goes to, where a service follows it.
    incarnation: str | None = None
    # What its copies say in front of their place.
    title: str = ""
    # Around what lets no other thread run for long.
    long_work: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


class Copy:
    """One index here. The replica's thread owns it; a job only what it was given."""

    def __init__(self, entry: Entry, folder: Path, shared: Shared) -> None:
        self.entry = entry
        self._shared = shared
        self.store = IndexStore(folder)
        # Only the owner of the folder goes by its name and saves; others live in memory alone.
        self.owner = False
        self.id = uuid.uuid4()
        self.state = State.LOADING
        self.index: AnyIndex | None = None
        # What searches have asked for, and what a job has read for it.
        self.filters = Filters()
        self.selected: Selected | None = None
        self.watermark: Watermark | None = None
        self.equal_under: tuple[str | None, str] = entry.state
        self.source = entry.source
        self.fresh: Fresh | None = None
        self.job: str | None = None
        self.error: str | None = None
        # What is told of it: keys that it is known to lack, and since when by time.time(); when it
        # last equalled a snapshot, when something last failed, and how often saving did.
        self.lag = 0
        self.lags_since: float | None = None
        self.caught_up_at: float | None = None
        self.failed_at: float | None = None
        self.failed_saves = 0
        self.done = self.total = 0
        # No new job before, no reading of the table before.
        self.retry_at = 0.0
        self.blocked_until = 0.0
        self.failures = 0
        # The last cycle that brought it to its snapshot.
        self.brought = 0
        self._dropped = False
        self._thread: threading.Thread | None = None
        # That of the job under way, which may wait for a lock of somebody else's.
        self._connection: Connection | None = None

        # What was acknowledged, and the keys applied since: after a lost connection the log is
        # read again from there, and so are these keys.
        self.acknowledged: Watermark | None = None
        self.nonce: uuid.UUID | None = None
        self.unacknowledged: set[str] = set()
        self.redo: set[str] = set()

        # Whether what was acknowledged is a rebuild's, while another index answers.
        self.mixed = False
        self.unsaved = False
        self.saved_at = time.monotonic()
        self.acknowledged_at = time.monotonic()
        self.reported_at = 0.0
        self.reported: list[object] = []
        self.unmeasured = 0
        self._graphs_at = self._select_at = 0.0
        self._doubted_at = 0.0

    @property
    def _name(self) -> str:
        """What it goes by in the log."""
        entry = self.entry
        return entry.address if entry.name is None else f"{entry.address}, index {entry.name}"

    @property
    def _lease(self) -> str:
        return _SAVED_LEASE if self.owner else _MEMORY_LEASE

    @property
    def _place(self) -> str:
        where = self.store.folder if self.owner else f"process {os.getpid()}"
        return f"{self._shared.title}{socket.gethostname()} {where}"

    def serving(self) -> bool:
        """Whether it may answer."""
        return self.state is State.READY and self.index is not None and self.watermark is not None

    @property
    def behind(self) -> bool:
        """Whether it lacks so much that searches of the present do without it."""
        # As ehub.deciding_keys decides.
        return self.lag > _MANY_CHANGED and self.lag > len(self.index or ()) / _CHANGED_PART

    def health(self) -> str:
        """Say how it is, in a word: a state, or 'behind'."""
        return "behind" if self.serving() and self.behind else str(self.state)

    def _lags(self, keys: int) -> None:
        """Remember how many keys it lacks, 0 where it equals a snapshot."""
        now = time.time()
        was_behind = self.behind
        if not keys:
            self.lags_since, self.caught_up_at = None, now
        elif self.lags_since is None:
            self.lags_since = now
        self.lag = keys
        if self.behind and not was_behind:
            _log.warning("%s: %d rows behind; searches of the present are exact", self._name, keys)
        elif was_behind and not self.behind:
            _log.warning("%s: has caught up", self._name)

    def ask(self, text: str) -> None:
        """Remember that a search has a filter, which the index may come to know. Of any thread."""
        if self.filters.ask(text):
            self._shared.interrupt()

    def doubt(self) -> None:
        """Have the table looked at soon: a search knows it as another one. Of any thread."""
        now = time.monotonic()
        if now - self._doubted_at > _DOUBT_SECONDS:
            self._doubted_at = now
            self._shared.interrupt()

    def settled(self) -> bool:
        """Whether it answers, or cannot for now: others need not wait for it."""
        return self.serving() or self.state is State.FAILED

    def begun(self) -> bool:
        """Whether there is an index, or work on one."""
        return self.index is not None or self.fresh is not None or self.job is not None

    def forget_stamp(self) -> None:
        """Say no more what the index equals, until it was brought there again."""
        if self.index is not None:
            self.index.as_of = None

    def _stamp(self, watermark: Watermark, incarnation: str | None) -> Stamp:
        """Return what the rows of an index equal that was brought to this watermark."""
        token = self.equal_under[0]
        if incarnation is not None and token is not None:
            incarnation = f"{incarnation}/{token}"
        return Stamp(incarnation, watermark, self.entry.shape)

    def resume(self, worker: Connection) -> None:
        """Go back to what was acknowledged, over a new connection.

        The server may have crashed or failed over, and then it uses transaction ids again that the
        watermark takes for seen.
        """
        if self.acknowledged is None:
            return
        nonce = acknowledged_nonce(worker, self.id, self.entry.index_id)
        with self._shared.changed:
            if nonce != self.nonce or self.mixed:
                _log.warning("%s: this is not the state it knew; comparing", self.entry.address)
                self.watermark = self.nonce = None
                return
            if self.index is not None:
                self.redo |= self.unacknowledged
                self.watermark = self.acknowledged
                if isinstance(self.index, HnswIndex):
                    # What was read for them is not among the keys that are read again.
                    self.index.deselect()
            if self.fresh is not None:
                self.fresh.redo |= self.fresh.applied
                self.fresh.watermark = self.acknowledged

    def bring(self, worker: Connection, snapshot: Watermark, cycle: int) -> bool:
        """Bring one index to the snapshot; True if its table had changed."""
        index, watermark, redo = self.index, self.watermark, self.redo
        fresh = self.fresh
        if time.monotonic() < self.blocked_until:
            return False
        if self.entry.problem is not None:
            self._set_aside(self.entry.problem)
            return False
        if fresh is not None and self.job is None and fresh.state != self.entry.state:
            # The table is not any more what it was then, and who changed it wrote no log.
            self.index, self.watermark, self.fresh = fresh.index, None, None
            self.forget_stamp()
            return True
        if self.source != self.entry.source:
            # What selects by a column may be of another one now.
            self.source = self.entry.source
            self.filters, self.selected = Filters(), None
            if isinstance(index, HnswIndex):
                index.deselect()
        if watermark is not None and self.equal_under != self.entry.state:
            _log.info("%s: its table was altered; comparing", self.entry.address)
            self.watermark = None
            self.forget_stamp()
            return True
        if fresh is not None and self.nonce is None:
            # Made from a state that the database has lost since.
            self.index, self.fresh, self.watermark = fresh.index, None, None
            return True
        if fresh is not None and self.job is None:
            index, watermark, redo = fresh.index, fresh.watermark, fresh.redo
        else:
            fresh = None
        if index is None:
            self._submit("open", self._open)
            return False
        if self.job in ("catch up", "compare"):
            return False
        if watermark is None:
            self.state = State.COMPARING
            self._submit("compare", self._compare, index)
            return False
        try:
            keys = changed_keys(worker, self.entry, watermark, redo)
        except Behind as why:
            _log.info("%s: %s; building its index anew", self.entry.address, why)
            self.state = State.BUILDING
            self.index = self.fresh = None
            self._submit("rebuild", self._build)
            return True
        if len(keys) > _LARGE_BACKLOG:
            self._lags(len(keys))
            life = self._shared.epoch, self._shared.incarnation
            if not self._submit("catch up", self._catch_up, fresh, *life):
                # Another job goes on; to read so many keys again and again would not help it.
                self.blocked_until = time.monotonic() + 0.5
            return True
        if fresh is not None:
            self.equal_under = fresh.state
        stamp = self._stamp(snapshot, self._shared.incarnation)
        selected = self._usable_selected(index, fresh)
        if selected is not None:
            try:
                keys |= changed_keys(worker, self.entry, selected.watermark, set())
            except Behind:
                selected = None
        if keys or selected is not None:
            self._apply(index, keys, worker, selected, stamp)
        index.as_of = stamp
        if fresh is not None:
            self._adopt(fresh)
        self._applied(keys)
        self.redo = set()
        self.watermark = snapshot
        self.brought = cycle
        self._lags(0)
        return bool(keys) or fresh is not None

    def may_fail(self, error: Exception) -> bool:
        """Whether the others go on without this one, which cannot be brought for this reason.

        TRUNCATE or DDL that is not committed, a space that was deleted just now; and whatever comes
        of a table that is somebody else's.
        """
        known = (pg.LockNotAvailable, pg.InsufficientPrivilege, pg.UndefinedTable)
        if isinstance(error, known):
            return True
        if self.entry.attached and isinstance(error, psycopg.Error):
            self._set_aside(str(error))
            return True
        return False

    def _set_aside(self, problem: str) -> None:
        """Answer nothing while the table cannot be followed; afterwards all is compared."""
        if self.error != problem or self.state is not State.FAILED:
            self.failed_at = time.time()
            _log.warning("%s: no index follows it: %s", self.entry.address, problem)
        self.state, self.error = State.FAILED, problem
        self.watermark = None
        self.forget_stamp()

    def _usable_selected(self, index: AnyIndex, fresh: Fresh | None) -> Selected | None:
        """Take what a job has read for selections, if it is for this index and connection."""
        selected, self.selected = self.selected, None
        if selected is None or fresh is not None or isinstance(index, PartitionedIndex):
            return None
        return selected if selected.epoch == self._shared.epoch else None

    def _apply(
        self,
        index: AnyIndex,
        keys: set[str],
        worker: Connection,
        selected: Selected | None,
        stamp: Stamp,
    ) -> None:
        """Make an index, and its selections, equal to the table for ``keys``."""
        if isinstance(index, PartitionedIndex):
            _apply(index, keys, read_rows(worker, self.entry, keys), stamp)
            return
        new = {} if selected is None else selected.rows
        coming = sum(0 if vectors is None else vectors.size for _, vectors in new.values())
        conditions = self.filters.keep(index, coming)
        if selected is not None:
            conditions |= selected.conditions
        matching: list[set[str]] = [set() for _ in conditions]

        def rows() -> Iterator[Batch]:
            for batch in read_rows(worker, self.entry, keys, list(conditions.values())):
                for column, found in enumerate(matching):
                    found.update(
                        batch.keys[row] for row in np.flatnonzero(batch.matches[:, column])
                    )
                yield batch

        def members() -> dict[str, Members]:
            return {
                text: Members(found, *_without(new[text], keys)) if text in new else Members(found)
                for text, found in zip(conditions, matching, strict=True)
            }

        self.filters.conditions = conditions
        _apply(index, keys, rows(), stamp, members)

    def _adopt(self, fresh: Fresh) -> None:
        """Answer from an index that a job has made, from the watermark that was acknowledged."""
        self.index, self.fresh = fresh.index, None
        self.equal_under = fresh.state
        self.unacknowledged = set(fresh.applied)
        self.unmeasured = len(fresh.applied)
        self.mixed = False
        self.unsaved = not fresh.saved or bool(fresh.applied)
        self.saved_at = time.monotonic() if fresh.saved else float("-inf")
        self.state = State.READY
        self.error = None
        self.failures = 0

    def _applied(self, keys: set[str]) -> None:
        self.unacknowledged |= keys
        self.unmeasured += len(keys)
        self.unsaved |= bool(keys)

    # --- between cycles

    def look_after(self, worker: Connection) -> None:
        """Do what is due: a job, an acknowledgement, a report."""
        now = time.monotonic()
        index, watermark = self.index, self.watermark
        if index is not None and watermark is not None and self.serving():
            if isinstance(index, PartitionedIndex):
                self._look_after_graphs(index, now)
            else:
                self._look_after_graph(index)
            if self.owner and self.unsaved and self._save_is_due(now):
                self._begin_save(index, watermark)
            elif not self.owner and now - self.acknowledged_at > _ACKNOWLEDGE_SECONDS:
                if self.job is None and watermark != self.acknowledged:
                    self._acknowledge(worker, watermark, uuid.uuid4())
                    self.unacknowledged = set()
                    self.mixed = False
            if isinstance(index, HnswIndex) and self.selected is None and now > self._select_at:
                # Last, so that whoever asks for ever new ones keeps nothing else from being done.
                if due := self.filters.due(index):
                    self._submit("select", self._select, index, due, self._shared.epoch)
        self._report(worker, now)

    def _look_after_graph(self, index: HnswIndex) -> None:
        if index.is_worn(_FEW):
            self._submit("rebuild", self._build)
        elif self.unmeasured > _RECALIBRATE_CHANGES * max(len(index), _FEW):
            if self._submit("measure", self._measure, index):
                self.unmeasured = 0

    def _look_after_graphs(self, index: PartitionedIndex, now: float) -> None:
        if now - self._graphs_at > _GRAPHS_SECONDS:
            self._graphs_at = now
            if index.worn:
                target = self.entry.target_recall
                self._submit("rebuild", index.compact, target, self._progressed)
            elif index.uncalibrated:
                self._submit("measure", self._measure, index)

    def _report(self, worker: Connection, now: float) -> None:
        watermark, index = self.watermark or self.acknowledged, self.index
        if watermark is None or self.acknowledged is None:
            return
        age = now - self.reported_at
        # What a service has saved answers nobody after its end.
        state = "stopped" if self._shared.stopping and self._shared.title else self.health()
        # A new state is told at once, numbers now and then, and a sign of life before the lease
        # ends.
        if self.reported[:1] == [state] and age < _REPORT_SECONDS:
            return
        values: list[object] = [
            state,
            len(index) if index else 0,
            index.tombstones if index else 0,
            index.calibration.ef if index else None,
            index.calibration.recall if index else None,
            index.memory if index else None,
            self.error,
        ]
        if values == self.reported and age < (3600 if self.owner else 60):
            return
        self.reported_at, self.reported = now, values
        kept = worker.execute(
            "SELECT ehub.report(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s::text::pg_snapshot,"
            " %s::text::interval)",
            [self.id, self.entry.index_id, *values, str(watermark), self._lease],
        ).fetchone()
        if kept == (False,):
            # The lease ran out, or the space is being deleted: the log may be gone.
            self.watermark = self.nonce = None

    def _save_is_due(self, now: float) -> bool:
        # Keys that are not acknowledged are kept in memory.
        many = len(self.unacknowledged) > _MANY_KEYS
        return now - self.saved_at > (_ACKNOWLEDGE_SECONDS if many else _SAVE_SECONDS)

    def _begin_save(self, index: AnyIndex, watermark: Watermark) -> None:
        if self.job is not None:
            return
        before, self.unacknowledged = self.unacknowledged, set()
        self.unsaved = False
        self.saved_at = time.monotonic()
        finish = self._write(index, watermark)

        def save() -> None:
            try:
                manifest = finish()
                with self._shared.database.connection() as connection:
                    self._acknowledge(connection, watermark, uuid.UUID(manifest.nonce))
                self.mixed = False
            except BaseException:
                self.unacknowledged |= before
                self.unsaved = True
                raise

        self._submit("save", save)

    def _write(self, index: AnyIndex, watermark: Watermark) -> Callable[[], Manifest]:
        """Begin to save an index that equals its table at a watermark."""
        build = self.entry.build_parameters() | {_EQUAL_UNDER: list(self.equal_under)}
        return self.store.begin_save(index, build, str(watermark))

    def leave(self) -> None:
        """Save the last state, so that the next start has little to do. No job may be under way."""
        index, watermark = self.index, self.watermark
        with contextlib.suppress(EhubError, psycopg.Error):
            with self._shared.database.connection() as connection:
                if not self.owner:
                    self.forget(connection)
                elif index is not None and watermark is not None and self.serving():
                    if self.unsaved:
                        finish = self._write(index, watermark)
                        self._acknowledge(connection, watermark, uuid.UUID(finish().nonce))
                    self.reported = []
                    self._report(connection, time.monotonic())

    def forget(self, connection: Connection) -> None:
        """End its lease: the log need not be kept for it."""
        connection.execute("SELECT ehub.forget_replica(%s, %s)", [self.id, self.entry.index_id])

    def drop(self, *, delete: bool) -> None:
        """Give up the folder; ``delete`` also what is saved there."""
        self._dropped = True
        if delete and self.owner:
            with contextlib.suppress(OSError):
                self.store.delete()
        self.store.release()

    def join(self, seconds: float) -> bool:
        """Wait for the job under way, after the replica was told to stop; True if it did."""
        if self._thread is None:
            return True
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.cancel_safe(timeout=seconds)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _acknowledge(self, connection: Connection, watermark: Watermark, nonce: uuid.UUID) -> None:
        connection.execute(
            "SELECT ehub.acknowledge(%s, %s, %s, %s::text::pg_snapshot, %s, %s,"
            " %s::text::interval)",
            [
                self.id,
                self.entry.index_id,
                self._place,
                str(watermark),
                nonce,
                len(self.index) if self.index else 0,
                self._lease,
            ],
        )
        self.acknowledged, self.nonce = watermark, nonce
        self.acknowledged_at = time.monotonic()

    # --- jobs

    def _submit(self, name: str, work: Callable[..., None], *values: object) -> bool:
        """Start a job; False if another one is under way, or the last one has just failed."""
        if self.job is not None or time.monotonic() < self.retry_at:
            return False
        self.job = name

        def run() -> None:
            try:
                work(*values)
                if self.error is not None and self.error.startswith(f"{name}: "):
                    self.error = None
            except (_Stopped, Behind):
                # The next cycle sees for itself that it is behind.
                pass
            except Exception as error:
                if self._shared.stopping and isinstance(error, pg.QueryCanceled):
                    # Whoever leaves does not wait for somebody else's lock.
                    return
                if self._dropped:
                    # Its folder is gone, and its space or the right to it.
                    return
                self.failures += 1
                self.failed_saves += name == "save"
                self.failed_at = time.time()
                self.error = f"{name}: {error}"
                self.retry_at = time.monotonic() + min(0.5 * 2**self.failures, 60)
                if self.index is None:
                    self.state = State.FAILED
                _log.warning(
                    "%s: index: %s",
                    self.entry.address,
                    self.error,
                    exc_info=not isinstance(error, EhubError | psycopg.Error | OSError),
                )
            finally:
                if self._dropped:
                    # It may have taken the folder after that was given up.
                    self.store.release()
                self.job = None
                with self._shared.changed:
                    self._shared.changed.notify_all()
                self._shared.interrupt()

        self._thread = threading.Thread(target=run, name=f"ehub-{name}", daemon=True)
        self._thread.start()
        return True

    def _open(self) -> None:
        """Load the saved index if it is of use, else build one."""
        entry, store = self.entry, self.store
        self.state = State.LOADING
        try:
            self.owner = store.own()
            if self.owner:
                self.id = store.identity()
            manifest = store.manifest()
            index = None
            build = {} if manifest is None else dict(manifest.build)
            equal_under = build.pop(_EQUAL_UNDER, None)
            if manifest is not None and build == entry.build_parameters():
                with self._shared.long_work():
                    index = store.load(manifest)
        except IndexFileError as error:
            _log.warning("%s: %s; building the index anew", entry.address, error)
            manifest = index = None
        if manifest is None or index is None:
            self._build()
            return
        watermark = Watermark.parse(manifest.watermark)
        with self._shared.database.connection() as connection:
            nonce = acknowledged_nonce(connection, store.identity(), entry.index_id)
            known = nonce == uuid.UUID(manifest.nonce) and equal_under == list(entry.state)
            if known and self.owner:
                self.acknowledged, self.nonce = watermark, nonce
            elif known:
                self._acknowledge(connection, watermark, uuid.uuid4())
            # Asked after the lease is there: from then on nobody trims above it.
            known = known and has_log_since(connection, entry, watermark)
        if known:
            self.fresh = Fresh(index, watermark, entry.state, saved=True)
        else:
            _log.info("%s: the saved index is not as of a known state", entry.address)
            self.state = State.COMPARING
            self._compare(index)

    def _build(self) -> None:
        """Build an index from the whole table, as of one snapshot."""
        entry = self.entry
        if self.index is None:
            self.state = State.BUILDING
        started = time.monotonic()
        _log.info("%s: building its index", self._name)
        with Spool(self.store.folder, entry.dims) as spool:
            watermark, state = self._stream(spool.write)
            self.done, self.total = 0, spool.rows
            keys, vectors, partitions = spool.all()
            parameters = (
                *(entry.metric, entry.m, entry.ef_construction, entry.target_recall),
                self._progressed,
            )
            index: AnyIndex
            if entry.partition_by is None:
                index = build_index(keys, vectors, *parameters)
            else:
                index = build_partitioned(keys, vectors, partitions, *parameters)
        seconds = time.monotonic() - started
        _log.info("%s: its index of %d rows is built, in %.1f s", self._name, len(index), seconds)
        self.fresh = Fresh(index, watermark, state)

    def _progressed(self, rows: int) -> None:
        self._check_stopped()
        self.done = rows

    def _compare(self, index: AnyIndex) -> None:
        """Make an index equal to the whole table, where it is not known what changed."""
        present: set[str] = set()

        def compare(batch: Batch) -> None:
            present.update(batch.keys)
            _stage(index, batch)

        try:
            watermark, state = self._stream(compare)
            index.publish(set(index.keys()) - present)
        except BaseException:
            index.discard()
            raise
        self._measure(index)
        self.index = None
        self.fresh = Fresh(index, watermark, state)

    def _catch_up(self, fresh: Fresh | None, epoch: int, incarnation: str | None) -> None:
        """Apply a large backlog, to the index that answers or to one that is about to."""
        entry = self.entry
        state: Copy | Fresh = self if fresh is None else fresh
        index = state.index
        if index is None or state.watermark is None:
            return
        with contextlib.ExitStack() as stack:
            with self._connected() as connection, repeatable_read(connection):
                snapshot = take_snapshot(connection)
                keys = changed_keys(connection, entry, state.watermark, state.redo)
                spool = stack.enter_context(Spool(self.store.folder, entry.dims, len(keys)))
                for batch in read_rows(connection, entry, keys):
                    self._check_stopped()
                    spool.write(batch)
            self.done, self.total = 0, spool.rows

            def batches() -> Iterator[Batch]:
                for batch in spool.batches():
                    self._check_stopped()
                    yield batch
                    self.done += len(batch.keys)

            _apply(index, keys, batches(), self._stamp(snapshot, incarnation))
        with self._shared.changed:
            if fresh is None:
                self._applied(keys)
            else:
                fresh.applied |= keys
            if epoch == self._shared.epoch and self._shared.connected:
                state.redo = set()
                state.watermark = snapshot
            else:
                # What was read may have been undone by a crash.
                state.redo |= keys
                index.as_of = None

    def _measure(self, index: AnyIndex) -> None:
        if isinstance(index, PartitionedIndex):
            index.calibrate_graphs(self.entry.target_recall)
        else:
            calibrate(index, self.entry.target_recall)

    def _select(self, index: HnswIndex, due: dict[str, bool], epoch: int) -> None:
        """Read which rows match some filters, for the index to keep; the next cycle takes it."""
        started = time.monotonic()
        with self._connected() as connection:
            with repeatable_read(connection):
                self.selected = read_selected(
                    connection, self.entry, index, due, epoch, self._check_stopped
                )
        # The database has as much rest as work with it.
        self._select_at = 2 * time.monotonic() - started

    def _stream(self, receive: Callable[[Batch], None]) -> tuple[Watermark, tuple[str | None, str]]:
        """Read the whole table in one snapshot, and take a lease of the log from there on.

        Returns the snapshot, and what the entry said of the table then.
        """
        with self._connected() as connection:
            while True:
                with repeatable_read(connection):
                    snapshot = take_snapshot(connection)
                    entry = read_entry(connection, self.entry)
                    self.done, self.total = 0, estimated_rows(connection, entry)
                    with self._shared.database.connection() as other:
                        self._acknowledge(other, snapshot, uuid.uuid4())
                        self.unacknowledged = set()
                        self.mixed = self.index is not None
                        if not has_log_since(other, entry, snapshot):
                            continue
                    for batch in stream_rows(connection, entry):
                        self._check_stopped()
                        receive(batch)
                        self.done += len(batch.keys)
                    return snapshot, entry.state

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Lend a connection of its own to a job."""
        with contextlib.closing(self._shared.database.connect()) as connection:
            self._connection = connection
            try:
                # Whoever stops the job later finds the connection.
                self._check_stopped()
                yield connection
            finally:
                self._connection = None

    def _check_stopped(self) -> None:
        if self._shared.stopping or self._dropped:
            raise _Stopped


def _apply(
    index: AnyIndex,
    keys: set[str],
    rows: Iterable[Batch],
    stamp: Stamp,
    members: Callable[[], dict[str, Members]] = dict,
) -> None:
    """Make an index equal to the table for ``keys``, which have these rows, at one moment.

    ``members`` says then what becomes of its selections; those that it does not name end.
    """
    absent = set(keys)
    try:
        for batch in rows:
            absent.difference_update(batch.keys)
            _stage(index, batch)
        if isinstance(index, PartitionedIndex):
            index.publish(absent, stamp)
        else:
            index.publish(absent, stamp, keys, members())
    except BaseException:
        index.discard()
        raise


def _stage(index: AnyIndex, batch: Batch) -> None:
    """Stage the rows that an index does not have like this."""
    # Metadata may have changed and the vector not: that is nothing to a graph.
    keys, vectors, partitions, _ = batch
    if isinstance(index, PartitionedIndex):
        differs = np.flatnonzero(index.differing(keys, vectors, partitions))
        if len(differs):
            names = [partitions[row] for row in differs]
            index.add([keys[row] for row in differs], vectors[differs], names)
    else:
        differs = np.flatnonzero(index.differing(keys, vectors))
        if len(differs):
            index.add([keys[row] for row in differs], vectors[differs])


def _without(
    rows: tuple[list[str], Matrix | None], gone: set[str]
) -> tuple[list[str], Matrix | None]:
    """Return rows without some keys."""
    keys, vectors = rows
    if not gone:
        return rows
    kept = [row for row, key in enumerate(keys) if key not in gone]
    return [keys[row] for row in kept], None if vectors is None else vectors[kept]
