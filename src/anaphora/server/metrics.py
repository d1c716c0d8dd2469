"""Prometheus metrics under vLLM's names, so that existing dashboards, routers and load tools read them, plus our own.

Token counters count what was computed; latencies and successes count what clients got, hits included. Everything about
the answer cache is under `anaphora:`. One registry per server, none global.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from anaphora.events import Answered, Computed, Damaged, Dropped, Event, Evicted, Failed, Miss, Refused, Stored
from anaphora.types import FinishReason

CONTENT_TYPE = CONTENT_TYPE_LATEST
ENGINE = "0"

# vLLM's own buckets, with a finer low end: an answer from the cache takes less than a millisecond.
_FIRST_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE_BUCKETS = (0.0005, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)

_FINISHED: dict[FinishReason, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "stop",
    "max_tokens": "length",
    "refusal": "abort",
}

_GAUGES = {
    "num_requests_running": "Requests in the running batch.",
    "num_requests_waiting": "Requests waiting to be processed.",
    "kv_cache_usage_perc": "Share of KV blocks in use, 0 to 1.",
}
_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the KV prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the KV prefix cache.",
    "num_preemptions": "Requests that lost their KV blocks while running.",
}


class _BackendStats:
    """The backend's own counters and gauges, under vLLM's names where it has one."""

    def __init__(self, model: str, stats: Mapping[str, Any]) -> None:
        self.model = model
        self.stats = stats

    def collect(self) -> Iterable[Metric]:
        labels = ("model_name", "engine")
        values = (self.model, ENGINE)
        rest = {name: value for name, value in self.stats.items() if isinstance(value, int | float)}
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=labels)
            gauge.add_metric(values, float(rest.pop(name, 0)))
            yield gauge
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            counter.add_metric(values, float(rest.pop(name, 0)))
            yield counter
        for name, value in rest.items():
            gauge = GaugeMetricFamily(f"anaphora:backend_{name}", "A figure of the backend.", labels=labels)
            gauge.add_metric(values, float(value))
            yield gauge


class _OfModel:
    """The children of one model's labels, looked up once: a request should not pay for label hashing."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        labels = (model, ENGINE)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.prompt_tokens_cached = metrics.prompt_tokens_cached.labels(*labels)
        self.first = metrics.first.labels(*labels)
        self.gap = metrics.gap.labels(*labels)
        self.whole = metrics.whole.labels(*labels)
        self.success = {reason: metrics.success.labels(*labels, reason) for reason in ("stop", "length", "abort")}
        self.requests = {
            (source, outcome): metrics.requests.labels(model, source, outcome)
            for source in ("hit", "miss", "collapsed", "bypass")
            for outcome in ("finished", "failed", "left")
        }
        self.saved = metrics.saved.labels(model)
        self.saved_prompt_tokens = metrics.saved_prompt_tokens.labels(model)
        self.saved_generation_tokens = metrics.saved_generation_tokens.labels(model)


class Metrics:
    """Counts events; `render` is what `/metrics` answers."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else every counter has a second series that nobody reads
        self.registry = CollectorRegistry(auto_describe=True)
        engine = ("model_name", "engine")

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, engine, buckets=buckets, registry=self.registry)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of computed answers.", engine)
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens.", engine)
        self.prompt_tokens_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens whose KV was reused.", engine)
        self.success = counter("vllm:request_success", "Answers given whole.", (*engine, "finished_reason"))
        self.first = histogram("vllm:time_to_first_token_seconds", "Request to first token.", _FIRST_BUCKETS)
        self.gap = histogram("vllm:inter_token_latency_seconds", "Token to token.", _GAP_BUCKETS)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Request to last token.", _WHOLE_BUCKETS)

        self.requests = counter("anaphora:requests", "Requests by where the answer came from.", ("model", "source", "outcome"))
        self.saved = counter("anaphora:saved_compute_seconds", "What hits and shared computations would have cost.", ("model",))
        self.saved_prompt_tokens = counter("anaphora:saved_prompt_tokens", "Prompt tokens of answers not computed.", ("model",))
        self.saved_generation_tokens = counter("anaphora:saved_generation_tokens", "Tokens not generated.", ("model",))
        self.misses = counter("anaphora:cache_misses", "Lookups that gave nothing.", ("level", "reason"))
        self.stored = counter("anaphora:cache_stored", "Answers learned.", ("level",))
        self.refused = counter("anaphora:cache_refused", "Answers not learned.", ("level", "reason"))
        self.evicted = counter("anaphora:cache_evicted", "Entries that made room.", ("tier",))
        self.lost = counter("anaphora:cache_lost", "Entries found damaged, or never written.", ("tier", "why"))
        self.failed = counter("anaphora:cache_failures", "Operations that a tier could not do.", ("tier", "operation"))
        self.of_model = lru_cache(maxsize=64)(lambda model: _OfModel(self, model))

    def record(self, event: Event) -> None:
        match event:
            case Answered():
                self._answered(event)
            case Computed():
                model = self.of_model(event.model)
                model.prompt_tokens.inc(event.usage.prompt_tokens)
                model.generation_tokens.inc(event.usage.output_tokens)
                model.prompt_tokens_cached.inc(event.usage.kv_reused_tokens)
            case Miss():
                self.misses.labels(event.level, event.reason.value).inc()
            case Stored():
                self.stored.labels(event.level).inc()
            case Refused():
                self.refused.labels(event.level, event.reason.value).inc()
            case Evicted():
                self.evicted.labels(event.tier).inc(event.num_entries)
            case Damaged():
                self.lost.labels(event.tier, "damaged").inc(event.num_entries)
            case Dropped():
                self.lost.labels(event.tier, "dropped").inc(event.num_entries)
            case Failed():
                self.failed.labels(event.tier, event.operation).inc()

    def _answered(self, event: Answered) -> None:
        model = self.of_model(event.model)
        model.requests[event.source, event.outcome].inc()
        if event.first_s is not None:
            model.first.observe(event.first_s)
        for gap_s in event.gaps_s:
            model.gap.observe(gap_s)
        if event.outcome != "finished":
            return
        model.whole.observe(event.elapsed_s)
        model.success[_FINISHED[event.reasons[0]] if event.reasons else "stop"].inc()
        if event.saved_s:
            model.saved.inc(event.saved_s)
        if event.source in ("hit", "collapsed"):
            model.saved_prompt_tokens.inc(event.usage.prompt_tokens)
            model.saved_generation_tokens.inc(event.usage.output_tokens)

    def render(self, backend_stats: Mapping[str, Any], model: str) -> bytes:
        """The text format; `backend_stats` as `Backend.stats` gives them, `model` the label of what they are about."""
        backend = CollectorRegistry()
        backend.register(_BackendStats(model, backend_stats))
        return generate_latest(self.registry) + generate_latest(backend)
