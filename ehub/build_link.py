"""Build extension ``ehub_link``, the shortest way from a search in SQL to the index service.

It is a file of C, built by the server's own rules (PGXS) for the server that it is to run in.
Nothing needs it: without it searches go by dblink, and without that they are exact.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ehub import resources
from ehub.errors import DependencyError

_log = logging.getLogger(__name__)

_NAME = "ehub_link"
_SOURCES = ("Makefile", f"{_NAME}.c", f"{_NAME}.control", f"{_NAME}--1.0.sql")
_BUILD_SECONDS = 120.0
_LAST_LINES = 5


def build(pg_config: Path | str) -> Path:
    """Build the extension for the server of this ``pg_config``, and install it there.

    Returns the library that the server loads. Raises DependencyError where it cannot be built (no
    compiler, no ``make``, no headers of the server) or its folders cannot be written.
    """
    library, extensions = (Path(_ask(pg_config, f"--{what}")) for what in ("pkglibdir", "sharedir"))
    with tempfile.TemporaryDirectory(prefix="ehub-link-") as name:
        folder = Path(name)
        for source in _SOURCES:
            shutil.copy(resources.folder("extension") / source, folder)
        try:
            done = subprocess.run(
                ["make", f"PG_CONFIG={pg_config}", "install"],
                cwd=folder,
                # What a make above this one has to say is not meant for it.
                env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")},
                capture_output=True,
                text=True,
                timeout=_BUILD_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DependencyError(f"extension {_NAME} cannot be built: {error}") from None
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-_LAST_LINES:])
        raise DependencyError(
            f"extension {_NAME} cannot be built; it needs make, a C compiler and the server's"
            f" headers (postgresql-server-dev-17, for one), and to write to {library}:\n{last}"
        )
    (extensions / "extension" / f"{_NAME}.digest").write_text(_digest())
    return library / f"{_NAME}.so"


def is_built(pg_config: Path | str) -> bool:
    """Whether the server of this ``pg_config`` has the extension of this release."""
    extensions = Path(_ask(pg_config, "--sharedir")) / "extension"
    try:
        return (extensions / f"{_NAME}.digest").read_text() == _digest()
    except OSError:
        return False


def build_once(pg_config: Path) -> None:
    """Build it for a server of one's own, unless that is done; says in the log if it cannot be."""
    try:
        with (pg_config.parent / f"{_NAME}.lock").open("ab") as lock:
            # Several processes may start servers at once.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_built(pg_config):
                build(pg_config)
    except (DependencyError, OSError) as error:
        _log.warning("searches in SQL will be exact on the embedded Postgres: %s", error)


def _ask(pg_config: Path | str, what: str) -> str:
    try:
        done = subprocess.run(
            [pg_config, what], capture_output=True, text=True, check=True, timeout=_BUILD_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DependencyError(f"{pg_config} does not say where its server is: {error}") from None
    return done.stdout.strip()


def _digest() -> str:
    folder = resources.folder("extension")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _SOURCES)).hexdigest()
