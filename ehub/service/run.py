"""The service itself: what runs, and how it begins and ends."""

from __future__ import annotations

import contextlib
import logging
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from ehub import resources
from ehub.config import Address
from ehub.database import SCHEMA_REVISION, Connection, Database, installed, is_lost, mapped
from ehub.errors import ConfigurationError, EhubError, UnavailableError
from ehub.replica import Replica, State
from ehub.service.candidates import Answers
from ehub.service.metrics import Metrics, Pages
from ehub.service.pgwire import Door, Verifier
from ehub.service.watchdog import Watchdog

_log = logging.getLogger(__name__)

# Postgres takes a service whose pulse is older than two seconds for hung (sql/service.sql).
_PULSE_SECONDS = 0.5
_SECRET_SECONDS = 2.0
# A thread that works in Python lets another one run after this long; a search takes no longer.
_SWITCH_SECONDS = 0.0005


class Service:
    """Indexes of all spaces of a database, and the door at which Postgres asks for candidates.

    Args:
        database: what to follow, as the owner of schema ``ehub``.
        listen: where Postgres finds it.
        pages: where metrics and health are, None for nowhere.
        tls: with a certificate, for connections that ask for it.
        watchdog: kills this process when it hangs. With it Postgres may wait for answers without a
            deadline of its own, where nothing else lies between the two.
        token: for whoever may read the metrics, None for everybody who reaches the pages.

    Raises:
        ConfigurationError: it cannot listen there.
        UnavailableError: the database cannot be reached.
    """

    def __init__(
        self,
        database: Database,
        listen: Address,
        pages: Address | None = None,
        tls: ssl.SSLContext | None = None,
        watchdog: Watchdog | None = None,
        token: str | None = None,
    ) -> None:
        self._database = database
        self._watchdog = watchdog
        self._loading = 0
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        self._secret: Verifier | None = None
        self._was_installed = False
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._replica = Replica(database, f"service at {listen}", self._long_work)
        self._exact: dict[str, int] = {}
        # Of what runs here, whatever is installed beneath it later.
        self._release = SCHEMA_REVISION, resources.sql_digest()
        release = version("ehub")
        self._schema = "unknown"
        self._pulse_error: str | None = None
        self.metrics = Metrics(
            self._replica,
            lambda: self._door.connections,
            lambda: self._exact,
            lambda: {"version": release, "schema": self._schema},
            named=token is not None,
        )
        with contextlib.ExitStack() as stack:
            answers = Answers(self._replica, self.metrics)
            self._door = Door(listen, self._verifier, answers, tls, propose=answers.candidates)
            stack.callback(self._door.close)
            self._pages = (
                None
                if pages is None
                else Pages(
                    pages, self.metrics, self._replica, self.ready, lambda: self._schema, token
                )
            )
            if self._pages is not None:
                stack.callback(self._pages.close)
            stack.callback(self._replica.close)
            # An error of the first connection is told at once; later ones are waited out.
            connection = self._feel(self._warn_of_others)
            self._pulse = threading.Thread(
                target=self._beat, args=(connection,), name="ehub-pulse", daemon=True
            )
            self._pulse.start()
            self._replica.follow_all()
            self._leave = stack.pop_all()

    @property
    def address(self) -> Address:
        """Where Postgres finds it."""
        return self._door.address

    @property
    def pages(self) -> Address | None:
        """Where metrics and health are."""
        return None if self._pages is None else self._pages.address

    @property
    def installed(self) -> bool:
        """Whether the database has a secret for it."""
        return self._secret is not None

    def install(self) -> None:
        """Tell the database that this is its service, as ``ehub install-service`` does.

        Raises:
            ServiceError: neither extension ehub_link nor dblink is to be had.
        """
        with self._database.connection() as connection:
            connection.execute(
                "SELECT ehub.install_service(%s, %s::int)", [self.address.host, self.address.port]
            )
            self._read_secret(connection)
            self._promise(connection)

    def ready(self) -> bool:
        """Whether it follows the database and answers for what it can.

        A space whose index is being built or cannot be made keeps nobody from the others. At the
        start those that were saved are loaded first.
        """
        copies = self._replica.followed()
        return self._replica.followed_once and not any(
            copy.state is State.LOADING for copy in copies if copy.entry.current
        )

    def complete(self) -> bool:
        """Whether the index of every current version answers, or cannot be made."""
        return self.ready() and all(
            copy.settled()
            for copy in self._replica.followed()
            if copy.entry.current and copy.entry.whole
        )

    def close(self) -> None:
        """Hang up on everybody and save the indexes."""
        self._stopping.set()
        self._leave.close()
        self._pulse.join(5)

    def _verifier(self) -> Verifier | None:
        return self._secret

    @contextlib.contextmanager
    def _long_work(self) -> Iterator[None]:
        """Tell everybody who waits for this process that it does not answer for a while."""
        with self._mutex:
            self._loading += 1
        if self._watchdog is not None:
            self._watchdog.begin_long_work()
        try:
            with contextlib.suppress(EhubError), self._database.connection() as connection:
                self._promise(connection)
            yield
        finally:
            if self._watchdog is not None:
                self._watchdog.end_long_work()
            with self._mutex:
                self._loading -= 1

    # --- the pulse

    def _beat(self, connection: Connection | None) -> None:
        """Show that this process lives, by a connection of which Postgres sees when it moved."""
        asked = time.monotonic()
        while not self._stopping.wait(_PULSE_SECONDS):
            try:
                if connection is None:
                    connection = self._feel()
                elif time.monotonic() - asked > _SECRET_SECONDS:
                    asked = time.monotonic()
                    self._read_secret(connection)
                    self._promise(connection)
                    self._look_around(connection)
                else:
                    connection.execute("SELECT")
                if self._pulse_error is not None:
                    _log.warning("the pulse of this service is back")
                    self._pulse_error = None
            except Exception as error:
                # The replica tells of lost connections; this thread must outlive everything.
                if connection is not None:
                    connection.close()
                    connection = None
                lost = is_lost(error) or isinstance(error, UnavailableError | OSError)
                if not lost and self._pulse_error != str(error):
                    self._pulse_error = str(error)
                    _log.warning("this service has no pulse, and searches are exact: %s", error)
        if connection is not None:
            connection.close()

    def _feel(self, first: Callable[[Connection], None] | None = None) -> Connection:
        connection = self._database.connect()
        try:
            with mapped():
                if first is not None:
                    first(connection)
                connection.execute("SET application_name = 'ehub pulse'")
                self._read_secret(connection)
                self._promise(connection)
                self._look_around(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _warn_of_others(self, connection: Connection) -> None:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity AS a WHERE a.application_name = 'ehub pulse'"
            " AND a.datname = current_database() AND a.pid <> pg_backend_pid()"
        ).fetchone()
        if row is not None and row[0]:
            _log.warning(
                "another index service follows this database; Postgres asks the one that"
                " `ehub install-service` named last"
            )

    def _look_around(self, connection: Connection) -> None:
        """Read what Postgres has counted, and whether its functions are those of this release."""
        self._exact = dict(
            connection.execute("SELECT reason, answers FROM ehub.exact_answers()").fetchall()
        )
        schema = "fits" if installed(connection) == self._release else "differs"
        if schema != self._schema and schema == "differs":
            _log.warning(
                "schema ehub is of another release than this service: run `ehub migrate` with this"
                " release, or the service of the other one"
            )
        self._schema = schema

    def _promise(self, connection: Connection) -> None:
        """Tell the database whether this process ends, one way or another, what it is asked."""
        watched = self._watchdog is not None and self._watchdog.armed and not self._loading
        connection.execute(
            "SELECT ehub.promise_answers(%s, %s, %s::int)",
            [watched, self.address.host, self.address.port],
        )

    def _read_secret(self, connection: Connection) -> None:
        row = connection.execute("SELECT ehub.service_secret()").fetchone()
        secret = None if row is None else row[0]
        if secret is None:
            self._secret = None
        elif self._secret is None or not self._secret.is_of(secret):
            self._secret = Verifier(secret)
            if self._was_installed:
                # It was removed meanwhile, and with it what the database knew of this service.
                self._replica.reconnect()
            self._was_installed = True


def tls_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """Return what the door needs for TLS.

    Raises:
        ConfigurationError: the files cannot be read or do not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the certificate {certificate} cannot be used: {error}") from None
    return context
