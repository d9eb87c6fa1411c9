"""Writers and searchers beside a service that is restarted now and then: ``make soak MINUTES=20``.

At the end what the index says is compared with brute force, and the service's memory and
connections and the rows of the change log with what they were. Needs EHUB_TEST_DATABASE_URL: a
Postgres with dblink, as a role that may create databases.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psycopg
from psycopg.conninfo import make_conninfo

DIMS, ROWS, WRITERS, SEARCHERS = 32, 20_000, 2, 2
PORT = 6543


class Run:
    """Counters that all threads share."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.stop = threading.Event()
        self.writes = self.searches = self.by_index = 0
        self.slowest = 0.0
        self.problems: list[str] = []

    def write(self, seed: int) -> None:
        draw = random.Random(seed)
        vectors = np.random.default_rng(seed)
        with psycopg.connect(self.url, autocommit=True) as connection:
            while not self.stop.is_set():
                key = f"k{draw.randrange(ROWS)}"
                if draw.random() < 0.3:
                    connection.execute("DELETE FROM spaces.soak WHERE key = %s", [key])
                else:
                    vector = vectors.standard_normal(DIMS).tolist()
                    connection.execute("SELECT ehub.set('soak', %s, %s)", [key, str(vector)])
                self.writes += 1
                time.sleep(0.002)

    def search(self, seed: int) -> None:
        vectors = np.random.default_rng(1000 + seed)
        with psycopg.connect(self.url, autocommit=True) as connection:
            while not self.stop.is_set():
                query = str(vectors.standard_normal(DIMS).tolist())
                started = time.monotonic()
                rows = connection.execute(
                    "SELECT key, distance FROM ehub.nearest('soak', %s, 10)", [query]
                ).fetchall()
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.searches += 1
                distances = [distance for _, distance in rows]
                if len({key for key, _ in rows}) != 10 or distances != sorted(distances):
                    self.problems.append(f"{query}: {rows}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--restart-every", type=float, default=50, metavar="SECONDS")
    arguments = parser.parse_args()
    server = os.environ["EHUB_TEST_DATABASE_URL"]
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS ehub_soak WITH (FORCE)")
        admin.execute("CREATE DATABASE ehub_soak")
    url = make_conninfo(server, dbname="ehub_soak")
    ehub = str(Path(sys.executable).with_name("ehub"))
    subprocess.run([ehub, "migrate", url], check=True)
    place = f"127.0.0.1:{PORT}"
    subprocess.run([ehub, "install-service", place, "--database", url], check=True)
    with tempfile.TemporaryDirectory() as folder, psycopg.connect(url, autocommit=True) as db:
        command = [ehub, "serve", "-d", url, "--listen", place, "--data", folder]
        soak(url, db, command, arguments.minutes, arguments.restart_every)


def soak(
    url: str, db: psycopg.Connection, command: list[str], minutes: float, restart_every: float
) -> None:
    db.execute("SELECT ehub.create_space('soak', %s)", [DIMS])
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIMS))
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO spaces.soak (key, embedding) VALUES (%s, %s)",
            [(f"k{i}", str(row.tolist())) for i, row in enumerate(vectors)],
        )
    service = start(command)
    settle(db)
    run = Run(url)
    threads = [threading.Thread(target=run.write, args=(seed,)) for seed in range(WRITERS)]
    threads += [threading.Thread(target=run.search, args=(seed,)) for seed in range(SEARCHERS)]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    restarts = 0
    restarted = begun
    while time.monotonic() - begun < 60 * minutes:
        time.sleep(10)
        show(run, db, service, restarts)
        if time.monotonic() - restarted < restart_every:
            continue
        restarted = time.monotonic()
        # By turns: asked to leave, killed, its worker killed.
        if restarts % 3 == 2:
            os.kill(worker(service), signal.SIGKILL)
        else:
            service.send_signal(signal.SIGTERM if restarts % 3 == 0 else signal.SIGKILL)
            service.wait()
            time.sleep(2)
            service = start(command)
        restarts += 1
    run.stop.set()
    for thread in threads:
        thread.join()
    settle(db)
    db.execute("SELECT ehub.trim()")
    show(run, db, service, restarts)
    differences = compare(db)
    print(f"problems {len(run.problems)}, differences from brute force {differences}")
    service.terminate()
    service.wait()
    sys.exit(bool(run.problems or differences))


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, "--pages", "none"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def worker(service: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()[0])


def settle(db: psycopg.Connection) -> None:
    (now,) = db.execute("SELECT pg_current_snapshot()").fetchone() or ()
    while True:
        db.execute("SET ehub.breaker = ''")
        if db.execute("SELECT ehub.index_missing('soak', %s)", [now]).fetchone() == (None,):
            return
        time.sleep(0.2)


def show(run: Run, db: psycopg.Connection, service: subprocess.Popen[bytes], restarts: int) -> None:
    status = Path(f"/proc/{worker(service)}/status").read_text()
    memory = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    (connections,) = db.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    ).fetchone() or (0,)
    (log,) = db.execute("SELECT count(*) FROM ehub.change").fetchone() or (0,)
    print(
        f"{time.strftime('%H:%M:%S')} restarts {restarts}, writes {run.writes}, searches"
        f" {run.searches}, slowest {run.slowest:.2f} s, service {int(memory) / 1024:.0f} MB,"
        f" connections {connections}, log rows {log}, problems {len(run.problems)}",
        flush=True,
    )


def compare(db: psycopg.Connection) -> int:
    """Count the rows that index and table do not agree on, asking for all of them."""
    (rows,) = db.execute("SELECT count(*) FROM spaces.soak").fetchone() or (0,)
    db.execute("SET ehub.mode = 'index'; SET ehub.consistency = 'eventual'")
    query = str([0.0] * DIMS)
    found = set(db.execute("SELECT key, distance FROM ehub.nearest('soak', %s, %s)", [query, rows]))
    db.execute("SET ehub.mode = 'exact'")
    true = set(db.execute("SELECT key, distance FROM ehub.nearest('soak', %s, %s)", [query, rows]))
    return len(found ^ true)


if __name__ == "__main__":
    main()
