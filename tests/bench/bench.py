"""ehub beside raw hnswlib, in one run, as ratios: ``make bench FILE=glove.txt``.

Every measurement is a process of its own, so that memory and imports are told apart; what is
compared is interleaved and repeated, and medians are given. 1,000 rows, drawn at random, are held
out as queries.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

K = 10
HELD_OUT = 1000
SINGLE = 300
SPACE = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="embeddings in GloVe's text form")
    parser.add_argument("--metric", default="l2", choices=["l2", "cosine", "ip"])
    parser.add_argument("--builds", type=int, default=1, help="how often each index is built")
    parser.add_argument("--repeats", type=int, default=7, help="how often the rest is measured")
    arguments = parser.parse_args()
    with data_folder() as folder:
        run(arguments, folder)


@contextlib.contextmanager
def data_folder() -> Iterator[Path]:
    """Lend a folder whose ``data`` holds the embedded Postgres and index files of this run."""
    with tempfile.TemporaryDirectory(prefix="ehub-bench-") as name:
        folder = Path(name)
        # The embedded server runs as a user of its own where this one is root.
        folder.chmod(0o755)
        os.environ["EHUB_DATA_DIR"] = str(folder / "data")
        yield folder


def run(arguments: argparse.Namespace, folder: Path) -> None:
    import ehub

    lines = arguments.file.read_text().splitlines(keepends=True)
    held = set(np.random.default_rng(1).choice(len(lines), HELD_OUT, replace=False).tolist())
    (folder / "held.txt").write_text("".join(lines[i] for i in sorted(held)))
    (folder / "rows.txt").write_text("".join(x for i, x in enumerate(lines) if i not in held))
    del lines

    # It keeps the embedded Postgres running between the processes.
    with ehub.connect(index="none") as hub:
        load = subprocess.run(
            [
                Path(sys.executable).with_name("ehub"),
                *("load", folder / "rows.txt", SPACE, "--metric", arguments.metric),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        report("ehub load", load.stdout.strip())
        keys, rows = zip(*hub.get_space(SPACE).items(), strict=True)
        np.save(folder / "rows.npy", np.stack(rows))
        (folder / "keys.json").write_text(json.dumps(keys))
        queries = [line.rsplit(" ", rows[0].size)[1:] for line in open(folder / "held.txt")]
        np.save(folder / "held.npy", np.array(queries, np.float32))
        del keys, rows, queries

        builds: dict[str, list[float]] = {"raw": [], "ehub": []}
        for _ in range(arguments.builds):
            for kind in ("raw", "ehub"):
                builds[kind].append(child(f"build_{kind}", folder, arguments.metric)["seconds"])
                if kind == "ehub" and len(builds["ehub"]) < arguments.builds:
                    import shutil

                    shutil.rmtree(folder / "data" / "indexes")
        compare("build", "s", builds, limit="<= 1.2")

        answers = child("search", folder, arguments.metric, arguments.repeats)
        report("ef, as calibrated", answers["ef"])
        report("recall@10 on queries that are not in the index", f"{answers['recall']:.4f}")
        report("recall@10 of raw hnswlib at that ef", f"{answers['raw_recall']:.4f}")
        # Raw searches on the very graph that ehub has built and saved: the same work at the same ef.
        compare("single queries, the same graph", "/s", answers["single"], limit=">= 0.7")
        compare("batches, the same graph", "queries/s", answers["batch"], limit=">= 0.9")
        own = statistics.median(answers["raw_own"])
        report("single queries of raw hnswlib on its own graph", f"{own:,.0f} /s")

        held: dict[str, list[float]] = {"raw": [], "ehub": []}
        restart: dict[str, list[float]] = {"raw": [], "ehub": []}
        for _ in range(arguments.repeats):
            for kind in ("raw", "ehub"):
                started = time.monotonic()
                answer = child(f"restart_{kind}", folder, arguments.metric)
                restart[kind].append(answer["at"] - started)
                held[kind].append(answer["memory"] / 1e6)
        compare("restart to the first indexed answer", "s", restart, limit="<= 1.5")
        compare("memory of the process", "MB", held, limit="<= 1.4")


def build_raw(folder: Path, metric: str) -> dict[str, Any]:
    from hnswlib import Index

    rows = np.load(folder / "rows.npy")
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = Index("l2" if metric == "l2" else "ip", rows.shape[1])
    started = time.monotonic()
    index.init_index(len(rows), M=16, ef_construction=200)
    index.add_items(rows, num_threads=os.cpu_count())
    seconds = time.monotonic() - started
    index.save_index(str(folder / "raw.hnsw"))
    return {"seconds": seconds}


def build_ehub(folder: Path, metric: str) -> dict[str, Any]:
    import ehub

    with ehub.connect() as hub:
        space = hub.get_space(SPACE)
        started = time.monotonic()
        space.wait_until_indexed()
        return {"seconds": time.monotonic() - started}


def search(folder: Path, metric: str, repeats: int) -> dict[str, Any]:
    from hnswlib import Index

    import ehub

    queries = np.load(folder / "held.npy")
    rows = np.load(folder / "rows.npy")
    keys = json.loads((folder / "keys.json").read_text())
    near = queries
    if metric == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        near = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    distances = -near @ rows.T
    if metric == "l2":
        distances = 2 * distances + np.einsum("ij,ij->i", rows, rows)
    truth = np.argpartition(distances, K, axis=1)[:, :K]
    del distances, rows
    raw = raw_index(folder, metric, queries.shape[1])

    with ehub.connect() as hub:
        space = hub.get_space(SPACE)
        space.wait_until_indexed()
        ef = next(row["ef"] for row in hub.status() if row["space"] == SPACE and row["ef"])
        raw.set_ef(ef)
        same = Index("l2" if metric == "l2" else "ip", queries.shape[1])
        same.load_index(str(next((folder / "data").glob("indexes/*/*/*.hnsw"))))
        same.set_ef(ef)
        found = space.multi_nearest_neighbors(K, vectors=queries)
        labels, _ = raw.knn_query(near, k=K)
        single: dict[str, list[float]] = {"raw": [], "ehub": []}
        batch: dict[str, list[float]] = {"raw": [], "ehub": []}
        raw_own: list[float] = []
        for _ in range(repeats):
            started = time.monotonic()
            for query in near[:SINGLE]:
                same.knn_query(query, k=K, num_threads=1)
            single["raw"].append(SINGLE / (time.monotonic() - started))
            started = time.monotonic()
            for query in near[:SINGLE]:
                raw.knn_query(query, k=K, num_threads=1)
            raw_own.append(SINGLE / (time.monotonic() - started))
            started = time.monotonic()
            for query in queries[:SINGLE]:
                space.nearest_neighbors(K, vector=query)
            single["ehub"].append(SINGLE / (time.monotonic() - started))
            started = time.monotonic()
            same.knn_query(near, k=K, num_threads=os.cpu_count())
            batch["raw"].append(len(near) / (time.monotonic() - started))
            started = time.monotonic()
            space.multi_nearest_neighbors(K, vectors=queries)
            batch["ehub"].append(len(queries) / (time.monotonic() - started))
    return {
        "ef": ef,
        "recall": statistics.mean(
            len({keys[i] for i in true} & {one.key for one in got}) / K
            for true, got in zip(truth, found, strict=True)
        ),
        "raw_recall": statistics.mean(
            len(set(true.tolist()) & set(got.tolist())) / K
            for true, got in zip(truth, labels, strict=True)
        ),
        "single": single,
        "batch": batch,
        "raw_own": raw_own,
    }


def download(_folder: Path, space: str) -> dict[str, Any]:
    import ehub

    with ehub.connect(index="none") as hub:
        snapshot = hub.get_space(space).download_snapshot()
        assert len(snapshot)
        return {"peak": memory("VmHWM")}


def restart_raw(folder: Path, metric: str) -> dict[str, Any]:
    query = np.load(folder / "held.npy")[0]
    index = raw_index(folder, metric, len(query))
    index.set_ef(200)
    index.knn_query(query, k=K)
    return {"at": time.monotonic(), "memory": memory()}


def restart_ehub(folder: Path, metric: str) -> dict[str, Any]:
    import ehub

    query = np.load(folder / "held.npy")[0]
    with ehub.connect() as hub:
        space = hub.get_space(SPACE)
        space.wait_until_indexed()
        space.nearest_neighbors(K, vector=query)
        return {"at": time.monotonic(), "memory": memory()}


def raw_index(folder: Path, metric: str, dims: int) -> Any:
    from hnswlib import Index

    index = Index("l2" if metric == "l2" else "ip", dims)
    index.load_index(str(folder / "raw.hnsw"))
    return index


def memory(what: str = "VmRSS") -> int:
    """Bytes that this process holds, or, as VmHWM, has held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what}")


def child(what: str, *values: object, script: str = __file__) -> dict[str, Any]:
    """Run a function of this file, or of another one, in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, "--child", what, *map(str, values)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


def report(what: str, value: object) -> None:
    print(f"{what:<50} {value}", flush=True)


def compare(what: str, unit: str, figures: dict[str, list[float]], limit: str) -> None:
    raw, own = (statistics.median(figures[kind]) for kind in ("raw", "ehub"))
    report(what, f"ehub {own:,.4g} {unit}, raw {raw:,.4g}: ratio {own / raw:.2f} (wanted {limit})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, name, folder_name, chosen, *rest = sys.argv
        print(json.dumps(globals()[name](Path(folder_name), chosen, *map(int, rest))))
    else:
        main()
