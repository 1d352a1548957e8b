"""Prometheus metrics of one daemon: figures of its finished migrations, and of those that run now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from migrated.observe.progress import Progress
from migrated.record.model import Record
from migrated.record.terms import FINISHED, ROLES, Role
from migrated.settings.config import Address

DOWNTIME_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
TOTAL_BUCKETS_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
ERROR_BUCKETS: Final = (0.01, 0.02, 0.05, 0.08, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
BANDWIDTH_BUCKETS: Final = tuple(float(1 << power) for power in range(20, 37, 2))
MOST_REGIMES: Final = 64
"""Kinds of attempts with figures of their own, more than there are. Those of incoming attempts are a peer's word, and
each has its figures for as long as the daemon runs."""
OTHER_REGIMES: Final = "other"
ROUND_BUCKETS: Final = (1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 89.0, 144.0)


class Metrics:
    """The metrics of one daemon, in a registry of their own. ``observe`` and ``track`` are for the event loop's thread;
    reading them is for any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._regimes: dict[Role, set[str]] = {one: set() for one in ROLES}
        role = ("role",)
        self._migrations = Counter(
            "migrated_migrations", "Finished migration attempts.", ("role", "outcome"), registry=self.registry
        )
        self._downtime = Histogram(
            "migrated_downtime_seconds",
            "Downtime of completed migrations, from the stop of the guest to its run.",
            role,
            buckets=DOWNTIME_BUCKETS_S,
            registry=self.registry,
        )
        self._abort_pause = Histogram(
            "migrated_abort_pause_seconds",
            "Pause of the guest in switchovers that were aborted.",
            role,
            buckets=DOWNTIME_BUCKETS_S,
            registry=self.registry,
        )
        self._total = Histogram(
            "migrated_total_seconds",
            "Total time of completed migrations.",
            role,
            buckets=TOTAL_BUCKETS_S,
            registry=self.registry,
        )
        self._violations = Counter(
            "migrated_limit_violations", "Switchovers over their downtime limit.", role, registry=self.registry
        )
        self._prediction_error = Histogram(
            "migrated_prediction_error_ratio",
            "How far predicted downtime was off, over the actual, of completed migrations.",
            role,
            buckets=ERROR_BUCKETS,
            registry=self.registry,
        )
        self._late_predictions = Counter(
            "migrated_prediction_bound_exceeded",
            "Completed migrations whose downtime exceeded the predicted bound, by the kind of attempt.",
            ("role", "regime"),
            registry=self.registry,
        )
        self._bounds = Counter(
            "migrated_prediction_bounds",
            "Completed migrations whose downtime had a predicted bound, by the kind of attempt.",
            ("role", "regime"),
            registry=self.registry,
        )
        self._bandwidth = Histogram(
            "migrated_bandwidth_bytes_per_second",
            "Bandwidth of pre-copy rounds.",
            role,
            buckets=BANDWIDTH_BUCKETS,
            registry=self.registry,
        )
        self._rounds = Histogram(
            "migrated_rounds", "Pre-copy rounds per attempt.", role, buckets=ROUND_BUCKETS, registry=self.registry
        )
        self._bytes = Counter(
            "migrated_transferred_bytes", "Bytes of guest memory moved.", role, registry=self.registry
        )
        self._running = Gauge("migrated_running", "Migrations that run now.", role, registry=self.registry)
        self._in_doubt = Gauge("migrated_in_doubt", "Migrations in doubt now.", role, registry=self.registry)
        self._moved_now = Gauge(
            "migrated_running_transferred_bytes",
            "Bytes moved by a running migration.",
            ("guest",),
            registry=self.registry,
        )
        self._remaining_now = Gauge(
            "migrated_running_remaining_bytes", "Bytes left of a running migration.", ("guest",), registry=self.registry
        )
        self._connections = Gauge(
            "migrated_connections", "Migration connections that were accepted and are open.", registry=self.registry
        )
        self._refused = Counter(
            "migrated_connections_refused",
            "Migration connections that were not taken, by kind of the reason.",
            ("reason",),
            registry=self.registry,
        )
        self._offers_refused = Counter(
            "migrated_offers_refused",
            "Guests that were offered and not taken in, by kind of the reason.",
            ("reason",),
            registry=self.registry,
        )
        self._fleet = Gauge(
            "migrated_fleet",
            "Figures of the fleet as this host sees it: whether its store is reached (1), hosts with a lease, cordoned "
            "and fenced hosts, guests with an owner, jobs that are not over, guests on their way.",
            ("figure",),
            registry=self.registry,
        )
        self._certificate_end = Gauge(
            "migrated_certificate_expiry_timestamp_seconds",
            "When this host's certificate ends; 0 without TLS.",
            registry=self.registry,
        )
        for gauge in (self._running, self._in_doubt):
            for one in ROLES:
                gauge.labels(one).set(0)

    def observe(self, record: Record, role: Role) -> None:
        """Count a finished attempt; one in doubt is only counted once it is resolved."""
        if record.outcome == "in-doubt":
            return
        self._migrations.labels(role, record.outcome).inc()
        self._bytes.labels(role).inc(record.ram.transferred_bytes)
        self._rounds.labels(role).observe(len(record.rounds))
        for row in record.rounds:
            if row.bytes:
                self._bandwidth.labels(role).observe(row.bandwidth_bytes_per_s)
        downtime = record.downtime
        if record.outcome == "completed":
            self._total.labels(role).observe(record.total_ns / 1e9)
        if downtime is None:
            return
        if downtime.limit_violated:
            self._violations.labels(role).inc()
        if record.outcome != "completed":
            self._abort_pause.labels(role).observe(downtime.measured_ns / 1e9)
            return
        self._downtime.labels(role).observe(downtime.measured_ns / 1e9)
        if downtime.predicted_ns is not None and downtime.counted_ns > 0:
            self._prediction_error.labels(role).observe(abs(downtime.predicted_ns / downtime.counted_ns - 1))
        if downtime.predicted_upper_ns is not None:
            kind = (role, self._regime(role, downtime.predicted_regime or "unknown"))
            self._bounds.labels(*kind).inc()
            self._late_predictions.labels(*kind).inc(downtime.counted_ns > downtime.predicted_upper_ns)

    def _regime(self, role: Role, name: str) -> str:
        """The name under which a kind of attempt is counted."""
        known = self._regimes[role]
        if name not in known and len(known) >= MOST_REGIMES:
            return OTHER_REGIMES
        known.add(name)
        return name

    def connection_refused(self, reason: str) -> None:
        """Count a connection that was not taken, by the kind of the reason."""
        self._refused.labels(reason).inc()

    def offer_refused(self, reason: str) -> None:
        """Count a guest that was not taken in, by the kind of the reason."""
        self._offers_refused.labels(reason).inc()

    def connections(self, count: int) -> None:
        """Set the number of open migration connections."""
        self._connections.set(count)

    def count_fleet(self, figures: Mapping[str, int]) -> None:
        """Take the figures of the fleet."""
        for name, value in figures.items():
            self._fleet.labels(name).set(value)

    def certificate(self, expires_at_s: float | None) -> None:
        """Set the end of this host's certificate (seconds since 1970), None without TLS."""
        self._certificate_end.set(expires_at_s or 0)

    def track(self, progress: Iterable[Progress]) -> None:
        """Set the gauges from all migrations that the daemon knows; call it at least once per scrape interval."""
        live = [p for p in progress if p.status not in FINISHED]
        for role in ROLES:
            mine = [p for p in live if p.role == role]
            self._in_doubt.labels(role).set(sum(p.status == "in-doubt" for p in mine))
            self._running.labels(role).set(sum(p.status != "in-doubt" for p in mine))
        self._moved_now.clear()
        self._remaining_now.clear()
        for p in live:
            self._moved_now.labels(p.guest).set(p.transferred_bytes)
            self._remaining_now.labels(p.guest).set(p.remaining_bytes)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text form."""
        return generate_latest(self.registry)

    def serve(self, address: Address) -> Callable[[], None]:
        """Serve ``text`` over HTTP from a thread of its own, so that a scrape never sits in the event loop.

        Returns:
            The function that stops it.

        Raises:
            OSError: the address cannot be taken.
        """
        server, thread = start_http_server(address.port, address.host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
