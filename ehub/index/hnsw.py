"""One HNSW graph with string keys: many readers or one writer, and changes that appear at once.

Method: Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using
Hierarchical Navigable Small World graphs", 2016, in the implementation of hnswlib 0.8.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import hnswlib  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from ehub.index import tail
from ehub.index.calibrate import Calibration
from ehub.index.exact import brute_force, comparable, nearest_among, pgvector_distances
from ehub.index.keys import write_keys
from ehub.index.lock import ReadWriteLock
from ehub.index.memory import huge_pages
from ehub.index.selection import Selection
from ehub.types import Matrix, Metric, Vector

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Rows added while readers wait: a few tens of milliseconds of work.
_ADD_BATCH = 64
_BUILD_BATCH = 4096
_EXACT_BATCH = 8192
# To start threads takes longer than to search for so few.
_FEW_QUERIES = 4
_MEASURE_BATCH = 20
_SLACK = 1.05
_REBUILD_TOMBSTONES = 0.2
# What a candidate that the graph keeps costs, in vectors that are compared.
_COMPARED_A_CANDIDATE = 30
# More than so many neighbours are not asked of it to find some that match.
_MOST_ASKED = 5000


class Found(NamedTuple):
    """The answer to one query: keys and distances, nearest first."""

    keys: list[str]
    distances: list[float]


class Plan(NamedTuple):
    """How a search is answered.

    Attributes:
        by: ``graph``, or ``rows``: all that match are compared.
        rows: those that match.
        compared: vectors that are compared, roughly.
        asked: neighbours that the graph is asked for.
    """

    by: str
    rows: int
    compared: int
    asked: int = 0

    @property
    def note(self) -> str:
        """Say it in words."""
        if self.by == "graph":
            return f"asks the graph for {self.asked}"
        return "compares all that match"


class Proposed(NamedTuple):
    """The answer to some queries: keys by query, nearest first, and what the rows equalled."""

    keys: list[list[str]]
    as_of: object
    plan: Plan


class Members(NamedTuple):
    """What becomes of a selection with a change.

    Attributes:
        matching: of the keys that have changed, those that match now.
        others: all other keys that match, where the selection is new; else None.
        vectors: theirs, float32 by row, where all rows of the selection will be compared often.
    """

    matching: Collection[str]
    others: Sequence[str] | None = None
    vectors: Matrix | None = None


class _Graph(Protocol):
    """The part of hnswlib.Index that is used here."""

    def init_index(self, max_elements: int, M: int, ef_construction: int) -> None: ...
    def load_index(self, path_to_index: str, max_elements: int) -> None: ...
    def save_index(self, path_to_index: str) -> None: ...
    def index_file_size(self) -> int: ...
    def resize_index(self, new_size: int) -> None: ...
    def set_ef(self, ef: int) -> None: ...
    def get_max_elements(self) -> int: ...
    def get_current_count(self) -> int: ...
    def add_items(self, data: Matrix, ids: NDArray[np.uint64], num_threads: int) -> None: ...
    def mark_deleted(self, label: int) -> None: ...
    def get_items(self, ids: NDArray[np.uint64]) -> Matrix: ...
    def knn_query(
        self, data: Matrix, k: int, num_threads: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32]]: ...


class HnswIndex:
    """An approximate index over embeddings of one length and metric.

    A row is a label of the graph, and a label is never used twice: an update adds a new label and
    marks the old one deleted (hnswlib's own update is several times slower, and its reuse of
    deleted labels loses some). Changes are staged first: their labels are in the graph but not in
    any answer until :meth:`publish` shows all of them, and hides what they replace, at one moment.

    Args:
        dims: the length of the vectors.
        metric: what distance means.
        M: the links of a node; ``ef_construction``: the candidates kept while linking.
        capacity: room for so many rows at first; it grows by itself.
    """

    def __init__(
        self, dims: int, metric: Metric, M: int = 16, ef_construction: int = 200, capacity: int = 0
    ) -> None:
        self.dims = dims
        self.metric: Metric = metric
        self._graph: _Graph = hnswlib.Index(_space(metric), dims)
        with huge_pages():
            self._graph.init_index(max(capacity, 64), M, ef_construction)
        self._lock = ReadWriteLock()
        # The key of each label; "" where the row was deleted or replaced.
        self._keys: list[str] = []
        # The label of each key, made of the list when it is first asked for; and their number.
        self._labels_made: dict[str, int] | None = {}
        self._rows = 0
        # Labels from here on are staged.
        self._visible = 0
        self._tail = tail.Tail(dims)
        self._tombstones = 0
        self._selections: dict[str, Selection] = {}
        self.calibration = Calibration.untried()
        # Whether a search could not reach as many rows as there are.
        self.disconnected = False
        self.as_of: object = None
        """What the visible rows equal, in the words of who keeps them; None while nobody says."""

    # --- reading

    def __len__(self) -> int:
        """Count the rows that answers come from."""
        return self._rows

    def __contains__(self, key: str) -> bool:
        with self._lock.read():
            return key in self._labels

    @property
    def calibration(self) -> Calibration:
        """What searches go by; put another one in its place after measuring."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration) -> None:
        with self._lock.write():
            self._calibration = calibration
            self._graph.set_ef(calibration.ef)

    @property
    def tombstones(self) -> int:
        """Labels in the graph that are deleted: they cost time and memory until a rebuild."""
        return self._tombstones

    def is_worn(self, few: int) -> bool:
        """Whether deletions have made it worth another graph; so few rows and less count as that.

        Tombstones cost searches some 15 % at a fifth of the graph. And deletions can cut a graph
        apart; where many rows are alike another one would be no better.
        """
        apart = self.disconnected and self.tombstones > 0
        return apart or self.tombstones > _REBUILD_TOMBSTONES * max(len(self), few)

    @property
    def memory(self) -> int:
        """The bytes that the graph takes, roughly: its serialised size."""
        return self._graph.index_file_size()

    def keys(self) -> list[str]:
        """All keys, in no order."""
        with self._lock.read():
            return list(self._labels)

    def vector(self, key: str) -> Vector | None:
        """Return the stored vector of a key (of length 1 under cosine), None if there is none."""
        with self._lock.read():
            label = self._labels.get(key)
            return None if label is None else self._stored([label])[0]

    def search(self, queries: Matrix, k: int, selection: str | None = None) -> list[Found] | None:
        """Find the ``k`` nearest of each query, float32 of shape ``(n, dims)``, by the graph.

        With a ``selection`` among its rows. Finds as many as there are where there are fewer than
        ``k``. None means that the graph could not answer (parts of it cannot be reached), or that
        there is no such selection: ask the database.
        """
        queries = self._comparable(queries)
        with self._lock.read():
            if selection is None:
                found = self._nearest(queries, k)
            else:
                found = self._nearest_selected(queries, k, selection)
            if found is None:
                return None
            keys = self._keys
            return [
                Found([keys[label] for label in row], near)
                for row, near in zip(
                    found[0].tolist(),
                    pgvector_distances(found[1], self.metric).tolist(),
                    strict=True,
                )
            ]

    def propose(
        self, queries: Matrix, k: int, ef: int = 0, selection: str | None = None
    ) -> Proposed | None:
        """Find keys as :meth:`search` does, and say as of what they are right.

        ``ef`` is what the graph is searched with, 0 for what was calibrated. A smaller one than
        that makes other searches wait.
        """
        queries = self._comparable(queries)
        if selection is not None:
            with self._lock.read():
                plan = self.plan(k, selection, len(queries))
                return self._proposed(self._nearest_selected(queries, k, selection, ef), plan)
        if not ef or ef >= self.calibration.ef:
            with self._lock.read():
                return self._proposed(self._nearest(queries, k, ef), self.plan(k))
        with self._lock.write():
            self._graph.set_ef(ef)
            try:
                return self._proposed(self._nearest(queries, k, ef), self.plan(k))
            finally:
                self._graph.set_ef(self.calibration.ef)

    def _proposed(
        self,
        found: tuple[NDArray[np.int64], NDArray[np.float32]] | None,
        plan: Plan | None,
    ) -> Proposed | None:
        if found is None or plan is None:
            return None
        keys = self._keys
        return Proposed(
            [[keys[label] for label in row] for row in found[0].tolist()], self.as_of, plan
        )

    def selections(self) -> dict[str, Selection]:
        """Return the selections that there are, by name, to look at."""
        return self._selections.copy()

    def deselect(self) -> None:
        """Forget all selections."""
        with self._lock.write():
            self._selections.clear()

    def plan(self, k: int, selection: str | None = None, queries: int = 1) -> Plan | None:
        """Say how a search would be answered; None where there is no such selection."""
        if selection is None:
            ef = self.calibration.ef_for(k)
            return Plan("graph", self._rows, min(ef * _COMPARED_A_CANDIDATE, self._rows), k)
        chosen = self._selections.get(selection)
        return None if chosen is None else self._plan(chosen, min(k, len(chosen)), queries)

    def _plan(self, chosen: Selection, wanted: int, queries: int, ef: int = 0) -> Plan:
        asked = chosen.wanted_of_graph(wanted, self._rows)
        ef = max(ef, self.calibration.ef_for(asked))
        # A graph that is not needed is not searched.
        if self._tail.base == 0 or chosen.rows_are_cheaper(ef, queries):
            return Plan("rows", len(chosen), len(chosen))
        compared = min(ef * _COMPARED_A_CANDIDATE, self._rows)
        return Plan("graph", len(chosen), compared, asked)

    def _nearest_selected(
        self, queries: Matrix, k: int, selection: str, ef: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return what :meth:`_nearest` does, of a selection; under the lock."""
        chosen = self._selections.get(selection)
        if chosen is None:
            return None
        wanted = min(k, len(chosen))
        if not wanted:
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        plan = self._plan(chosen, wanted, len(queries), ef)
        if plan.by == "rows":
            return self._compare_selected(chosen, queries, wanted)
        near = np.empty((len(queries), wanted), np.int64)
        far = np.empty((len(queries), wanted), np.float32)
        left = np.arange(len(queries))
        asked = plan.asked
        while True:
            found = self._nearest(queries[left], asked, ef)
            if found is None:
                return None
            matching = chosen.holds(found[0])
            full = matching.sum(axis=1) >= wanted
            # Those that match come first, in their order.
            order = np.argsort(~matching[full], axis=1, kind="stable")[:, :wanted]
            near[left[full]] = np.take_along_axis(found[0][full], order, axis=1)
            far[left[full]] = np.take_along_axis(found[1][full], order, axis=1)
            if asked == plan.asked:
                chosen.note(len(left), int((~full).sum()))
            left = left[~full]
            if not len(left):
                return near, far
            asked *= 4
            if asked > min(_MOST_ASKED, self._rows) or chosen.rows_are_cheaper(asked, len(left)):
                break
        rest = self._compare_selected(chosen, queries[left], wanted)
        if rest is None:
            return None
        near[left], far[left] = rest
        return near, far

    def _compare_selected(
        self, chosen: Selection, queries: Matrix, wanted: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        if not chosen.comparable:
            return None
        return chosen.nearest(queries, wanted, self.metric, self._stored)

    def _nearest(
        self, queries: Matrix, k: int, ef: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return the labels of the nearest, and the graph's own distances; under the lock."""
        wanted = min(k, self._rows)
        if wanted and not len(self._tail):
            # Nothing has changed since it was built: the graph knows all.
            return self._reach(queries, wanted, ef)
        recent, rows = self._tail.below(self._visible)
        if self._tail.base == 0:
            return nearest_among(queries, recent, rows, wanted, self.metric)
        if not wanted:
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        found = self._reach(queries, wanted, ef)
        if found is None:
            return None
        near, far = found
        if len(recent) or len(self._keys) > self._visible:
            # What the graph found of the newest rows is there anyway, staged ones not yet.
            far = np.where(near < min(self._tail.base, self._visible), far, np.inf)
            newest = nearest_among(queries, recent, rows, wanted, self.metric)
            near, far = np.hstack([near, newest[0]]), np.hstack([far, newest[1]])
            order = np.argsort(far, axis=1, kind="stable")[:, :wanted]
            near = np.take_along_axis(near, order, axis=1)
            far = np.take_along_axis(far, order, axis=1)
        return near[:, :wanted], far[:, :wanted]

    def _reach(
        self, queries: Matrix, wanted: int, ef: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Search the graph for at least ``wanted`` visible rows, and staged ones among them."""
        # hnswlib searches with max(ef, k), and its ef is one for all calls: to ask for more than is
        # wanted is a setting of this call alone, safe beside others.
        live = self._graph.get_current_count() - self._tombstones
        # Staged rows may stand before visible ones; then more must be asked for.
        staged = live - self._rows
        ef = ef or self.calibration.ef_for(wanted)
        asked = wanted if self.calibration.ef >= ef and ef < live else ef
        asked = min(asked + min(staged, wanted), live)
        found = self._query(queries, asked)
        if found is None and asked == live:
            # All of them, and some cannot be reached: they are few enough to compare.
            labels = self._visible_labels()
            return nearest_among(queries, labels, self._stored(labels), wanted, self.metric)
        while found is None and asked > wanted:
            # So many cannot be reached; enough may be.
            asked = max(wanted, asked // 2)
            found = self._query(queries, asked)
        while found is not None and staged and asked < live:
            if ((found[0] < self._visible).sum(axis=1) >= wanted).all():
                break
            asked = min(asked * 4, live)
            found = self._query(queries, asked)
        if found is None:
            self.disconnected = not staged
            return None
        if not staged:
            # What was asked for only to widen the search goes first.
            found = found[0][:, :wanted], found[1][:, :wanted]
        return found[0].view(np.int64), found[1]

    def exact(self, queries: Matrix, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the nearest ``k`` of each query among all rows, by comparing all of them.

        Returns labels and the graph's own distances, each of shape ``(n, min(k, rows))``.
        """
        queries = self._comparable(queries)
        with self._lock.read():
            labels = self._visible_labels()

        def batches() -> Iterator[tuple[NDArray[np.int64], Matrix]]:
            for start in range(0, len(labels), _EXACT_BATCH):
                # Between batches writers have their turn, and may delete what was listed.
                with self._lock.read():
                    part = labels[start : start + _EXACT_BATCH]
                    part = np.array([label for label in part if self._keys[label]], np.int64)
                    rows = self._stored(part)
                yield part, rows

        return brute_force(queries, batches(), k, self.metric)

    def sample(self, n: int, seed: int = 0) -> tuple[NDArray[np.int64], Matrix]:
        """Draw up to ``n`` rows: their labels, and their vectors by row."""
        with self._lock.read():
            labels = self._visible_labels()
            if len(labels) > n:
                labels = np.random.default_rng(seed).choice(labels, n, replace=False)
            return labels, self._stored(labels)

    def labels_found(self, queries: Matrix, k: int, ef: int) -> NDArray[np.int64]:
        """Search at a given ``ef`` and return labels: what calibration compares.

        Returns them by row, none at all where ``k`` rows cannot be reached. The setting is one for
        all, so readers wait, but only for a few queries at a time.
        """
        parts = []
        for start in range(0, len(queries), _MEASURE_BATCH):
            with self._lock.write():
                self._graph.set_ef(ef)
                live = self._graph.get_current_count() - self._tombstones
                part = queries[start : start + _MEASURE_BATCH]
                found = self._query(part, min(k, live)) if live else None
                self._graph.set_ef(self.calibration.ef)
            if found is None:
                return np.empty((len(queries), 0), np.int64)
            parts.append(found[0].astype(np.int64))
        # Rows may have been deleted meanwhile.
        width = min(part.shape[1] for part in parts)
        return np.vstack([part[:, :width] for part in parts])

    # --- changing

    def add(self, keys: Sequence[str], vectors: Matrix) -> None:
        """Stage rows; ``vectors`` is float32 of shape ``(len(keys), dims)``.

        Each key at most once between two calls of :meth:`publish`. Readers have their turn
        between small batches.
        """
        vectors = self._comparable(vectors)
        # Nobody reads an index that has published nothing.
        size = _ADD_BATCH if self._visible else _BUILD_BATCH
        for start in range(0, len(keys), size):
            with self._lock.write():
                self._reserve(min(size, len(keys) - start))
                part = keys[start : start + size]
                labels = np.arange(len(self._keys), len(self._keys) + len(part), dtype=np.uint64)
                # The labels are taken first: even one that fails is never used again.
                self._keys.extend(part)
                self._tail.extend(vectors[start : start + size])
                self._graph.add_items(vectors[start : start + size], labels, num_threads=THREADS)

    def publish(
        self,
        deleted: Collection[str] = (),
        as_of: object = None,
        changed: Collection[str] = (),
        selections: Mapping[str, Members] | None = None,
    ) -> None:
        """Show the staged rows and hide what they replace and ``deleted``, at one moment.

        From the same moment on the rows are said to equal ``as_of``. ``changed`` are the keys of
        which something has changed, if only whether they match; ``selections`` says what becomes
        of each selection, and those that it does not name are there no more.
        """
        selections = selections or {}
        with self._lock.write():
            self.as_of = as_of
            for name in self._selections.keys() - selections.keys():
                del self._selections[name]
            if self._selections:
                # Whether those match is said anew, by the labels that they get.
                touched = {*changed, *deleted, *self._keys[self._visible :]}
                before = self._labels_of(touched)
                for selection in self._selections.values():
                    selection.leave(before)
            for key in deleted:
                self._bury(self._labels.pop(key, None))
            for label in range(self._visible, len(self._keys)):
                key = self._keys[label]
                self._bury(self._labels.get(key))
                self._labels[key] = label
            self._visible = len(self._keys)
            self._rows = len(self._labels)
            for name, members in selections.items():
                self._select(name, members)

    def _select(self, name: str, members: Members) -> None:
        labels = self._labels
        if members.others is not None:
            vectors = members.vectors
            known = np.array([key in labels for key in members.others], np.bool_)
            if vectors is not None:
                vectors = self._comparable(vectors[known])
            others = self._labels_of(members.others)
            self._selections[name] = Selection(others, vectors, self._graph.get_max_elements())
        self._selections[name].enter(self._labels_of(members.matching), self._stored)

    def _labels_of(self, keys: Collection[str]) -> NDArray[np.int64]:
        """Return the labels of the keys that there are, in their order."""
        labels = self._labels
        return np.array([labels[key] for key in keys if key in labels], np.int64)

    def settle(self) -> None:
        """Leave all rows to the graph, as after a build that was measured."""
        with self._lock.write():
            if len(self._keys) > tail.SIZE:
                self._tail = tail.Tail(self.dims, base=len(self._keys))

    def discard(self) -> None:
        """Forget what was staged and not published."""
        with self._lock.write():
            for label in range(self._visible, len(self._keys)):
                # A batch that failed may have added only some of its rows.
                with contextlib.suppress(RuntimeError):
                    self._bury(label)
                self._keys[label] = ""
                self._tail.bury(label)
            self._visible = len(self._keys)

    def differing(self, keys: Sequence[str], vectors: Matrix) -> NDArray[np.bool_]:
        """Say for each row whether the index lacks it or holds another vector for its key."""
        vectors = self._comparable(vectors)
        with self._lock.read():
            labels = np.array([self._labels.get(key, -1) for key in keys], np.int64)
            differs = labels < 0
            known = np.flatnonzero(~differs)
            if len(known):
                stored = self._stored(labels[known])
                differs[known] = (stored != vectors[known]).any(axis=1)
            return differs

    # --- files

    def save(self, path: Path) -> None:
        """Write the graph to ``path``; nothing may be staged or changed meanwhile.

        hnswlib holds the interpreter while it writes.

        Raises:
            OSError: it was not written whole, of which hnswlib says nothing.
        """
        self._graph.save_index(str(path))
        if path.stat().st_size != self.memory:
            raise OSError(errno.ENOSPC, "the graph was not written whole", str(path))

    def files(self, name: str) -> dict[str, Callable[[Path], None]]:
        """Return the files that this index is saved as, by name, and what writes each.

        Their names begin with ``name``. What writes them takes no lock.
        """
        return {
            f"{name}.keys": lambda path: write_keys(path, self._keys),
            f"{name}.hnsw": self.save,
        }

    def labelled_keys(self) -> list[str]:
        """Return the key of each label, "" where it was deleted: what :meth:`load` needs."""
        return self._keys

    @classmethod
    def load(
        cls, path: Path, dims: int, metric: Metric, keys: list[str], calibration: Calibration
    ) -> HnswIndex:
        """Read what :meth:`save` wrote. A damaged file can crash the process: check it before."""
        index = cls.__new__(cls)
        index.dims, index.metric = dims, metric
        index._graph = hnswlib.Index(_space(metric), dims)
        with huge_pages(filled=True):
            index._graph.load_index(str(path), max_elements=_with_slack(len(keys)))
        index._lock = ReadWriteLock()
        index._keys = keys
        # A start that only searches does without the mapping.
        index._labels_made = None
        index._rows = len(keys) - keys.count("")
        index._visible = len(keys)
        index._tail = tail.Tail(dims, base=len(keys))
        index.disconnected = False
        index.as_of = None
        index._tombstones = index._graph.get_current_count() - index._rows
        index._selections = {}
        index.calibration = calibration
        if len(keys) <= tail.SIZE:
            index._tail = tail.Tail(dims)
            labels = np.flatnonzero([bool(key) for key in keys])
            vectors = np.zeros((len(keys), dims), np.float32)
            vectors[labels] = index._stored(labels)
            index._tail.extend(vectors)
            for label in set(range(len(keys))) - set(labels.tolist()):
                index._tail.bury(label)
        return index

    # --- inside

    @property
    def _labels(self) -> dict[str, int]:
        labels = self._labels_made
        if labels is None:
            # Twice at once does no harm: labels change under the lock of a writer, who asks first.
            labels = {key: label for label, key in enumerate(self._keys[: self._visible]) if key}
            self._labels_made = labels
        return labels

    def _visible_labels(self) -> NDArray[np.int64]:
        return np.fromiter(self._labels.values(), np.int64, self._rows)

    def _comparable(self, vectors: Matrix) -> Matrix:
        """Return vectors in the form in which the graph has its own."""
        # hnswlib reads whatever memory follows a vector that is too short.
        if vectors.ndim != 2 or vectors.shape[1] != self.dims or vectors.dtype != np.float32:
            raise ValueError(f"float32 of shape (n, {self.dims}) is needed, not {vectors.shape}")
        return comparable(vectors, self.metric)

    def _reserve(self, n: int) -> None:
        needed = len(self._keys) + n
        if needed > self._graph.get_max_elements():
            self._graph.resize_index(max(_with_slack(needed), len(self._keys) * 3 // 2))

    def _bury(self, label: int | None) -> None:
        if label is not None:
            self._graph.mark_deleted(label)
            self._keys[label] = ""
            self._tail.bury(label)
            self._tombstones += 1

    def _query(
        self, queries: Matrix, k: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32]] | None:
        try:
            return self._graph.knn_query(
                queries, k=k, num_threads=1 if len(queries) <= _FEW_QUERIES else THREADS
            )
        except RuntimeError:
            # Fewer than k could be reached.
            return None

    def _stored(self, labels: Any) -> Matrix:
        if not len(labels):
            return np.empty((0, self.dims), np.float32)
        return self._graph.get_items(np.asarray(labels, np.uint64))


def _space(metric: Metric) -> str:
    # Cosine is the inner product of vectors that were normalised here.
    return "l2" if metric == "l2" else "ip"


def _with_slack(rows: int) -> int:
    return int(rows * _SLACK) + 64
