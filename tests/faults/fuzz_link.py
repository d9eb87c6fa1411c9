"""Damaged answers for extension ehub_link, under an address sanitizer: ``make fuzz``.

The extension is built apart, with memory of its own for each thing that it takes, so that a step over
the end of one is seen. A server of its own runs it; its backends must live.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psycopg
from service.conftest import install
from service.test_link import Damage, Liar

from ehub import resources
from ehub.config import Target
from ehub.database import Database
from ehub.migrate import migrate

# What the extension takes memory by; what it took is never given back, so backends are short-lived.
MEMORY = """
#include <stdlib.h>
#include <string.h>
#define palloc(size) malloc(size)
#define palloc_extended(size, flags) malloc(size)
#define repalloc_huge(memory, size) realloc(memory, size)
#define pnstrdup(text, size) strndup(text, size)
"""
ASKED_BY_ONE = 2000


def build(pg_config: Path, folder: Path) -> Path:
    source = (resources.folder("extension") / "ehub_link.c").read_text()
    # Behind all of the server's own headers.
    head, mark, rest = source.partition("PG_MODULE_MAGIC;")
    (folder / "ehub_link.c").write_text(head + MEMORY + mark + rest)
    include = subprocess.run(
        [pg_config, "--includedir-server"], check=True, capture_output=True, text=True
    ).stdout.strip()
    library = folder / "ehub_link.so"
    subprocess.run(
        [
            *("gcc", "-g", "-O1", "-fPIC", "-shared", "-fsanitize=address,undefined"),
            *("-fno-sanitize-recover=undefined", "-fno-sanitize=alignment"),
            *("-D_GNU_SOURCE", "-I", include, "-o", library, folder / "ehub_link.c"),
        ],
        check=True,
    )
    folder.chmod(0o755)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    sanitizers = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    os.environ["LD_PRELOAD"] = " ".join(sanitizers)
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1"
    with tempfile.TemporaryDirectory(prefix="ehub-fuzz-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        database = Database(Target(None, folder / "data"))
        assert database.embedded is not None
        url = database.conninfo()
        del os.environ["LD_PRELOAD"]
        migrate(database)
        (folder / "link").mkdir()
        library = build(database.embedded.bin_dir / "pg_config", folder / "link")
        with psycopg.connect(url, autocommit=True) as db:
            install(db, 1)
            db.execute(
                "CREATE FUNCTION fuzz_ask(text, bigint, int, int, text, text,"
                " vector[], int, OUT failure text, OUT reason text, OUT watermark pg_snapshot,"
                " OUT counts int[], OUT keys text[], OUT plan text, OUT matching boolean)"
                f" LANGUAGE c AS '{library}', 'ehub_link_ask'"
            )
            (secret,) = db.execute("SELECT ehub.service_secret()").fetchone()
            liar = Liar(secret, Damage(random.Random(arguments.seed)))
            install(db, liar.port)
        print(f"seed {arguments.seed}, {library}", flush=True)
        fuzz(url, arguments.answers)
        log = (folder / "data" / "postgres" / "log").read_text()
        assert "AddressSanitizer" not in log, log[-5000:]
        assert "terminated by signal" not in log, log[-5000:]
        database.close()


def fuzz(url: str, answers: int) -> None:
    left, failed = answers, 0
    mutex = threading.Lock()

    def work(seed: int) -> None:
        nonlocal left, failed
        rng = random.Random(seed)
        while left > 0:
            with psycopg.connect(url, autocommit=True) as db:
                row = db.execute(
                    "SELECT count(*), count(failure) FROM generate_series(1, %s) AS i,"
                    " LATERAL fuzz_ask('state', i, %s, 0, NULL, NULL,"
                    " array_fill('[1,2,3]'::vector, ARRAY[%s]), 5)",
                    [ASKED_BY_ONE, rng.choice([1, 3, 100]), rng.choice([1, 1, 2, 7])],
                ).fetchone()
            with mutex:
                left -= row[0]
                failed += row[1]
                done = answers - left
            if done // 50_000 > (done - row[0]) // 50_000:
                print(f"{done:,} answers, {failed:,} of them refused", flush=True)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left <= 0, "a client failed"
    assert 0 < failed < answers


if __name__ == "__main__":
    main()
