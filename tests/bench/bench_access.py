"""What access control costs: a granted role beside the owner, and row limits beside pgvector's HNSW.

Needs EHUB_TEST_DATABASE_URL: a Postgres with dblink on this machine, as a superuser. Rows get their
metadata at random; pgvector's table has the same row policies, and its searches the smallest
ef_search that reaches the recall, in either order of its iterative scan.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from bench import K, report
from bench_sql import PGVECTOR, fresh_database, held_out, parameters, served

import ehub
from ehub.binary import VectorParameter

SHARES = {"half": 0.5, "tenth": 0.1, "hundredth": 0.01}
QUERIES = 200
NEAREST = "SELECT key, distance FROM ehub.nearest('bench', %s, 10)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is measured")
    parser.add_argument("--listen", default="127.0.0.1:6545", help="where the service listens")
    arguments = parser.parse_args()
    with psycopg.connect(os.environ["EHUB_TEST_DATABASE_URL"], autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS ehub_bench WITH (FORCE)")
        for role in ("reader", *SHARES):
            admin.execute(f"DROP ROLE IF EXISTS ehub_bench_{role}")
            admin.execute(f"CREATE ROLE ehub_bench_{role}")
    url = fresh_database(arguments.listen)
    queries, rows, metadata = load(arguments.file, url)
    with tempfile.TemporaryDirectory(prefix="ehub-bench-") as folder:
        with served(url, arguments.listen, Path(folder), rows.shape[1]) as db:
            granted(db, url, queries, arguments.repeats)
            limited(db, url, queries, rows, metadata, arguments.repeats)


def load(file: Path, url: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    keys, rows, queries = held_out(file, QUERIES)
    random = np.random.default_rng(2)
    within = {name: random.random(len(rows)) < share for name, share in SHARES.items()}
    notes = [{n: True for n, chosen in within.items() if chosen[i]} for i in range(len(rows))]
    with ehub.connect(url, index="none") as hub:
        hub.create_space("bench", rows.shape[1]).multiset(keys, rows, notes)
    return queries, rows, within


def as_role(db: psycopg.Connection, role: str, ask: Callable[[], Any]) -> Any:
    db.execute(f"SET ROLE {role}")
    try:
        return ask()
    finally:
        db.execute("RESET ROLE")


def granted(db: psycopg.Connection, url: str, queries: np.ndarray, repeats: int) -> None:
    db.execute("SELECT ehub.grant('bench', 'ehub_bench_reader', 'read')")
    db.execute("SET ehub.mode = 'index'")
    vectors = [VectorParameter(query) for query in queries]
    rates: dict[str, list[float]] = {"postgres": [], "ehub_bench_reader": []}
    for role in rates:
        as_role(db, role, lambda: [db.execute(NEAREST, [q]).fetchall() for q in vectors])
    for _ in range(repeats):
        for role, found in rates.items():
            found.append(as_role(db, role, lambda: rate(db, NEAREST, vectors)))
    owner, reader = (statistics.median(found) for found in rates.values())
    report(
        "a granted role",
        f"{reader:,.0f}/s, the owner {owner:,.0f}: {reader / owner:.2f} (wanted >= 0.9)",
    )
    db.execute("RESET ehub.mode")


def limited(
    db: psycopg.Connection,
    url: str,
    queries: np.ndarray,
    rows: np.ndarray,
    within: dict[str, np.ndarray],
    repeats: int,
) -> None:
    db.execute("ALTER TABLE pgvector_own ENABLE ROW LEVEL SECURITY")
    started = time.monotonic()
    for share in SHARES:
        role = f"ehub_bench_{share}"
        db.execute(
            "SELECT ehub.grant('bench', %s, 'read', rows => %s)", [role, f'{{"{share}": true}}']
        )
        db.execute(f"GRANT SELECT ON pgvector_own TO {role}")
        db.execute(
            f"CREATE POLICY p_{share} ON pgvector_own TO {role}"
            f" USING (metadata @> '{{\"{share}\": true}}')"
        )
        report(f"granting {SHARES[share]:.0%}", f"{time.monotonic() - started:.2f} s")
        started = time.monotonic()
    db.execute("ANALYZE ehub_data.v1")
    while db.execute(
        "SELECT count(*) FROM ehub.status WHERE of_rows IS NOT NULL AND index_state = 'ready'"
    ).fetchone() != (len(SHARES),):
        time.sleep(0.5)
    report("their indexes are ready", f"{time.monotonic() - started:.0f} s later")
    vectors = [VectorParameter(query) for query in queries]
    db.execute("SET hnsw.max_scan_tuples = 400000; SET hnsw.scan_mem_multiplier = 4")
    for share, chosen in within.items():
        role = f"ehub_bench_{share}"
        mine = rows[chosen]
        limits = []
        for query in queries:
            distances = np.linalg.norm(mine - query, axis=1)
            limits.append(np.partition(distances, K - 1)[K - 1] + 1e-4)

        def recall(statement: str, limits: list[float] = limits, role: str = role) -> float:
            def measure() -> float:
                hits = 0
                for vector, limit in zip(vectors, limits, strict=True):
                    found = db.execute(statement, parameters(statement, vector)).fetchall()
                    assert len(found) == K or "pgvector" in statement
                    hits += sum(distance <= limit for _, distance in found)
                return hits / K / len(vectors)

            return float(as_role(db, role, measure))

        db.execute("SET ehub.mode = 'index'")
        own = recall(NEAREST)
        candidates = {"ehub": (NEAREST, "")}
        report(f"{SHARES[share]:.0%} of the rows, recall of ehub", f"{own:.4f} (wanted >= 0.95)")
        for order in ("relaxed_order", "strict_order"):
            for ef in (10, 20, 40, 80, 160, 320, 640, 1000):
                setting = f"SET hnsw.iterative_scan = {order}; SET hnsw.ef_search = {ef}"
                db.execute(setting)
                theirs = recall(PGVECTOR)
                if theirs >= 0.95 or ef == 1000:
                    report(f"  pgvector, {order}", f"recall {theirs:.4f} (ef_search {ef})")
                    candidates[order] = (PGVECTOR, setting)
                    break
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(repeats):
            for name, (statement, setting) in candidates.items():
                if setting:
                    db.execute(setting)
                rates[name].append(as_role(db, role, lambda s=statement: rate(db, s, vectors[:50])))
        middle = {name: statistics.median(found) for name, found in rates.items()}
        best = max(value for name, value in middle.items() if name != "ehub")
        report(
            "  rate",
            ", ".join(f"{name} {value:,.0f}/s" for name, value in middle.items())
            + f": {middle['ehub'] / best:.2f} (wanted > 1)",
        )


def rate(db: psycopg.Connection, statement: str, vectors: list[VectorParameter]) -> float:
    started = time.perf_counter()
    for vector in vectors:
        db.execute(statement, parameters(statement, vector)).fetchall()
    return len(vectors) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
