"""Why a request was answered as it was: which level answered, why the others did not, and where its prompt's cache broke.

The latest requests of every tenant are kept, in memory, with digests and short excerpts instead of what was said
(`outline`). A tenant sees its own requests only. Each gateway process knows those that it answered itself.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import WeakValueDictionary

import msgspec

from anaphora.accounting import Asked, Bill
from anaphora.answer import Live, Recalled
from anaphora.clock import Clock
from anaphora.diagnosis import Miss, Reason
from anaphora.events import AnswerNamed, Compared, Event, MissReason, Optimised, UpstreamAsked
from anaphora.events import Miss as LevelMiss
from anaphora.lint.findings import RULES
from anaphora.outline import Outline, Parting, Piece, outline, part
from anaphora.profiles import Profile, prices
from anaphora.promises import Charge
from anaphora.prompt import CacheUsage, Prompt
from anaphora.types import Scope, Tenant

log = logging.getLogger(__name__)

Outcome = Literal["running", "finished", "failed", "left"]

NUM_OUTLINES = 32
"""Prompts of one tenant that a later one can be compared with: as many as the books compare with."""
MAX_ID_CHARS = 256
"""Of an upstream's id for its answer; nobody is found by a longer one."""
MAX_TENANTS = 256
"""Beyond it the tenant that was heard of longest ago is left out."""

LEVEL_REASONS: Mapping[MissReason, str] = {
    MissReason.ABSENT: "nothing is kept for this question: it is new, or was evicted, expired or forgotten",
    MissReason.NO_CACHE: "the request's `Cache-Control: no-cache` asks for a fresh answer",
    MissReason.EXPIRED: "what is kept is past its lifetime",
    MissReason.STALE_FOR_REQUEST: "what is kept is older than the request's `max-age`",
    MissReason.OTHER_LIMIT: "what is kept was finished under another token limit",
    MissReason.SAMPLED: 'a sampled answer is wanted, and `cache.sampled` is "never"',
    MissReason.EMPTY_BUCKET: "a sampled answer is wanted, and the bucket drawn for it is not filled yet",
    MissReason.PREWARM: "`max_tokens` 0 asks for no answer",
    MissReason.UNKNOWN_MODEL: "the model's fingerprint is not known yet",
    MissReason.UNREADABLE: "what is kept is no answer of this version",
    MissReason.NOT_COMPARABLE: "it is not a plain question of some lines, or other words are not wanted to stand for it",
    MissReason.NO_NEIGHBOUR: "nothing like it was asked under the same circumstances",
    MissReason.GUARDED: "the nearest question differs in something that changes the answer",
    MissReason.UNVERIFIED: "the nearest question was not found to ask the same",
    MissReason.SHADOW: "there is an answer to the same question in other words; it is not known yet that such are right",
    MissReason.FAILED: "a step of comparing it with other questions failed",
    MissReason.AUDITED: "there is an answer to the same question in other words; it was computed anew to see if it is right",
}

PROMPT_REASONS: Mapping[Reason, str] = {
    "unmarked": "no breakpoint asks for caching",
    "too_short": "every boundary is below the model's minimum",
    "first": "there is no earlier prompt to read from",
    "changed": "the prompt parts from the nearest earlier one",
    "model": "the same prompt was seen, with another model",
    "cache_key": "the same prompt was seen, under another `prompt_cache_key`",
    "parameters": "the same prompt was seen, with other parameters",
    "no_boundary": "the same blocks were seen, but no entry was left behind any of them",
    "out_of_window": "an entry lives where this request does not look",
    "not_yet_visible": "the request that writes it had not begun to answer",
    "expired": "it was there, and its lifetime has passed",
    "recomputed": "it was promised, but the engine had lost it",
}

_CODES: Mapping[Reason, str] = {
    "model": "model-changed",
    "cache_key": "cache-key-changed",
    "not_yet_visible": "parallel-cold-start",
    "unmarked": "no-breakpoint",
    "too_short": "prefix-too-short",
    "out_of_window": "lookback-jump",
    "expired": "gap-over-ttl",
}
"""The rules of `anaphora lint` that say what to do; the later ones speak of Anthropic's marks only."""
_ANTHROPIC_CODES = frozenset({"no-breakpoint", "prefix-too-short", "lookback-jump", "gap-over-ttl"})

_PARAMETER_CODES: Mapping[str, str] = {
    "tool_choice": "tool-choice-changed",
    "parallel_tool_use": "parallel-calls-changed",
    "images": "image-presence",
    "thinking": "thinking-changed",
    "effort": "effort-changed",
    "format": "format-changed",
    "verbosity": "format-changed",
    "speed": "tier-changed",
    "service_tier": "tier-changed",
    "web_search": "server-tools-changed",
    "web_fetch": "server-tools-changed",
    "citations": "server-tools-changed",
}

_OTHER_FIXES: Mapping[Reason, str] = {
    "unmarked": "Mark the end of what stays the same (`prompt_cache_breakpoint`), or use the implicit mode.",
    "too_short": "Nothing, if the prompt is meant to be short. Else put more of what stays the same in front.",
    "expired": "Send requests with this prefix closer together, or ask for a longer lifetime where the model has one.",
    "first": "Nothing: the first request of a prefix writes it, the next one reads it.",
    "changed": "Nothing, if this is another conversation. Else keep what is the same at the start, and only append to it.",
    "parameters": "Keep the parameters that are named the same through a conversation.",
    "no_boundary": "Put a breakpoint at the end of what requests share, in each of them.",
    "out_of_window": "Put an explicit breakpoint on the boundary that was written.",
    "recomputed": "Give the engine more memory for KV blocks (`engine.kv_memory`), or mark less.",
}


class LevelAnswer(msgspec.Struct, frozen=True):
    """A level that did not answer."""

    level: str
    reason: MissReason
    meaning: str


class Shortfall(msgspec.Struct, frozen=True):
    """Why nothing, or less than possible, was read from the prompt cache."""

    reason: Reason
    meaning: str
    code: str
    """The rule of `anaphora lint`; empty where none fits."""
    fix: str
    common_tokens: int
    """Blocks that are shared with the nearest earlier prompt, from the start on."""
    differs_at: int | None
    """How many tokens are before the first one that differs, in the block at `path`; estimated by characters within it."""
    lost_tokens: int
    lost_usd: float | None
    """What they cost more than reading them. None: nobody knows the model's price."""
    path: str
    offset: int | None
    """Characters of that block's text before the difference, or before the line it is in."""
    before: str
    after: str
    names: tuple[str, ...]
    """Of the parameters that differ."""
    earlier_id: str
    """The answer to the nearest earlier prompt; empty if there is none, or it was not answered."""
    earlier_ago_s: float | None


class PromptCaching(msgspec.Struct, frozen=True):
    """By the rules of the provider that the model is accounted for like."""

    profile: str
    prompt_tokens: int
    read_tokens: int
    written_tokens: int
    plain_tokens: int
    miss: Shortfall | None
    """None: as much was read as there was to read."""


class Upstream(msgspec.Struct, frozen=True):
    """One that was asked for the answer."""

    name: str
    error: str
    """Why it gave none; empty where it did."""
    expected_s: float | None
    cached_tokens: int
    scores: dict[str, float]
    """The router's, of all that could have been asked; the smallest won."""


class Comparison(msgspec.Struct, frozen=True):
    """With the nearest question that was asked before in other words."""

    outcome: str
    step: str
    """That decided."""
    why: str
    nearest: str
    """How it began; empty where there was none."""
    similarity: float | None
    score: float | None


class Advice(msgspec.Struct, frozen=True):
    """What the prompt optimiser decided."""

    mode: str
    model: str
    marks: tuple[str, ...]
    reasons: tuple[dict[str, Any], ...]


class Explanation(msgspec.Struct, frozen=True):
    request_id: str
    answer_id: str
    dialect: str
    model: str
    arrived_s: float
    """Unix time."""
    outcome: Outcome
    error: str
    answered_by: str
    """A level of the answer cache, or `backend`; empty where nobody did."""
    shared: bool
    """Another request's computation was joined."""
    age_s: float | None
    """Of an answer from the cache."""
    levels: tuple[LevelAnswer, ...]
    prompt_cache: PromptCaching | None
    """None: answered from memory, or not accounted for."""
    kv_reused_tokens: int | None
    """Prompt tokens whose KV the engine really took from its cache; None where nothing was computed."""
    upstreams: tuple[Upstream, ...] = ()
    """That were asked, in turn."""
    optimiser: Advice | None = None
    """None: it had nothing to do with this request."""
    semantic: Comparison | None = None
    """None: not compared with questions in other words."""
    upstream_answer_id: str = ""
    """By which the upstream knows its answer, and so do clients of its dialect; empty where none answered."""


class Trail:
    """One request while it is under way, and what is kept of it. Filled in by whoever answers it."""

    __slots__ = (
        "_age_s",
        "_answered_by",
        "_bill",
        "_charge",
        "_differs_at",
        "_levels",
        "_outcome",
        "_parting",
        "_reused",
        "_shared",
        "_upstreams",
        "advice",
        "answer_id",
        "arrived_s",
        "comparison",
        "dialect",
        "error",
        "model",
        "request_id",
        "upstream_answer_id",
    )

    def __init__(self, request_id: str, answer_id: str, dialect: str, arrived_s: float) -> None:
        self.request_id = request_id
        self.answer_id = answer_id
        self.dialect = dialect
        self.arrived_s = arrived_s
        self.model = ""
        self.error = ""
        self._outcome: Outcome = "running"
        self._answered_by = ""
        self._shared = False
        self._age_s: float | None = None
        self._levels: tuple[LevelMiss, ...] = ()
        self._bill: Bill | None = None
        self._charge: _Charged | None = None
        self._parting: Parting | None = None
        self._differs_at: int | None = None
        self._reused: int | None = None
        self._upstreams: list[Upstream] = []
        self.advice: Advice | None = None
        self.comparison: Comparison | None = None
        self.upstream_answer_id = ""

    def asked(self, event: UpstreamAsked) -> None:
        """An upstream was asked; said once more where it gave no answer."""
        if event.error and self._upstreams:
            self._upstreams.pop()
        found = Upstream(event.upstream, event.error, event.expected_s, event.cached_tokens, event.scores)
        self._upstreams.append(found)

    def recalled(self, answer: Recalled) -> None:
        self._answered_by, self._age_s, self._levels = answer.level, answer.age_s, answer.misses
        self._outcome = "finished"

    def live(self, answer: Live, parting: Parting | None) -> None:
        self._answered_by, self._shared, self._levels = "backend", answer.source == "collapsed", answer.misses
        self._bill, self._parting = answer.bill, parting
        if parting is not None and answer.bill is not None:
            self._differs_at = _token(parting, answer.bill.charge.lengths.ends)

    def reused(self, tokens: int) -> None:
        """The answer has begun: so many prompt tokens were in the engine's cache."""
        self._reused = tokens

    def failed(self, error: str) -> None:
        self._close("failed")
        self.error = error

    def over(self, outcome: Outcome) -> None:
        """The first word on it counts."""
        if self._outcome == "running":
            self._close(outcome)

    def _close(self, outcome: Outcome) -> None:
        self._outcome = outcome
        if self._bill is not None:  # whose charge holds more than an explanation needs
            self._charge, self._bill = _charged(self._bill.charge), None

    def told(self) -> Explanation:
        charged = self._charge if self._bill is None else _charged(self._bill.charge)
        return Explanation(
            request_id=self.request_id,
            answer_id=self.answer_id,
            dialect=self.dialect,
            model=self.model,
            arrived_s=self.arrived_s,
            outcome=self._outcome,
            error=self.error,
            answered_by=self._answered_by,
            shared=self._shared,
            age_s=self._age_s,
            levels=tuple(LevelAnswer(miss.level, miss.reason, LEVEL_REASONS[miss.reason]) for miss in self._levels),
            prompt_cache=None
            if charged is None
            else _caching(charged, self._parting, self._differs_at, self.model, self.arrived_s),
            kv_reused_tokens=self._reused,
            upstreams=tuple(self._upstreams),
            optimiser=self.advice,
            semantic=self.comparison,
            upstream_answer_id=self.upstream_answer_id,
        )


class _Charged(msgspec.Struct, frozen=True):
    profile: Profile
    usage: CacheUsage
    miss: Miss | None


def _charged(charge: Charge) -> _Charged:
    return _Charged(charge.profile, charge.usage, charge.miss)


class _Kept:
    """Of one tenant."""

    def __init__(self) -> None:
        self.trails: OrderedDict[str, Trail] = OrderedDict()
        self.named: dict[str, Trail] = {}
        """By the ids of upstreams: the latest of those who were given an answer."""
        self.outlines: OrderedDict[str, tuple[str, Outline]] = OrderedDict()
        """By answer: the model, and the prompt's outline."""
        self.pieces: WeakValueDictionary[bytes, Piece] = WeakValueDictionary()
        """As long as an outline holds them."""

    def name(self, trail: Trail, answer_id: str) -> None:
        self._unname(trail)
        if len(answer_id) <= MAX_ID_CHARS:
            trail.upstream_answer_id = answer_id
            self.named[answer_id] = trail

    def find(self, name: str) -> Trail | None:
        return self.trails.get(_bare(name)) or self.named.get(name)

    def drop(self, name: str) -> None:
        self._unname(self.trails.pop(name))

    def _unname(self, trail: Trail) -> None:
        if self.named.get(trail.upstream_answer_id) is trail:
            del self.named[trail.upstream_answer_id]


class Explanations:
    """Of the latest `size` requests of each tenant. Made for one event loop."""

    concerns = (Optimised, UpstreamAsked, AnswerNamed, Compared)

    def __init__(self, clock: Clock, *, size: int = 128) -> None:
        """`size` 0: nothing is kept."""
        self._clock = clock
        self.size = size
        self._tenants: OrderedDict[Tenant, _Kept] = OrderedDict()

    def open(self, tenant: Tenant, request_id: str, answer_id: str, dialect: str) -> Trail:
        """A request arrived."""
        trail = Trail(request_id, answer_id, dialect, self._clock.now_s())
        if not self.size:
            return trail
        kept = self._tenants.get(tenant)
        if kept is None:
            kept = self._tenants[tenant] = _Kept()
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        else:
            self._tenants.move_to_end(tenant)
        kept.trails[_bare(request_id)] = trail
        if len(kept.trails) > self.size:
            kept.drop(next(iter(kept.trails)))
        return trail

    def record(self, event: Event) -> None:
        """Takes every event; most do not concern it."""
        if not isinstance(event, Optimised | UpstreamAsked | AnswerNamed | Compared):
            return
        kept = self._tenants.get(event.tenant)
        trail = None if kept is None else kept.trails.get(_bare(event.request_id))
        if kept is None or trail is None:
            return
        if isinstance(event, AnswerNamed):
            kept.name(trail, event.answer_id)
        elif isinstance(event, Optimised):
            trail.advice = Advice(event.mode, event.model, event.marks, event.reasons)
        elif isinstance(event, Compared):
            trail.comparison = Comparison(event.outcome, event.step, event.why, event.nearest, event.similarity, event.score)
        else:
            trail.asked(event)

    def note(self, tenant: Tenant, trail: Trail, answer: Live, asked: Asked) -> None:
        """The request is being computed. Outlines its prompt, where it is accounted for, and compares it where it missed."""
        kept, bill = self._tenants.get(tenant), answer.bill
        parting = None
        # Not of a request that was forgotten meanwhile.
        if kept is not None and bill is not None and kept.trails.get(_bare(trail.request_id)) is trail:
            try:
                parting = _compared(kept, trail, bill.charge, asked.prompt())
            except Exception:  # of any kind: no request fails for want of an explanation
                log.exception("a request cannot be explained (%s)", trail.request_id)
        trail.live(answer, parting)

    def find(self, tenant: Tenant, name: str) -> Explanation | None:
        """By the id of the request or of its answer, ours or the upstream's. None: not this tenant's, not among the latest, or
        not of this process."""
        kept = self._tenants.get(tenant)
        trail = kept.find(name) if kept is not None else None
        return None if trail is None else trail.told()

    def request_id(self, tenant: Tenant, name: str) -> str:
        """Of the request that `name` means, as in `find`; of one that is not kept, as far as the name itself tells."""
        kept = self._tenants.get(tenant)
        trail = kept.find(name) if kept is not None else None
        if trail is not None:
            return trail.request_id
        found = _ID.search(name)
        return f"req_{found[0]}" if found else name

    def latest(self, tenant: Tenant, limit: int = 20) -> list[Explanation]:
        """The newest first."""
        kept = self._tenants.get(tenant)
        trails = list(kept.trails.values())[-limit:] if kept is not None and limit > 0 else []
        return [trail.told() for trail in reversed(trails)]

    def forget(self, scope: Scope) -> int:
        """Drops what is kept within `scope`, and says how many requests that were. Requests have no tags."""
        if scope.tag is not None:
            return 0
        gone = 0
        for tenant in [scope.tenant] if scope.tenant is not None else list(self._tenants):
            kept = self._tenants.get(tenant)
            if kept is None:
                continue
            doomed = [name for name, trail in kept.trails.items() if scope.model in (None, trail.model)]
            for name in doomed:
                kept.drop(name)
            for answer in [name for name, (model, _) in kept.outlines.items() if scope.model in (None, model)]:
                del kept.outlines[answer]
            gone += len(doomed)
        return gone


def _compared(kept: _Kept, trail: Trail, charge: Charge, prompt: Prompt) -> Parting | None:
    """Where the prompt parts from the nearest earlier one, if that is why it missed. Keeps its outline for later ones."""
    if charge.lengths.total < charge.profile.minimum:  # no prefix of anything that is cached
        return None
    now = outline(prompt, charge.sketch.chain, kept.pieces)
    parting = None
    if charge.miss is not None and charge.miss.reason == "changed" and charge.miss.earlier_id in kept.outlines:
        parting = part(kept.outlines[charge.miss.earlier_id][1], now, prompt)
    kept.outlines[trail.answer_id] = trail.model, now
    if len(kept.outlines) > NUM_OUTLINES:
        kept.outlines.popitem(last=False)
    return parting


_ID = re.compile(r"[0-9a-f]{24}")


def _bare(name: str) -> str:
    """What the ids of a request and of its answer have in common: `req_X`, `msg_X`, `chatcmpl-X`, `resp_X` are all X."""
    found = _ID.search(name)
    return found[0] if found else name


# -- in words ------------------------------------------------------------------------------------------------------------


def _token(parting: Parting, ends: Sequence[int]) -> int:
    start = ends[parting.block - 1] if parting.block else 0
    return start + int(parting.share * (ends[parting.block] - start)) if parting.block < len(ends) else start


def _caching(charged: _Charged, parting: Parting | None, differs_at: int | None, model: str, arrived_s: float) -> PromptCaching:
    usage, miss = charged.usage, charged.miss
    return PromptCaching(
        profile=charged.profile.name,
        prompt_tokens=prices.total(usage),
        read_tokens=usage.read,
        written_tokens=sum(usage.written.values()),
        plain_tokens=usage.plain,
        miss=None if miss is None else _shortfall(miss, parting, differs_at, charged.profile, model, arrived_s),
    )


def _shortfall(
    miss: Miss, parting: Parting | None, differs_at: int | None, profile: Profile, model: str, arrived_s: float
) -> Shortfall:
    if miss.reason != "changed":  # what was true at first may have become another reason when the engine spoke
        parting = differs_at = None
    code = parting.code if parting is not None else _code(miss, profile)
    return Shortfall(
        reason=miss.reason,
        meaning=RULES[code].title if miss.reason == "changed" and code else PROMPT_REASONS[miss.reason],
        code=code,
        fix=RULES[code].fix if code else _OTHER_FIXES[miss.reason],
        common_tokens=miss.common_tokens,
        differs_at=differs_at,
        lost_tokens=miss.lost_tokens,
        lost_usd=lost_usd(miss.lost_tokens, profile, model),
        path=parting.path if parting is not None else miss.path,
        offset=parting.offset if parting is not None else None,
        before=parting.before if parting is not None else "",
        after=parting.after if parting is not None else "",
        names=miss.names,
        earlier_id=miss.earlier_id,
        earlier_ago_s=None if miss.earlier_s is None else max(0.0, arrived_s - miss.earlier_s),
    )


def _code(miss: Miss, profile: Profile) -> str:
    if miss.reason == "parameters":
        return next((_PARAMETER_CODES[name] for name in miss.names if name in _PARAMETER_CODES), "")
    code = _CODES.get(miss.reason, "")
    return "" if code in _ANTHROPIC_CODES and profile.dialect != "anthropic" else code


def lost_usd(tokens: int, profile: Profile, model: str) -> float | None:
    """What `tokens` cost more than reading them: written again where the profile charges for writing."""
    paid = CacheUsage(plain=tokens)
    if profile.ttls and profile.accounting != "openai-classic":
        paid = CacheUsage(plain=0, written={profile.ttls[0]: tokens})
    costs = [prices.cost(profile, usage, 0, model=model) for usage in (paid, CacheUsage(plain=0, read=tokens))]
    if costs[0] is None or costs[1] is None:
        return None
    return float(costs[0].input - costs[1].input)
