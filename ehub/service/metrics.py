"""What the service counts, for Prometheus; and the pages that show it, and whether it is well.

Whoever reaches the port reads it, so indexes go by their number here (``ehub.status`` says to those
who may know which space that is). Where there is a token, whoever sends it sees names too.
"""

from __future__ import annotations

import bisect
import hmac
import json
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ehub.config import Address
from ehub.errors import ConfigurationError
from ehub.replica import Copy, Replica, State

# Seconds, the upper bounds of the histogram's buckets.
_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_NAN = float("nan")


class Metrics(Collector):
    """Counts answers, and reads the state of the indexes when it is asked.

    Args:
        replica: whose indexes these are.
        connections: counts the connections through the door.
        exact: what Postgres has counted: answers without the index, by reason.
        build: the labels of ``ehub_build_info``.
        named: whether whoever reads it may know what spaces are called.
    """

    def __init__(
        self,
        replica: Replica,
        connections: Callable[[], int],
        exact: Callable[[], Mapping[str, int]],
        build: Callable[[], Mapping[str, str]],
        *,
        named: bool,
    ) -> None:
        self._replica, self._connections = replica, connections
        self._exact, self._build, self._named = exact, build, named
        self._durations = [0] * (len(_BUCKETS) + 1)
        self._seconds = 0.0
        self._refused: Counter[str] = Counter()
        # How many queries candidates were asked for.
        self.queries = 0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    @property
    def answers(self) -> int:
        """How many answers were given, a batch being one."""
        return sum(self._durations)

    def answered(self, queries: int, seconds: float, reason: str | None) -> None:
        """Count an answer, which has a ``reason`` if it has no candidates."""
        # In every search's way, so nothing but sums; a lost addition in a million would not matter.
        self._durations[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self._seconds += seconds
        self.queries += queries
        if reason is not None:
            self._refused[reason] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield what there is to tell, as the registry asks for it."""
        build = self._build()
        info = GaugeMetricFamily("ehub_build_info", "What runs here.", labels=list(build))
        info.add_metric(list(build.values()), 1)
        yield info
        yield self._histogram()
        yield CounterMetricFamily(
            "ehub_queries", "Queries that candidates were asked for.", value=self.queries
        )
        refused = CounterMetricFamily(
            "ehub_refused_answers",
            "Answers without candidates: Postgres went exact.",
            labels=["reason"],
        )
        for reason, number in list(self._refused.items()):
            refused.add_metric([reason], number)
        yield refused
        exact = CounterMetricFamily(
            "ehub_exact_answers",
            "Searches in SQL that asked the index and were exact, as Postgres counts them.",
            labels=["reason"],
        )
        for reason, number in self._exact().items():
            exact.add_metric([reason], number)
        yield exact
        yield _gauge("ehub_connections", "Connections through the door.", self._connections())
        connected = float(self._replica.connected)
        yield _gauge("ehub_database_connected", "Whether the database answers.", connected)
        yield from self._indexes()

    def _histogram(self) -> Metric:
        buckets = []
        total = 0
        for bound, number in zip((*map(str, _BUCKETS), "+Inf"), self._durations, strict=True):
            total += number
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(
            "ehub_answer_duration_seconds",
            "Time that answers to Postgres took, a batch being one, without the road.",
            buckets=buckets,
            sum_value=self._seconds,
        )

    def _indexes(self) -> Iterator[Metric]:
        copies = self._replica.followed()
        labels = ["index", "space", "version", "name"] if self._named else ["index"]
        now = time.time()
        for name, text, value in (
            ("ready", "Whether searches of the present are answered by it.", _ready),
            ("rows", "Rows in the index.", lambda copy: len(copy.index or ())),
            (
                "tombstones",
                "Deleted rows in the graph.",
                lambda copy: copy.index.tombstones if copy.index else 0,
            ),
            (
                "memory_bytes",
                "Size of the graph in memory.",
                lambda copy: copy.index.memory if copy.index else 0,
            ),
            ("disk_bytes", "Size of the saved index.", lambda copy: copy.store.size()),
            (
                "recall",
                "Measured recall@10.",
                lambda copy: (copy.index and copy.index.calibration.recall) or _NAN,
            ),
            (
                "ef",
                "Candidates kept by a search.",
                lambda copy: copy.index.calibration.ef if copy.index else 0,
            ),
            ("lag_rows", "Changed rows that it is known to lack.", lambda copy: copy.lag),
            (
                "lag_seconds",
                "How long it has lacked any.",
                lambda copy: 0 if copy.lags_since is None else now - copy.lags_since,
            ),
            (
                "caught_up_timestamp_seconds",
                "When it last equalled its table.",
                lambda copy: copy.caught_up_at or _NAN,
            ),
            (
                "failed_timestamp_seconds",
                "When something last failed.",
                lambda copy: copy.failed_at or _NAN,
            ),
            (
                "progress_ratio",
                "How far the work is that it cannot answer before; 1 where it answers.",
                lambda copy: (
                    1.0 if copy.serving() else copy.done / copy.total if copy.total else 0.0
                ),
            ),
        ):
            family = GaugeMetricFamily(f"ehub_index_{name}", text, labels=labels)
            for copy in copies:
                family.add_metric(self._labels(copy), value(copy))
            yield family
        failed = CounterMetricFamily(
            "ehub_index_failed_saves", "How often the index could not be saved.", labels=labels
        )
        for copy in copies:
            failed.add_metric(self._labels(copy), copy.failed_saves)
        yield failed

    def _labels(self, copy: Copy) -> list[str]:
        entry = copy.entry
        if not self._named:
            return [str(entry.index_id)]
        return [str(entry.index_id), entry.space, entry.version, entry.name or ""]


class Pages:
    """``/metrics`` for Prometheus; ``/health``: is it alive; ``/ready``: may it be relied on.

    A service is ready when it answers for what it can. Of one index ``/ready?index=NUMBER`` tells,
    of a space ``/ready?space=NAME``. With a ``token``, metrics and names are for those who send it
    as ``Authorization: Bearer``; without one, names are for nobody.
    """

    def __init__(
        self,
        address: Address,
        metrics: Metrics,
        replica: Replica,
        ready: Callable[[], bool],
        schema: Callable[[], str],
        token: str | None = None,
    ) -> None:
        self._metrics_page = make_wsgi_app(metrics.registry)
        self._replica, self._ready, self._schema = replica, ready, schema
        self._expected = None if token is None else f"Bearer {token}"
        try:
            self._server = make_server(
                address.host, address.port, self._page, _Server, _QuietHandler
            )
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {address}: {error}") from error
        self.address = address._replace(port=self._server.server_port)
        threading.Thread(target=self._server.serve_forever, name="ehub-pages", daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    def _knows_token(self, environ: dict[str, Any]) -> bool:
        given = environ.get("HTTP_AUTHORIZATION", "")
        return self._expected is not None and hmac.compare_digest(
            given.encode(), self._expected.encode()
        )

    def _page(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        asked = dict(urllib.parse.parse_qsl(environ.get("QUERY_STRING", "")))
        named = self._knows_token(environ)
        if not named and ((self._expected is not None and path == "/metrics") or "space" in asked):
            start("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"the token is missing or wrong\n"]
        if path == "/metrics":
            page: Iterable[bytes] = self._metrics_page(environ, start)
            return page
        if path not in ("/", "/health", "/ready"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics, /health and /ready\n"]
        copies = self._replica.followed()
        ready = self._ready()
        if "space" in asked:
            copies = [c for c in copies if c.entry.space == asked["space"] and c.entry.current]
        elif "index" in asked:
            copies = [c for c in copies if str(c.entry.index_id) == asked["index"]]
        if asked:
            ready = ready and bool(copies) and all(_ready(copy) for copy in copies)
        state = {
            "ready": ready,
            "database": "connected" if self._replica.connected else "not connected",
            "schema": self._schema(),
            "indexes": [_describe(copy, named) for copy in copies],
        }
        well = path != "/ready" or ready
        status = "200 OK" if well else "503 Service Unavailable"
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(state, indent=1).encode() + b"\n"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's word
        """Keep probes out of the log."""


def _ready(copy: Copy) -> bool:
    return copy.health() == State.READY


def _describe(copy: Copy, named: bool) -> dict[str, object]:
    description: dict[str, object] = {"index": copy.entry.index_id}
    if named:
        entry = copy.entry
        description |= {"space": entry.space, "version": entry.version}
        if entry.name is not None:
            description["name"] = entry.name
    description |= {"state": copy.health(), "ready": _ready(copy)}
    if copy.lag:
        description["lag"] = copy.lag
    if copy.error is not None:
        # What it says may be names.
        description["error"] = copy.error if named else "see the service's log"
    if copy.state is not State.READY and copy.total:
        description["done"] = round(copy.done / copy.total, 2)
    return description


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
