"""What is found out about answers to questions in other words: by audits, by what users say, by how they go on.

A question whose answer might have been given, and was computed all the same, is a trial: what was computed is compared with
what might have been given. Labels go to the evidence (`pools`), which decides what is given from then on.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

import msgspec

from anaphora.clock import Clock
from anaphora.events import Emit, Judged
from anaphora.levels.semantic import judging
from anaphora.levels.semantic.agreement import agree
from anaphora.levels.semantic.comparing import MIN_SCORE, Vector, Verifies, digest_of
from anaphora.levels.semantic.entries import Entries
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.pools import Pools
from anaphora.levels.semantic.records import Decision, Labelled
from anaphora.levels.semantic.scope import Asked
from anaphora.levels.semantic.texts import prepare
from anaphora.types import Completion, Key, Tenant, TextPart, ThinkingPart

Embed = Callable[[Tenant, str, Sequence[str]], Awaitable[Vector]]
"""Texts of a tenant, asked of a model, to vectors of length 1: one row each."""

JUDGE_S = 20.0
"""How long to wait for the judge's word."""
REPHRASED_S = 120.0
"""Who asks about the same again within so many seconds may not have been content."""
REPHRASED_SIMILARITY = 0.6
NUM_KEPT = 1024
"""Of each kind of thing that is remembered for a while."""

K = TypeVar("K")
V = TypeVar("V")


class Trial(msgspec.Struct, frozen=True):
    """A question that is computed though there is an answer that might be given."""

    decision: Decision
    answer: Completion
    """The one that might be given."""
    u: float
    inclusion: float
    forced: bool
    """It was not drawn, so it says something only where the answer is wrong."""


class Audits:
    """For one event loop. `ask` asks the judge, if there is one; `version` names all that scores depend on."""

    def __init__(
        self,
        pools: Pools,
        entries: Entries,
        *,
        embed: Embed,
        verifier: Verifies,
        version: str,
        clock: Clock,
        emit: Emit,
        ask: judging.Ask | None = None,
        unrelated: float = 0.0,
    ) -> None:
        self._unrelated = unrelated
        self._pools = pools
        self._entries = entries
        self._embed = embed
        self._verifier = verifier
        self._version = version
        self._clock = clock
        self._emit = emit
        self._ask = ask
        self._trials: OrderedDict[Key, Trial] = OrderedDict()
        self._served: OrderedDict[Asked, Decision] = OrderedDict()
        """The answers that were given last, by what was asked."""
        self._refuted: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        """Entries whose answers were found wrong for a question, by its content."""
        self._doubted: OrderedDict[int, None] = OrderedDict()

    # -- trials --------------------------------------------------------------------------------------------------------

    def begin(self, key: Key, trial: Trial) -> None:
        """The question `key` is being computed."""
        keep(self._trials, key, trial)

    def end(self, key: Key) -> Trial | None:
        """It was computed, or will not be."""
        return self._trials.pop(key, None)

    async def compare(self, trial: Trial, computed: Completion) -> bool | None:
        """Whether the answer that might have been given was right; None where that cannot be told."""
        decision, said, given = trial.decision, in_words(computed), in_words(trial.answer)
        if said is None or given is None:
            return None
        mark = self._entries.mark()
        right = await self._agree(decision, given, said)
        if mark != self._entries.mark():  # a judge takes his time, and meanwhile this may have been forgotten
            return None
        self._emit(Judged(decision.tenant, decision.model, decision.request_id, _source(trial), not right))
        self._found(decision, wrong=not right, u=trial.u, inclusion=trial.inclusion, forced=trial.forced)
        return right

    def is_refuted(self, entry_id: int, content: bytes) -> bool:
        """Whether the entry's answer was found wrong for a question of this content."""
        return (entry_id, content) in self._refuted

    def forget(self) -> None:
        """Everything that is under way: whose it is is not known of all of it."""
        for kept in (self._trials, self._served, self._refuted, self._doubted):
            kept.clear()

    async def _agree(self, decision: Decision, first: str, second: str) -> bool:
        tenant, model = decision.tenant, decision.model
        if self._ask is None:
            return await agree(first, second, lambda texts: self._embed(tenant, model, texts))
        async with asyncio.timeout(JUDGE_S):
            return first == second or await judging.same(self._ask, tenant, decision.text, first, second)

    def _found(self, decision: Decision, *, wrong: bool, u: float, inclusion: float, forced: bool) -> None:
        label = self._label(decision.tenant, decision.model, decision.score, wrong=wrong)
        source: Literal["audit", "feedback"] = "feedback" if forced else "audit"
        self._pools.add(msgspec.structs.replace(label, u=u, inclusion=inclusion, source=source))
        if wrong:
            keep(self._refuted, (decision.entry_id, digest_of(prepare(decision.text))), None)
        outcome = "wrong" if wrong else "right"
        self._entries.note(msgspec.structs.replace(decision, outcome=outcome, at_s=self._clock.now_s()))

    def _label(self, tenant: Tenant, model: str, score: float, *, wrong: bool) -> Labelled:
        return Labelled(tenant=tenant, model=model, score=score, wrong=wrong, at_s=self._clock.now_s(), version=self._version)

    # -- how users go on -----------------------------------------------------------------------------------------------

    def served(self, place: Asked, decision: Decision) -> None:
        keep(self._served, place, decision)

    def served_before(self, place: Asked) -> Decision | None:
        """The answer that was given to `place`, not long ago. It is told once."""
        before = self._served.pop(place, None)
        return None if before is None or self._clock.now_s() - before.at_s > REPHRASED_S else before

    async def doubt(self, before: Decision, vector: Vector) -> None:
        """What was asked after that answer has this vector. If it is nearly the same, the answer may have been wrong."""
        mark = self._entries.mark()
        other = (await self._embed(before.tenant, before.model, (before.text,)))[0]
        if self._similarity(other, vector) >= REPHRASED_SIMILARITY:
            keep(self._doubted, before.entry_id, None)
            self._entries.note(msgspec.structs.replace(before, outcome="doubted", at_s=self._clock.now_s()), mark)

    def is_doubted(self, entry_id: int) -> bool:
        """Whether its next answer should be audited. It is told once."""
        return self._doubted.pop(entry_id, self) is None

    # -- what users say ------------------------------------------------------------------------------------------------

    async def feedback(self, tenant: Tenant, request_id: str, *, right: bool) -> bool:
        """Whether the answer to a request of `tenant` was right. False: none such was given in other words."""
        mark = self._entries.mark()
        decisions = await self._entries.decisions(tenant, request=request_id)
        served = next((decision for decision in decisions if decision.outcome == "served"), None)
        if served is None or mark != self._entries.mark():
            return False
        self._emit(Judged(tenant, served.model, request_id, "feedback", not right))
        self._found(served, wrong=not right, u=0.0, inclusion=1.0, forced=True)
        return True

    async def teach(self, tenant: Tenant, model: str, pairs: Sequence[tuple[str, str, bool]]) -> int:
        """Evidence of one's own: two questions, and whether the answer to one is right for the other. How many count: those
        that no step says no to."""
        num, mark = 0, self._entries.mark()
        for first, second, right in pairs:
            score = await self._score(tenant, model, first, second)
            if score is not None:
                label = self._label(tenant, model, score, wrong=not right)
                num += self._pools.add(msgspec.structs.replace(label, source="imported"), mark)
                self._emit(Judged(tenant, model, "", "imported", not right))
        return num

    async def _score(self, tenant: Tenant, model: str, first: str, second: str) -> float | None:
        one, other = prepare(first), prepare(second)
        if one.normal == other.normal:
            return 1.0
        if refusal(one, other) is not None:
            return None
        vectors = await self._embed(tenant, model, (first, second))
        score = self._verifier.probability(one, other, self._similarity(vectors[0], vectors[1]))
        return score if score >= MIN_SCORE else None

    def _similarity(self, one: Vector, other: Vector) -> float:
        return (float(one @ other) - self._unrelated) / (1 - self._unrelated)


def _source(trial: Trial) -> Literal["audit", "shadow"]:
    return "audit" if trial.decision.outcome == "audited" else "shadow"


def in_words(completion: Completion) -> str | None:
    """What an answer in words says; None where it is another kind of answer."""
    if len(completion.choices) != 1 or not completion.faithful or completion.choices[0].reason == "refusal":
        return None
    content = completion.choices[0].content
    if not all(isinstance(part, TextPart | ThinkingPart) for part in content):
        return None
    return "".join(part.text for part in content if isinstance(part, TextPart)).strip() or None


def keep(kept: OrderedDict[K, V], key: K, value: V) -> None:
    """The latest `NUM_KEPT` of them."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > NUM_KEPT:
        kept.popitem(last=False)
