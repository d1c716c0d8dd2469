"""What replicas say of themselves in `/metrics`: vLLM, SGLang and Anaphora in the text format of Prometheus."""

from __future__ import annotations

import re

from anaphora.routing.base import Load

_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{[^\n]*\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*$", re.MULTILINE)


def load(metrics: str) -> Load | None:
    """Of all engines and models behind one address together; None where the text names no queue."""
    samples: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(metrics):
        if name in _RUNNING or name in _WAITING or name in _USAGE:
            try:
                number = float(value)
            except ValueError:
                continue
            if 0 <= number < float("inf"):
                samples.setdefault(name, []).append(number)
    running = _first(samples, _RUNNING)
    waiting = _first(samples, _WAITING)
    if running is None and waiting is None:
        return None
    usage = _first(samples, _USAGE)
    return Load(round(sum(running or ())), round(sum(waiting or ())), max(usage) if usage else None)


def _first(samples: dict[str, list[float]], names: tuple[str, ...]) -> list[float] | None:
    return next((samples[name] for name in names if name in samples), None)
