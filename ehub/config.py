"""Where the data is: arguments first, then the environment, then the embedded Postgres."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ehub.errors import ConfigurationError

EMBEDDED = "embedded"
"""The URL of the embedded Postgres."""

# A dead peer is noticed in about a minute, whatever the kernel's own patience.
_CONNECTION_DEFAULTS = {
    "application_name": "ehub",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
_SOCKET_NAME = ".s.PGSQL."
_PG_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE")


@dataclass(frozen=True, slots=True)
class Target:
    """Which Postgres to use, and the folder for what is kept beside it.

    Attributes:
        conninfo: libpq's connection string, or None for the embedded Postgres. It may hold a
            password and is never shown.
        data_dir: the folder of the embedded Postgres and of the index files.
    """

    conninfo: str | None = field(repr=False)
    data_dir: Path

    def describe(self) -> str:
        """Name the database without its password."""
        if self.conninfo is None:
            return f"embedded Postgres in {self.data_dir}"
        values = conninfo_to_dict(self.conninfo)
        host = values.get("host") or os.environ.get("PGHOST") or "local socket"
        port = values.get("port") or os.environ.get("PGPORT") or "5432"
        name = values.get("dbname") or os.environ.get("PGDATABASE") or values.get("service") or ""
        return f"{host}:{port}/{name}"


class Address(NamedTuple):
    """Where something listens: a host and port, or the path of a Unix socket."""

    host: str
    port: int
    path: Path | None = None

    @classmethod
    def parse(cls, text: str, default_port: int) -> Address:
        """Read ``HOST``, ``HOST:PORT``, ``:PORT``, ``[IPv6]:PORT`` or the path of a socket.

        A path begins with ``/`` or ``.``, and is a folder if it is one: then the socket gets the
        name that libpq looks for, ``.s.PGSQL.PORT``.

        Raises:
            ConfigurationError: it is none of these.
        """
        if text.startswith(("/", ".")):
            path = Path(text).absolute()
            if path.is_dir():
                path /= f"{_SOCKET_NAME}{default_port}"
            port = path.name.removeprefix(_SOCKET_NAME)
            if port == path.name or not port.isdigit():
                raise ConfigurationError(
                    f"a socket is named {_SOCKET_NAME} and a port, or give its folder: {text!r}"
                )
            return cls(str(path.parent), int(port), path)
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]*)(?::(\d{1,5}))?", text)
        number = default_port if found is None or found[2] is None else int(found[2])
        if found is None or number > 65535:
            raise ConfigurationError(f"an address is HOST:PORT or the path of a socket: {text!r}")
        return cls(found[1].strip("[]") or "127.0.0.1", number)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def resolve(url: str | None = None, data_dir: str | os.PathLike[str] | None = None) -> Target:
    """Decide which database is meant.

    The first that is given counts: ``url``; ``EHUB_DATABASE_URL``; libpq's own variables
    (``PGHOST``, ``PGPORT``, ``PGDATABASE``, ``PGSERVICE``); else the embedded Postgres. The folder:
    ``data_dir``, ``EHUB_DATA_DIR``, else the user's data directory (``/var/lib/ehub`` for root).

    Raises:
        ConfigurationError: the URL cannot be read.
    """
    folder = data_dir or os.environ.get("EHUB_DATA_DIR") or _default_data_dir()
    path = Path(folder).expanduser().absolute()
    url = url or os.environ.get("EHUB_DATABASE_URL")
    if url is None and any(os.environ.get(name) for name in _PG_VARIABLES):
        url = ""
    if url is None or url == EMBEDDED:
        return Target(None, path)
    return Target(_parse(url), path)


def _parse(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if separator:
        # SQLAlchemy writes its driver into the scheme.
        scheme = scheme.partition("+")[0]
        if scheme not in ("postgresql", "postgres"):
            raise ConfigurationError(f"a URL starts with postgresql://, not with {scheme}://")
        url = f"{scheme}://{rest}"
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except psycopg.Error:
        # The driver's message quotes the URL, and with it the password.
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user@host:5432/database"
        ) from None
    return make_conninfo(**(_CONNECTION_DEFAULTS | given))


def _default_data_dir() -> str:
    # Postgres refuses to run as root, so the embedded one takes another user, who has no way
    # into root's home.
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return "/var/lib/ehub"
    # Where it is not needed it need not be loaded: clients start often.
    import platformdirs

    return platformdirs.user_data_dir("ehub", appauthor=False)
