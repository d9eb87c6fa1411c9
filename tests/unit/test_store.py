"""Index files: whole or not at all."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ehub.errors import IndexFileError
from ehub.index import Calibration, HnswIndex, IndexStore

BUILD = {"dims": 4, "metric": "cosine", "m": 16, "ef_construction": 200}


def make_index(rows=200):
    index = HnswIndex(4, "cosine")
    random = np.random.default_rng(rows)
    if rows:
        index.add([f"ключ {i}" for i in range(rows)], random.standard_normal((rows, 4), "f4"))
    index.publish([f"ключ {i}" for i in range(0, rows, 3)])
    index.calibration = Calibration(ef=77, ef_large=200, recall=0.97, bias=0.01)
    return index


@pytest.fixture(autouse=True)
def _release(monkeypatch):
    """Give back every folder that a test came to own."""
    made = []
    create = IndexStore.__init__

    def remember(store, folder):
        create(store, folder)
        made.append(store)

    monkeypatch.setattr(IndexStore, "__init__", remember)
    yield
    for store in made:
        store.release()


def saved(folder, index):
    store = IndexStore(folder)
    assert store.own()
    return store, store.begin_save(index, BUILD, "5:7:6")()


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_what_is_saved_is_what_is_loaded(tmp_path, rows):
    index = make_index(rows)
    store, manifest = saved(tmp_path / "new" / "folder", index)
    assert store.manifest() == manifest
    assert (manifest.watermark, manifest.build, manifest.rows) == ("5:7:6", BUILD, len(index))
    again = store.load(manifest)
    assert sorted(again.keys()) == sorted(index.keys())
    assert (again.calibration, again.tombstones) == (index.calibration, index.tombstones)
    query = np.ones((1, 4), np.float32)
    assert again.search(query, 20) == index.search(query, 20)
    # And it can be changed.
    again.add(["new"], np.ones((1, 4), np.float32))
    again.publish()
    assert again.search(query, 1)[0].keys == ["new"]


def test_nothing_saved_is_nothing(tmp_path):
    assert IndexStore(tmp_path / "nothing").manifest() is None


def test_a_new_save_takes_the_place_of_the_old_one(tmp_path):
    store, first = saved(tmp_path, make_index(100))
    second = store.begin_save(make_index(50), BUILD, "9:9:")()
    assert store.manifest() == second != first
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".json", ".keys", ".hnsw"}
    assert len(list(tmp_path.iterdir())) == 4


def test_changes_after_the_save_began_are_not_in_it(tmp_path):
    index = make_index(3000)
    store = IndexStore(tmp_path)
    store.own()
    finish = store.begin_save(index, BUILD, "5:7:6")
    rows = len(index)
    index.add([f"later {i}" for i in range(500)], np.ones((500, 4), np.float32))
    index.publish(["ключ 1"])
    again = store.load(finish())
    assert len(again) == rows
    assert "ключ 1" in again


def test_one_process_saves_and_others_load(tmp_path):
    store, manifest = saved(tmp_path, make_index())
    other = IndexStore(tmp_path)
    assert not other.own()
    assert other.identity() == store.identity()
    assert len(other.load(manifest)) == manifest.rows
    with pytest.raises(IndexFileError, match="another process"):
        other.begin_save(make_index(), BUILD, "5:7:6")
    store.release()
    assert other.own()


def every_byte_counts(path):
    data = path.read_bytes()
    for position in np.linspace(0, len(data) - 1, 25).astype(int):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        yield position
    for size in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        yield f"cut to {size}"
    path.unlink()
    yield "missing"
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["hnsw", "keys", "json"])
def test_damage_is_found_before_the_file_is_believed(tmp_path, suffix):
    store, manifest = saved(tmp_path, make_index())
    (path,) = tmp_path.glob(f"*.{suffix}")
    for _ in every_byte_counts(path):
        if suffix == "json":
            try:
                # White space and the like may change without changing what it says.
                found = store.manifest()
            except IndexFileError:
                continue
            assert found in (manifest, None)
        else:
            with pytest.raises(IndexFileError):
                store.load(store.manifest())
    assert store.load(store.manifest())


def test_a_full_disk_is_noticed_and_keeps_what_was_saved(tmp_path):
    store, manifest = saved(tmp_path, make_index(50))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files cannot grow beyond this: hnswlib itself says nothing.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(IndexFileError, match="disk full|cannot be written|ended with"):
            store.begin_save(make_index(5000), BUILD, "9:9:")()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.load(store.manifest()).keys().sort() == make_index(50).keys().sort()
    assert store.manifest() == manifest
    assert len(list(tmp_path.iterdir())) == 4


SAVE_FOR_EVER = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
from unit.test_store import *
store = IndexStore(pathlib.Path(sys.argv[1]))
store.own()
index = make_index(5000)
print("ready", flush=True)
number = 0
while True:
    number += 1
    store.begin_save(index, BUILD, f"{number}:{number}:")()
"""


def test_a_process_that_is_killed_in_the_middle_of_a_save_leaves_a_whole_one(tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    for delay in np.linspace(0.0, 0.25, 8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), tests], stdout=subprocess.PIPE
        )
        with process:
            process.stdout.readline()
            time.sleep(0.1 + delay)
            process.send_signal(signal.SIGKILL)
        store = IndexStore(tmp_path)
        manifest = store.manifest()
        if manifest is not None:
            assert len(store.load(manifest)) == len(make_index(5000))
    assert manifest is not None
    # The next owner clears away what was left half done; a child may still be writing.
    deadline = time.monotonic() + 10
    while not store.own():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    store.begin_save(make_index(10), BUILD, "1:1:")()
    assert len(list(tmp_path.iterdir())) == 4


def test_saving_beside_matrix_products_hangs_neither(tmp_path):
    """OpenBLAS ends its threads when a process forks; who waits for one would wait for ever."""
    program = f"""
import threading, numpy as np
from pathlib import Path
from ehub.index import HnswIndex, IndexStore
rows = np.random.default_rng(0).standard_normal((20000, 16), np.float32)
index = HnswIndex(16, "l2")
index.add([str(i) for i in range(500)], rows[:500])
index.publish()
store = IndexStore(Path({str(tmp_path)!r}))
assert store.own()
stop = threading.Event()
def compare():
    from ehub.index.exact import brute_force
    while not stop.is_set():
        brute_force(rows[:200], [(np.arange(len(rows)), rows)], 10, "l2")
threads = [threading.Thread(target=compare) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(60): store.begin_save(index, {{}}, "1:1:")()
stop.set()
for thread in threads: thread.join()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
