"""What OpenTelemetry gets, in memory: names old and new, and nothing of what was said."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.ledger.entries import AT_US, made

from anaphora.ledger.entry import Entry

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from anaphora.ledger.telemetry import Telemetry, from_environment

COMPUTED = made(
    model="claude-opus-5-5",
    asked="claude-opus-5-5-latest",
    upstream="anthropic",
    tag="batch",
    input=100,
    cache_read=50,
    write_5m=20,
    write_1h=30,
    output=11,
    reasoning=4,
    audio_input=10,
    first_us=500_000,
    whole_us=2_500_000,
    paid=10**9,
    saved_prompts=2 * 10**9,
)
HIT = made(level="exact", saved_input=7, saved_output=3, saved_answers=5)

Points = dict[str, list[Any]]


class Seen:
    def __init__(self, *entries: Entry) -> None:
        exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(exporter))
        telemetry = Telemetry(tracers, MeterProvider([reader]))
        for entry in entries:
            telemetry.record(entry)
        data = reader.get_metrics_data()
        self.points: Points = {}
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    self.points[metric.name] = list(metric.data.data_points)
        self.spans: list[ReadableSpan] = list(exporter.get_finished_spans())
        telemetry.close()

    def counted(self, name: str, label: str = "gen_ai.token.modality") -> dict[Any, Any]:
        """A counter's values, or a histogram's sums, by a label."""
        return {point.attributes.get(label): getattr(point, "value", None) or point.sum for point in self.points[name]}


@pytest.fixture(autouse=True)
def no_exporters_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def test_a_computed_answer_is_a_span_with_its_usage_under_both_names() -> None:
    (span,) = Seen(COMPUTED).spans
    assert (span.name, span.kind) == ("chat claude-opus-5-5", SpanKind.CLIENT)
    assert (span.start_time, span.end_time) == ((AT_US - 2_500_000) * 1000, AT_US * 1000)
    assert span.attributes is not None
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.system": "anthropic",
        "gen_ai.request.model": "claude-opus-5-5-latest",
        "gen_ai.response.model": "claude-opus-5-5",
        "gen_ai.usage.input_tokens": 200,
        "gen_ai.usage.output_tokens": 11,
        "gen_ai.usage.cache_read.input_tokens": 50,
        "gen_ai.usage.cache_write.input_tokens": 50,
        "gen_ai.usage.cache_creation.input_tokens": 50,
        "gen_ai.usage.reasoning.output_tokens": 4,
        "anaphora.request.id": "req_1",
        "anaphora.tenant": "t",
        "anaphora.tag": "batch",
        "anaphora.upstream": "anthropic",
        "anaphora.cache.level": "computed",
        "anaphora.outcome": "finished",
        "anaphora.cost.paid_usd": "0.001",
        "anaphora.cost.saved_by_answer_cache_usd": "0",
        "anaphora.cost.saved_by_prompt_caching_usd": "0.002",
    }


def test_tokens_are_counted_by_their_kind() -> None:
    seen = Seen(COMPUTED, COMPUTED)
    usage = "gen_ai.client.inference.usage"
    assert seen.counted(f"{usage}.input_tokens") == {"text": 380, "audio": 20}
    assert seen.counted(f"{usage}.output_tokens") == {"text": 22}
    assert seen.counted(f"{usage}.cache_read.input_tokens") == {"unknown": 100}
    assert seen.counted(f"{usage}.cache_write.input_tokens") == {"unknown": 100}
    assert seen.counted(f"{usage}.reasoning.output_tokens") == {"unknown": 8}
    assert seen.counted("gen_ai.client.inference.operation.input_tokens") == {None: 400}
    assert seen.counted("gen_ai.client.token.usage", "gen_ai.token.type") == {"input": 400, "output": 22}


def test_times_are_seconds_in_the_conventions_buckets() -> None:
    seen = Seen(COMPUTED)
    for name in ("gen_ai.client.operation.duration", "gen_ai.server.request.duration"):
        (point,) = seen.points[name]
        assert point.sum == 2.5
        assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (0.01, 81.92)
    for name in ("gen_ai.client.operation.time_to_first_chunk", "gen_ai.server.time_to_first_token"):
        assert seen.points[name][0].sum == 0.5
    assert seen.points["gen_ai.server.time_per_output_token"][0].sum == 0.2
    assert seen.points["gen_ai.client.token.usage"][0].explicit_bounds[-1] == 67_108_864


def test_a_remembered_answer_has_a_span_and_no_usage() -> None:
    seen = Seen(HIT)
    (span,) = seen.spans
    assert span.attributes is not None
    assert span.attributes["anaphora.cache.level"] == "exact"
    assert not [name for name in span.attributes if name.startswith("gen_ai.usage")]
    assert "gen_ai.client.inference.usage.input_tokens" not in seen.points
    assert seen.counted("anaphora.cache.requests", "anaphora.cache.level") == {"exact": 1}
    assert seen.counted("anaphora.cache.saved_tokens", "none") == {None: 10}
    assert span.kind == SpanKind.SERVER


def test_what_failed_is_an_error_with_no_tokens_of_no_known_kind() -> None:
    seen = Seen(made(outcome="failed"))
    (span,) = seen.spans
    assert span.status.status_code == StatusCode.ERROR
    (point,) = seen.points["gen_ai.client.inference.usage.input_tokens"]
    assert (point.value, point.attributes["gen_ai.token.modality"], point.attributes["error.type"]) == (0, "unknown", "_OTHER")


def test_without_a_price_there_is_no_amount() -> None:
    (span,) = Seen(made(priced=0)).spans
    assert span.attributes is not None
    assert "anaphora.cost.paid_usd" not in span.attributes


class Collector(BaseHTTPRequestHandler):
    """Takes what exporters send."""

    def do_POST(self) -> None:
        assert isinstance(self.server, CollectorServer)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken[self.path] = gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class CollectorServer(ThreadingHTTPServer):
    taken: dict[str, bytes]


@pytest.fixture
def collector() -> Iterator[CollectorServer]:
    with CollectorServer(("127.0.0.1", 0), Collector) as server:
        server.taken = {}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_it_goes_where_the_standard_variables_say(monkeypatch: pytest.MonkeyPatch, collector: CollectorServer) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-gateway")
    telemetry = from_environment()
    telemetry.record(COMPUTED)
    telemetry.close()
    assert set(collector.taken) == {"/v1/traces", "/v1/metrics"}
    assert all(b"my-gateway" in body for body in collector.taken.values())
    assert b"gen_ai.usage.cache_write.input_tokens" in collector.taken["/v1/traces"]
    assert b"gen_ai.client.token.usage" in collector.taken["/v1/metrics"]


def test_nothing_of_it_is_imported_unless_it_is_wanted() -> None:
    code = "import sys, anaphora.server.run; print(any(name.startswith('opentelemetry.') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
