"""Entries of the ledger as OpenTelemetry spans and metrics of generative AI, under their new names and the older ones that are
still in wide use. What has no convention yet is under `anaphora.`.

Where to send it is said by the standard OTEL_* variables. Nothing of what was asked or answered is in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Histogram, Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from anaphora import __version__
from anaphora.ledger.entry import Entry, usd_text
from anaphora.profiles import match

Attributes = dict[str, str | int | float]

_NAME = "anaphora"
_TOKEN_BOUNDS = [4**power for power in range(14)]
_SECOND_BOUNDS = [0.01 * 2**power for power in range(14)]
_COMPUTED = ("computed", "bypass", "passed")


def from_environment() -> Telemetry:
    """With exporters as the OTEL_* variables say."""
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or _NAME, "service.version": __version__})
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Telemetry(tracers, MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], resource))


class Telemetry:
    """Owns both providers."""

    def __init__(self, tracers: TracerProvider, meters: MeterProvider) -> None:
        self._tracers = tracers
        self._meters = meters
        self._tracer = tracers.get_tracer(_NAME, __version__)
        self._instruments = _Instruments(meters.get_meter(_NAME, __version__))

    def record(self, entry: Entry) -> None:
        self._span(entry)
        self._instruments.record(entry)

    def close(self) -> None:
        """Send what is left."""
        self._tracers.shutdown()
        self._meters.shutdown()

    def _span(self, entry: Entry) -> None:
        attributes: Attributes = {
            **_attributes(entry),
            "gen_ai.system": _provider(entry),
            "anaphora.request.id": entry.request_id,
            "anaphora.tenant": entry.tenant,
            "anaphora.tag": entry.tag,
            "anaphora.upstream": entry.upstream,
            "anaphora.cache.level": entry.level,
            "anaphora.outcome": entry.outcome,
            "anaphora.cost.saved_by_answer_cache_usd": usd_text(entry.saved_answers),
        }
        if entry.priced:
            attributes["anaphora.cost.paid_usd"] = usd_text(entry.paid)
            attributes["anaphora.cost.saved_by_prompt_caching_usd"] = usd_text(entry.saved_prompts)
        if entry.level in _COMPUTED:  # whatever was only fetched has no usage
            written = entry.prompt - entry.input - entry.cache_read
            attributes |= {
                "gen_ai.usage.input_tokens": entry.prompt,
                "gen_ai.usage.output_tokens": entry.output,
                "gen_ai.usage.cache_read.input_tokens": entry.cache_read,
                "gen_ai.usage.cache_write.input_tokens": written,
                "gen_ai.usage.cache_creation.input_tokens": written,
                "gen_ai.usage.reasoning.output_tokens": entry.reasoning,
            }
        kind = SpanKind.CLIENT if entry.upstream else SpanKind.SERVER
        start_ns = (entry.at_us - entry.whole_us) * 1000
        span = self._tracer.start_span(f"chat {entry.model}", kind=kind, attributes=attributes, start_time=start_ns)
        if entry.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=entry.at_us * 1000)


class _Instruments:
    def __init__(self, meter: Meter) -> None:
        usage, operation = "gen_ai.client.inference.usage", "gen_ai.client.inference.operation"
        self._input = meter.create_counter(f"{usage}.input_tokens", "{token}")
        self._output = meter.create_counter(f"{usage}.output_tokens", "{token}")
        self._read = meter.create_counter(f"{usage}.cache_read.input_tokens", "{token}")
        self._written = meter.create_counter(f"{usage}.cache_write.input_tokens", "{token}")
        self._reasoning = meter.create_counter(f"{usage}.reasoning.output_tokens", "{token}")
        self._inputs = _tokens(meter, f"{operation}.input_tokens")
        self._outputs = _tokens(meter, f"{operation}.output_tokens")
        self._old = _tokens(meter, "gen_ai.client.token.usage")
        self._whole = [_seconds(meter, name) for name in ("gen_ai.client.operation.duration", "gen_ai.server.request.duration")]
        firsts = ("gen_ai.client.operation.time_to_first_chunk", "gen_ai.server.time_to_first_token")
        self._first = [_seconds(meter, name) for name in firsts]
        self._per_token = _seconds(meter, "gen_ai.server.time_per_output_token")
        self._requests = meter.create_counter("anaphora.cache.requests", "{request}")
        self._saved = meter.create_counter("anaphora.cache.saved_tokens", "{token}")

    def record(self, entry: Entry) -> None:
        attributes = _attributes(entry)
        self._requests.add(1, {**attributes, "anaphora.cache.level": entry.level})
        self._saved.add(entry.saved_input + entry.saved_output, attributes)
        for histogram in self._whole:
            histogram.record(entry.whole_us / 1e6, attributes)
        if entry.first_us is not None:
            for histogram in self._first:
                histogram.record(entry.first_us / 1e6, attributes)
            if entry.output > 1:
                self._per_token.record((entry.whole_us - entry.first_us) / (entry.output - 1) / 1e6, attributes)
        if entry.level in _COMPUTED:
            self._record_usage(entry, attributes)

    def _record_usage(self, entry: Entry, attributes: Attributes) -> None:
        for modality, tokens in _by_modality(entry, entry.prompt, entry.audio_input, entry.image_input):
            self._input.add(tokens, {**attributes, "gen_ai.token.modality": modality})
        for modality, tokens in _by_modality(entry, entry.output, entry.audio_output, 0):
            self._output.add(tokens, {**attributes, "gen_ai.token.modality": modality})
        plain = not entry.audio_input and not entry.image_input and entry.outcome == "finished"
        mixed = {**attributes, "gen_ai.token.modality": "text" if plain else "unknown"}
        self._read.add(entry.cache_read, mixed)
        self._written.add(entry.prompt - entry.input - entry.cache_read, mixed)
        self._reasoning.add(entry.reasoning, mixed)
        self._inputs.record(entry.prompt, attributes)
        self._outputs.record(entry.output, attributes)
        self._old.record(entry.prompt, {**attributes, "gen_ai.token.type": "input"})
        self._old.record(entry.output, {**attributes, "gen_ai.token.type": "output"})


def _by_modality(entry: Entry, tokens: int, audio: int, image: int) -> Iterator[tuple[str, int]]:
    if entry.outcome == "failed" and not tokens:
        yield "unknown", 0
        return
    yield "text", tokens - audio - image
    if audio:
        yield "audio", audio
    if image:
        yield "image", image


def _attributes(entry: Entry) -> Attributes:
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": _provider(entry),
        "gen_ai.request.model": entry.asked,
        "gen_ai.response.model": entry.model,
    }
    if entry.outcome == "failed":
        attributes["error.type"] = "_OTHER"
    return attributes


def _provider(entry: Entry) -> str:
    profile = match(entry.model)
    return profile.provider if profile is not None else entry.upstream or _NAME


def _tokens(meter: Meter, name: str) -> Histogram:
    return meter.create_histogram(name, "{token}", explicit_bucket_boundaries_advisory=_TOKEN_BOUNDS)


def _seconds(meter: Meter, name: str) -> Histogram:
    return meter.create_histogram(name, "s", explicit_bucket_boundaries_advisory=_SECOND_BOUNDS)
