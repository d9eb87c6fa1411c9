"""The embedded Postgres is killed: nothing acknowledged is lost, and clients go on by themselves."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import ehub


@pytest.fixture
def hub(tmp_path):
    with ehub.connect("embedded", data_dir=tmp_path / "data") as hub:
        yield hub


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().split("\n")[0])


def kill_postgres(data_dir: Path) -> None:
    """Kill the server, and wait until its processes have noticed: until then they may answer."""
    server = psutil.Process(postmaster(data_dir))
    children = server.children()
    server.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_STOPPED:
                child.kill()
    deadline = time.monotonic() + 30
    while any(map(lives, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop_log_writer(data_dir: Path) -> None:
    """Let nothing reach the disk but what a commit waits for."""
    for child in psutil.Process(postmaster(data_dir)).children():
        if "walwriter" in " ".join(child.cmdline()):
            child.suspend()
            return
    raise AssertionError("no walwriter")


def retried(call, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except ehub.UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_was_acknowledged_is_there_afterwards(hub, tmp_path):
    space = hub.create_space("s", 4)
    space.multiset({f"old{i}": [i, 0, 0, 1] for i in range(500)})
    space.wait_until_indexed(30)
    for round_ in range(3):
        acknowledged = {}
        stop = threading.Event()

        def write(number, round_=round_, acknowledged=acknowledged, stop=stop):
            i = 0
            while not stop.is_set():
                i += 1
                key, value = f"{round_}:{number}:{i}", [i, number, round_, 2]
                try:
                    space.set(key, value)
                except ehub.EhubError:
                    # Not acknowledged: it may be there or not.
                    continue
                acknowledged[key] = value

        writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(0.5)
        kill_postgres(tmp_path / "data")
        time.sleep(1.5)
        stop.set()
        for writer in writers:
            writer.join()
        assert len(acknowledged) > 20
        keys = list(acknowledged)
        found = retried(lambda keys=keys: space.multiget(keys))
        assert np.array_equal(found, np.array(list(acknowledged.values()), np.float32))
        check_index(space)


def check_index(space):
    """The index has caught up by itself, and holds just what the table holds."""
    retried(lambda: space.wait_until_indexed(60))
    index = retried(lambda: space._index(True)).index
    assert index is not None
    rows = dict(retried(lambda: list(space.items())))
    assert set(index.keys()) == set(rows)
    for key, vector in rows.items():
        assert index.vector(key).tobytes() == vector.tobytes()


def next_transaction(hub):
    with hub._database.connection() as connection:
        query = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
        return connection.execute(query).fetchone()[0]


def test_transaction_ids_that_are_used_again_hide_nothing(hub, tmp_path):
    """A crash forgets transactions that were not flushed; the next ones get their numbers.

    The replica has seen numbers beyond them, and would take the new changes for seen.
    """
    space = hub.create_space("s", 2)
    space.set("first", [0, 1])
    space.wait_until_indexed(30)
    with hub._database.connection() as connection:
        connection.execute("CHECKPOINT")
        before = next_transaction(hub)
        # Numbers are used up, and nothing of it reaches the disk.
        stop_log_writer(tmp_path / "data")
        connection.execute("SET synchronous_commit = off")
        for _ in range(500):
            with pytest.raises(ZeroDivisionError), connection.transaction():
                connection.execute("SELECT pg_current_xact_id()")
                raise ZeroDivisionError
        space.nearest_neighbors(1, vector=[0, 1], consistency="strong")
    assert space._replica._meant["s"].watermark.xmax >= before + 500
    kill_postgres(tmp_path / "data")
    retried(lambda: space.set("second", [5, 5]))
    after = retried(lambda: next_transaction(hub))
    assert after < before + 500, "no number was used again: the test tried nothing"
    check_index(space)
    assert space.nearest_neighbors(1, vector=[5, 5])[0].key == "second"


def test_commits_that_a_crash_forgot_leave_the_index_too(hub, tmp_path):
    """With synchronous_commit off a crash may lose what was seen. The index must forget it too."""
    space = hub.create_space("s", 2)
    space.multiset({"a": [0, 1], "b": [1, 0]})
    space.wait_until_indexed(30)
    # The first save has been acknowledged; nothing else will flush the log from now on.
    time.sleep(0.5)
    stop_log_writer(tmp_path / "data")
    with contextlib.suppress(ehub.UnavailableError), hub._database.connection() as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("INSERT INTO spaces.s VALUES ('lost', '[7,7]')")
        connection.execute("UPDATE spaces.s SET embedding = '[8,8]' WHERE key = 'a'")
        found = space.nearest_neighbors(1, vector=[7, 7], consistency="strong")
        assert found[0].key == "lost"
        kill_postgres(tmp_path / "data")
    assert not retried(lambda: "lost" in space), "the commit survived: the test tried nothing"
    check_index(space)


def test_searches_go_on_from_the_index_while_postgres_is_away(hub, tmp_path):
    space = hub.create_space("s", 2)
    space.multiset({"a": [0, 1], "b": [1, 0]})
    space.wait_until_indexed(30)
    pid = postmaster(tmp_path / "data")
    os.kill(pid, signal.SIGSTOP)
    try:
        for child in psutil.Process(pid).children():
            os.kill(child.pid, signal.SIGSTOP)
        started = time.monotonic()
        assert space.nearest_neighbors(1, vector=[0, 1])[0].key == "a"
        assert time.monotonic() - started < 1
    finally:
        for child in psutil.Process(pid).children():
            os.kill(child.pid, signal.SIGCONT)
        os.kill(pid, signal.SIGCONT)
    retried(lambda: space.set("c", [1, 1]))
    assert retried(lambda: space.nearest_neighbors(1, vector=[1, 1]))[0].key == "c"


def test_the_last_to_leave_stops_the_server(tmp_path):
    data_dir = tmp_path / "data"
    script = (
        "import ehub, sys\n"
        "hub = ehub.connect('embedded', data_dir=sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "input()\n"
    )
    first = ehub.connect("embedded", data_dir=data_dir)
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "ready\n"
        pid = postmaster(data_dir)
        first.close()
        assert psutil.pid_exists(pid)
        # It is killed, and so leaves no word: the next one to leave stops the server all the same.
        other.kill()
    with ehub.connect("embedded", data_dir=data_dir):
        assert postmaster(data_dir) == pid
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_many_processes_start_at_once(tmp_path):
    data_dir = str(tmp_path / "data")
    script = (
        "import ehub, sys\n"
        "with ehub.connect('embedded', data_dir=sys.argv[1]) as hub:\n"
        "    print(len(hub.spaces()))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, data_dir], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        with process:
            assert process.stdout.read() == "0\n"
        assert process.returncode == 0
