"""Attaching a table under write load beside pgvector's CREATE INDEX CONCURRENTLY, and its searches.

Needs EHUB_TEST_DATABASE_URL: a Postgres with dblink on this machine, as a superuser. Two writers go
on at a steady pace all the time; the rows of one of them move, those of the other come and go. A
search by an ORM statement is measured beside the raw function and pgvector's index.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from bench import K, report
from bench_sql import connect, fresh_database, held_out, service
from pgvector.sqlalchemy import VECTOR
from sqlalchemy import BigInteger, create_engine, event, select, text
from sqlalchemy.dialects.postgresql import psycopg as psycopg_dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import ehub
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
        with service(url, arguments.listen, Path(folder)), connect(url) as db:
            # With pgvector's default, and with ehub's, which stays.
            for ef_construction in (64, 200):
                attached(db, url, ef_construction)
                built(db, url, ef_construction)
            rates(db, url, queries, arguments.repeats)


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

    # Not just like another row's: of many alike a graph finds some.
    elsewhere = (
        "embedding + (SELECT array_agg(random() / 10) FROM generate_series(1,"
        " vector_dims(embedding)) WHERE %(id)s = %(id)s)::vector"
    )
    move = (
        f"UPDATE documents SET embedding = (SELECT {elsewhere} FROM documents WHERE id = 300000 - %(id)s)"
        " WHERE id = %(id)s"
    )
    come_and_go = (
        "WITH gone AS (DELETE FROM documents WHERE id = 300000 + %(id)s %% 40000 RETURNING id)"
        " INSERT INTO documents SELECT 1000000 + coalesce(max(d.id), 0), 'new', 3,"
        f" (SELECT {elsewhere} FROM documents WHERE id = %(id)s) FROM documents AS d WHERE d.id >= 1000000"
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


def attached(db: psycopg.Connection, url: str, ef_construction: int) -> None:
    db.execute("SELECT ehub.detach(space) FROM ehub.attached")
    db.execute("DROP INDEX IF EXISTS documents_embedding_idx")
    with written(url) as told:
        started = time.perf_counter()
        db.execute(
            "SELECT ehub.attach('documents', 'embedding', metric => 'l2', ef_construction => %s)",
            [ef_construction],
        )
        report("attach returns after, s", f"{time.perf_counter() - started:.2f}")
        wait_until_indexed(db)
        seconds = time.perf_counter() - started
        report(f"attached, ef_construction {ef_construction}: ready after, s", f"{seconds:.2f}")
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


def built(db: psycopg.Connection, url: str, ef_construction: int) -> None:
    db.execute("SET maintenance_work_mem = '1GB'")
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


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    word: Mapped[str]
    letters: Mapped[int]
    embedding = mapped_column(VECTOR())


def rates(db: psycopg.Connection, url: str, queries: np.ndarray, repeats: int) -> None:
    """One statement: the raw function, what the ORM makes of it, the ORM, and pgvector."""
    db.execute("SET ehub.mode = 'index'; SET enable_seqscan = off; SET jit = off")
    engine = create_engine("postgresql+psycopg://", creator=lambda: connect(url))
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    with Session(engine, autoflush=False) as session:
        session.execute(text("SET ehub.mode = 'index'"))

        def statement(query: np.ndarray, *what: Any) -> Any:
            nearest = ehub.orm.nearest(Document.embedding, query, k=K)
            return select(*what, nearest.distance).join(nearest).order_by(nearest.distance)

        def orm(query: np.ndarray) -> Any:
            return session.execute(statement(query, Document.id)).all()

        def entities(query: np.ndarray) -> Any:
            session.expunge_all()
            return session.execute(statement(query, Document)).all()

        sent.clear()
        orm(queries[0])
        report("statements of one ORM search", len(sent))
        plan = session.execute(text(f"EXPLAIN {literal(statement(queries[0], Document.id))}"))
        lines = [line for (line,) in plan]
        report("  sequential scans in its plan", sum("Seq Scan" in line for line in lines))
        for line in lines:
            print(f"    {line}")
        written = statement(queries[0], Document.id).compile(dialect=psycopg_dialect.dialect())
        (query_name,) = [k for k, v in written.params.items() if str(v).startswith("[")]

        def as_written(query: np.ndarray) -> Any:
            vector = "[" + ",".join(map(str, query)) + "]"
            return db.execute(str(written), {**written.params, query_name: vector}).fetchall()

        ways: dict[str, Callable[[np.ndarray], Any]] = {
            "the function": lambda q: db.execute(NEAREST, [VectorParameter(q)]).fetchall(),
            "the ORM's statement, as text": as_written,
            "the ORM, keys": orm,
            "the ORM, entities": entities,
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, ask in ways.items():
                started = time.perf_counter()
                for query in queries:
                    ask(query)
                found[name].append(len(queries) / (time.perf_counter() - started))
        medians = {name: statistics.median(some) for name, some in found.items()}
        for name, rate in medians.items():
            report(name, f"{rate:,.0f}/s: ratio {rate / medians['the function']:.2f}")
    own_searches(db, queries, repeats)


def literal(statement: Any) -> str:
    return str(
        statement.compile(dialect=psycopg_dialect.dialect(), compile_kwargs={"literal_binds": True})
    )


def own_searches(db: psycopg.Connection, queries: np.ndarray, repeats: int) -> None:
    """pgvector's index at the recall of ehub's, and both rates."""
    vectors = [VectorParameter(query) for query in queries]
    true = [
        {
            int(k)
            for (k,) in db.execute("SELECT key FROM ehub.nearest_exact('documents', %s, 10)", [q])
        }
        for q in vectors
    ]

    def recall(ask: Callable[[VectorParameter], Any]) -> float:
        return statistics.mean(
            len(a & {int(row[0]) for row in ask(q)}) / K for a, q in zip(true, vectors, strict=True)
        )

    def ehub_(query: VectorParameter) -> Any:
        return db.execute(NEAREST, [query]).fetchall()

    def pgvector(query: VectorParameter) -> Any:
        return db.execute(PGVECTOR, {"q": query}).fetchall()

    ours = recall(ehub_)
    ef = 40
    db.execute(f"SET hnsw.ef_search = {ef}")
    while (theirs := recall(pgvector)) < ours and ef < 1000:
        ef = min(ef + 20, 1000)
        db.execute(f"SET hnsw.ef_search = {ef}")
    report("recall, and pgvector's", f"{ours:.3f}, {theirs:.3f} at ef_search {ef}")
    found: dict[str, list[float]] = {"ehub": [], "pgvector": []}
    for _ in range(repeats):
        for name, ask in (("ehub", ehub_), ("pgvector", pgvector)):
            started = time.perf_counter()
            for vector in vectors:
                ask(vector)
            found[name].append(len(vectors) / (time.perf_counter() - started))
    ehubs, pgvectors = (statistics.median(some) for some in found.values())
    report("searches a second, ehub, pgvector", f"{ehubs:,.0f}, {pgvectors:,.0f}")
    report("  ratio", f"{ehubs / pgvectors:.2f}")


if __name__ == "__main__":
    main()
