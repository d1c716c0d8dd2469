"""Prometheus metrics under vLLM's names, so that existing dashboards, routers and load tools read them, plus our own.

Token counters count what was computed; latencies and successes count what clients got, hits included. Everything about
the answer cache is under `anaphora:`. One registry per page, none global: the numbers are in `Sums`, which several gateway
processes share.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from anaphora.events import (
    Answered,
    Billed,
    Compared,
    Computed,
    Damaged,
    Dropped,
    Embedded,
    Event,
    Evicted,
    Failed,
    Judged,
    Miss,
    Refused,
    Stored,
)
from anaphora.promises import Stats as PromiseStats
from anaphora.sums import Sums, Totals
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


class _Counter:
    """Sums by label values. (The package's own counters lock, and cost a hit more than its lookup.)"""

    def __init__(self, sums: Sums, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._sums = sums
        self._name = name
        self._text = text
        self._labels = labels
        self._rows: dict[tuple[str, ...], int] = {}

    def add(self, amount: float, *values: str) -> None:
        row = self._rows.get(values)
        if row is None:
            row = self._rows[values] = self._sums.row((self._name, *values))
        self._sums.cells[row] += amount

    def collect(self, totals: Totals) -> Metric:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, (total,) in totals.get(self._name, {}).items():
            family.add_metric(values, total)
        return family


class _Histogram:
    """Counts by bucket and label values: a cell for each bucket, and one for the sum."""

    def __init__(self, sums: Sums, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self._sums = sums
        self._name = name
        self._text = text
        self._labels = labels
        self._rows: dict[tuple[str, ...], int] = {}
        self._bounds = bounds

    def observe(self, observed: Iterable[float], *values: str) -> None:
        row = self._rows.get(values)
        if row is None:
            row = self._rows[values] = self._sums.row((self._name, *values), len(self._bounds) + 2)
        cells, bounds = self._sums.cells, self._bounds
        for value in observed:
            cells[row + bisect_left(bounds, value)] += 1
            cells[row + len(bounds) + 1] += value

    def collect(self, totals: Totals) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for values, (*counts, total) in totals.get(self._name, {}).items():
            family.add_metric(values, list(zip(names, accumulate(counts), strict=True)), total)
        return family


class Metrics:
    """Counts events in `sums`; `render` is what `/metrics` answers."""

    concerns = (
        *(Answered, Computed, Miss, Billed, Compared, Judged, Embedded),
        *(Stored, Refused, Evicted, Damaged, Dropped, Failed),
    )

    def __init__(self, sums: Sums | None = None) -> None:
        self._sums = sums = Sums() if sums is None else sums
        engine = ("model_name", "engine")
        self.prompt_tokens = _Counter(sums, "vllm:prompt_tokens", "Prompt tokens of computed answers.", engine)
        self.generation_tokens = _Counter(sums, "vllm:generation_tokens", "Generated tokens.", engine)
        self.prompt_tokens_cached = _Counter(sums, "vllm:prompt_tokens_cached", "Prompt tokens whose KV was reused.", engine)
        self.success = _Counter(sums, "vllm:request_success", "Answers given whole.", (*engine, "finished_reason"))
        self.first = _Histogram(sums, "vllm:time_to_first_token_seconds", "Request to first token.", engine, _FIRST_BUCKETS)
        self.gap = _Histogram(sums, "vllm:inter_token_latency_seconds", "Token to token.", engine, _GAP_BUCKETS)
        self.whole = _Histogram(sums, "vllm:e2e_request_latency_seconds", "Request to last token.", engine, _WHOLE_BUCKETS)

        origin = ("model", "source", "outcome")
        self.requests = _Counter(sums, "anaphora:requests", "Requests by where the answer came from.", origin)
        self.saved_s = _Counter(
            sums, "anaphora:saved_compute_seconds", "What answers not computed would have cost.", ("model",)
        )
        self.saved_prompt_tokens = _Counter(
            sums, "anaphora:saved_prompt_tokens", "Prompt tokens of answers not computed.", ("model",)
        )
        self.saved_generation_tokens = _Counter(sums, "anaphora:saved_generation_tokens", "Tokens not generated.", ("model",))
        self.misses = _Counter(sums, "anaphora:cache_misses", "Lookups that gave nothing.", ("level", "reason"))
        self.billed = _Counter(
            sums, "anaphora:prompt_cache_tokens", "Prompt tokens by the providers' rules.", ("model", "kind")
        )
        self.unread = _Counter(
            sums, "anaphora:prompt_cache_misses", "Prompts that read less than they could.", ("model", "reason")
        )
        self.compared = _Counter(sums, "anaphora:semantic_compared", "Questions compared with others.", ("outcome", "step"))
        self.judged = _Counter(
            sums, "anaphora:semantic_judged", "Answers in other words found right or wrong.", ("source", "wrong")
        )
        self.texts = _Counter(sums, "anaphora:embedding_texts", "Texts by where their vectors came from.", ("model", "source"))
        self.stored = _Counter(sums, "anaphora:cache_stored", "Answers learned.", ("level",))
        self.refused = _Counter(sums, "anaphora:cache_refused", "Answers not learned.", ("level", "reason"))
        self.evicted = _Counter(sums, "anaphora:cache_evicted", "Entries that made room.", ("tier",))
        self.lost = _Counter(sums, "anaphora:cache_lost", "Entries found damaged, or never written.", ("tier", "why"))
        self.failed = _Counter(sums, "anaphora:cache_failures", "Operations that a tier could not do.", ("tier", "operation"))

    def record(self, event: Event) -> None:
        match event:
            case Answered():
                self._answered(event)
            case Computed():
                self.prompt_tokens.add(event.usage.prompt_tokens, event.model, ENGINE)
                self.generation_tokens.add(event.usage.output_tokens, event.model, ENGINE)
                self.prompt_tokens_cached.add(event.usage.kv_reused_tokens, event.model, ENGINE)
            case Miss():
                self.misses.add(1, event.level, event.reason.value)
            case Billed():
                self.billed.add(event.read_tokens, event.model, "read")
                self.billed.add(event.written_tokens, event.model, "written")
                self.billed.add(event.plain_tokens, event.model, "plain")
                if event.miss:
                    self.unread.add(1, event.model, event.miss)
            case Compared():
                self.compared.add(1, event.outcome, event.step)
            case Judged():
                self.judged.add(1, event.source, "true" if event.wrong else "false")
            case Embedded():
                self.texts.add(event.num_hits, event.model, "hit")
                self.texts.add(event.num_computed, event.model, "computed")
                self.texts.add(event.num_shared, event.model, "shared")
            case Stored():
                self.stored.add(1, event.level)
            case Refused():
                self.refused.add(1, event.level, event.reason.value)
            case Evicted():
                self.evicted.add(event.num_entries, event.tier)
            case Damaged():
                self.lost.add(event.num_entries, event.tier, "damaged")
            case Dropped():
                self.lost.add(event.num_entries, event.tier, "dropped")
            case Failed():
                self.failed.add(1, event.tier, event.operation)

    def _answered(self, event: Answered) -> None:
        model = event.model
        self.requests.add(1, model, event.source, event.outcome)
        if event.source == "passed":
            return
        if event.first_s is not None:
            self.first.observe((event.first_s,), model, ENGINE)
        if event.gaps_s:
            self.gap.observe(event.gaps_s, model, ENGINE)
        if event.outcome != "finished":
            return
        self.whole.observe((event.elapsed_s,), model, ENGINE)
        self.success.add(1, model, ENGINE, _FINISHED[event.reasons[0]])
        if event.source in ("hit", "collapsed"):
            self.saved_s.add(event.saved_s, model)
            self.saved_prompt_tokens.add(event.usage.prompt_tokens, model)
            self.saved_generation_tokens.add(event.usage.output_tokens, model)

    def render(self, backend_stats: Mapping[str, Any], model: str, promises: PromiseStats | None = None) -> bytes:
        """The text format; `backend_stats` as `Backend.stats` gives them, `model` the label of what they are about."""
        registry = CollectorRegistry()
        totals = self._sums.totals()
        counted = [metric.collect(totals) for metric in vars(self).values() if isinstance(metric, _Counter | _Histogram)]
        registry.register(_Page([*counted, *_of_backend(model, backend_stats), *_of_promises(promises)]))
        return generate_latest(registry)


class _Page:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _of_promises(stats: PromiseStats | None) -> Iterator[Metric]:
    """The books of the process that answers."""
    if stats is None:
        return
    yield GaugeMetricFamily("anaphora:promises_entries", "Prefixes in the books of prompt caching.", stats.entries)
    yield GaugeMetricFamily("anaphora:promises_protected_tokens", "Tokens protected from eviction.", stats.protected_tokens)
    lost = CounterMetricFamily("anaphora:promises_lost", "Promises that could not be kept.", labels=("why",))
    for why in ("dropped", "evicted", "broken"):
        lost.add_metric((why,), getattr(stats, why))
    yield lost


def _of_backend(model: str, stats: Mapping[str, Any]) -> Iterator[Metric]:
    """The backend's own counters and gauges, under vLLM's names where it has one."""
    labels = ("model_name", "engine")
    values = (model, ENGINE)
    rest = {name: value for name, value in stats.items() if isinstance(value, int | float)}
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
