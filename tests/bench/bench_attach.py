"""Attaching a table under write load beside pgvector's CREATE INDEX CONCURRENTLY, and its searches.

Needs EHUB_TEST_DATABASE_URL: a Postgres with dblink on this machine, as a superuser. Two writers go
on at a steady pace all the time; the rows of one of them move, those of the other come and go. A
search by an ORM statement is measured beside the raw function and pgvector's index.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from bench import K, report
from bench_sql import EHUB, connect, fresh_database, held_out, run_ehub

from ehub.binary import VectorParameter

QUERIES = 200
# Transactions a second of each writer.
PACE = 50
NEAREST = "SELECT key, distance FROM ehub.nearest('documents', %s, 10)"
PGVECTOR = "SELECT id, embedding <-> %(q)s FROM documents ORDER BY embedding <-> %(q)s LIMIT 10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--repeats", type=int, default=5, help="how often rates are measured")
    parser.add_argument("--listen", default="127.0.0.1:6547", help="where the service listens")
    arguments = parser.parse_args()
    url = fresh_database(arguments.listen)
    queries = load(arguments.file, url)
    with tempfile.TemporaryDirectory(prefix="ehub-bench-") as folder:
        service = subprocess.Popen(
            [
                *(EHUB, "serve", "--database", url, "--listen", arguments.listen),
                *("--data", folder, "--pages", "none"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            with connect(url) as db:
                attached(db, url)
                built(db, url)
                rates(db, url, queries, arguments.repeats)
        finally:
            service.terminate()
            service.wait()


def load(file: Path, url: str) -> np.ndarray:
    keys, rows, queries = held_out(file, QUERIES)
    with connect(url) as db:
        db.execute(
            "CREATE TABLE documents (id bigint PRIMARY KEY, word text, letters int,"
            f" embedding vector({rows.shape[1]}))"
        )
        with db.cursor().copy("COPY documents FROM STDIN") as copy:
            for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
                copy.write_row((number, key, len(key), "[" + ",".join(map(str, row)) + "]"))
        db.execute("VACUUM ANALYZE documents")
    report("rows", len(keys))
    return queries


@contextlib.contextmanager
def written(url: str) -> Iterator[dict[str, Any]]:
    """Two writers at their pace; what they did, and the longest time that one of them waited."""
    stop = threading.Event()
    told: dict[str, Any] = {"transactions": 0, "errors": [], "longest": 0.0}

    def write(statement: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        with connect(url) as db:
            due = time.perf_counter()
            while not stop.is_set():
                started = time.perf_counter()
                try:
                    db.execute(statement, {"id": int(random.integers(300_000))})
                except psycopg.Error as error:
                    told["errors"].append(str(error))
                told["longest"] = max(told["longest"], time.perf_counter() - started)
                told["transactions"] += 1
                due += 1 / PACE
                time.sleep(max(0.0, due - time.perf_counter()))

    move = (
        "UPDATE documents SET embedding = (SELECT embedding FROM documents WHERE id = 300000 - %(id)s)"
        " WHERE id = %(id)s"
    )
    come_and_go = (
        "WITH gone AS (DELETE FROM documents WHERE id = 300000 + %(id)s %% 40000 RETURNING id)"
        " INSERT INTO documents SELECT 1000000 + coalesce(max(d.id), 0), 'new', 3,"
        " (SELECT embedding FROM documents WHERE id = %(id)s) FROM documents AS d WHERE d.id >= 1000000"
    )
    writers = [
        threading.Thread(target=write, args=(statement, seed))
        for seed, statement in enumerate((move, come_and_go))
    ]
    for writer in writers:
        writer.start()
    time.sleep(1)
    told["longest"] = 0.0
    try:
        yield told
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def attached(db: psycopg.Connection, url: str) -> None:
    with written(url) as told:
        started = time.perf_counter()
        db.execute("SELECT ehub.attach('documents', 'embedding', metric => 'l2')")
        report("attach returns after, s", f"{time.perf_counter() - started:.2f}")
        wait_until_indexed(db)
        report("attached and ready after, s", f"{time.perf_counter() - started:.2f}")
    tell(told)
    wait_until_indexed(db)
    rows, indexed = db.execute(
        "SELECT rows, indexed_rows FROM ehub.status WHERE index_state = 'ready'"
    ).fetchone() or (0, 0)
    report("rows of the table, and of its index", f"{rows:,}, {indexed:,}")
    # Without looking at the log: what the index itself has for rows that were written last.
    db.execute("SET ehub.consistency = 'eventual'; SET ehub.mode = 'index'")
    wrong = db.execute(
        "SELECT count(*) FROM (SELECT id, embedding FROM documents ORDER BY xmin::text::bigint DESC"
        " LIMIT 500) AS d WHERE NOT EXISTS (SELECT FROM ehub.nearest('documents', d.embedding, 10) AS n"
        " WHERE n.distance < 1e-6)"
    ).fetchone() or (None,)
    report("of the 500 rows written last, not found where they are", wrong[0])
    db.execute("RESET ehub.consistency; RESET ehub.mode")


def built(db: psycopg.Connection, url: str) -> None:
    """With pgvector's default, and last, to stay, with what ehub's index is built with."""
    db.execute("SET maintenance_work_mem = '1GB'")
    for ef_construction in (64, 200):
        db.execute("DROP INDEX IF EXISTS documents_embedding_idx")
        with written(url) as told:
            started = time.perf_counter()
            db.execute(
                "CREATE INDEX CONCURRENTLY documents_embedding_idx ON documents"
                " USING hnsw (embedding vector_l2_ops)"
                f" WITH (m = 16, ef_construction = {ef_construction})"
            )
            seconds = time.perf_counter() - started
        report(f"pgvector, ef_construction {ef_construction}: built after, s", f"{seconds:.2f}")
        tell(told)


def tell(told: dict[str, Any]) -> None:
    report("  meanwhile transactions, errors", f"{told['transactions']:,}, {len(told['errors'])}")
    report("  the longest wait of a writer, s", f"{told['longest']:.2f}")


def wait_until_indexed(db: psycopg.Connection) -> None:
    (now,) = db.execute("SELECT pg_current_snapshot()").fetchone() or (None,)
    while db.execute("SELECT ehub.index_missing('documents', %s)", [now]).fetchone() != (None,):
        db.execute("SELECT set_config('ehub.breaker', '', false)")
        time.sleep(0.1)


def rates(db: psycopg.Connection, url: str, queries: np.ndarray, repeats: int) -> None:
    return


if __name__ == "__main__":
    main()
