"""What could be done with all there is to know: every cache and queue as it is, and the true speeds. For simulations only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from anaphora.routing.base import Choice, Question, Replica, RequestId
from anaphora.routing.inflight import Counting
from anaphora.routing.simulation import Engine


class Oracle(Counting):
    """The replica that is done first. Not even the oracle knows how long an answer becomes, or who comes next."""

    def __init__(self) -> None:
        super().__init__()
        self._engines: Mapping[str, Engine] = {}
        self._cached_tokens: dict[RequestId, int] = {}
        """Of those that wait: what will be there when their turn comes. Nothing that comes later changes it."""

    def see(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        choice = self.least(replicas, lambda replica: self._whole_s(self._engines[replica.name], question))
        if choice is None:
            return None
        cached = self._cached(self._engines[choice.replica], question)
        return Choice(choice.replica, cached_tokens=cached, scores=choice.scores)

    def began(self, request: RequestId, question: Question, choice: Choice, now_s: float) -> None:
        super().began(request, question, choice, now_s)
        self._cached_tokens[request] = choice.cached_tokens

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        super().ended(request, now_s, output_tokens=output_tokens, cached_tokens=cached_tokens)
        del self._cached_tokens[request]

    def _whole_s(self, engine: Engine, question: Question) -> float:
        speed = engine.speed
        decoding = engine.num_decoding
        decode_s = max(speed.step_s, (decoding + 1) * speed.token_s) + engine.context_tokens * speed.context_s
        # Of the queue: what each still has to compute, chunk by chunk beside the answers being written.
        queue_s = 0.0
        needed = question.num_tokens + question.output_tokens
        for job in engine.prefilling:
            queue_s += self._prefill_s(engine, job.done_tokens, job.arrival.question.num_tokens)
        for job in engine.waiting:
            asked, cached = job.arrival.question, self._cached_tokens[job.request]
            queue_s += self._prefill_s(engine, cached, asked.num_tokens)
            needed += asked.num_tokens - cached + question.output_tokens
        cached = self._cached(engine, question)
        needed -= cached
        room_s, available = 0.0, engine.cache.available_tokens
        for remaining, held in engine.remaining():
            if needed <= available:
                break
            available += held
            room_s = remaining * decode_s
        prefill_s = self._prefill_s(engine, cached, question.num_tokens)
        return max(queue_s, room_s) + prefill_s + question.output_tokens * decode_s

    def _prefill_s(self, engine: Engine, cached: int, num_tokens: int) -> float:
        speed = engine.speed
        computed = max(1, num_tokens - cached)
        steps = -(-computed // speed.chunk_tokens)
        beside = engine.num_decoding * speed.token_s + engine.context_tokens * speed.context_s
        linear = max(steps * speed.step_s, computed * speed.token_s)
        return linear + computed * (cached + computed / 2) * speed.position_s + steps * beside

    def _cached(self, engine: Engine, question: Question) -> int:
        """What will be there when those ahead are computed."""
        ahead = [*engine.prefilling, *engine.waiting]
        number = max([engine.cache.present(question), *(_shared(question, job.arrival.question) for job in ahead)])
        number = min(number, bisect_left(question.ends, question.num_tokens))
        return question.ends[number - 1] if number else 0


def _shared(one: Question, other: Question) -> int:
    """Blocks that two chains begin with."""
    low, high = 0, min(len(one.blocks), len(other.blocks))
    while low < high:
        middle = (low + high) // 2
        if one.blocks[middle] == other.blocks[middle]:
            low = middle + 1
        else:
            high = middle
    return low
