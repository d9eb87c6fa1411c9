"""What the service counts, for Prometheus; and the page that shows it, and whether it is well.

Whoever reaches the port reads it, so indexes go by their number here (``ehub.status`` says to those
who may know which space that is), and how large they are is for Prometheus alone, where it has been
given a token.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ehub.config import Address
from ehub.errors import ConfigurationError
from ehub.replica import Copy, Replica, State

_COUNTS = {
    "answers": "Answers to Postgres, a batch being one.",
    "queries": "Queries that candidates were asked for.",
    "answer_seconds": "Time that answers took, without the road.",
    "refused_answers": "Answers without candidates: Postgres went exact.",
}


class Metrics:
    """Counts answers, and reads the state of the indexes when it is asked."""

    def __init__(self, replica: Replica, connections: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._state = _State(replica, connections)
        self.registry.register(self._state)

    @property
    def counts(self) -> dict[str, float]:
        """What was counted so far, by name."""
        return self._state.counts

    def answered(self, queries: int, seconds: float, reason: str | None) -> None:
        """Count an answer, which has a ``reason`` if it has no candidates."""
        # In every search's way, so nothing but sums; a lost addition in a million would not matter.
        counts = self._state.counts
        counts["answers"] += 1
        counts["queries"] += queries
        counts["answer_seconds"] += seconds
        if reason is not None:
            counts["refused_answers"] += 1


class _State(Collector):
    def __init__(self, replica: Replica, connections: Callable[[], int]) -> None:
        self._replica, self._connections = replica, connections
        self.counts = dict.fromkeys(_COUNTS, 0.0)

    def collect(self) -> Iterator[Metric]:
        for name, text in _COUNTS.items():
            yield CounterMetricFamily(f"ehub_{name}", text, value=self.counts[name])
        yield _gauge("ehub_connections", "Connections through the door.", self._connections())
        connected = float(self._replica.connected)
        yield _gauge("ehub_database_connected", "Whether the database answers.", connected)
        copies = self._replica.followed()
        for name, text, value in (
            ("ready", "Whether the index answers.", lambda copy: float(copy.serving())),
            ("rows", "Rows in the index.", lambda copy: len(copy.index or ())),
            (
                "tombstones",
                "Deleted rows in the graph.",
                lambda copy: copy.index.tombstones if copy.index else 0,
            ),
            (
                "memory_bytes",
                "Size of the graph.",
                lambda copy: copy.index.memory if copy.index else 0,
            ),
            (
                "recall",
                "Measured recall@10.",
                lambda copy: (copy.index and copy.index.calibration.recall) or float("nan"),
            ),
            (
                "ef",
                "Candidates kept by a search.",
                lambda copy: copy.index.calibration.ef if copy.index else 0,
            ),
        ):
            family = GaugeMetricFamily(f"ehub_index_{name}", text, labels=["index"])
            for copy in copies:
                family.add_metric([str(copy.entry.index_id)], value(copy))
            yield family


class Pages:
    """``/metrics`` for Prometheus; ``/health``: is it alive; ``/ready``: may it be relied on.

    With a ``token`` metrics are for those who send it as ``Authorization: Bearer``.
    """

    def __init__(
        self,
        address: Address,
        metrics: Metrics,
        replica: Replica,
        ready: Callable[[], bool],
        token: str | None = None,
    ) -> None:
        self._metrics_page = make_wsgi_app(metrics.registry)
        self._replica, self._ready = replica, ready
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

    def _page(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            given = environ.get("HTTP_AUTHORIZATION", "")
            if self._expected is not None and not hmac.compare_digest(
                given.encode(), self._expected.encode()
            ):
                start("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
                return [b"the token is missing or wrong\n"]
            page: Iterable[bytes] = self._metrics_page(environ, start)
            return page
        if path not in ("/", "/health", "/ready"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics, /health and /ready\n"]
        ready = self._ready()
        well = path != "/ready" or ready
        state = {
            "ready": ready,
            "database": "connected" if self._replica.connected else "not connected",
            "indexes": [_describe(copy) for copy in self._replica.followed()],
        }
        status = "200 OK" if well else "503 Service Unavailable"
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(state, indent=1).encode() + b"\n"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's word
        """Keep probes out of the log."""


def _describe(copy: Copy) -> dict[str, object]:
    description: dict[str, object] = {
        "index": copy.entry.index_id,
        "state": str(copy.state),
        "failed": copy.error is not None,
    }
    if copy.state is not State.READY and copy.total:
        description["done"] = round(copy.done / copy.total, 2)
    return description


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
