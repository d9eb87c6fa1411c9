"""What versions, checkpoints and snapshots cost, at two sizes and beside what they add to.

``make bench FILE=glove.txt`` runs it after the others. What is compared is interleaved and
repeated, and medians are given.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psycopg
from bench import K, child, data_folder, report

BATCH = 5000
SMALL = 10_000
QUERIES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is measured")
    arguments = parser.parse_args()
    with data_folder() as folder:
        run(arguments, folder)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    import ehub

    keys, rows = [], []
    for line in arguments.file.open():
        key, _, values = line.partition(" ")
        keys.append(key)
        rows.append(np.array(values.split(), np.float32))
    matrix = np.stack(rows)
    del rows
    with ehub.connect(index="none") as hub:
        spaces = {}
        for size in (SMALL, len(keys)):
            started = time.monotonic()
            spaces[size] = hub.create_space(f"s{size}", matrix.shape[1])
            spaces[size].multiset(keys[:size], matrix[:size])
            seconds = time.monotonic() - started
            spaces[size].create_version("v2", from_version="v1")
        report("load of all rows", f"{seconds:.1f} s")
        switches(spaces, arguments.repeats)
        restores(spaces, matrix, keys, arguments.repeats)
        upserts(hub, matrix, keys, arguments.repeats)
        snapshots(hub, spaces[len(keys)], matrix, keys, arguments.repeats, folder)


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def switches(spaces, repeats: int) -> None:
    times: dict[tuple[str, int], list[float]] = {}
    for i in range(repeats):
        for size, space in spaces.items():
            for what, call in (
                ("promote", lambda space=space: space.promote("v2")),
                ("rollback", space.rollback),
                ("checkpoint", lambda space=space, i=i: space.checkpoint(f"c{i}")),
                ("drop_checkpoint", lambda space=space, i=i: space.drop_checkpoint(f"c{i}")),
            ):
                times.setdefault((what, size), []).append(milliseconds(call))
    for what in ("promote", "rollback", "checkpoint", "drop_checkpoint"):
        small, large = (statistics.median(times[what, size]) for size in spaces)
        report(what, f"{large:.1f} ms at {max(spaces):,} rows, {small:.1f} ms at {SMALL:,}")


def restores(spaces, matrix, keys, repeats: int) -> None:
    size = max(spaces)
    space = spaces[size]
    times: dict[str, list[float]] = {"1 %": [], "10 %": []}
    for _ in range(repeats):
        for what, part in (("1 %", size // 100), ("10 %", size // 10)):
            space.checkpoint("before")
            space.multiset(keys[:part], matrix[:part] + 1)
            times[what].append(milliseconds(lambda: space.restore("before")))
            space.drop_checkpoint("before")
    one, ten = (statistics.median(times[what]) for what in times)
    report("restore of 1 % and of 10 % changed rows", f"{one:,.0f} ms, {ten:,.0f} ms")


def upserts(hub, matrix, keys, repeats: int) -> None:
    """Upserts into four spaces alike: never a checkpoint, one that was dropped, one that is there
    and has the images of all rows, one that is new each time."""
    names = ["never", "dropped", "kept", "first"]
    for name in names:
        space = hub.create_space(name, matrix.shape[1])
        space.multiset(keys[:BATCH], matrix[:BATCH])
        if name in ("dropped", "kept"):
            space.checkpoint("one")
        if name == "dropped":
            space.drop_checkpoint("one")
        if name == "kept":
            space.multiset(keys[:BATCH], matrix[:BATCH] + 1)
    times: dict[tuple[str, str], list[float]] = {}
    with psycopg.connect(hub.conninfo, autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE rows AS SELECT key, embedding FROM spaces.never")
        for i in range(10 * repeats):
            hub.get_space("first").checkpoint(f"c{i}")
            for name in random.sample(names, len(names)):
                statement = (
                    f"INSERT INTO spaces.{name} (key, embedding) SELECT key, embedding FROM rows"
                    " WHERE %s::text IS NULL OR key = %s ORDER BY key"
                    " ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding"
                )
                for key in keys[20 * i : 20 * (i + 1)]:
                    times.setdefault(("single upserts", name), []).append(
                        milliseconds(lambda s=statement, k=key: connection.execute(s, [k, k]))
                    )
                times.setdefault((f"upserts of {BATCH:,} rows", name), []).append(
                    milliseconds(lambda s=statement: connection.execute(s, [None, None]))
                )
            if i:
                hub.get_space("first").drop_checkpoint(f"c{i - 1}")
    for what in sorted({what for what, _ in times}):
        never, dropped, kept, first = (statistics.median(times[what, name]) for name in names)
        report(f"{what}, without a checkpoint", f"ratio {dropped / never:.2f} (wanted <= 1.05)")
        report(f"{what}, rows first changed", f"ratio {first / never:.2f} (wanted <= 2)")
        report(f"{what}, changed before", f"ratio {kept / never:.2f} (wanted 1)")


def snapshots(hub, space, matrix, keys, repeats: int, folder: Path) -> None:
    from hnswlib import Index

    peak = child("download", folder, space.name)
    ratio = peak["peak"] / matrix.nbytes
    report("peak memory of a process that downloads", f"{ratio:.2f} x the matrix (wanted <= 2.2)")
    whole, part = [], []
    one = len(keys) // 100
    snapshot = space.download_snapshot()
    for i in range(repeats):
        whole.append(milliseconds(lambda: space.download_snapshot().close()))
        space.multiset(keys[i * one : (i + 1) * one], matrix[:one])
        part.append(milliseconds(snapshot.refresh))
    ratio = statistics.median(part) / statistics.median(whole)
    report(
        "refresh after 1 % changes beside a download",
        f"{statistics.median(part):,.0f} / {statistics.median(whole):,.0f} ms:"
        f" ratio {ratio:.2f} (wanted <= 0.1)",
    )
    started = time.monotonic()
    snapshot.wait_until_indexed()
    report("index of the snapshot", f"{time.monotonic() - started:.1f} s")
    index = snapshot._index
    index.save(folder / "snapshot.hnsw")
    raw = Index("l2", matrix.shape[1])
    raw.load_index(str(folder / "snapshot.hnsw"))
    raw.set_ef(index.calibration.ef)
    queries = matrix[np.random.default_rng(1).choice(len(matrix), QUERIES, replace=False)] + 0.01
    rates: dict[str, list[float]] = {"raw": [], "ehub": []}
    for _ in range(repeats):
        started = time.monotonic()
        for query in queries:
            raw.knn_query(query, k=K, num_threads=1)
        rates["raw"].append(QUERIES / (time.monotonic() - started))
        started = time.monotonic()
        for query in queries:
            snapshot.nearest_neighbors(K, vector=query)
        rates["ehub"].append(QUERIES / (time.monotonic() - started))
    own, other = statistics.median(rates["ehub"]), statistics.median(rates["raw"])
    report(
        "single queries of the snapshot, the same graph",
        f"{own:,.0f} /s, raw {other:,.0f}: ratio {own / other:.2f} (wanted >= 0.85)",
    )


if __name__ == "__main__":
    sys.exit(main())
