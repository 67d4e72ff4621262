"""What Prometheus reads at `/metrics`: latencies seen by clients, and the engine's own counters."""

import os
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linnet.infer.engine import Engine
from linnet.infer.updates import Update

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)

_GAUGES = {
    "running": "Sequences that run",
    "waiting": "Requests in the queue",
    "waiting_tokens": "Prompt tokens of the requests in the queue",
    "kv_pages_used": "Pages of keys and values in use, also by the prefix cache",
    "kv_pages_total": "Pages of keys and values that the plan allows",
    "state_slots_used": "Slots of linear-attention state in use, also by the prefix cache",
    "state_slots_total": "Slots of linear-attention state that the plan allows",
    "prefix_entries": "Prefixes that the prefix cache holds",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of all prompts",
    "cached_tokens": "Prompt tokens that the prefix cache held",
    "completion_tokens": "Tokens generated",
    "prefix_hits": "Prompts of which the prefix cache held a part",
    "preemptions": "Times that a sequence was parked for another",
    "steps": "Steps of the engine",
    "step_seconds": "Time in steps of the engine",
    "model_seconds": "Time of it inside the model",
}
_LABELED = {
    "finished": ("reason", "Requests that ended"),
    "prefix_misses": ("reason", "Prompts of which the prefix cache held nothing, and why"),
}


class Metrics:
    """All metrics of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "linnet_http_requests",
            "HTTP requests answered",
            ["path", "status"],
            registry=self._registry,
        )
        self.first_token = self._histogram(
            "time_to_first_token", "From submission to the first token", _LONG_S
        )
        self.between_tokens = self._histogram(
            "inter_token_latency", "Between the tokens of a request", _SHORT_S
        )
        self.queued = self._histogram("queue_time", "From submission to the first chunk", _LONG_S)
        self.whole = self._histogram("request_duration", "From submission to the end", _LONG_S)

    def clock(self) -> "RequestClock":
        """Return a clock for a request that is submitted now."""
        return RequestClock(self)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        name = f"linnet_{name}_seconds"
        return Histogram(name, description, buckets=buckets, registry=self._registry)


class RequestClock:
    """Times one request by its updates."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._last_token: float | None = None

    def observe(self, update: Update, arrived: float) -> None:
        """Take note of an update that came at `arrived`, by the monotonic clock."""
        if update.tokens and self._last_token is None:
            self._metrics.first_token.observe(arrived - self._start)
        elif update.tokens and self._last_token is not None:
            between = (arrived - self._last_token) / len(update.tokens)
            for _ in update.tokens:
                self._metrics.between_tokens.observe(between)
        if update.tokens:
            self._last_token = arrived
        if update.finish_reason is not None:
            self._metrics.whole.observe(arrived - self._start)
        if update.usage is not None:
            self._metrics.queued.observe(update.usage.queue_s)


class _EngineCollector(Collector):
    """Reads the engine's counters whenever somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counters = self._engine.counters()
        for name, description in _GAUGES.items():
            yield GaugeMetricFamily(f"linnet_{name}", description, getattr(counters, name))
        for name, description in _COUNTERS.items():
            value = getattr(counters, f"{name}_total")
            yield CounterMetricFamily(f"linnet_{name}", description, value)
        for name, (label, description) in _LABELED.items():
            family = CounterMetricFamily(f"linnet_{name}", description, labels=[label])
            for value, count in getattr(counters, f"{name}_total").items():
                family.add_metric([value], count)
            yield family
        planned = self._engine.plan.total_bytes
        yield GaugeMetricFamily("linnet_planned_bytes", "Memory that the plan allots", planned)
        yield GaugeMetricFamily("linnet_resident_bytes", "Memory of the process", _resident_bytes())

    def describe(self) -> Iterator[Metric]:
        # Nothing: the names are fixed, and asking the engine at registration would be too early.
        return iter(())


def _resident_bytes() -> int:
    """Return the resident memory of this process; 0 where /proc does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
