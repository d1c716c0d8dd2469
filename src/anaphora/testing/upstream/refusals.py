"""What a provider sends beside its answers: limits in headers, and refusals in its own dialect. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from anaphora.server.endpoint import ANTHROPIC, dialect_of
from anaphora.testing.upstream.backend import ToldToFail
from anaphora.testing.upstream.script import Fault

RawHeaders = list[tuple[bytes, bytes]]

LIMITS = {"requests": 4_000, "input-tokens": 2_000_000, "output-tokens": 400_000, "tokens": 2_400_000}
"""A minute. They are named in headers; nobody is held to them."""
_REFILL_S = 1.0


def limits(path: str, head: Mapping[bytes, bytes], status: int, now_s: float, refill_s: float | None = None) -> RawHeaders:
    """The headers by which the provider tells its limits. After a 429 nothing is left of them."""
    left = 0.0 if status == 429 else 1.0
    refill_s = _REFILL_S if refill_s is None else refill_s
    if dialect_of(path, head) is ANTHROPIC:
        reset = datetime.fromtimestamp(math.ceil(now_s + refill_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return [
            (f"anthropic-ratelimit-{what}-{name}".encode(), value.encode())
            for what, limit in LIMITS.items()
            for name, value in (("limit", f"{limit}"), ("remaining", f"{left * limit:.0f}"), ("reset", reset))
        ]
    return [
        (f"x-ratelimit-{name}-{what}".encode(), value.encode())
        for what in ("requests", "tokens")
        for name, value in (
            ("limit", f"{LIMITS[what]}"),
            ("remaining", f"{left * LIMITS[what]:.0f}"),
            ("reset", f"{refill_s:g}s"),
        )
    ]


def refusal(fault: Fault, status: int, path: str, head: Mapping[bytes, bytes], request_id: str) -> tuple[RawHeaders, bytes]:
    """Headers and body of an answer with `status`, as the provider words it."""
    error = ToldToFail(fault, status)
    _, body, headers = dialect_of(path, head).render_error(error, request_id)
    if fault.should_retry is not None:
        headers["x-should-retry"] = "true" if fault.should_retry else "false"
    if fault.retry_after_s is not None and fault.retry_after_s % 1:
        headers["retry-after-ms"] = f"{fault.retry_after_s * 1000:.0f}"
    return [(name.encode(), value.encode()) for name, value in headers.items()], body
