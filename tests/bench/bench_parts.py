"""Partitions beside one graph over all rows, and the graph of all neighbours beside raw hnswlib.

Rows of the file are multiplied with noise to a million and put into 10,000 partitions with Zipf
sizes. What holds the indexes are processes of their own, so that memory is told apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import K, child, data_folder, memory, report

PARTITIONS = 10_000
QUERIES = 300
GRAPH_ROWS = 20_480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--rows", type=int, default=1_000_000, help="in partitions")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured")
    arguments = parser.parse_args()
    with data_folder() as folder:
        lines = arguments.file.read_text().splitlines()
        dims = len(lines[0].split(" ")) - 1
        rows = np.array([line.rsplit(" ", dims)[1:] for line in lines], np.float32)
        del lines
        random = np.random.default_rng(1)
        drawn = random.choice(len(rows), arguments.rows, replace=arguments.rows > len(rows))
        noise = random.standard_normal((arguments.rows, dims)).astype(np.float32)
        many = rows[drawn] + noise * (0.3 * rows.std())
        del noise
        shares = 1 / np.arange(1, PARTITIONS + 1)
        tenants = random.choice(PARTITIONS, arguments.rows, p=shares / shares.sum())
        np.save(folder / "many.npy", many)
        np.save(folder / "tenants.npy", tenants)
        np.save(folder / "rows.npy", rows)
        store(many, tenants, rows)
        found = {
            kind: child(kind, folder, arguments.repeats, script=__file__)
            for kind in ("plain", "parted")
        }
        plain, parted = found["plain"], found["parted"]
        report(
            "memory of a process with the index",
            f"partitions {parted['memory'] / 1e6:,.0f} MB, one graph {plain['memory'] / 1e6:,.0f}"
            f" MB: {parted['memory'] / plain['memory']:.2f} (wanted <= 1.3)",
        )
        report("ready after", f"{parted['seconds']:.0f} s, one graph {plain['seconds']:.0f} s")
        for who in ("by rows", "by partitions"):
            a, b = parted[who], plain[who]
            report(
                f"tenants drawn {who}",
                f"{a['rate']:,.0f}/s at recall {a['recall']:.4f} (wanted >= 0.95); the same filters"
                f" on one index {b['rate']:,.0f}/s: {a['rate'] / b['rate']:.1f} (wanted > 1)",
            )
        a, b = parted["hot"], plain["hot"]
        report(
            "one tenant again and again, largest to smallest",
            ", ".join(
                f"{n} rows {x:,.0f} by {y:,.0f}/s" for (n, x), (_, y) in zip(a, b, strict=True)
            ),
        )
        graph = child("graph", folder, arguments.repeats, script=__file__)
        ratio = statistics.median(graph["ehub"]) / statistics.median(graph["raw"])
        report(
            f"the graph of all neighbours, {len(rows)} rows",
            f"{statistics.median(graph['ehub']):,.0f} rows/s, raw hnswlib's batches"
            f" {statistics.median(graph['raw']):,.0f}: {ratio:.2f} (wanted >= 0.8);"
            f" recall {graph['recall']:.4f} (wanted >= 0.95)",
        )


def store(many: np.ndarray, tenants: np.ndarray, rows: np.ndarray) -> None:
    import ehub

    with ehub.connect(index="none") as hub:
        for name, field in (("plain", None), ("parted", "tenant")):
            space = hub.create_space(name, many.shape[1], partition_by=field)
            space.multiset(
                (f"k{i}", many[i], {"tenant": int(tenants[i])}) for i in range(len(many))
            )
        hub.create_space("all", rows.shape[1]).multiset(
            (f"{i:06}", row) for i, row in enumerate(rows)
        )


def searches(folder: Path, name: str, repeats: int) -> dict[str, Any]:
    import ehub

    many, tenants = np.load(folder / "many.npy"), np.load(folder / "tenants.npy")
    random = np.random.default_rng(2)
    drawn = {
        "by rows": random.choice(tenants, QUERIES),
        "by partitions": random.choice(np.unique(tenants), QUERIES),
    }
    queries = many[random.choice(len(many), QUERIES)] + 0.1
    truth = {}
    for who, of in drawn.items():
        limits = []
        for query, tenant in zip(queries, of, strict=True):
            apart = np.linalg.norm(many[tenants == tenant] - query, axis=1)
            limits.append((float(np.sort(apart)[:K][-1]) + 1e-4, min(K, len(apart))))
        truth[who] = limits
    order = np.argsort(-np.bincount(tenants, minlength=PARTITIONS), kind="stable")
    hot = [int(tenant) for tenant in order[[0, 9, 99, 999]]]
    sizes = [int((tenants == tenant).sum()) for tenant in hot]
    del many, tenants
    gc.collect()
    before = memory()
    with ehub.connect() as hub:
        space = hub.get_space(name)
        started = time.monotonic()
        space.wait_until_indexed()
        seconds = time.monotonic() - started
        held = 0

        def ask(i: int, tenant: int) -> list[ehub.Neighbor]:
            if name == "parted":
                return space.nearest_neighbors(K, vector=queries[i], partition=tenant)
            return space.nearest_neighbors(K, vector=queries[i], filter={"tenant": tenant})

        answer: dict[str, Any] = {"seconds": seconds}
        for who, of in drawn.items():
            rates, hits = [], 0.0
            for turn in range(1 if name == "plain" else repeats):
                started = time.perf_counter()
                count = QUERIES if name == "parted" else QUERIES // 6
                found = [ask(i, int(of[i])) for i in range(count)]
                rates.append(count / (time.perf_counter() - started))
                if not turn:
                    # That of a process that is in use.
                    hits = sum(
                        sum(one.distance <= limit for one in near) / n
                        for near, (limit, n) in zip(found, truth[who], strict=False)
                    ) / len(found)
            answer[who] = {"rate": statistics.median(rates), "recall": hits}
        answer["hot"] = []
        for tenant, size in zip(hot, sizes, strict=True):
            for _ in range(3):
                ask(0, tenant)
                time.sleep(0 if name == "parted" else 4)
            rates = []
            for _ in range(repeats):
                started = time.perf_counter()
                for i in range(100):
                    ask(i, tenant)
                rates.append(100 / (time.perf_counter() - started))
            answer["hot"].append((size, statistics.median(rates)))
        held = memory()
    # Another process, which reads the files, holds nothing that only the build needed.
    restarted = child("held", folder, name, script=__file__)
    return {**answer, "memory": restarted["memory"], "built": held - before}


def plain(folder: Path, repeats: int) -> dict[str, Any]:
    return searches(folder, "plain", repeats)


def parted(folder: Path, repeats: int) -> dict[str, Any]:
    return searches(folder, "parted", repeats)


def held(_folder: Path, name: str) -> dict[str, Any]:
    import ehub

    with ehub.connect() as hub:
        space = hub.get_space(name)
        space.wait_until_indexed()
        space.nearest_neighbors(K, vector=np.ones(space.dims))
        return {"memory": memory()}


def graph(folder: Path, repeats: int) -> dict[str, Any]:
    from hnswlib import Index

    import ehub

    rows = np.load(folder / "rows.npy")
    with ehub.connect() as hub:
        space = hub.get_space("all")
        space.wait_until_indexed()
        row = next(row for row in hub.status() if row["space"] == "all" and row["ef"])
        path = folder / "data" / "indexes"
        deadline = time.monotonic() + 120
        while not (saved := list(path.glob(f"*/{row['index_id']}/manifest.json"))):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        same = Index("l2", rows.shape[1])
        same.load_index(str(next(saved[0].parent.glob("*.hnsw"))))
        same.set_ef(row["ef"])
        rates: dict[str, list[float]] = {"ehub": [], "raw": []}
        near: dict[str, set[str]] = {}
        for turn in range(repeats):
            # All over the file, of which parts are easier than others.
            first = turn * (len(rows) - GRAPH_ROWS) // max(1, repeats - 1)
            part = rows[first : first + GRAPH_ROWS]
            started = time.perf_counter()
            after = f"{first - 1:06}" if first else None
            for n, (key, found) in enumerate(space.nearest_neighbors_of_all(K, after=after), 1):
                if n % 200 == 0:
                    near[key] = {one.key for one in found}
                if n == GRAPH_ROWS:
                    break
            rates["ehub"].append(GRAPH_ROWS / (time.perf_counter() - started))
            started = time.perf_counter()
            same.knn_query(part, k=K + 1, num_threads=os.cpu_count())
            rates["raw"].append(GRAPH_ROWS / (time.perf_counter() - started))
    hits = 0
    for key, found in near.items():
        apart = ((rows - rows[int(key)]) ** 2).sum(axis=1)
        apart[int(key)] = np.inf
        hits += len({f"{i:06}" for i in np.argpartition(apart, K)[:K]} & found)
    return {**rates, "recall": hits / K / len(near)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, what, folder, *values = sys.argv
        work = {"plain": plain, "parted": parted, "held": held, "graph": graph}[what]
        answer = work(Path(folder), *[int(v) if v.isdigit() else v for v in values])
        print(json.dumps(answer))
    else:
        main()
