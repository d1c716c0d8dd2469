"""The levels of answers, grouped: what is recalled, learned and forgotten as one.

Recall asks level after level, the surest first; learning and forgetting go to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from anaphora.events import Emit, Forgotten, Hit, Miss, MissReason, Refused, RefusedReason, Stored, ignore
from anaphora.keys import request_key
from anaphora.levels.base import Level, Question
from anaphora.store import Mark as LevelMark
from anaphora.tiers.base import TierStats
from anaphora.types import CacheControl, Completion, Key, Request, Scope

NO_WISHES = CacheControl()
AnswerLevel = Level[Question, Completion]
Mark = tuple[LevelMark, ...]
"""One for each level."""

_FINAL = frozenset({MissReason.NO_CACHE, MissReason.PREWARM, MissReason.SAMPLED, MissReason.EMPTY_BUCKET})
"""What one level says for all: a new answer is wanted, or none at all."""


class Recall(msgspec.Struct, frozen=True):
    """What memory says to a request: a hit, or why each level asked has none."""

    key: Key | None
    """What makes requests the same question, also for sharing one computation. None: the model is not known."""
    hit: Hit[Completion] | None
    misses: tuple[Miss, ...] = ()
    mark: Mark | None = None
    """What had been forgotten when the recall began. None: memory could not be asked."""


class Memory:
    """`fingerprint` gives a model's fingerprint by the name a request uses, None while it is not known.

    `levels` without any is a memory that recalls nothing and learns nothing.
    """

    def __init__(self, levels: Sequence[AnswerLevel], *, fingerprint: Callable[[str], str | None], emit: Emit = ignore) -> None:
        self._levels = tuple(levels)
        self._fingerprint = fingerprint
        self._emit = emit

    async def recall(self, request: Request, control: CacheControl = NO_WISHES, request_id: str = "") -> Recall:
        """The remembered answer. Does not suspend where the first level has it in this process's memory."""
        mark = tuple([level.mark() for level in self._levels])
        fingerprint = self._fingerprint(request.model)
        if fingerprint is None:
            miss = Miss("memory", MissReason.UNKNOWN_MODEL)
            self._emit(miss)
            return Recall(None, None, (miss,), mark)
        key = request_key(request, fingerprint=fingerprint)
        question = Question(request, key, control, fingerprint, request_id)
        misses: list[Miss] = []
        for level in self._levels:
            answer = await level.lookup(question)
            self._emit(answer)
            if isinstance(answer, Hit):
                return Recall(key, answer, tuple(misses), mark)
            misses.append(answer)
            if answer.reason in _FINAL:
                break
        return Recall(key, None, tuple(misses), mark)

    async def learn(
        self,
        request: Request,
        control: CacheControl,
        completion: Completion,
        *,
        clean: bool,
        key: Key | None = None,
        tags: tuple[str, ...] = (),
        since: Mark | None = None,
        request_id: str = "",
    ) -> Stored | Refused:
        """Keep `completion` where it may be kept; the first level's word on it that says Stored, else the first one's.

        `clean`: the answer was seen to its `End`. `key` is the recall's: an answer belongs to the question as it was when
        it was asked, even if the model has been replaced since. `since` is the recall's mark: what was being computed while
        something was forgotten is not learned (invariant 7).
        """
        fingerprint = self._fingerprint(request.model)
        if key is None and fingerprint is not None:
            key = request_key(request, fingerprint=fingerprint)
        outcomes: list[Stored | Refused] = []
        if key is None or not self._levels:
            outcomes.append(Refused("memory", RefusedReason.UNKNOWN_MODEL if key is None else RefusedReason.NO_LEVEL))
        else:
            question = Question(request, key, control, fingerprint or "", request_id)
            cost_s = completion.compute_s
            marks = (None,) * len(self._levels) if since is None else since
            outcomes += [
                await level.learn(question, completion, clean=clean, cost_s=cost_s, tags=tags, since=mark)
                for level, mark in zip(self._levels, marks, strict=True)
            ]
        for outcome in outcomes:
            self._emit(outcome)
        return next((outcome for outcome in outcomes if isinstance(outcome, Stored)), outcomes[0])

    async def forget(self, scope: Scope) -> tuple[Forgotten, ...]:
        """Erase everything within `scope`; one receipt for each level."""
        return tuple([await level.forget(scope) for level in self._levels])

    def drop(self, scope: Scope) -> None:
        """Another gateway process is forgetting `scope`: drop what only this one has of it. Immediate."""
        for level in self._levels:
            level.drop(scope)

    async def stats(self) -> dict[str, dict[str, TierStats]]:
        """Level name → tier name → figures."""
        return {level.name: await level.stats() for level in self._levels}

    async def flush(self) -> None:
        """Return when what was learned so far is in every tier."""
        for level in self._levels:
            await level.flush()

    async def aclose(self) -> None:
        """Flush and let go of every tier."""
        for level in self._levels:
            await level.aclose()
