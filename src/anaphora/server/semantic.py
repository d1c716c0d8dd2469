"""`/anaphora/feedback` and `/anaphora/semantic`: what clients say of answers in other words, and what is known of them."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import msgspec

from anaphora.errors import InvalidRequest, NotFound
from anaphora.server.endpoint import Call, Endpoint
from anaphora.server.routes import read_query

MAX_PAIRS = 10_000


class _Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: Annotated[str, msgspec.Meta(min_length=1)]
    """Of the request, or of its answer."""
    correct: bool


class Feedback(Endpoint):
    """`POST /anaphora/feedback` with `{"id", "correct"}`: whether an answer in other words was right."""

    async def answer(self, call: Call) -> None:
        level = self.api.gateway.semantic()
        try:
            said = msgspec.json.decode(await call.body(), type=_Feedback)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body is wrong: {error}.") from error
        request_id = self.api.explanations.request_id(call.tenant, said.id)
        if not await level.audits.feedback(call.tenant, request_id, right=said.correct):
            raise NotFound(f"No answer in other words was given to '{said.id}', or it is too long ago.", code="not_semantic")
        await call.json(b'{"recorded":true}')


class _Limit(msgspec.Struct, frozen=True):
    limit: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 1000


class Semantic(Endpoint):
    """`GET /anaphora/semantic`: what was compared lately, and what is known of how often that would be right."""

    async def answer(self, call: Call) -> None:
        level = self.api.gateway.semantic()
        decisions = await level.decisions(call.tenant, read_query(call, _Limit).limit)
        last: dict[str, str] = {}
        for decision in decisions:  # the newest first: what was found out of a request in the end
            last.setdefault(decision.request_id, decision.outcome)
        told: dict[str, Any] = {
            "tenant": call.tenant,
            "mode": level.options.mode,
            "risk": level.options.risk,
            "confidence": level.options.confidence,
            "audit_share": level.options.audit_share,
            "questions": (await level.stats())["questions"],
            "outcomes": Counter(decision.outcome for decision in decisions),
            "in_the_end": Counter(last.values()),
            "evidence": level.evidence(call.tenant),
            "decisions": decisions,
        }
        await call.json(msgspec.json.encode(told))


class _Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    question: Annotated[str, msgspec.Meta(min_length=1)]
    other: Annotated[str, msgspec.Meta(min_length=1)]
    same: bool
    """The answer to one is the right answer to the other."""


class _Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: Annotated[str, msgspec.Meta(min_length=1)]
    pairs: Annotated[list[_Pair], msgspec.Meta(min_length=1, max_length=MAX_PAIRS)]


class Evidence(Endpoint):
    """`POST /anaphora/semantic/evidence` with `{"model", "pairs": [{"question", "other", "same"}]}`: pairs of the caller's own
    traffic, as a start of the evidence."""

    async def answer(self, call: Call) -> None:
        level = self.api.gateway.semantic()
        try:
            said = msgspec.json.decode(await call.body(), type=_Evidence)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body is wrong: {error}.") from error
        model = await self.api.gateway.model(said.model)
        pairs = [(pair.question, pair.other, pair.same) for pair in said.pairs]
        num = await level.audits.teach(call.tenant, model.id, pairs)
        await call.json(msgspec.json.encode({"pairs": len(pairs), "counted": num}))
