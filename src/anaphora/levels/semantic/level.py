"""The same question in other words: the answer, where it is known that such answers are right often enough.

The level remembers questions, not answers: an answer lies where the exact level put it, and is judged there as if it had been
asked for in the words it was given to, so that lifetimes, limits and forgetting are those of the exact level. What may be given
is found in steps, the cheapest first, each of which can only say no (`comparing`); whether it is given is for the evidence of
the tenant and model (`risk`). What might have been given and was computed all the same, because it was drawn to be audited or
because there is no evidence yet, becomes evidence (`audits`).

Any failure is a miss.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

from anaphora.clock import Clock
from anaphora.events import (
    Compared,
    Emit,
    Failed,
    Forgotten,
    Hit,
    Miss,
    MissReason,
    Refused,
    RefusedReason,
    Stored,
    ignore,
)
from anaphora.levels.base import Question
from anaphora.levels.semantic import comparing, judging
from anaphora.levels.semantic.audits import JUDGE_S, Audits, Embed, Trial, in_words, keep
from anaphora.levels.semantic.comparing import Vector, Verifies, digest_of
from anaphora.levels.semantic.entries import Entries
from anaphora.levels.semantic.forms import form_of
from anaphora.levels.semantic.pools import Pools
from anaphora.levels.semantic.records import Decision, Entry
from anaphora.levels.semantic.risk import Audit, Policy, Rung, Serve
from anaphora.levels.semantic.scope import Asked, asked
from anaphora.levels.semantic.texts import prepare
from anaphora.store import Mark
from anaphora.tiers.base import TierStats
from anaphora.types import CacheControl, Completion, Key, Scope, Tenant

log = logging.getLogger(__name__)

Mode = Literal["off", "shadow", "on"]
Answers = Callable[[Question], Awaitable[Hit[Completion] | Miss]]
"""What the exact level has for a question."""

EMBED_S = 0.5
"""How long to wait for a question's vector (for the judge's word `JUDGE_S`): then it is a miss."""
LEARN_S = 60.0
"""The same behind the answer, where nobody waits."""
CLOSE_S = 2.0
"""And where the server is stopping."""
EXCERPT = 80
"""Characters of the nearest question that are told."""


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Patterns, and what holds where they match. None: what holds everywhere."""

    models: tuple[str, ...] = ("*",)
    tenants: tuple[str, ...] = ("*",)
    mode: Mode | None = None
    risk: float | None = None

    def matches(self, tenant: str, model: str) -> bool:
        return any(fnmatchcase(tenant, one) for one in self.tenants) and any(fnmatchcase(model, one) for one in self.models)


class SemanticOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As in `config.SemanticConfig`."""

    mode: Mode = "on"
    risk: float = 0.01
    confidence: float = 0.95
    audit_share: float = 0.05
    max_chars: int = 600
    shared: bool = False
    routes: tuple[Route, ...] = ()
    unrelated: float = 0.0
    """Cosine that the encoder gives texts about different things."""


class _Looked(msgspec.Struct):
    """A question that is being looked up."""

    question: Question
    place: Asked
    risk: float
    """Of answers in other words, the share that may be wrong."""
    serves: bool
    mark: Mark
    """What had been forgotten when it was asked."""
    vector: Vector | None = None


class SemanticLevel:
    """`answers` is the exact level's lookup; `entries` is owned, and started by `start`. `ask` asks the judge, if there is one.

    `version` names all that scores depend on: evidence of another one is none. Until the encoder is `ready` nothing is found.
    For one event loop.
    """

    name = "semantic"

    def __init__(
        self,
        options: SemanticOptions,
        *,
        answers: Answers,
        embed: Embed,
        entries: Entries,
        verifier: Verifies,
        version: str,
        clock: Clock,
        ask: judging.Ask | None = None,
        ready: Callable[[], bool] = lambda: True,
        emit: Emit = ignore,
        rng: random.Random | None = None,
    ) -> None:
        self.options = options
        self._answers = answers
        self._embed = embed
        self._entries = entries
        self._verifier = verifier
        self._ask = ask
        self._ready = ready
        self._clock = clock
        self._emit = emit
        self._rng = rng or random.Random()
        # Who imports labels says that they are like the traffic.
        policy = Policy(options.risk, options.confidence, options.audit_share, trust_imported=True)
        self._pools = Pools(policy, entries, version)
        self.audits = Audits(
            self._pools,
            entries,
            embed=embed,
            verifier=verifier,
            version=version,
            clock=clock,
            emit=emit,
            ask=ask,
            unrelated=options.unrelated,
        )
        self._looked: OrderedDict[Key, _Looked] = OrderedDict()
        """For when their answers are learned."""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- looking up ----------------------------------------------------------------------------------------------------

    async def lookup(self, question: Question) -> Hit[Completion] | Miss:
        try:
            return await self._lookup(question)
        except Exception as error:  # of any kind, in any step: nothing is given (invariant 8)
            self._failed("lookup", error)
            return Miss(self.name, MissReason.FAILED)

    async def _lookup(self, question: Question) -> Hit[Completion] | Miss:
        looked = self._begin(question)
        if looked is None:
            return Miss(self.name, MissReason.NOT_COMPARABLE)
        keep(self._looked, question.key, looked)
        if not self._ready():
            return Miss(self.name, MissReason.FAILED)
        await self._notice(looked)
        found = await self._compared(looked)
        if not found.candidate or found.entry is None or found.score is None:
            return self._missed(looked, found)
        hit = await self._answers(msgspec.structs.replace(question, key=found.entry.key))
        if isinstance(hit, Hit):
            return self._decided(looked, found, found.entry, found.score, hit)
        if hit.reason is MissReason.ABSENT:  # evicted, expired, forgotten: the entry stands for nothing any more
            self._entries.remove(found.entry.id)
        why = f"its answer cannot be given: {hit.reason.value}"
        return self._missed(looked, msgspec.structs.replace(found, step="answer", why=why))

    def _begin(self, question: Question) -> _Looked | None:
        """None: nothing is compared."""
        request, wish, options = question.request, question.control.semantic_risk, self.options
        route = next((route for route in options.routes if route.matches(request.tenant, request.model)), Route())
        mode = options.mode if route.mode is None else route.mode
        if mode == "off" or wish == 0:
            return None
        place = self._place(question)
        risk = options.risk if route.risk is None else route.risk
        if place is None:
            return None
        return _Looked(question, place, risk if wish is None else wish, mode == "on", self.mark())

    def _place(self, question: Question, *, shared: bool = False) -> Asked | None:
        request, options = question.request, self.options
        return asked(request, fingerprint=question.fingerprint, max_chars=options.max_chars, shared=shared)

    async def _compared(self, looked: _Looked) -> comparing.Compared:
        spaces = [looked.place.space]
        if self.options.shared and (common := self._place(looked.question, shared=True)) is not None:
            spaces.append(common.space)
        return await comparing.compare(
            prepare(looked.place.text),
            spaces,
            self._entries,
            self._verifier,
            lambda: self._vector(looked),
            self.audits.is_refuted,
            None if self._ask is None else lambda entry: self._fits(looked, entry),
            unrelated=self.options.unrelated,
        )

    async def _vector(self, looked: _Looked, within_s: float = EMBED_S) -> Vector:
        if looked.vector is None:
            request = looked.question.request
            async with asyncio.timeout(within_s):
                looked.vector = (await self._embed(request.tenant, request.model, (looked.place.text,)))[0]
        return looked.vector

    async def _fits(self, looked: _Looked, entry: Entry) -> bool:
        assert self._ask is not None
        hit = await self._answers(msgspec.structs.replace(looked.question, key=entry.key))
        said = in_words(hit.value) if isinstance(hit, Hit) else None
        if said is None:
            return False
        async with asyncio.timeout(JUDGE_S):
            return await judging.fits(self._ask, looked.question.request.tenant, entry.text, said, looked.place.text)

    async def _notice(self, looked: _Looked) -> None:
        """Whoever goes on by asking nearly the same again may not have been content with the answer."""
        question = looked.question
        if len(question.request.messages) < 3:
            return
        earlier = msgspec.structs.replace(question.request, messages=question.request.messages[:-2])
        there = self._place(msgspec.structs.replace(question, request=earlier))
        before = None if there is None else self.audits.served_before(there)
        if before is not None:
            await self.audits.doubt(before, await self._vector(looked))

    def _decided(
        self, looked: _Looked, found: comparing.Compared, entry: Entry, score: float, hit: Hit[Completion]
    ) -> Hit[Completion] | Miss:
        """What the evidence says to an answer that might be given."""
        request, u = looked.question.request, self._rng.random()
        outcome = self._pools.decide((request.tenant, request.model), score, u, self._clock.now_s(), looked.risk)
        forced = self.audits.is_doubted(entry.id)
        if not looked.serves:
            why = "the mode is shadow; else " + ("it would be given" if isinstance(outcome, Serve) else str(outcome))
            return self._tried(looked, found, hit, "shadow", why, u, 1.0)
        if forced:
            why = "whoever got this answer last asked again"
            return self._tried(looked, found, hit, "audited", why, u, 1.0, forced=True)
        if isinstance(outcome, Audit):
            return self._tried(looked, found, hit, "audited", "drawn to be audited", u, outcome.inclusion)
        if not isinstance(outcome, Serve):
            return self._tried(looked, found, hit, "shadow", str(outcome), u, outcome.inclusion)
        decision = self._decision(looked, found, "served")
        self._entries.used(entry.id)
        self._entries.note(decision, looked.mark)
        self.audits.served(looked.place, decision)
        self._say(looked, found, "hit", "risk", f"such answers are right often enough at scores from {outcome.threshold:g}")
        return Hit(self.name, entry.key, hit.value, hit.age_s, hit.ttl_s, hit.cost_s)

    def _tried(
        self,
        looked: _Looked,
        found: comparing.Compared,
        hit: Hit[Completion],
        outcome: Literal["audited", "shadow"],
        why: str,
        u: float,
        inclusion: float,
        *,
        forced: bool = False,
    ) -> Miss:
        """It is computed, and compared with what might have been given."""
        decision = self._decision(looked, found, outcome)
        self._entries.note(decision, looked.mark)
        self.audits.begin(looked.question.key, Trial(decision, hit.value, u, inclusion, forced))
        self._say(looked, found, "audit" if outcome == "audited" else "shadow", "risk", why)
        return Miss(self.name, MissReason.AUDITED if outcome == "audited" else MissReason.SHADOW)

    def _missed(self, looked: _Looked, found: comparing.Compared) -> Miss:
        if found.entry is not None:
            self._entries.note(self._decision(looked, found, "refused"), looked.mark)
        self._say(looked, found, "miss", found.step, found.why)
        reasons = {"neighbours": MissReason.NO_NEIGHBOUR, "guards": MissReason.GUARDED, "answer": MissReason.NO_NEIGHBOUR}
        return Miss(self.name, reasons.get(found.step, MissReason.UNVERIFIED))

    # -- learning ------------------------------------------------------------------------------------------------------

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
        looked = self._looked.pop(question.key, None)
        trial = self.audits.end(question.key)
        if not clean:
            return Refused(self.name, RefusedReason.NOT_CLEAN)
        if question.control.no_store:
            return Refused(self.name, RefusedReason.NO_STORE)
        mark = self.mark()
        if since is not None and since != mark:
            return Refused(self.name, RefusedReason.FORGOTTEN)
        looked = looked or self._begin(question)
        if looked is None or in_words(value) is None:
            return Refused(self.name, RefusedReason.NOT_COMPARABLE)
        # The exact level says whether it kept the answer, whatever this request wishes.
        kept = await self._answers(msgspec.structs.replace(question, control=CacheControl()))
        if not isinstance(kept, Hit):
            return Refused(self.name, RefusedReason.NOT_COMPARABLE)
        self._later(lambda: self._learn(looked, value, trial, tags, mark))
        return Stored(self.name, question.key, len(looked.place.text.encode()))

    async def _learn(self, looked: _Looked, value: Completion, trial: Trial | None, tags: tuple[str, ...], mark: Mark) -> None:
        """Behind the answer: remember the question, and see whether what might have been given was right."""
        await self._remember(looked, looked.place, tags, mark)
        if trial is None or mark != self.mark():
            return
        right = await self.audits.compare(trial, value)
        # An answer that was computed twice, and was the same, is for all tenants, where they share.
        if right and self.options.shared and (there := self._place(looked.question, shared=True)) is not None:
            await self._remember(looked, there, tags, mark)

    async def _remember(self, looked: _Looked, place: Asked, tags: tuple[str, ...], mark: Mark) -> None:
        request, prepared = looked.question.request, prepare(place.text)
        self._entries.add(
            space=place.space,
            digest=digest_of(prepared),
            key=looked.question.key,
            text=place.text,
            form=form_of(prepared),
            vector=await self._vector(looked, LEARN_S),
            tenant=request.tenant,
            model=request.model,
            tags=tags,
            since=mark,
        )

    # -- reports -------------------------------------------------------------------------------------------------------

    def evidence(self, tenant: Tenant) -> dict[str, list[Rung]]:
        """What is known of the answers to a tenant's questions, by model and threshold."""
        now_s = self._clock.now_s()
        return {model: self._pools.rungs((owner, model), now_s) for owner, model in self._pools.all() if owner == tenant}

    async def decisions(self, tenant: Tenant, limit: int) -> list[Decision]:
        """The newest first."""
        return await self._entries.decisions(tenant, limit=limit)

    # -- the rest of a level -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read what was remembered before."""
        self._entries.start()

    def mark(self) -> Mark:
        return self._entries.mark()

    async def forget(self, scope: Scope) -> Forgotten:
        self._drop(scope)
        receipt = await self._entries.forget(scope)
        self._drop(scope)  # what was found out meanwhile
        return receipt

    def drop(self, scope: Scope) -> None:
        self._drop(scope)
        self._entries.drop(scope)

    def _drop(self, scope: Scope) -> None:
        self._looked.clear()
        self.audits.forget()
        self._pools.forget(scope)

    async def stats(self) -> dict[str, TierStats]:
        return {"questions": self._entries.stats()}

    async def flush(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._entries.flush()

    async def aclose(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._entries.aclose()

    # -- saying it -----------------------------------------------------------------------------------------------------

    def _decision(self, looked: _Looked, found: comparing.Compared, outcome: str) -> Decision:
        request, entry = looked.question.request, found.entry
        return Decision(
            tenant=request.tenant,
            model=request.model,
            request_id=looked.question.request_id,
            outcome=outcome,
            step="risk" if outcome != "refused" else found.step,
            entry_id=0 if entry is None else entry.id,
            text=looked.place.text,
            other_text="" if entry is None else entry.text,
            similarity=found.similarity or 0.0,
            score=found.score or 0.0,
            at_s=self._clock.now_s(),
        )

    def _say(
        self,
        looked: _Looked,
        found: comparing.Compared,
        outcome: Literal["hit", "miss", "shadow", "audit"],
        step: str,
        why: str,
    ) -> None:
        request, text = looked.question.request, "" if found.entry is None else found.entry.text
        nearest = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"
        said = (outcome, step, why, nearest, found.similarity, found.score)
        self._emit(Compared(request.tenant, looked.question.request_id, request.model, *said))

    def _later(self, work: Callable[[], Awaitable[None]]) -> None:
        async def safely() -> None:
            try:
                await work()
            except Exception as error:  # what it would have found out is not known, no more
                self._failed("learn", error)

        task = asyncio.create_task(safely(), name="anaphora-semantic")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _failed(self, operation: str, error: Exception) -> None:
        log.warning("the semantic level failed to %s; the request goes on without it", operation, exc_info=error)
        self._emit(Failed(self.name, operation, repr(error)))
