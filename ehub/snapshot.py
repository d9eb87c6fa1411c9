"""A local copy of a version as of one instant, that nothing moves under its reader."""

from __future__ import annotations

import dataclasses
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias, cast, overload

import numpy as np
from numpy.typing import ArrayLike

from ehub import jsontext, values
from ehub.database import Connection, Database, copy_rows
from ehub.download import Block, Lease, Source, download, identity, news
from ehub.errors import (
    ConfigurationError,
    ConflictError,
    InvalidValueError,
    KeyNotFoundError,
    ReadOnlyError,
    WaitTimeoutError,
)
from ehub.index import HnswIndex, build_index, nearest_of_all
from ehub.types import Matrix, Metadata, Metric, Neighbor, Vector

OnConflict: TypeAlias = Literal["error", "ours", "theirs"]
"""Of rows that somebody else has changed: nothing is written; ours are; theirs stay."""

_COPY_ROWS = 5000


class Refreshed(NamedTuple):
    """What a refresh brought: the number of keys, and whether all rows had to be downloaded."""

    changed: int
    whole: bool


class Written(NamedTuple):
    """What writing a snapshot changed, and the keys that somebody else had changed meanwhile."""

    written: int
    deleted: int
    conflicts: list[str]


# What a fork has put in the place of a row: a vector with its metadata, or nothing.
_Own: TypeAlias = tuple[Vector, str | None] | None


class Snapshot:
    """All rows of a version as of one instant, in memory. Any thread may call any method.

    Got by ``space.download_snapshot()`` or :meth:`load`. It has what a space has for reading and
    searching; to write, :meth:`fork` it. The first search begins to build an index of the rows in
    the background; until it is ready, and with few rows, answers are exact.
    """

    def __init__(
        self,
        source: Source,
        block: Block,
        database: Database | None = None,
        address: str | None = None,
        lease: Lease | None = None,
        writable: bool = False,
    ) -> None:
        block.vectors.flags.writeable = False
        self._source, self._block = source, block
        self._database, self._lease = database, lease
        self._address = address or source.space
        self._writable = writable
        self._mutex = threading.RLock()
        self._places_made: dict[str, int] | None = None
        # A fork's own changes, over the rows that were taken; and how those rows were when it first
        # changed them, which a refresh does not touch.
        self._own: dict[str, _Own] = {}
        self._base: dict[str, _Own] = {}
        self._refreshing = threading.Lock()
        self._merged: Block | None = block
        self._index: HnswIndex | None = None
        self._building: Future[None] | None = None
        # Keys that changed since the rows were given to the build under way.
        self._missed: set[str] = set()
        self._progress: tuple[int, int] = (0, 0)

    @classmethod
    def download(
        cls,
        database: Database,
        address: str,
        watch: Callable[[int, int], None] | None = None,
    ) -> Snapshot:
        """Download a space or a version of it; see ``space.download_snapshot()``."""
        source, block, lease = download(database, address, uuid.uuid4(), watch)
        return cls(source, block, database, address, lease)

    # --- what it is

    @property
    def space(self) -> str:
        """The name of the space that it was taken of."""
        return self._source.space

    @property
    def version(self) -> str:
        """The name of the version that it was taken of."""
        return self._source.version

    @property
    def dims(self) -> int:
        """The length of its vectors."""
        return self._source.dims

    @property
    def metric(self) -> Metric:
        """``l2``, ``cosine`` or ``ip``."""
        return self._source.metric

    @property
    def writable(self) -> bool:
        """Whether it is a fork."""
        return self._writable

    def __repr__(self) -> str:
        kind = "Fork" if self._writable else "Snapshot"
        return f"<{kind} of {self.space}@{self.version}: {len(self):,} rows of {self.dims} dims>"

    # --- keys and values

    def __len__(self) -> int:
        return len(self._rows().keys)

    def __bool__(self) -> bool:
        """Be true, also without rows."""
        return True

    def __contains__(self, key: object) -> bool:
        return self._find(values.as_key(key)) is not None

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def keys(self) -> Iterator[str]:
        """Iterate over the keys, in no order."""
        return iter(self._rows().keys)

    @overload
    def items(self, *, metadata: Literal[False] = False) -> Iterator[tuple[str, Vector]]: ...
    @overload
    def items(self, *, metadata: Literal[True]) -> Iterator[tuple[str, Vector, dict[str, Any]]]: ...
    def items(
        self, *, metadata: bool = False
    ) -> Iterator[tuple[str, Vector]] | Iterator[tuple[str, Vector, dict[str, Any]]]:
        """Iterate over ``(key, vector)``, or ``(key, vector, metadata)``, in no order."""
        rows = self._rows()
        if metadata:
            return zip(rows.keys, rows.vectors, map(_note, rows.notes), strict=True)
        return zip(rows.keys, rows.vectors, strict=True)

    def get(self, key: str) -> Vector:
        """Return the vector of a key, float32 of shape ``(dims,)``, not to be written to.

        Raises:
            KeyNotFoundError: there is none.
        """
        return self._row(key)[0]

    def metadata(self, key: str) -> dict[str, Any]:
        """Return the metadata of a key, ``{}`` where none was given.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        return _note(self._row(key)[1])

    def multiget(self, keys: Iterable[str]) -> Matrix:
        """Return the vectors of many keys, in their order: float32 of shape ``(n, dims)``.

        Raises:
            KeyNotFoundError: one of them is not there; it is named.
            InvalidValueError: no keys were given.
        """
        return np.stack([self._row(key)[0] for key in values.as_keys(keys)])

    def numpy(self) -> tuple[list[str], Matrix]:
        """Return all keys, and their vectors by row: float32, not copied, not to be written to."""
        rows = self._rows()
        return rows.keys, rows.vectors

    def batches(
        self, size: int, *, shuffle: bool = False, seed: int | None = None
    ) -> Iterator[tuple[list[str], Matrix]]:
        """Iterate over the rows in batches of keys and vectors, as a training loop takes them.

        With ``shuffle`` in random order, the same for the same ``seed``. The last batch may be
        smaller.

        Raises:
            InvalidValueError: ``size`` is not positive.
        """
        if size < 1:
            raise InvalidValueError(f"size is a positive number, not {size}")
        return self._batches(self._rows(), size, shuffle, seed)

    @staticmethod
    def _batches(
        rows: Block, size: int, shuffle: bool, seed: int | None
    ) -> Iterator[tuple[list[str], Matrix]]:
        n = len(rows.keys)
        order = np.random.default_rng(seed).permutation(n) if shuffle else None
        for start in range(0, n, size):
            if order is None:
                yield rows.keys[start : start + size], rows.vectors[start : start + size]
            else:
                part = order[start : start + size]
                yield [rows.keys[row] for row in part], rows.vectors[part]

    # --- neighbours

    def nearest_neighbors(
        self,
        k: SupportsIndex,
        *,
        key: str | None = None,
        vector: ArrayLike | None = None,
        metadata: bool = False,
    ) -> list[Neighbor]:
        """Find the ``k`` nearest rows to a stored ``key``, which is left out, or to a ``vector``.

        Distances are those of the space. See the class for who answers.

        Raises:
            KeyNotFoundError: there is no such key.
            InvalidValueError: ``k``, the vector, or not just one of ``key`` and ``vector``.
        """
        count = values.as_count(k)
        values.require_one_of(key=key, vector=vector)
        if key is not None:
            (found,) = self._nearest(self._row(key)[0][None], count + 1)
            near = [one for one in found if one.key != key][:count]
        else:
            query = values.as_vector(vector, self.dims, self.metric, f"{self._place}, query")
            (near,) = self._nearest(query[None], count)
        return self._complete(near) if metadata else near

    def multi_nearest_neighbors(
        self, k: SupportsIndex, *, vectors: ArrayLike, metadata: bool = False
    ) -> list[list[Neighbor]]:
        """Find the ``k`` nearest rows to each of many vectors, shape ``(n, dims)``, in parallel.

        Raises:
            InvalidValueError: ``k``, a vector, which is named by its row, or no vectors at all.
        """
        count = values.as_count(k)
        queries = values.require_some(
            values.as_matrix(vectors, self.dims, self.metric, f"{self._place}, queries")
        )
        found = self._nearest(queries, count)
        return [self._complete(near) for near in found] if metadata else found

    def wait_until_indexed(
        self,
        timeout: float | None = None,
        *,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        """Wait until the index of the rows is built; ``timeout`` is in seconds.

        ``watch`` is told now and then how many rows of how many are in it.

        Raises:
            WaitTimeoutError: it was not built in time; the work goes on.
        """
        building = self._begin_index()
        waited = 0.0
        while building is not None:
            step = 0.1 if timeout is None else min(0.1, max(timeout - waited, 0))
            try:
                building.result(step)
                return
            except TimeoutError:
                waited += step
                if watch is not None:
                    watch(*self._progress)
            if timeout is not None and waited >= timeout:
                raise WaitTimeoutError(f"{self._place}: no index in {timeout} seconds")

    # --- writing here

    def fork(self) -> Snapshot:
        """Return a copy that can be written, here. Rows are shared until they are."""
        with self._mutex:
            fork = Snapshot(
                self._source, self._block, self._database, self._address, self._lease, writable=True
            )
            fork._own, fork._base = dict(self._own), dict(self._base)
            fork._merged = self._merged
            return fork

    def set(self, key: str, vector: ArrayLike, metadata: Metadata | None = None) -> None:
        """Store a vector under a key, in this fork.

        Without ``metadata`` a key that was there keeps what it had.

        Raises:
            ReadOnlyError: this is not a fork.
            InvalidValueError: the key, the vector or the metadata; nothing was changed.
        """
        self.multiset([(key, vector, metadata)])

    def multiset(
        self,
        rows: Mapping[str, ArrayLike]
        | Iterable[tuple[str, ArrayLike] | tuple[str, ArrayLike, Metadata | None]],
    ) -> int:
        """Store many vectors in this fork: all or nothing. Returns the number of keys.

        Takes a mapping, or ``(key, vector)`` or ``(key, vector, metadata)``.

        Raises:
            ReadOnlyError: this is not a fork.
            InvalidValueError: a row, which is named, or no rows at all; nothing was changed.
        """
        self._require_writable()
        new: dict[str, _Own] = {}
        for row in rows.items() if isinstance(rows, Mapping) else rows:
            key = values.as_key(row[0])
            place = values.describe(self.space, key)
            vector = values.as_vector(row[1], self.dims, self.metric, place).copy()
            vector.flags.writeable = False
            note = row[2] if len(row) == 3 else None
            if note is not None:
                text: str | None = values.as_json(note, place)
            else:
                known = new.get(key) or self._find(key)
                text = known[1] if known else None
            new[key] = (vector, text)
        if not new:
            raise InvalidValueError("an empty batch: no embeddings were given")
        self._change(new)
        return len(new)

    def delete(self, key: str) -> None:
        """Delete a key, in this fork.

        Raises:
            ReadOnlyError: this is not a fork.
            KeyNotFoundError: it was not there.
        """
        self.multidelete([key])

    def multidelete(self, keys: Iterable[str]) -> int:
        """Delete many keys in this fork: all or nothing. Returns their number.

        Raises:
            ReadOnlyError: this is not a fork.
            KeyNotFoundError: one of them was not there; nothing was deleted.
            InvalidValueError: no keys were given.
        """
        self._require_writable()
        wanted = values.as_keys(keys)
        for key in wanted:
            self._row(key)
        self._change(dict.fromkeys(wanted))
        return len(set(wanted))

    def delete_all(self) -> int:
        """Delete every key in this fork, and return their number."""
        self._require_writable()
        keys = self._rows().keys
        self._change(dict.fromkeys(keys))
        return len(keys)

    # --- and the database

    @overload
    def refresh(self, wait: Literal[True] = True) -> Refreshed: ...
    @overload
    def refresh(self, wait: Literal[False]) -> Future[Refreshed]: ...
    def refresh(self, wait: bool = True) -> Refreshed | Future[Refreshed]:
        """Bring in what has changed in the space since, and nothing else; all at one moment.

        A fork keeps its own changes. What :meth:`numpy` has returned stays as it was. Without
        ``wait`` this goes on in the background, and the future tells when it is done. Where the
        change log is gone (it is kept for an hour after the last refresh), or the space's name
        means another version now, all rows are downloaded.

        Raises:
            ConfigurationError: it was loaded from a file without a hub.
            NotFoundError: the space or version has been deleted.
            InvalidValueError: a fork has changed rows of a version with other dims.
        """
        if wait:
            return self._refresh()
        future: Future[Refreshed] = Future()

        def run() -> None:
            try:
                future.set_result(self._refresh())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="ehub-refresh", daemon=True).start()
        return future

    def write_to_space(
        self, name: str, *, create: bool = False, on_conflict: OnConflict = "error"
    ) -> Written:
        """Write to a space, in one transaction; ``create`` makes it first.

        Into the version that it was taken of go a fork's own changes; into any other all rows.
        What else is there stays. A conflict is a row there that is neither as it was taken nor as
        it is here; ``on_conflict`` says what becomes of those.

        Raises:
            ConflictError: there are such rows, and they are an error; nothing was written.
            SpaceNotFoundError: there is no such space, or ``create`` and SpaceExistsError.
            InvalidValueError: the space has other dims.
            FrozenError: its current version was frozen.
        """
        made = ("SELECT ehub.create_space(%s, %s, %s, %s, %s, %s)", [name, *self._shape()])
        return self._write(name, False, on_conflict, made if create else None)

    def overwrite_space(self, name: str, *, on_conflict: OnConflict = "error") -> Written:
        """Make the rows of a space equal to these, in one transaction.

        A conflict is any row there that is neither as it was taken nor as it is here, also one that
        was added meanwhile. Raises what :meth:`write_to_space` does.
        """
        return self._write(name, True, on_conflict, None)

    def write_to_version(self, version: str, *, on_conflict: OnConflict = "error") -> Written:
        """Write to a version of the space that it was taken of; makes it if need be.

        As :meth:`write_to_space` otherwise.
        """
        made = (
            "SELECT ehub.create_version(%s, %s, %s, %s, NULL, %s, %s, %s)"
            " WHERE NOT EXISTS (SELECT FROM ehub.catalogue WHERE space = %s AND version = %s)",
            [self.space, version, *self._shape(), self.space, version],
        )
        return self._write(f"{self.space}@{version}", False, on_conflict, made)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all to a file, for machines without a database.

        ``.npz`` for numpy: ``vectors``, and keys and metadata as UTF-8 with the ends of each;
        ``.arrow`` for Arrow (Feather), with columns ``key``, ``embedding`` and ``metadata``: needs
        ``ehub[parquet]``. The file is there whole or not at all.

        Raises:
            InvalidFileError: another suffix, or the file cannot be written.
            DependencyError: pyarrow is not installed.
        """
        from ehub import archive

        rows = self._rows()
        description = {**dataclasses.asdict(self._source), "address": self._address}
        archive.save(Path(path), description, rows.keys, rows.vectors, rows.notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read what :meth:`save` wrote. It knows no database; ``hub.load_snapshot`` gives it one.

        Raises:
            InvalidFileError: it is damaged, or not a snapshot.
            DependencyError: pyarrow is needed and not installed.
        """
        return cls.load_for(None, path)

    @classmethod
    def load_for(cls, database: Database | None, path: str | os.PathLike[str]) -> Snapshot:
        """Read as :meth:`load` does, and know a database to refresh from and to write to."""
        # Loaded only where it is used: starts are to be quick.
        from ehub import archive

        description, keys, vectors, notes = archive.load(Path(path))
        address = description.pop("address")
        return cls(Source(**description), Block(keys, vectors, notes), database, address)

    def close(self) -> None:
        """Let the change log go that is kept for it; it can be read on. Safe to call twice."""
        lease, self._lease = self._lease, None
        if lease is not None and lease.nonce is not None and self._database is not None:
            with self._database.connection() as connection:
                connection.execute("SELECT ehub.release_log(%s)", [lease.id])

    # --- inside: rows

    @property
    def _place(self) -> str:
        return f"snapshot of {self.space!r}"

    def _shape(self) -> list[object]:
        one = self._source
        return [one.dims, one.metric, one.M, one.ef_construction, one.target_recall]

    def _places(self) -> dict[str, int]:
        places = self._places_made
        if places is None:
            self._places_made = places = {key: row for row, key in enumerate(self._block.keys)}
        return places

    def _taken(self, key: str) -> _Own:
        """Return a row as it was taken."""
        row = self._places().get(key)
        return None if row is None else (self._block.vectors[row], self._block.notes[row])

    def _find(self, key: str) -> _Own:
        with self._mutex:
            return self._own[key] if key in self._own else self._taken(key)

    def _row(self, key: str) -> tuple[Vector, str | None]:
        found = self._find(values.as_key(key))
        if found is None:
            raise KeyNotFoundError(f"{self._place} has no key {key!r}")
        return found

    def _rows(self) -> Block:
        """Return all rows, a fork's changes among them."""
        with self._mutex:
            if self._merged is None:
                self._merged = _with_changes(self._block, self._places(), self._own)
                self._merged.vectors.flags.writeable = False
            return self._merged

    def _require_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._place} cannot be written; fork() makes a copy that can")

    def _change(self, new: Mapping[str, _Own]) -> None:
        with self._mutex:
            for key, row in new.items():
                if row is None and key not in self._places() and self._base.get(key) is None:
                    # Added here, and gone again.
                    self._own.pop(key, None)
                    self._base.pop(key, None)
                else:
                    self._base.setdefault(key, self._taken(key))
                    self._own[key] = row
            self._merged = None
            self._follow(new)

    # --- inside: search

    def _nearest(self, queries: Matrix, k: int) -> list[list[Neighbor]]:
        self._begin_index()
        index = self._index
        found = None if index is None else index.search(queries, k)
        if found is not None:
            return [list(map(Neighbor, *one)) for one in found]
        rows = self._rows()
        near, far = nearest_of_all(queries, rows.vectors, k, self.metric)
        return [
            [Neighbor(rows.keys[row], distance) for row, distance in zip(*one, strict=True)]
            for one in zip(near.tolist(), far.tolist(), strict=True)
        ]

    def _complete(self, near: list[Neighbor]) -> list[Neighbor]:
        found = ((one, self._find(one.key)) for one in near)
        return [one._replace(metadata=_note(row[1])) for one, row in found if row is not None]

    def _begin_index(self) -> Future[None] | None:
        """Have an index built, once; returns the work under way, None where it is done."""
        if self._index is not None:
            return None
        with self._mutex:
            if self._building is None and self._index is None:
                rows = self._rows()
                self._missed = set()
                self._building = Future()
                threading.Thread(
                    target=self._build, args=[rows, self._building], name="ehub-build", daemon=True
                ).start()
            return self._building

    def _build(self, rows: Block, done: Future[None]) -> None:
        total = len(rows.keys)
        source = self._source

        def progressed(n: int) -> None:
            self._progress = (n, total)

        try:
            index = build_index(
                rows.keys,
                rows.vectors,
                source.metric,
                source.M,
                source.ef_construction,
                source.target_recall,
                progressed,
            )
            with self._mutex:
                missed, self._missed = self._missed, set()
                if source.dims == self._source.dims and source.metric == self._source.metric:
                    self._index = index
                    self._follow(missed)
                self._building = None
            done.set_result(None)
        except BaseException as error:
            with self._mutex:
                self._building = None
            done.set_exception(error)

    def _follow(self, keys: Iterable[str]) -> None:
        """Bring the index to the present rows of some keys; under the lock."""
        if self._index is None:
            self._missed.update(keys)
            return
        found = {key: self._find(key) for key in keys}
        present = {key: row[0] for key, row in found.items() if row is not None}
        if present:
            names, vectors = list(present), np.stack(list(present.values()))
            differs = np.flatnonzero(self._index.differing(names, vectors))
            self._index.add([names[row] for row in differs], vectors[differs])
        self._index.publish([key for key, row in found.items() if row is None])

    # --- inside: the database

    def _require_database(self) -> Database:
        if self._database is None:
            raise ConfigurationError(
                f"{self._place} knows no database; hub.load_snapshot(path) gives it one"
            )
        return self._database

    def _refresh(self) -> Refreshed:
        with self._refreshing:
            return self._refresh_alone(self._require_database())

    def _refresh_alone(self, database: Database) -> Refreshed:
        lease = self._lease
        brought = None if lease is None else news(database, self._address, self._source, lease)
        if brought is None:
            source, block, fresh = download(
                database, self._address, lease.id if lease else uuid.uuid4(), None
            )
            return self._replace(source, block, fresh)
        changed, rows, fresh = brought
        with self._mutex:
            new: dict[str, _Own] = dict.fromkeys(changed)
            for key, vector, note in zip(rows.keys, rows.vectors, rows.notes, strict=True):
                new[key] = (vector, note)
            if new:
                self._block = _with_changes(self._block, self._places(), new)
                self._block.vectors.flags.writeable = False
                self._places_made = None
                self._merged = None if self._own else self._block
            self._lease = fresh
            self._follow(new)
        return Refreshed(len(changed), whole=False)

    def _replace(self, source: Source, block: Block, lease: Lease) -> Refreshed:
        with self._mutex:
            if self._own and source.dims != self.dims:
                raise InvalidValueError(
                    f"{self._place}: {self._address!r} has {source.dims} dims now, the rows that "
                    f"this fork has changed have {self.dims}"
                )
            same = source.dims == self.dims and source.metric == self.metric
            before = self._block.keys
            self._source, self._block, self._lease = source, block, lease
            self._block.vectors.flags.writeable = False
            self._places_made = None
            self._merged = None if self._own else block
            if same:
                self._follow({*before, *block.keys})
            else:
                self._index = None
        return Refreshed(len(block.keys), whole=True)

    def _write(
        self,
        address: str,
        whole: bool,
        on_conflict: str,
        prepare: tuple[str, list[object]] | None,
    ) -> Written:
        if on_conflict not in ("error", "ours", "theirs"):
            raise InvalidValueError(
                f"on_conflict is 'error', 'ours' or 'theirs', not {on_conflict!r}"
            )
        database = self._require_database()
        with self._mutex:
            rows, own, base = self._rows(), dict(self._own), dict(self._base)
        with database.connection(address) as connection, connection.transaction():
            if prepare is not None:
                connection.execute(prepare[0].encode(), prepare[1])
            row = connection.execute(
                "SELECT version_id, dims FROM ehub.require_space(%s)", [address]
            ).fetchone()
            assert row is not None  # noqa: S101 - what is not there raises
            if row[1] != self.dims:
                raise InvalidValueError(
                    f"space {address!r} has {row[1]} dims, {self._place} has {self.dims}"
                )
            origin = (
                row[0] == self._source.version_id and identity(connection) == self._source.identity
            )
            connection.execute("SELECT ehub.stage()")
            if origin and not whole:
                rows = _block(own, self.dims)
            copy_rows(connection, address, "ehub_staging", _staged(rows))
            if origin:
                _copy_base(connection, address, base, self.dims)
            done = connection.execute(
                "SELECT written, deleted, conflicts FROM ehub.write_staged(%s, %s, %s, %s)",
                [address, whole, origin, on_conflict],
            ).fetchone()
            assert done is not None  # noqa: S101 - the function returns a row
            written, deleted, conflicts = done
            if written is None:
                some = ", ".join(map(repr, conflicts[:5])) + (" …" if len(conflicts) > 5 else "")
                raise ConflictError(
                    f"space {address!r}: {len(conflicts)} rows are neither as they were taken nor "
                    f"as they are to be ({some}); on_conflict='ours' or 'theirs' settles it",
                    conflicts,
                )
        return Written(written, deleted, conflicts)


def _note(text: str | None) -> dict[str, Any]:
    return {} if text is None else cast("dict[str, Any]", jsontext.read(text))


def _with_changes(block: Block, places: Mapping[str, int], new: Mapping[str, _Own]) -> Block:
    """Return rows with some of them replaced, added or, where there is nothing, taken out."""
    gone = [places[key] for key, row in new.items() if row is None and key in places]
    kept = np.ones(len(block.keys), np.bool_)
    kept[gone] = False
    added = {key: row for key, row in new.items() if row is not None and key not in places}
    size = int(kept.sum())
    vectors = np.empty((size + len(added), block.vectors.shape[1]), np.float32)
    if gone:
        np.compress(kept, block.vectors, axis=0, out=vectors[:size])
        keys = [key for key, keep in zip(block.keys, kept, strict=True) if keep]
        notes = [note for note, keep in zip(block.notes, kept, strict=True) if keep]
    else:
        vectors[:size] = block.vectors
        keys, notes = list(block.keys), list(block.notes)
    moved = np.cumsum(kept) - 1
    for key, row in new.items():
        if row is not None and key in places:
            place = moved[places[key]]
            vectors[place], notes[place] = row
    for place, (key, (vector, note)) in enumerate(added.items(), size):
        vectors[place] = vector
        keys.append(key)
        notes.append(note)
    return Block(keys, vectors, notes)


def _block(rows: Mapping[str, _Own], dims: int) -> Block:
    """Return those of the rows that are there."""
    return _with_changes(Block([], np.empty((0, dims), np.float32), []), {}, rows)


def _staged(rows: Block) -> Iterator[tuple[list[str], Matrix, list[str | None]]]:
    for start in range(0, len(rows.keys), _COPY_ROWS):
        part = slice(start, start + _COPY_ROWS)
        # Said outright: without metadata a row would keep what it had.
        notes: list[str | None] = ["{}" if note is None else note for note in rows.notes[part]]
        yield rows.keys[part], rows.vectors[part], notes


def _copy_base(connection: Connection, space: str, taken: Mapping[str, _Own], dims: int) -> None:
    """Tell how the rows were that a fork has changed; NULL where there was none."""
    present = {key: row for key, row in taken.items() if row is not None}
    copy_rows(connection, space, "ehub_base", _staged(_block(present, dims)))
    absent = [key for key, row in taken.items() if row is None]
    connection.execute("INSERT INTO pg_temp.ehub_base (key) SELECT unnest(%s::text[])", [absent])
