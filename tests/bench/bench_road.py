"""The road to the index: what a search in SQL costs beside pgvector's own HNSW index, and where.

Needs EHUB_TEST_DATABASE_URL: a Postgres on this machine, as a superuser, over TCP as it is installed.
With extension ehub_link (``ehub build-link``) or dblink or both, which are compared. 1,000 rows, drawn
at random, are held out as queries; all is interleaved and repeated, and medians are given. Processor
time is that of all processes of this machine, so let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from bench import HELD_OUT, SINGLE, K, report
from bench_sql import clients, connect, fresh_database, held_out, service
from pgvector.sqlalchemy import VECTOR
from psycopg import sql
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import ehub
from ehub.binary import VectorParameter, VectorsParameter

BATCH = 100
NEAREST = "SELECT key, distance FROM ehub.nearest('bench', %s, 10)"
ATTACHED = "SELECT key, distance FROM ehub.nearest('documents', %s, 10)"
PGVECTOR = (
    "SELECT key, embedding {op} %(q)s::vector FROM pgvector_own"
    " ORDER BY embedding {op} %(q)s::vector LIMIT 10"
)
ROADS = {"ehub_link": "SET ehub.link = 'on'", "dblink": "SET ehub.link = 'off'"}


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "documents"

    key: Mapped[str] = mapped_column(primary_key=True)
    embedding: Mapped[Any] = mapped_column(VECTOR())


def read(file: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return keys, rows and queries that are none of them: of an .npz, or of GloVe's text."""
    if file.suffix != ".npz":
        return held_out(file, HELD_OUT)
    with np.load(file) as arrays:
        keys, rows = list(map(str, arrays["keys"])), arrays["vectors"].astype(np.float32)
    held = np.random.default_rng(1).choice(len(rows), HELD_OUT, replace=False)
    kept = np.ones(len(rows), np.bool_)
    kept[held] = False
    return [key for key, is_kept in zip(keys, kept, strict=True) if is_kept], rows[kept], rows[held]


def prepare(url: str, folder: Path, keys: list[str], rows: np.ndarray, metric: str) -> None:
    """A space of ehub's own, somebody's table that is attached, and one with pgvector's index."""
    dims = rows.shape[1]
    with ehub.connect(url, data_dir=folder / "hub", index="none") as hub:
        hub.create_space("bench", dims, metric=metric).multiset(keys, rows)
    with connect(url) as db:
        for table in ("documents", "pgvector_own"):
            db.execute(
                f"CREATE TABLE {table} (key text PRIMARY KEY,"
                f" embedding vector({dims}) STORAGE MAIN, note text)"
            )
            db.execute(f"INSERT INTO {table} SELECT key, embedding, 'a note' FROM spaces.bench")
        db.execute("SELECT ehub.attach('documents', 'embedding', metric => %s)", [metric])
        db.execute("SET maintenance_work_mem = '1GB'")
        started = time.monotonic()
        db.execute(
            f"CREATE INDEX ON pgvector_own USING hnsw (embedding vector_{metric}_ops)"
            " WITH (m = 16, ef_construction = 64)"
        )
        report("pgvector's HNSW, built", f"{time.monotonic() - started:.0f} s")
        db.execute("VACUUM ANALYZE")


class Bench:
    """One run: connections of its own, and everybody's searches by name."""

    def __init__(self, url: str, folder: Path, queries: np.ndarray, metric: str) -> None:
        self.url, self.folder, self.queries, self.metric = url, folder, queries, metric
        self.db = connect(url)
        self.db.execute("SET ehub.mode = 'index'")
        self.vectors = [VectorParameter(query) for query in queries]
        self.pgvector = PGVECTOR.format(op={"l2": "<->", "cosine": "<=>", "ip": "<#>"}[metric])
        self.roads = {name: setting for name, setting in ROADS.items() if self.goes(setting)}

    def goes(self, setting: str) -> bool:
        self.db.execute(setting)
        self.db.execute("SET ehub.breaker = ''")
        try:
            self.db.execute(NEAREST, [self.vectors[0]])
        except psycopg.DatabaseError as error:
            report(setting, f"cannot be measured here: {error.diag.message_primary}")
            return False
        return True

    def recall(self, ask: Callable[[VectorParameter], Any], true: list[set[str]]) -> float:
        found = [{row[0] for row in ask(query)} for query in self.vectors]
        return statistics.mean(len(a & b) / K for a, b in zip(true, found, strict=True))

    def equal_recall(self) -> int:
        """Return pgvector's ``ef_search`` that finds as much as ehub does."""
        self.db.execute("SET ehub.mode = 'exact'")
        true = [{key for (key, _) in self.db.execute(NEAREST, [query])} for query in self.vectors]
        self.db.execute("SET ehub.mode = 'index'")
        own = self.recall(lambda q: self.db.execute(NEAREST, [q]).fetchall(), true)
        report("recall@10 of ehub.nearest", f"{own:.4f}")
        theirs, ef_search = 0.0, 20
        while theirs < own - 0.003 and ef_search < 1000:
            ef_search = min(round(ef_search * 1.15), 1000)
            self.db.execute(sql.SQL("SET hnsw.ef_search = {}").format(sql.Literal(ef_search)))
            theirs = self.recall(
                lambda q: self.db.execute(self.pgvector, {"q": q}).fetchall(), true
            )
        report("recall@10 of pgvector's HNSW", f"{theirs:.4f} (ef_search {ef_search})")
        return ef_search

    def raw(self) -> Any:
        """Return the very graph of the service, to search without anything around."""
        from hnswlib import Index

        (entry,) = self.db.execute(
            "SELECT index_id FROM ehub.catalogue WHERE space = 'bench'"
        ).fetchone() or (0,)
        while not (saved := list(self.folder.glob(f"service/indexes/*/{entry}/manifest.json"))):
            time.sleep(0.5)
        manifest = json.loads(saved[0].read_text())["manifest"]
        raw = Index("l2" if self.metric == "l2" else "ip", self.queries.shape[1])
        raw.load_index(str(next(saved[0].parent.glob("*.hnsw"))))
        raw.set_ef(manifest["calibration"]["ef"])
        report("ef", str(manifest["calibration"]["ef"]))
        return raw

    def one_client(self, repeats: int) -> None:
        raw = self.raw()
        alike = self.queries
        if self.metric == "cosine":
            alike = alike / np.linalg.norm(alike, axis=1, keepdims=True)
        engine = create_engine(
            "postgresql+psycopg://",
            creator=lambda: connect(self.url),
            isolation_level="AUTOCOMMIT",
        )
        hub = ehub.connect(self.url, data_dir=self.folder / "asks", index="service")
        space = hub.get_space("bench")
        local = ehub.connect(self.url, data_dir=self.folder / "local", index="local")
        here = local.get_space("bench")
        here.wait_until_indexed(600)
        with Session(engine) as session:

            def orm(i: int) -> Any:
                near = ehub.orm.nearest(Document.embedding, self.queries[i], k=K)
                statement = select(Document.key, near.distance).join(near)
                return session.execute(statement.order_by(near.distance)).all()

            asks: dict[str, Callable[[int], Any]] = {
                "raw": lambda i: raw.knn_query(alike[i], k=K, num_threads=1),
                "the client's road": lambda i: self.db.execute(
                    "SELECT %s::vector IS NULL", [self.vectors[i]]
                ).fetchall(),
                "pgvector": lambda i: self.db.execute(
                    self.pgvector, {"q": self.vectors[i]}
                ).fetchall(),
                "in process": lambda i: here.nearest_neighbors(K, vector=self.queries[i]),
                "Hub by the service": lambda i: space.nearest_neighbors(K, vector=self.queries[i]),
                "ORM, attached": orm,
            }
            for name in self.roads:

                def ask(i: int, statement: str = NEAREST) -> Any:
                    return self.db.execute(statement, [self.vectors[i]]).fetchall()

                asks[f"nearest, {name}"] = ask
                asks[f"nearest, attached, {name}"] = lambda i: ask(i, ATTACHED)
            micros: dict[str, list[float]] = {name: [] for name in asks}
            for _ in range(repeats + 1):
                for name, ask_one in asks.items():
                    road = name.rpartition(", ")[2]
                    if road in self.roads:
                        self.db.execute(self.roads[road])
                    started = time.perf_counter()
                    for i in range(SINGLE):
                        ask_one(i)
                    micros[name].append((time.perf_counter() - started) / SINGLE * 1e6)
        local.close()
        hub.close()
        engine.dispose()
        # The first of each warms what is cold.
        time_of = {name: statistics.median(values[1:]) for name, values in micros.items()}
        for name, value in time_of.items():
            report(f"one client, {name}", f"{value:,.0f} us")
        least = time_of["raw"] + time_of["the client's road"]
        for name in self.roads:
            own = time_of[f"nearest, {name}"]
            report(f"one client, {name} beside pgvector", f"{time_of['pgvector'] / own:.2f} times")
            report(f"one client, {name} by raw search and road", f"{own / least:.2f}")
            attached = time_of[f"nearest, attached, {name}"]
            report(f"one client, {name}, attached by own", f"{attached / own:.2f}")
        best = time_of[f"nearest, {next(iter(self.roads))}"]
        for name in ("Hub by the service", "ORM, attached"):
            report(f"one client, {name} by nearest", f"{time_of[name] / best:.2f}")
        report("in process, raw by it", f"{time_of['raw'] / time_of['in process']:.2f}")

    def many(self, repeats: int) -> None:
        """Batches of 100, beside raw batches on as many threads as there are processors."""
        raw = self.raw()
        alike = self.queries / np.linalg.norm(self.queries, axis=1, keepdims=True)
        (oid,) = self.db.execute("SELECT 'vector'::regtype::oid").fetchone() or (0,)
        statement = "SELECT q, key, distance FROM ehub.nearest_many('bench', %s, 10)"
        micros: dict[str, list[float]] = {"raw": []}
        for _ in range(repeats):
            for start in range(0, SINGLE, BATCH):
                part = slice(start, start + BATCH)
                started = time.perf_counter()
                raw.knn_query(alike[part], k=K, num_threads=os.cpu_count() or 1)
                micros["raw"].append((time.perf_counter() - started) / BATCH * 1e6)
                for name, setting in self.roads.items():
                    self.db.execute(setting)
                    started = time.perf_counter()
                    self.db.execute(
                        statement, [VectorsParameter(self.queries[part], oid)]
                    ).fetchall()
                    found = micros.setdefault(name, [])
                    found.append((time.perf_counter() - started) / BATCH * 1e6)
        time_of = {name: statistics.median(values) for name, values in micros.items()}
        for name in self.roads:
            report(
                f"nearest_many of {BATCH}, {name}",
                f"{time_of[name]:,.0f} us each, raw {time_of['raw']:,.0f}:"
                f" {time_of[name] / time_of['raw']:.2f}",
            )

    def clients(self, number: int, ef_search: int, repeats: int) -> None:
        """Searches a second of some clients, and the processor time that one takes of all."""
        asked = {name: (f"SET ehub.mode = 'index'; {s}", NEAREST) for name, s in self.roads.items()}
        asked["pgvector"] = (f"SET hnsw.ef_search = {ef_search}", self.pgvector)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
        for _ in range(repeats):
            for name, (setting, statement) in asked.items():
                found[name].append(clients(number, self.url, setting, statement, self.queries))
        rates = {name: statistics.median(r for r, _ in values) for name, values in found.items()}
        for name, value in rates.items():
            spent = statistics.median(cpu for _, cpu in found[name])
            report(
                f"{number} clients, {name}", f"{value:,.0f}/s, {spent:,.0f} us of processors each"
            )
        for name in self.roads:
            report(
                f"{number} clients, {name} beside pgvector",
                f"{rates[name] / rates['pgvector']:.2f} times",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings: .npz with keys and vectors, or text")
    parser.add_argument("--metric", default="cosine", choices=["l2", "cosine", "ip"])
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured")
    parser.add_argument("--listen", default="127.0.0.1:6544", help="where the service listens")
    arguments = parser.parse_args()
    url = fresh_database(arguments.listen)
    with tempfile.TemporaryDirectory(prefix="ehub-bench-") as name:
        folder = Path(name)
        keys, rows, queries = read(arguments.file)
        prepare(url, folder, keys, rows, arguments.metric)
        with service(url, arguments.listen, folder / "service") as process:
            assert process.stdout is not None
            process.stdout.readline()
            with connect(url) as db:
                # The service must have promised to keep its deadline, for dblink.
                while db.execute("SELECT prompt FROM ehub.incarnation").fetchone() != (True,):
                    time.sleep(0.2)
            bench = Bench(url, folder, queries, arguments.metric)
            ef_search = bench.equal_recall()
            bench.one_client(arguments.repeats)
            bench.many(arguments.repeats)
            for number in (1, 8):
                bench.clients(number, ef_search, 3)


if __name__ == "__main__":
    main()
