"""Searches with filters: in SQL beside pgvector, and in process beside raw hnswlib and numpy.

Needs EHUB_TEST_DATABASE_URL: a Postgres with dblink on this machine, as a superuser. Each row gets
flags, drawn at random or, correlated with the vectors, by their product with one direction. pgvector
has an index of just the rows that a filter leaves (exact search), and its HNSW with an iterative
scan at the smallest ef_search that reaches the recall.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import psycopg
from bench import K, report
from bench_sql import fresh_database, held_out, served

import ehub
from ehub.binary import VectorParameter

SHARES = (0.5, 0.1, 0.01, 0.001, 0.0001)
QUERIES = 200
NEAREST = "SELECT key, distance FROM ehub.nearest('bench', %s, 10, filter => '{{\"{}\": true}}')"
PGVECTOR = (
    "SELECT key, embedding <-> %s FROM pgvector_own WHERE metadata @> '{{\"{}\": true}}'"
    " ORDER BY embedding <-> %s LIMIT 10"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured")
    parser.add_argument("--listen", default="127.0.0.1:6546", help="where the service listens")
    arguments = parser.parse_args()
    url = fresh_database(arguments.listen)
    queries, rows, flags = load(arguments.file, url)
    with tempfile.TemporaryDirectory(prefix="ehub-bench-") as folder:
        with served(url, arguments.listen, Path(folder), rows.shape[1]) as db:
            for name in flags:
                condition = f"metadata @> '{{\"{name}\": true}}'"
                db.execute(f"CREATE INDEX ON pgvector_own (key) WHERE {condition}")
            db.execute("ANALYZE")
            in_sql(db, queries, rows, flags, arguments.repeats)
        in_process(url, Path(folder), queries, rows, flags, arguments.repeats)


def load(file: Path, url: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    keys, rows, queries = held_out(file, QUERIES)
    random = np.random.default_rng(2)
    along = np.argsort(-(rows @ random.standard_normal(rows.shape[1]).astype(np.float32)))
    flags = {}
    for share in SHARES:
        # A dot in a field's name would lead into an object.
        name = f"{share:%}".replace(".", "_").rstrip("0%").rstrip("_")
        flags[f"random_{name}"] = random.random(len(rows)) < share
        flags[f"along_{name}"] = np.isin(np.arange(len(rows)), along[: int(share * len(rows))])
    notes = [{name: True for name, chosen in flags.items() if chosen[i]} for i in range(len(rows))]
    with ehub.connect(url, index="none") as hub:
        hub.create_space("bench", rows.shape[1]).multiset(keys, rows, notes)
    return queries, rows, flags


def limits_of(queries: np.ndarray, rows: np.ndarray) -> list[float]:
    """Return the distance of the last neighbour that is to be found, by query."""
    found = []
    for query in queries:
        distances = np.linalg.norm(rows - query, axis=1)
        last = min(K, len(rows)) - 1
        found.append(float(np.partition(distances, last)[last]) + 1e-4)
    return found


def recall(
    ask: Callable[[int], list[tuple[str, float]]], limits: list[float], rows: int, *, whole: bool
) -> float:
    """Return the share of neighbours found; with ``whole`` each answer must have as many as are."""
    hits = 0
    for number, limit in enumerate(limits):
        found = ask(number)
        assert not whole or len(found) == min(K, rows)
        hits += sum(distance <= limit for _, distance in found)
    return hits / min(K, rows) / len(limits)


def in_sql(
    db: psycopg.Connection,
    queries: np.ndarray,
    rows: np.ndarray,
    flags: dict[str, np.ndarray],
    repeats: int,
) -> None:
    vectors = [VectorParameter(query) for query in queries]
    db.execute("SET hnsw.max_scan_tuples = 400000; SET hnsw.scan_mem_multiplier = 4")
    db.execute("SET hnsw.iterative_scan = relaxed_order")
    for name, chosen in flags.items():
        mine = rows[chosen]
        limits = limits_of(queries, mine)
        own = NEAREST.format(name)
        theirs = PGVECTOR.format(name)
        db.execute("SET ehub.mode = 'auto'")
        for _ in range(3):
            db.execute(own, [vectors[0]]).fetchall()
            time.sleep(2)
        db.execute("SET ehub.mode = 'index'")

        def ask(number: int, statement: str = own, n: int = 1) -> list[tuple[str, float]]:
            return db.execute(statement, [vectors[number]] * n).fetchall()  # type: ignore[return-value]

        (way,) = db.execute(
            "SELECT way FROM ehub.explain_nearest('bench', %s, 10, %s::jsonb) WHERE chosen",
            [vectors[0], f'{{"{name}": true}}'],
        ).fetchone() or ("?",)
        found = recall(ask, limits, len(mine), whole=True)
        hnsw = "SET enable_bitmapscan = off; SET enable_sort = off; SET enable_seqscan = off"
        exact = "SET enable_bitmapscan = on; SET enable_sort = on; SET enable_seqscan = on"
        # A sum keeps the planner from the HNSW.
        compared = theirs.replace("ORDER BY ", "ORDER BY 0.0 + (").replace(" LIMIT", ") LIMIT")
        ways = {"ehub": (own, 1, exact), "exact": (compared, 2, exact)}
        db.execute(hnsw)
        reached = ef = 0.0
        for ef in (10, 20, 40, 80, 160, 320, 640, 1000):
            db.execute(f"SET hnsw.ef_search = {ef}")
            some = limits[:50]
            reached = recall(lambda i: ask(i, theirs, 2), some, len(mine), whole=False)
            if reached >= 0.95:
                break
        ways["hnsw"] = (theirs, 2, f"{hnsw}; SET hnsw.ef_search = {ef}")
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for kind, (statement, n, setting) in ways.items():
                db.execute(setting)
                count = QUERIES if kind == "ehub" else 50
                started = time.perf_counter()
                for number in range(count):
                    ask(number, statement, n)
                rates[kind].append(count / (time.perf_counter() - started))
        middle = {kind: statistics.median(each) for kind, each in rates.items()}
        report(
            f"SQL, {name}, {len(mine)} rows",
            f"recall {found:.4f} ({way}; pgvector's HNSW {reached:.3f} at ef_search {ef}); "
            + ", ".join(f"{kind} {value:,.0f}/s" for kind, value in middle.items())
            + f"; by HNSW {middle['ehub'] / middle['hnsw']:.2f},"
            f" by exact {middle['ehub'] / middle['exact']:.2f} (wanted > 1)",
        )


def in_process(
    url: str,
    folder: Path,
    queries: np.ndarray,
    rows: np.ndarray,
    flags: dict[str, np.ndarray],
    repeats: int,
) -> None:
    raw = hnswlib.Index("l2", rows.shape[1])
    raw.init_index(len(rows), 200, 16)
    raw.add_items(rows)
    with ehub.connect(url, data_dir=folder, index="local") as hub:
        space = hub.get_space("bench")
        space.wait_until_indexed()
        labels = [*space.keys()]
        for name, chosen in flags.items():
            matching = {name: True}
            members = rows[chosen]
            keys = [labels[i] for i in np.flatnonzero(chosen)]
            limits = limits_of(queries, members)
            for _ in range(3):
                space.nearest_neighbors(K, vector=queries[0], filter=matching)
                time.sleep(2)

            def own(i: int, matching: dict[str, bool] = matching) -> list[tuple[str, float]]:
                found = space.nearest_neighbors(K, vector=queries[i], filter=matching)
                return [(key, distance) for key, distance, _ in found]

            def gathered(
                i: int, members: np.ndarray = members, keys: list[str] = keys
            ) -> list[tuple[str, float]]:
                apart = ((members - queries[i]) ** 2).sum(axis=1)
                k = min(K, len(keys))
                near = np.argpartition(apart, k - 1)[:k]
                near = near[np.argsort(apart[near])]
                return [(keys[j], float(apart[j]) ** 0.5) for j in near.tolist()]

            squares = (members**2).sum(axis=1)

            def product(
                i: int,
                members: np.ndarray = members,
                keys: list[str] = keys,
                squares: np.ndarray = squares,
            ) -> list[tuple[str, float]]:
                apart = squares - 2 * (members @ queries[i])
                k = min(K, len(keys))
                near = np.argpartition(apart, k - 1)[:k]
                near = near[np.argsort(apart[near])]
                return [(keys[j], float(apart[j])) for j in near.tolist()]

            def callback(i: int, chosen: np.ndarray = chosen) -> Any:
                return raw.knn_query(queries[i], K, num_threads=1, filter=lambda n: chosen[n])

            raw.set_ef(300)
            found = recall(own, limits, len(members), whole=True)
            ways: dict[str, tuple[Callable[[int], Any], int]] = {
                "ehub": (own, QUERIES),
                "numpy": (gathered, QUERIES),
                "numpy, by a product": (product, QUERIES),
            }
            try:
                callback(0)
                ways["callback"] = (callback, 10)
            except RuntimeError:
                # It finds fewer than are asked for.
                pass
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats):
                for kind, (ask, count) in ways.items():
                    started = time.perf_counter()
                    for i in range(count):
                        try:
                            ask(i)
                        except RuntimeError:
                            continue
                    rates[kind].append(count / (time.perf_counter() - started))
            middle = {kind: statistics.median(each) for kind, each in rates.items()}
            batch = []
            for _ in range(repeats):
                started = time.perf_counter()
                space.multi_nearest_neighbors(K, vectors=queries, filter=matching)
                batch.append(QUERIES / (time.perf_counter() - started))
            report(
                f"in process, {name}, {len(members)} rows",
                f"recall {found:.4f}; "
                + ", ".join(f"{kind} {value:,.0f}/s" for kind, value in middle.items())
                + f", ehub's batch {statistics.median(batch):,.0f}/s; by numpy"
                f" {middle['ehub'] / middle['numpy']:.2f}, by its product"
                f" {middle['ehub'] / middle['numpy, by a product']:.2f} (wanted >= 0.7)"
                + (
                    f", by the callback {middle['ehub'] / middle['callback']:.0f}"
                    if "callback" in middle
                    else ""
                ),
            )


if __name__ == "__main__":
    main()
