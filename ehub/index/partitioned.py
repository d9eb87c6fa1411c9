"""An index whose searches are kept apart by a value of each row, its partition: a tenant.

A large partition has a graph of its own. The many small ones have none: the rows of each are a
plain array, compared one by one. An empty graph alone takes 2.6 MB (hnswlib keeps 65,536 locks in
each), as much as thousands of vectors. There is no graph over all rows; searches over all of them
merge the answers of the partitions.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ehub.index.build import build_index
from ehub.index.calibrate import Calibration, calibrate
from ehub.index.exact import comparable, nearest_among, nearest_in_batches, pgvector_distances
from ehub.index.hnsw import Found, HnswIndex, Plan, Proposed
from ehub.index.keys import write_keys
from ehub.index.lock import ReadWriteLock
from ehub.types import Matrix, Metric, Vector

# A partition gets a graph when it has more rows than the one, and goes without again below the
# other: not to and fro for every row.
_LARGE = 5000
_SMALL = 2500
# Rows are as many as they take to compare: no more numbers than these.
_LARGE_FLOATS = 2_000_000
_RECALIBRATE_CHANGES = 0.2
# So many rows are added to a rebuilt graph while the writer waits.
_CATCH_UP = 1000
_EXACT_BATCH = 8192
_QUERIES = 256
_WRITE_BUFFER = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a small partition. They never change: a publish puts others in their place."""

    keys: list[str]
    vectors: Matrix

    def __len__(self) -> int:
        return len(self.keys)

    def vector(self, key: str) -> Vector:
        # They are so few that a mapping for each would take more memory than it is worth.
        vector: Vector = self.vectors[self.keys.index(key)].copy()
        return vector

    def without(self, keys: Collection[str]) -> _Rows:
        kept = [i for i, key in enumerate(self.keys) if key not in keys]
        if len(kept) == len(self.keys):
            return self
        return _Rows([self.keys[i] for i in kept], self.vectors[kept])

    def differing(self, keys: Sequence[str], vectors: Matrix) -> NDArray[np.bool_]:
        stored = self.vectors[[self.keys.index(key) for key in keys]]
        differs: NDArray[np.bool_] = (stored != vectors).any(axis=1)
        return differs


@dataclasses.dataclass(eq=False, slots=True)
class _Partition:
    """A partition that has rows; the keys of all of them refer to it."""

    name: str
    rows: _Rows | HnswIndex
    # Rows that were added to its graph or deleted since that was measured.
    changed: int = 0


@dataclasses.dataclass(slots=True)
class _Staged:
    """What is staged for a partition: in its graph if it has one, or gets one, else here."""

    keys: list[str] = dataclasses.field(default_factory=list)
    vectors: list[Matrix] = dataclasses.field(default_factory=list)
    # How many of the keys the partition has already.
    replaced: int = 0
    graph: HnswIndex | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """What a publish does to a partition: its rows from then on, and the keys that go and come."""

    partition: _Partition
    rows: _Rows | HnswIndex
    leaving: set[str]
    coming: list[str]


class PartitionedIndex:
    """An approximate index over embeddings that belong to partitions, each searched by itself.

    Many threads may read it and one may change it: whoever calls :meth:`add`, :meth:`publish` and
    :meth:`discard`. Another one may call :meth:`calibrate_graphs` and :meth:`compact` meanwhile.

    Under cosine rows have length 1, and all comparisons inside are by inner product: they are
    scaled once, when they come in, and stay bit for bit what they are when they move.

    Args:
        dims: the length of the vectors.
        metric: what distance means.
        M: the links of a node of a graph; ``ef_construction``: the candidates kept while linking.
    """

    def __init__(self, dims: int, metric: Metric, M: int = 16, ef_construction: int = 200) -> None:
        self.dims = dims
        self.metric: Metric = metric
        self._inner: Metric = "ip" if metric == "cosine" else metric
        self._M, self._ef_construction = M, ef_construction
        self._lock = ReadWriteLock()
        # Held by whoever changes something; told when nothing is staged any more.
        self._changing = threading.Condition()
        self._partitions: dict[str, _Partition] = {}
        # Where each key is; just a reference by row, of which there are many.
        self._places: dict[str, _Partition] = {}
        self._staged: dict[str, _Staged] = {}
        self._len = 0
        self.as_of: object = None
        """What the visible rows equal, in the words of who keeps them; None while nobody says."""

    # --- reading

    def __len__(self) -> int:
        """Count the rows that answers come from."""
        return self._len

    def __contains__(self, key: str) -> bool:
        with self._lock.read():
            return key in self._places

    @property
    def disconnected(self) -> bool:
        """Whether a search of a graph could not reach as many rows as there are."""
        return any(graph.disconnected for _, graph in self._graphs())

    @property
    def tombstones(self) -> int:
        """Rows in graphs that are deleted: they cost time and memory until :meth:`compact`."""
        return sum(graph.tombstones for _, graph in self._graphs())

    @property
    def memory(self) -> int:
        """The bytes that vectors and graphs take, roughly: the serialised size of these."""
        with self._lock.read():
            parts = [partition.rows for partition in self._partitions.values()]
        return sum(
            rows.vectors.nbytes if isinstance(rows, _Rows) else rows.memory for rows in parts
        )

    @property
    def calibration(self) -> Calibration:
        """What searches of graphs go by: the largest ``ef``, and the lowest recall measured.

        ``recall`` is None while no graph is measured; without graphs it is 1, and ``ef`` 0.
        """
        found = [graph.calibration for _, graph in self._graphs()]
        if not found:
            return Calibration(ef=0, ef_large=0, recall=1.0, bias=0.0)
        return Calibration(
            ef=max(each.ef for each in found),
            ef_large=max(each.ef_large for each in found),
            recall=min((each.recall for each in found if each.recall is not None), default=None),
            bias=max(each.bias for each in found),
        )

    def keys(self) -> list[str]:
        """All keys, in no order."""
        with self._lock.read():
            return list(self._places)

    def sizes(self) -> dict[str, int]:
        """Count the rows of each partition that has some."""
        with self._lock.read():
            return {name: len(each.rows) for name, each in self._partitions.items()}

    def vector(self, key: str) -> Vector | None:
        """Return the stored vector of a key (of length 1 under cosine), None if there is none."""
        with self._lock.read():
            partition = self._places.get(key)
            return None if partition is None else partition.rows.vector(key)

    def search(self, queries: Matrix, k: int, partition: str | None = None) -> list[Found] | None:
        """Find the ``k`` nearest of each query, float32 of shape ``(n, dims)``, in one partition.

        Or in all of them if it is None, which compares the rows of all small ones. Finds as many as
        there are where there are fewer than ``k``, and none in a partition that has no rows. None
        means that a graph could not answer (parts of it cannot be reached): ask the database.
        """
        found = self._found(self._comparable(queries), k, partition, 0)
        return None if found is None else found[0]

    def propose(
        self, queries: Matrix, k: int, ef: int = 0, partition: str | None = None
    ) -> Proposed | None:
        """Find keys as :meth:`search` does, and say as of what they are right.

        ``ef`` is what graphs are searched with, 0 for what was calibrated. A smaller one than that
        makes other searches of the partition wait, and is of no account over all of them.
        """
        queries = self._comparable(queries)
        with self._lock.read():
            searched = None if partition is None else self._partitions.get(partition)
            if searched is not None and isinstance(searched.rows, HnswIndex):
                near = searched.rows.propose(queries, k, ef)
                return None if near is None else near._replace(as_of=self.as_of)
            rows = self._len if partition is None else 0 if searched is None else len(searched.rows)
        found = self._found(queries, k, partition, ef)
        if found is None:
            return None
        return Proposed([one.keys for one in found[0]], found[1], Plan("rows", rows, rows))

    def plan(self, k: int, partition: str | None = None) -> Plan:
        """Say how a search would be answered."""
        with self._lock.read():
            searched = None if partition is None else self._partitions.get(partition)
            if searched is not None and isinstance(searched.rows, HnswIndex):
                plan = searched.rows.plan(k)
                if plan is not None:
                    return plan
            rows = self._len if partition is None else 0 if searched is None else len(searched.rows)
        return Plan("rows", rows, rows)

    def _found(
        self, queries: Matrix, k: int, name: str | None, ef: int
    ) -> tuple[list[Found], object] | None:
        """Return the answers to queries that are comparable, and as of what they are right."""
        small: list[_Rows] = []
        answers: list[list[Found]] = []
        with self._lock.read():
            as_of = self.as_of
            if name is None:
                searched = list(self._partitions.values())
            else:
                searched = [self._partitions[name]] if name in self._partitions else []
            for partition in searched:
                if isinstance(partition.rows, _Rows):
                    small.append(partition.rows)
                    continue
                near = self._nearest_by_graph(partition.rows, queries, k, ef)
                if near is None:
                    return None
                answers.append(near)
        # The rows of small partitions stay what they were then: nobody needs to wait for this.
        if small:
            answers.append(self._nearest_of(small, queries, k))
        if len(answers) == 1:
            return answers[0], as_of
        return [_merged([answer[i] for answer in answers], k) for i in range(len(queries))], as_of

    def _nearest_by_graph(
        self, graph: HnswIndex, queries: Matrix, k: int, ef: int
    ) -> list[Found] | None:
        # hnswlib searches with ef, or with how many it is asked for where that is more.
        found = graph.search(queries, max(k, ef))
        if found is None:
            return None
        near = [Found(one.keys[:k], one.distances[:k]) for one in found]
        if self.metric != "cosine":
            return near
        # From minus the product to 1 minus it, which rounding can take below 0.
        return [Found(one.keys, [min(max(d + 1, 0), 2) for d in one.distances]) for one in near]

    def _nearest_of(self, parts: list[_Rows], queries: Matrix, k: int) -> list[Found]:
        """Compare all rows of small partitions, in a few products."""
        # Rows are numbered through, part by part.
        starts = np.cumsum([0, *map(len, parts)])

        def places(rows: NDArray[np.int64]) -> Iterator[tuple[_Rows, int]]:
            numbers = np.searchsorted(starts, rows, "right") - 1
            for number, row in zip(
                numbers.tolist(), (rows - starts[numbers]).tolist(), strict=True
            ):
                yield parts[number], row

        def vectors_of(rows: NDArray[np.int64]) -> Matrix:
            return np.stack([part.vectors[row] for part, row in places(rows)])

        answers = []
        for first in range(0, len(queries), _QUERIES):
            asked = queries[first : first + _QUERIES]
            if len(parts) == 1:
                (part,) = parts
                rows = np.arange(len(part))
                near, far = nearest_among(asked, rows, part.vectors, k, self._inner)
            else:
                near, far = nearest_in_batches(asked, _batches(parts), vectors_of, k, self._inner)
            distances = pgvector_distances(far, self.metric).tolist()
            for found, apart in zip(near, distances, strict=True):
                answers.append(Found([part.keys[row] for part, row in places(found)], apart))
        return answers

    # --- changing

    def add(self, keys: Sequence[str], vectors: Matrix, partitions: Sequence[str]) -> None:
        """Stage rows; ``vectors`` is float32 of shape ``(len(keys), dims)``.

        ``partitions`` says where each belongs. Each key at most once between two calls of
        :meth:`publish`. A small partition that these rows make a large one gets its graph here,
        while its readers go on without.
        """
        vectors = self._comparable(vectors)
        with self._changing:
            for name, rows in _grouped(keys, partitions).items():
                self._stage(name, [keys[row] for row in rows], vectors[rows])

    def _stage(self, name: str, keys: list[str], vectors: Matrix) -> None:
        partition = self._partitions.get(name)
        rows = self._no_rows() if partition is None else partition.rows
        staged = self._staged.setdefault(name, _Staged())
        # Noted first: what fails half way is to be discarded.
        staged.keys += keys
        if isinstance(rows, HnswIndex):
            staged.graph = rows
        if staged.graph is not None:
            staged.graph.add(keys, vectors)
        elif isinstance(rows, _Rows):
            staged.vectors.append(vectors)
            if partition is not None:
                staged.replaced += sum(self._places.get(key) is partition for key in keys)
            size = len(rows) + len(staged.keys) - staged.replaced
            if size > _large(self.dims):
                staged.graph = self._graph_of(rows.without(set(staged.keys)), staged, size)
                staged.vectors.clear()

    def _graph_of(self, rows: _Rows, staged: _Staged, size: int) -> HnswIndex:
        """Make the graph of a partition that has become large, with the staged rows staged."""
        graph = HnswIndex(self.dims, self._inner, self._M, self._ef_construction, size)
        graph.add(rows.keys, rows.vectors)
        graph.publish()
        graph.add(staged.keys, np.vstack(staged.vectors))
        return graph

    def publish(self, deleted: Collection[str] = (), as_of: object = None) -> None:
        """Show the staged rows and hide what they replace and ``deleted``, at one moment.

        What they replace may be in another partition. The moment is one for all partitions, and
        from then on the rows are said to equal ``as_of``.
        """
        with self._changing:
            leaving = self._leaving(deleted)
            names = dict.fromkeys([*self._staged, *(partition.name for partition in leaving)])
            changes = [self._change(name, leaving) for name in names]
            with self._lock.write():
                self.as_of = as_of
                for change in changes:
                    for key in change.leaving:
                        del self._places[key]
                for change in changes:
                    self._apply(change)
                self._len = len(self._places)
            self._staged = {}
            self._changing.notify_all()
            for change in changes:
                self._shrink(change.partition)

    def _leaving(self, deleted: Collection[str]) -> dict[_Partition, set[str]]:
        """Return the keys that partitions lose, to deletions and to each other."""
        leaving: dict[_Partition, set[str]] = {}
        for key in deleted:
            if (place := self._places.get(key)) is not None:
                leaving.setdefault(place, set()).add(key)
        for name, staged in self._staged.items():
            for key in staged.keys:
                place = self._places.get(key)
                if place is not None and place.name != name:
                    leaving.setdefault(place, set()).add(key)
        return leaving

    def _change(self, name: str, leaving: dict[_Partition, set[str]]) -> _Change:
        """Prepare what a publish does to a partition, so that readers wait only for the rest."""
        partition = self._partitions.get(name) or _Partition(name, self._no_rows())
        staged = self._staged.get(name) or _Staged()
        gone = leaving.get(partition, set())
        rows = partition.rows if staged.graph is None else staged.graph
        if isinstance(rows, _Rows):
            kept = rows.without(gone.union(staged.keys))
            rows = _Rows(kept.keys + staged.keys, np.vstack([kept.vectors, *staged.vectors]))
        return _Change(partition, rows, gone, staged.keys)

    def _apply(self, change: _Change) -> None:
        partition, rows = change.partition, change.rows
        if isinstance(rows, HnswIndex):
            rows.publish(change.leaving)
            partition.changed += len(change.leaving) + len(change.coming)
        partition.rows = rows
        for key in change.coming:
            # Of two equal strings the one that the rows hold stays.
            self._places.pop(key, None)
            self._places[key] = partition
        if len(rows):
            self._partitions[partition.name] = partition
        else:
            self._partitions.pop(partition.name, None)

    def _shrink(self, partition: _Partition) -> None:
        """Let a partition that has become small do without its graph."""
        graph = partition.rows
        if isinstance(graph, HnswIndex) and len(graph) < min(_SMALL, _large(self.dims) // 2):
            rows = _rows_of(graph)
            with self._lock.write():
                partition.rows, partition.changed = rows, 0

    def discard(self) -> None:
        """Forget what was staged and not published."""
        with self._changing:
            for staged in self._staged.values():
                if staged.graph is not None:
                    staged.graph.discard()
            self._staged = {}
            self._changing.notify_all()

    def differing(
        self, keys: Sequence[str], vectors: Matrix, partitions: Sequence[str]
    ) -> NDArray[np.bool_]:
        """Say for each row whether the index lacks it, or has its key otherwise.

        That is with another vector or in another partition.
        """
        vectors = self._comparable(vectors)
        differs = np.ones(len(keys), np.bool_)
        with self._lock.read():
            for name, rows in _grouped(keys, partitions).items():
                partition = self._partitions.get(name)
                if partition is None:
                    continue
                known = [row for row in rows if self._places.get(keys[row]) is partition]
                if known:
                    here = [keys[row] for row in known]
                    differs[known] = partition.rows.differing(here, vectors[known])
        return differs

    # --- looking after graphs

    @property
    def uncalibrated(self) -> int:
        """How many graphs :meth:`calibrate_graphs` would measure."""
        return sum(_is_uncalibrated(*each) for each in self._graphs())

    @property
    def worn(self) -> int:
        """How many graphs :meth:`compact` would rebuild."""
        return sum(graph.is_worn(_SMALL) for _, graph in self._graphs())

    def calibrate_graphs(
        self, target: float, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Measure the graphs that never were, or have changed by a fifth since.

        ``target`` is the recall that each is to reach. ``progress`` is told how many rows were
        measured, and what it raises ends the work. Any thread may call it, beside readers and the
        one that changes the index, but one at a time.
        """
        done = 0
        for partition, graph in self._graphs():
            if _is_uncalibrated(partition, graph):
                progress(done)
                changed = partition.changed
                calibrate(graph, target)
                with self._changing:
                    if partition.rows is graph:
                        # What changed meanwhile is not measured.
                        partition.changed -= changed
                done += len(graph)
        progress(done)

    def compact(self, target: float, progress: Callable[[int], None] = lambda _: None) -> None:
        """Build the graphs anew that deletions have worn, each from its own rows, one by one.

        Those are graphs of which a fifth is tombstones, or in which a search could not reach rows
        after deletions. A new one is calibrated to ``target``. It is built beside the old one,
        which answers until then, and follows what has changed meanwhile. ``progress`` is told how
        many rows are done; what it raises ends the work, and graphs that are done stay.

        Any thread may call it, beside readers and the one that changes the index, but one at a
        time, and not one that has rows staged: it waits until nothing is.
        """
        done = 0
        for partition, graph in self._graphs():
            if graph.is_worn(_SMALL):
                self._rebuild(partition, graph, target, _after(done, progress))
                done += len(graph)
        progress(done)

    def _rebuild(
        self,
        partition: _Partition,
        graph: HnswIndex,
        target: float,
        progress: Callable[[int], None],
    ) -> None:
        with self._changing:
            self._changing.wait_for(lambda: not self._staged)
            then = list(graph.labelled_keys())
            rows = _rows_of(graph)
        M, ef_construction = self._M, self._ef_construction
        fresh = build_index(
            rows.keys, rows.vectors, self._inner, M, ef_construction, target, progress
        )
        del rows
        changed = 0
        while True:
            with self._changing:
                self._changing.wait_for(lambda: not self._staged)
                if partition.rows is not graph:
                    # It became small.
                    return
                # A label is never used twice.
                now = list(graph.labelled_keys())
                gone = [old for old, new in zip(then, now, strict=False) if old and not new]
                come = [key for key in now[len(then) :] if key]
                changed += len(gone) + len(come)
                if len(come) <= _CATCH_UP:
                    _follow(fresh, graph, come, gone)
                    with self._lock.write():
                        partition.rows, partition.changed = fresh, changed
                    return
            # So many that nobody should wait; what changes again comes in the next round.
            _follow(fresh, graph, come, gone)
            then = now

    # --- files

    def files(self, name: str) -> dict[str, Callable[[Path], None]]:
        """Return the files that this index is saved as, by name, and what writes each.

        Their names begin with ``name``: one for all keys, one for the vectors of small partitions,
        one that says which these are, and one for each graph. What writes them takes no lock, and
        nothing may be staged or changed meanwhile.
        """
        # A graph may be rebuilt between this call and the writing.
        held = [dataclasses.replace(each) for each in self._partitions.values()]

        def write_all_keys(path: Path) -> None:
            write_keys(path, (key for each in held for key in _labelled(each.rows)))

        def write_vectors(path: Path) -> None:
            with path.open("wb", _WRITE_BUFFER) as file:
                for each in held:
                    if isinstance(each.rows, _Rows):
                        file.write(each.rows.vectors.data)

        def write_partitions(path: Path) -> None:
            path.write_bytes(json.dumps([_described(each) for each in held]).encode())

        files: dict[str, Callable[[Path], None]] = {
            f"{name}.keys": write_all_keys,
            f"{name}.vectors": write_vectors,
            f"{name}.partitions": write_partitions,
        }
        for number, each in enumerate(held):
            if isinstance(each.rows, HnswIndex):
                files[_graph_file(name, number)] = each.rows.save
        return files

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str,
        dims: int,
        metric: Metric,
        keys: list[str],
        M: int,
        ef_construction: int,
    ) -> PartitionedIndex:
        """Read what was written to the :meth:`files` of a name, of which ``keys`` are one.

        Damaged files can crash the process: check them before.
        """
        index = cls(dims, metric, M, ef_construction)
        described = json.loads((folder / f"{name}.partitions").read_bytes())
        start = 0
        with (folder / f"{name}.vectors").open("rb") as file:
            for number, values in enumerate(described):
                labelled = keys[start : start + values["labels"]]
                start += len(labelled)
                rows: _Rows | HnswIndex
                if values["calibration"] is None:
                    vectors = np.fromfile(file, np.float32, len(labelled) * dims)
                    rows = _Rows(labelled, vectors.reshape(-1, dims))
                else:
                    calibration = Calibration.from_dict(values["calibration"])
                    path = folder / _graph_file(name, number)
                    rows = HnswIndex.load(path, dims, index._inner, labelled, calibration)
                index._hold(_Partition(values["name"], rows, values["changed"]))
        return index

    @classmethod
    def _of(
        cls,
        parts: Iterable[tuple[str, _Rows | HnswIndex]],
        dims: int,
        metric: Metric,
        M: int,
        ef_construction: int,
    ) -> PartitionedIndex:
        """Make an index of partitions as they are built."""
        index = cls(dims, metric, M, ef_construction)
        for name, rows in parts:
            index._hold(_Partition(name, rows))
        return index

    # --- inside

    def _hold(self, partition: _Partition) -> None:
        """Take over a partition; nobody reads yet."""
        self._partitions[partition.name] = partition
        self._places.update((key, partition) for key in _labelled(partition.rows) if key)
        self._len = len(self._places)

    def _graphs(self) -> list[tuple[_Partition, HnswIndex]]:
        with self._lock.read():
            held = [(each, each.rows) for each in self._partitions.values()]
        return [(each, rows) for each, rows in held if isinstance(rows, HnswIndex)]

    def _no_rows(self) -> _Rows:
        return _Rows([], np.empty((0, self.dims), np.float32))

    def _comparable(self, vectors: Matrix) -> Matrix:
        """Return vectors in the form in which they are compared."""
        # hnswlib reads whatever memory follows a vector that is too short.
        if vectors.ndim != 2 or vectors.shape[1] != self.dims or vectors.dtype != np.float32:
            raise ValueError(f"float32 of shape (n, {self.dims}) is needed, not {vectors.shape}")
        return comparable(vectors, self.metric)


def build_partitioned(
    keys: list[str],
    vectors: Matrix,
    partitions: Sequence[str],
    metric: Metric,
    M: int,
    ef_construction: int,
    target_recall: float,
    progress: Callable[[int], None],
) -> PartitionedIndex:
    """Build an index of these rows, of which each key is there once, and calibrate its graphs.

    ``vectors`` is float32 of shape ``(len(keys), dims)`` and may be a file that is mapped to
    memory; ``partitions`` says where each row belongs. ``progress`` is told how many rows are done;
    what it raises ends the build.
    """
    dims = vectors.shape[1]
    inner: Metric = "ip" if metric == "cosine" else metric

    def parts() -> Iterator[tuple[str, _Rows | HnswIndex]]:
        done = 0
        # The largest first: its vectors are in memory twice while it is built.
        for name, rows in sorted(_rows_by(partitions), key=lambda part: -len(part[1])):
            progress(done)
            here = [keys[row] for row in rows.tolist()]
            own = vectors[rows]
            for start in range(0, len(own), _EXACT_BATCH):
                part = slice(start, start + _EXACT_BATCH)
                own[part] = comparable(own[part], metric)
            if len(rows) > _large(dims):
                yield (
                    name,
                    build_index(
                        here, own, inner, M, ef_construction, target_recall, _after(done, progress)
                    ),
                )
            else:
                yield name, _Rows(here, own)
            done += len(rows)
        progress(done)

    return PartitionedIndex._of(parts(), dims, metric, M, ef_construction)


def _large(dims: int) -> int:
    """Return how many rows a partition without a graph has at most."""
    return min(_LARGE, _LARGE_FLOATS // dims)


def _rows_by(partitions: Sequence[str]) -> list[tuple[str, NDArray[np.int64]]]:
    """Return the rows of each partition, by number."""
    numbers: dict[str, int] = {}
    of_row = np.fromiter(
        (numbers.setdefault(name, len(numbers)) for name in partitions), np.int32, len(partitions)
    )
    order = np.argsort(of_row, kind="stable")
    ends = np.cumsum(np.bincount(of_row, minlength=len(numbers)))
    return list(zip(numbers, np.split(order, ends[:-1]), strict=True)) if numbers else []


def _grouped(keys: Sequence[str], partitions: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each partition, of a few."""
    rows: dict[str, list[int]] = {}
    for row, (_, name) in enumerate(zip(keys, partitions, strict=True)):
        rows.setdefault(name, []).append(row)
    return rows


def _batches(parts: Iterable[_Rows]) -> Iterator[tuple[NDArray[np.int64], Matrix]]:
    """Put rows together to many at a time, numbered through."""
    start = size = 0
    held: list[Matrix] = []
    for part in parts:
        held.append(part.vectors)
        size += len(part)
        if size >= _EXACT_BATCH:
            yield np.arange(start, start + size), np.concatenate(held)
            start, size = start + size, 0
            held.clear()
    if held:
        yield np.arange(start, start + size), np.concatenate(held)


def _merged(answers: list[Found], k: int) -> Found:
    """Return the ``k`` nearest of all answers to one query."""
    near = [pair for found in answers for pair in zip(found.distances, found.keys, strict=True)]
    near.sort(key=lambda pair: pair[0])
    return Found([key for _, key in near[:k]], [distance for distance, _ in near[:k]])


def _rows_of(graph: HnswIndex) -> _Rows:
    labels, vectors = graph.sample(len(graph))
    keys = graph.labelled_keys()
    return _Rows([keys[label] for label in labels.tolist()], vectors)


def _follow(fresh: HnswIndex, graph: HnswIndex, come: list[str], gone: list[str]) -> None:
    """Make to a graph the changes that another one has had."""
    found = {key: vector for key in come if (vector := graph.vector(key)) is not None}
    if found:
        fresh.add(list(found), np.stack(list(found.values())))
    fresh.publish(gone)


def _is_uncalibrated(partition: _Partition, graph: HnswIndex) -> bool:
    unmeasured = graph.calibration.recall is None
    return unmeasured or partition.changed > _RECALIBRATE_CHANGES * len(graph)


def _after(done: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    """Return what tells a progress of the rows that come after others."""
    return lambda rows: progress(done + rows)


def _labelled(rows: _Rows | HnswIndex) -> list[str]:
    return rows.keys if isinstance(rows, _Rows) else rows.labelled_keys()


def _described(partition: _Partition) -> dict[str, object]:
    rows = partition.rows
    measured = dataclasses.asdict(rows.calibration) if isinstance(rows, HnswIndex) else None
    return {
        "name": partition.name,
        "labels": len(_labelled(rows)),
        "calibration": measured,
        "changed": partition.changed,
    }


def _graph_file(name: str, number: int) -> str:
    return f"{name}.{number}.hnsw"
