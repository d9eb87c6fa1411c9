"""Services, in this process and as operators run them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ehub.config import Address, resolve
from ehub.database import Database
from ehub.service import Service


class ServiceProcess:
    """``ehub serve`` as an operator starts it: a supervisor and the service below it."""

    def __init__(self, url, folder, port):
        self.url, self.folder, self.port = url, folder, port
        self.start()

    def start(self):
        starts = self.text().count("ready:")
        self.log = (self.folder / "serve.log").open("ab")
        self.process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("ehub"), "serve", "--database", self.url),
                *("--listen", f"127.0.0.1:{self.port}", "--pages", "none"),
                *("--data", self.folder / "service", "--log-format", "text"),
            ],
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self.log.close()
        deadline = time.monotonic() + 60
        while self.text().count("ready:") == starts:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    @property
    def worker(self):
        """The process below the supervisor."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def text(self):
        log = self.folder / "serve.log"
        return log.read_text() if log.exists() else ""

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def service(url, db, tmp_path):
    """A service in this process; Postgres polls for its answers."""
    with contextlib.closing(Database(resolve(url, tmp_path / "service"))) as database:
        with contextlib.closing(Service(database, Address.parse("127.0.0.1:0", 0))) as service:
            install(db, service.address.port)
            yield service


@pytest.fixture
def process(url, db, tmp_path):
    """A service as an operator runs it; Postgres relies on its watchdog."""
    process = ServiceProcess(url, tmp_path, free_port())
    install(db, process.port)
    yield process
    process.close()


def install(db, port):
    db.execute("SELECT ehub.install_service('127.0.0.1', %s::int)", [port])


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def settled(db, space="s", seconds=30):
    """Wait until the index of a space sees all that was committed before."""
    (now,) = db.execute("SELECT pg_current_snapshot()").fetchone()
    deadline = time.monotonic() + seconds
    while True:
        db.execute("SELECT set_config('ehub.breaker', '', false)")
        (reason,) = db.execute("SELECT ehub.index_missing(%s, %s)", [space, now]).fetchone()
        if reason is None:
            return
        assert time.monotonic() < deadline, reason
        time.sleep(0.05)
