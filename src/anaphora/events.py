"""What happened, as values: returned to the caller, and handed to an `Emit` for metrics and the ledger.

Events are plain data. They are emitted on the event loop's thread, never from a worker thread, so that a consumer needs no
lock. A consumer must be quick and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from anaphora.types import FinishReason, Key, Scope, Tenant, Usage

V_co = TypeVar("V_co", covariant=True)


class MissReason(StrEnum):
    """Why a level did not answer. The values are label values of metrics: never rename one."""

    ABSENT = "absent"
    """Nothing under the key: never asked, evicted, expired, forgotten, or lost."""
    NO_CACHE = "no_cache"
    """The request's `Cache-Control: no-cache`."""
    STALE_FOR_REQUEST = "stale_for_request"
    """An entry exists, older than the request's `max-age`."""
    EXPIRED = "expired"
    """An entry exists, past its lifetime. It may still be given where nobody can compute a new one."""
    OTHER_LIMIT = "other_limit"
    """An entry exists, but it was finished under another token limit and cannot stand for an answer under this one."""
    SAMPLED = "sampled"
    """A sampled answer is wanted and the setting is `never`."""
    EMPTY_BUCKET = "empty_bucket"
    """A sampled answer is wanted, and the bucket drawn for it is not filled yet."""
    PREWARM = "prewarm"
    """`max_tokens` 0: asked for its side effect."""
    UNKNOWN_MODEL = "unknown_model"
    """The model's fingerprint is not known (yet), so there is no key."""
    UNREADABLE = "unreadable"
    """The stored bytes are intact but not an answer of this version; the next answer replaces them."""
    NOT_COMPARABLE = "not_comparable"
    """Words cannot be compared: no plain question at the end, or a long one, or the setting or the client does not want it."""
    NO_NEIGHBOUR = "no_neighbour"
    """Nothing like it was asked under the same circumstances."""
    GUARDED = "guarded"
    """The nearest question differs in something that changes the answer: a number, a name, a negation, ..."""
    UNVERIFIED = "unverified"
    """The nearest question was not found to ask the same."""
    SHADOW = "shadow"
    """There is an answer to the same question in other words, but not yet the evidence that such answers are right."""
    FAILED = "failed"
    """A step of the comparison failed. It is a miss, whatever the others said."""
    AUDITED = "audited"
    """There is one that might be given. It is computed anew, to see whether that would have been right."""


class RefusedReason(StrEnum):
    """Why a finished answer was not learned. The values are label values of metrics: never rename one."""

    NOT_CLEAN = "not_clean"
    """Cut by the backend, aborted by the client, or ended by an error: no `End` was seen."""
    INCOMPLETE = "incomplete"
    """It does not hold the number of choices that was asked for."""
    REFUSAL = "refusal"
    """At least one choice ended by refusal or content filter."""
    UNFAITHFUL = "unfaithful"
    """An upstream's answer held more than can be remembered of it: citations, a block of an unknown kind."""
    EMPTY = "empty"
    """At least one choice holds neither text nor a tool call."""
    NO_STORE = "no_store"
    """The request's `Cache-Control: no-store`."""
    TOO_LARGE = "too_large"
    """Larger than the level's cap, or than every tier."""
    SAMPLED = "sampled"
    """A sampled answer and the setting is `never`."""
    PREWARM = "prewarm"
    """`max_tokens` 0: there is no answer."""
    UNKNOWN_MODEL = "unknown_model"
    """The model's fingerprint is not known (yet), so there is no key."""
    NOT_COMPARABLE = "not_comparable"
    """Not an answer in words to a question in words: nothing to give to the same question in other words."""
    NO_LEVEL = "no_level"
    """The answer cache is turned off."""
    FORGOTTEN = "forgotten"
    """Something was forgotten since the question was asked: the answer may be just that."""


class Hit(msgspec.Struct, Generic[V_co], frozen=True):
    """A level answered. `ttl_s` is what is left to live (None: no limit); `cost_s` is what computing it had taken."""

    level: str
    key: Key
    value: V_co
    age_s: float
    ttl_s: float | None
    cost_s: float


class Miss(msgspec.Struct, frozen=True):
    level: str
    reason: MissReason


class Stored(msgspec.Struct, frozen=True):
    """An answer was learned: `size` bytes under `key`."""

    level: str
    key: Key
    size: int


class Refused(msgspec.Struct, frozen=True):
    level: str
    reason: RefusedReason


class Evicted(msgspec.Struct, frozen=True):
    """Room was needed in a tier."""

    tier: str
    num_entries: int
    size: int


class Damaged(msgspec.Struct, frozen=True):
    """Stored bytes did not match their checksum, or were gone from under the index. They are dropped: a miss."""

    tier: str
    num_entries: int


class Failed(msgspec.Struct, frozen=True):
    """A tier could not do `operation`; the request went on without it (invariant 8)."""

    tier: str
    operation: str
    error: str


class Dropped(msgspec.Struct, frozen=True):
    """Entries that were never written to a slower tier: too many were waiting, or a forget came in between."""

    tier: str
    num_entries: int


class Forgotten(msgspec.Struct, frozen=True):
    """The receipt of a forget (invariant 7). Keys of the dicts are tier names.

    `removed` counts the entries that went, `remaining` what a sweep of the tier for the same scope found afterwards (only
    entries learned since), `failed` names the tiers that could not be asked: there, nothing is promised.
    """

    scope: Scope
    removed: dict[str, int]
    remaining: dict[str, int]
    failed: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.failed and not any(self.remaining.values())


class Computed(msgspec.Struct, frozen=True):
    """A backend finished an answer cleanly. One for each computation, however many clients it had."""

    tenant: Tenant
    model: str
    usage: Usage
    compute_s: float
    request_id: str = ""
    """Of the request that began it."""


class Answered(msgspec.Struct, frozen=True):
    """A client's request is over. One for each request that got as far as an answer."""

    tenant: Tenant
    model: str
    source: Literal["hit", "miss", "collapsed", "bypass", "passed"]
    """"passed": not understood here, only passed on to an upstream and back."""
    outcome: Literal["finished", "failed", "left"]
    usage: Usage
    """Zeros unless finished."""
    reasons: tuple[FinishReason, ...]
    """One for each choice."""
    elapsed_s: float
    """From the request to the last delta the client was given."""
    first_s: float | None
    """From the request to the first delta with content. None: there was none."""
    gaps_s: tuple[float, ...] = ()
    """Between one delta with content and the next."""
    saved_s: float = 0.0
    """What the answer would have cost to compute, where it was not computed for this request."""
    level: str = ""
    """Which level of memory answered; empty where none did."""
    asked: str = ""
    """The model, as the client named it."""
    answered: str = ""
    """The model, as whoever answered named it; empty where nobody began to."""
    upstream: str = ""
    """The upstream that answered, or whose answer was remembered. Empty: the engine of this server."""
    billed: Usage | None = None
    """Tokens by the rules of the model's provider, where those are kept here. Zeros unless finished."""
    begun: Usage | None = None
    """Of what failed or was left: the tokens of what had been computed by then, its output estimated. None: nothing had.
    Zeros of what was passed on: nobody knows how many."""
    request_id: str = ""
    workspace: str = ""
    tag: str = ""
    """The client's own label."""
    refresh: bool = False
    """Nobody waited for it: its client was given an older answer, as another event tells."""
    audit: bool = False
    """It was computed though an answer to the same question in other words might have been given: to see if that was right."""
    known: Usage | None = None
    """Of what did not have to be computed, where a part had to: `usage` is of that part alone."""


class Embedded(msgspec.Struct, frozen=True):
    """A client's texts were turned into vectors."""

    tenant: Tenant
    model: str
    num_hits: int
    """Texts whose vector was remembered."""
    num_computed: int
    num_shared: int
    """Texts that came twice, or that another request was having computed already."""


class Billed(msgspec.Struct, frozen=True):
    """A client's answer began, and what its prompt read and wrote is known, by the rules of the model's provider."""

    tenant: Tenant
    model: str
    """As the client names it."""
    read_tokens: int
    written_tokens: int
    plain_tokens: int
    miss: str
    """Why nothing, or less than possible, was read (`diagnosis.Reason`); empty where all was."""


class Compared(msgspec.Struct, frozen=True):
    """The semantic level compared a question with those asked before, in other words."""

    tenant: Tenant
    request_id: str
    model: str
    outcome: Literal["hit", "miss", "shadow", "audit"]
    step: str
    """Which of its steps decided: `scope`, `neighbours`, `guards`, `verifier`, `judge`, `risk`, `answer`."""
    why: str
    """In words."""
    nearest: str = ""
    """How the nearest question began; empty where there was none."""
    similarity: float | None = None
    score: float | None = None
    """Probability that its answer is right, by the verifier; 1: the same content."""


class Judged(msgspec.Struct, frozen=True):
    """It is known whether an answer to a question in other words was right, or would have been."""

    tenant: Tenant
    model: str
    request_id: str
    source: Literal["audit", "shadow", "feedback", "imported"]
    wrong: bool


class Optimised(msgspec.Struct, frozen=True):
    """The prompt optimiser has decided what a request to an upstream needs for the provider's cache to hit."""

    tenant: Tenant
    request_id: str
    model: str
    """As the upstream names it."""
    upstream: str
    mode: str
    """"advise": nothing of it was done."""
    marks: tuple[str, ...]
    """Path and lifetime of each breakpoint that was added."""
    reasons: tuple[dict[str, Any], ...]
    """For every decision, also against doing something: code, path, text, tokens saved."""


class AnswerNamed(msgspec.Struct, frozen=True):
    """An upstream has begun an answer, and gave it an id of its own. One for each client of the answer."""

    tenant: Tenant
    request_id: str
    answer_id: str


class UpstreamAsked(msgspec.Struct, frozen=True):
    """An upstream was asked for an answer, and did not give any if there is an `error`."""

    tenant: Tenant
    request_id: str
    model: str
    upstream: str
    expected_s: float | None = None
    """From here to the whole answer, where the router estimates that."""
    cached_tokens: int = 0
    """Of the prompt, which it expects the upstream to have."""
    scores: dict[str, float] = {}
    """Of all that could have been asked: the smallest won."""
    error: str = ""


Event = (
    Hit[object]
    | Miss
    | Stored
    | Refused
    | Evicted
    | Damaged
    | Failed
    | Dropped
    | Forgotten
    | Computed
    | Answered
    | Embedded
    | Billed
    | Compared
    | Judged
    | Optimised
    | AnswerNamed
    | UpstreamAsked
)
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The `Emit` of whoever does not count."""


class Consumer(Protocol):
    @property
    def concerns(self) -> tuple[type, ...]:
        """The kinds of events that it wants to be told of."""

    def record(self, event: Event) -> None: ...


def among(consumers: Iterable[Consumer]) -> Emit:
    """Tells each of them what concerns it, in their order. Nobody is asked about what concerns nobody: there are several events
    on the way of a request to its first byte."""
    told: dict[type, list[Emit]] = {}
    for consumer in consumers:
        for kind in consumer.concerns:
            told.setdefault(kind, []).append(consumer.record)

    def emit(event: Event) -> None:
        for record in told.get(type(event), ()):
            record(event)

    return emit
