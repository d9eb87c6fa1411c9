"""A client that is killed in the middle of a write leaves all of it or nothing."""

import signal
import subprocess
import sys
import time

import numpy as np

ROWS = 60_000
SCRIPT = f"""
import sys, ehub
hub = ehub.connect(sys.argv[1], data_dir=sys.argv[2])
space = hub.get_space("s")
generation = int(sys.argv[3])

def rows():
    print("writing", flush=True)
    for i in range({ROWS}):
        yield f"k{{i}}", [generation, i, 1.0]

space.multiset(rows())
print("done", flush=True)
"""


def test_multiset_is_all_or_nothing(hub, url, data_dir):
    space = hub.create_space("s", 3)
    space.multiset([f"k{i}" for i in range(ROWS)], [[0, i, 1] for i in range(ROWS)])
    acknowledged = 0
    outcomes = set()
    # From long before the end to just after it.
    delays = np.linspace(0.05, 2.5, 7)
    for generation, delay in enumerate(delays, 1):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, url, str(data_dir), str(generation)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout.readline() == "writing\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            if "done" in process.stdout.read():
                acknowledged = generation
        settle(hub, url)
        found = {int(vector[0]) for _, vector in space.items()}
        assert len(found) == 1, "a part of a multiset is there"
        (present,) = found
        assert len(space) == ROWS
        assert present >= acknowledged, "what was acknowledged is gone"
        outcomes.add(present == generation)
        acknowledged = present
    assert False in outcomes, "no kill came before the end: the test tried nothing"


def settle(hub, url):
    """Wait until the killed client's backend has noticed."""
    with hub._database.connection() as connection:
        deadline = time.monotonic() + 30
        while connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query ~ 'ehub_staging|merge_staged' AND state <> 'idle' AND pid <> pg_backend_pid()"
        ).fetchone() != (0,):
            assert time.monotonic() < deadline
            time.sleep(0.05)
