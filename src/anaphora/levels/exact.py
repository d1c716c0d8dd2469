"""The same question again: the answer, word for word.

**Where an answer is kept.** A question's key leaves the token limit out, because whether the limit matters is only known
when the answer is. An answer that came to its own end is kept under the key itself and stands for every request that would
have let it come to that end: no limit, or one of at least its output tokens. An answer that the limit cut is kept under the
key and that limit, for requests with the same limit. So is, for simplicity, one of several choices, since usage does not
tell how long each of them is. `max_tokens` 0 (pre-warm) has no answer and takes no part.

**Sampled answers** (temperature not 0, or not said, which is the backend's own, and no seed) differ from one computation to
the next. `sampled` says what becomes of them: `reuse` the first one, `never` keep any, or keep up to k `buckets` of them, of
which each lookup draws one; while its bucket is empty it is a miss, so k different answers are computed before none is.
"""

from __future__ import annotations

import random
from typing import Literal

import msgspec

from anaphora.clock import Clock
from anaphora.config import Buckets
from anaphora.events import Forgotten, Hit, Miss, MissReason, Refused, RefusedReason, Stored
from anaphora.keys import derived_key
from anaphora.levels.base import Question
from anaphora.store import Mark, Store
from anaphora.tiers.base import Entry, TierStats
from anaphora.types import Choice, Completion, Key, Request, Scope, TextPart, ToolUsePart

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Completion).decode


class ExactOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sampled: Literal["reuse", "never"] | Buckets = "reuse"
    stale_s: float = 0.0
    """Of the time that the store keeps an entry, the last so many seconds are past its lifetime."""
    max_value_bytes: int = 8 << 20
    """Of one encoded answer. A larger one is not kept."""


class ExactLevel:
    """A `Level` from questions to completions, over `store`, which it owns. `rng` draws buckets."""

    name = "exact"

    def __init__(self, options: ExactOptions, *, store: Store, clock: Clock, rng: random.Random | None = None) -> None:
        self._options = options
        self._store = store
        self._clock = clock
        self._buckets = options.sampled.buckets if isinstance(options.sampled, Buckets) else 0
        self._rng = rng or random.Random()

    async def lookup(self, question: Question) -> Hit[Completion] | Miss:
        request = question.request
        barred = self._barred(question)
        if barred is not None:
            return Miss(self.name, barred)
        reason, base = MissReason.ABSENT, question.key
        if self._buckets and _sampled(request):
            reason, base = MissReason.EMPTY_BUCKET, self._bucket(base, self._rng.randrange(self._buckets))
        # Nearly always the first key has it, and that hit is to be short. Slower tiers are asked once.
        at_hand = self._store.get_now(base)
        if at_hand is not None and isinstance(answer := self._judge(question, base, at_hand, any_limit=True), Hit):
            return answer
        places = _places(base, request.max_tokens)
        found = await self._store.get_many(places)
        for key in places:
            if (entry := found.get(key)) is None:
                continue
            answer = self._judge(question, key, entry, any_limit=key == base)
            if isinstance(answer, Hit):
                return answer
            reason = answer
        return Miss(self.name, reason)

    async def learn(
        self,
        question: Question,
        value: Completion,
        *,
        clean: bool,
        cost_s: float,
        tags: tuple[str, ...] = (),
        since: Mark | None = None,
    ) -> Stored | Refused:
        request = question.request
        refused = self._refused(question, value, clean)
        if refused is not None:
            return Refused(self.name, refused)
        encoded = _encode(value)
        if len(encoded) > self._options.max_value_bytes:
            return Refused(self.name, RefusedReason.TOO_LARGE)
        key = await self._place(question, value)
        if since is not None and since != self._store.mark():
            return Refused(self.name, RefusedReason.FORGOTTEN)
        kept = self._store.put(key, encoded, cost_s=cost_s, tenant=request.tenant, model=request.model, tags=tags, since=since)
        return Stored(self.name, key, len(encoded)) if kept else Refused(self.name, RefusedReason.TOO_LARGE)

    def mark(self) -> Mark:
        return self._store.mark()

    async def forget(self, scope: Scope) -> Forgotten:
        return await self._store.forget(scope)

    def drop(self, scope: Scope) -> None:
        self._store.drop(scope)

    async def stats(self) -> dict[str, TierStats]:
        return await self._store.stats()

    async def flush(self) -> None:
        await self._store.flush()

    async def aclose(self) -> None:
        await self._store.aclose()

    # -- may it be answered, may it be kept ----------------------------------------------------------------------------

    def _barred(self, question: Question) -> MissReason | None:
        """Why the cache may not even be asked. `no-store` does not bar: it is about this request's own answer."""
        if question.request.max_tokens == 0:
            return MissReason.PREWARM
        if question.control.no_cache:
            return MissReason.NO_CACHE
        if self._options.sampled == "never" and _sampled(question.request):
            return MissReason.SAMPLED
        return None

    def _judge(self, question: Question, key: Key, entry: Entry, *, any_limit: bool) -> Hit[Completion] | MissReason:
        """Whether what lies under `key` answers `question`. `any_limit`: the key does not cover the token limit."""
        now_s = self._clock.now_s()
        age_s = max(0.0, now_s - entry.stored_at_s)
        max_age_s = question.control.max_age_s
        if max_age_s is not None and age_s > max_age_s:
            return MissReason.STALE_FOR_REQUEST
        ttl_s = None if entry.expires_at_s is None else entry.expires_at_s - self._options.stale_s - now_s
        if ttl_s is not None and ttl_s < -question.control.stale_s:
            return MissReason.EXPIRED
        try:
            completion = _decode(entry.value)
        except msgspec.MsgspecError:  # its checksum was right: another version of Anaphora wrote it
            return MissReason.UNREADABLE
        limit = question.request.max_tokens
        if any_limit and limit is not None and not _ends_within(completion, limit):
            return MissReason.OTHER_LIMIT
        return Hit(self.name, key, completion, age_s, ttl_s, entry.cost_s)

    def _refused(self, question: Question, completion: Completion, clean: bool) -> RefusedReason | None:
        """The admission matrix: why `completion` must not be kept."""
        request = question.request
        if request.max_tokens == 0:
            return RefusedReason.PREWARM
        if question.control.no_store:
            return RefusedReason.NO_STORE
        if self._options.sampled == "never" and _sampled(request):
            return RefusedReason.SAMPLED
        if not clean:
            return RefusedReason.NOT_CLEAN
        if len(completion.choices) != max(1, len(request.prompts)) * request.sampling.n:
            return RefusedReason.INCOMPLETE
        if not completion.faithful:
            return RefusedReason.UNFAITHFUL
        if any(choice.reason == "refusal" for choice in completion.choices):
            return RefusedReason.REFUSAL
        if not all(_says_something(choice) for choice in completion.choices):
            return RefusedReason.EMPTY
        return None

    # -- where it is kept ----------------------------------------------------------------------------------------------

    async def _place(self, question: Question, completion: Completion) -> Key:
        """The key to keep `completion` under: with buckets an empty one's, or any if all are full."""
        limit = question.request.max_tokens
        own = limit is not None and not _stands_alone(completion)

        def place(base: Key) -> Key:
            return _limited(base, limit) if own and limit is not None else base

        if not self._buckets or not _sampled(question.request):
            return place(question.key)
        places = [place(self._bucket(question.key, index)) for index in range(self._buckets)]
        filled = await self._store.get_many(places)
        return self._rng.choice([key for key in places if key not in filled] or places)

    def _bucket(self, key: Key, index: int) -> Key:
        return derived_key(key, "bucket", index)


def _places(base: Key, limit: int | None) -> tuple[Key, ...]:
    """Where an answer under `limit` may lie."""
    return (base,) if limit is None else (base, _limited(base, limit))


def _limited(base: Key, limit: int) -> Key:
    return derived_key(base, "max_tokens", limit)


def _stands_alone(completion: Completion) -> bool:
    """Whether the answer is known to be what it is whatever the limit, as long as it is not shorter than the answer."""
    return len(completion.choices) == 1 and completion.choices[0].reason != "max_tokens"


def _ends_within(completion: Completion, limit: int) -> bool:
    # No output tokens means that the backend does not count them: then nothing can be said.
    return _stands_alone(completion) and 0 < completion.usage.output_tokens <= limit


def _sampled(request: Request) -> bool:
    sampling = request.sampling
    return sampling.seed is None and sampling.temperature != 0


def _says_something(choice: Choice) -> bool:
    return any(isinstance(part, ToolUsePart) or (isinstance(part, TextPart) and part.text) for part in choice.content)
