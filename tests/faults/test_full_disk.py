"""The disk of the index files is full, really: searches go on, and it is told."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psycopg
import pytest
from service.conftest import settled
from service.test_nearest import nearest, vectors

import ehub

EHUB = Path(sys.executable).with_name("ehub")
N = 6000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that holds less than the index."""
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_searches_and_changes_go_on(url, db, data_dir, small_disk):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        hub.create_space("s", 8).multiset([f"k{i}" for i in range(N)], vectors(N))
    process = subprocess.Popen(
        [
            *(EHUB, "serve", "--database", url, "--data", small_disk),
            *("--listen", "127.0.0.1:0", "--pages", "127.0.0.1:0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"ready: 127\.0\.0\.1:(\d+), pages at (\S+)\n", line)
        assert found, process.communicate()
        db.execute("SELECT ehub.install_service('127.0.0.1', %s::int)", [int(found[1])])
        pages = f"http://{found[2]}"
        deadline = time.monotonic() + 60
        while 'ehub_index_failed_saves_total{index="1"} 0.0' in page(pages, "/metrics"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        settled(db)
        # More than the log of changes that is read at once, and each found as it comes.
        for round_ in range(20):
            place = [20.0 + round_] * 8
            db.execute(
                "INSERT INTO spaces.s (key, embedding)"
                " SELECT %s || i, array_fill((%s + i * 1e-4)::real, ARRAY[8])"
                " FROM generate_series(0, 299) AS i",
                [f"n{round_}-", place[0]],
            )
            assert nearest(db, place, 1)[0].key == f"n{round_}-0"
        settled(db)
        db.execute("SET ehub.mode = 'index'")
        assert nearest(db, [39.0] * 8, 1)[0].key == "n19-0"
        assert json.loads(page(pages, "/ready"))["ready"] is True
        metrics = page(pages, "/metrics")
        assert 'ehub_index_ready{index="1"} 1.0' in metrics
        assert re.search(r'ehub_index_lag_rows\{index="1"\} 0\.0', metrics)
        deadline = time.monotonic() + 60
        while (told := db.execute("SELECT last_error FROM ehub.status").fetchone()) == (None,):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert told[0].startswith("save: ")
    finally:
        process.kill()
        process.communicate()
    # Nothing of it is believed that was not written whole.
    with psycopg.connect(url, autocommit=True) as fresh:
        assert nearest(fresh, vectors(1)[0], 1)[0].key == "k0"
        assert fresh.execute("SELECT count(*) FROM spaces.s").fetchone() == (N + 6000,)


def page(address, path):
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        return answer.read().decode()
