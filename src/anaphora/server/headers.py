"""Caching headers: `Cache-Control` (RFC 9111 §5.2.1) and `X-Anaphora-KV` of requests, `Cache-Status` (RFC 9211) and `Age` of
answers. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec

from anaphora.answer import Answer, Recalled
from anaphora.errors import InvalidRequest
from anaphora.events import MissReason
from anaphora.ledger.limits import Standing
from anaphora.types import CacheControl, Keep, Request

RawHeaders = list[tuple[bytes, bytes]]

NO_DIRECTIVES = CacheControl()
MAX_KEEP_S = 86_400
MAX_TAG = 128
MAX_RISK = 0.5
_FOREVER_S = 1e10
"""Of a `max-stale` without seconds: however old."""
_WHOLE_PROMPT = 1 << 40
"""Tokens: more than any prompt has."""

_DIRECTIVE = re.compile(r"""\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,]*))?\s*(?:,|$)|[^,]*(?:,|$)""")

# RFC 9211 §2.2: "request" is for answers that the request's own directives ruled out, "bypass" for what the cache does not
# handle at all.
_FWD = {
    MissReason.NO_CACHE: b"request",
    MissReason.STALE_FOR_REQUEST: b"request",
    MissReason.SAMPLED: b"bypass",
    MissReason.PREWARM: b"bypass",
    MissReason.UNKNOWN_MODEL: b"bypass",
}

_PLAIN = (MissReason.ABSENT, MissReason.NOT_COMPARABLE, MissReason.NO_NEIGHBOUR)
"""Misses that there is nothing to say of."""

NOT_CACHED: RawHeaders = [(b"cache-status", b"anaphora; detail=only-if-cached")]


def cache_control(value: bytes | None) -> CacheControl:
    """The directives that Anaphora honours; unknown and malformed ones are ignored, as the RFC demands.

    Several `max-age` give the smallest; one that is no number of seconds counts as 0, the careful reading.
    """
    if not value:
        return NO_DIRECTIVES
    no_store = no_cache = only_if_cached = False
    max_age_s: float | None = None
    stale: dict[str, float] = {}
    for name, argument in _DIRECTIVE.findall(value.decode("latin-1")):
        match name.lower():
            case "no-store":
                no_store = True
            case "no-cache":
                no_cache = True
            case "only-if-cached":
                only_if_cached = True
            case "max-age":
                seconds = _seconds(argument)
                max_age_s = seconds if max_age_s is None else min(max_age_s, seconds)
            case "max-stale" | "stale-if-error" | "stale-while-revalidate" as kind:
                seconds = _FOREVER_S if kind == "max-stale" and not argument else _seconds(argument)
                stale[kind] = min(seconds, stale.get(kind, seconds))
    return CacheControl(
        no_store,
        no_cache,
        only_if_cached,
        max_age_s,
        stale.get("max-stale", 0.0),
        stale.get("stale-if-error"),
        stale.get("stale-while-revalidate"),
    )


def _seconds(argument: str) -> float:
    digits = argument.strip('"')
    return float(digits[:10]) if digits.isascii() and digits.isdigit() else 0.0


def with_wishes(request: Request, exact: bytes | None, keep: bytes | None) -> Request:
    """`request` with what `x-anaphora-kv` and `x-anaphora-kv-keep` ask of its KV. Raises InvalidRequest."""
    if exact is not None:
        if exact.strip().lower() != b"exact":
            raise InvalidRequest("The header x-anaphora-kv takes only the value exact.")
        request = msgspec.structs.replace(request, exact_kv=True)
    if keep is not None:
        if not keep.isdigit() or not 0 < int(keep[:10]) <= MAX_KEEP_S:
            raise InvalidRequest(f"The header x-anaphora-kv-keep takes whole seconds from 1 to {MAX_KEEP_S}.")
        request = msgspec.structs.replace(request, keep=(Keep(_WHOLE_PROMPT, float(int(keep))),))
    return request


def semantic_risk(value: bytes | None) -> float | None:
    """What `x-anaphora-semantic` says: `off`, or the share of answers to questions in other words that may be wrong. Raises
    InvalidRequest."""
    if value is None:
        return None
    text = value.decode("latin-1").strip().lower()
    if text == "off":
        return 0.0
    try:
        risk = float(text)
    except ValueError:
        risk = -1.0
    if not 0 < risk <= MAX_RISK:
        raise InvalidRequest(f"The header x-anaphora-semantic takes off, or a share of wrong answers above 0 up to {MAX_RISK}.")
    return risk


def tag(value: bytes | None) -> str:
    """The client's own label of a request, `x-anaphora-tag`. Raises InvalidRequest."""
    if value is None:
        return ""
    label = value.decode("latin-1").strip()
    if len(label) > MAX_TAG or not label.isprintable():
        raise InvalidRequest(f"The header x-anaphora-tag takes at most {MAX_TAG} printable characters.")
    return label


def of_answer(answer: Answer, kv_reused_tokens: int) -> RawHeaders:
    """Where the answer came from and what that saved."""
    if isinstance(answer, Recalled):
        ttl = b"" if answer.ttl_s is None else b"; ttl=%d" % answer.ttl_s  # below 0: stale (RFC 9211 §2.3)
        detail = b"" if answer.level == "exact" else b"; detail=%b" % answer.level.encode()
        return [
            (b"cache-status", b'anaphora; hit%b; key="%b"%b' % (ttl, answer.key.encode(), detail)),
            (b"age", b"%d" % max(0, answer.age_s)),
            (b"x-anaphora-saved-ms", b"%d" % (answer.saved_s * 1000)),
        ]
    if (old := answer.instead) is not None:
        status = b'anaphora; hit; ttl=%d; key="%b"; detail=stale-if-error' % (old.ttl_s or 0, answer.key.encode())
        return [(b"cache-status", status), (b"age", b"%d" % max(0, old.age_s))]
    reason = answer.reason
    fwd = b"bypass" if answer.source == "bypass" or reason is None else _FWD.get(reason, b"miss")
    collapsed = b"; collapsed" if answer.source == "collapsed" else b""
    key = b'; key="%b"' % answer.key.encode() if answer.key else b""
    detail = b"" if reason is None or reason in _PLAIN else b"; detail=%b" % reason.encode()
    return [
        (b"cache-status", b"anaphora; fwd=%b%b%b%b" % (fwd, collapsed, key, detail)),
        (b"x-anaphora-kv-reused-tokens", b"%d" % kv_reused_tokens),
    ]


def of_limits(standings: Iterable[Standing], dialect: str, now_s: float) -> RawHeaders:
    """How a tenant stands, in the words of the dialect's provider: the nearest limit of requests, and that of tokens."""
    found: RawHeaders = []
    nearest: dict[str, Standing] = {}
    for standing in standings:
        before = nearest.get(standing.kind)
        if standing.kind != "usd" and (before is None or standing.remaining < before.remaining):
            nearest[standing.kind] = standing
    for kind, standing in nearest.items():
        if dialect == "anthropic":
            prefix, suffix = f"anthropic-ratelimit-{kind}-", ""
            reset = datetime.fromtimestamp(now_s + standing.reset_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        else:
            prefix, suffix, reset = "x-ratelimit-", f"-{kind}", _duration(standing.reset_s)
        for name, value in (("limit", standing.limit), ("remaining", standing.remaining), ("reset", reset)):
            found.append((f"{prefix}{name}{suffix}".encode(), str(value).encode()))
    return found


def _duration(seconds: float) -> str:
    """As OpenAI writes it: "6m0s", "1.5s", "20ms"."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{text}s"
