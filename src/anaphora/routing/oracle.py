"""What could be done with all there is to know: every cache and queue as it is, and the true speeds. For simulations only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from anaphora.routing.base import Choice, Question, Replica
from anaphora.routing.inflight import Counting
from anaphora.routing.simulation import Engine, Job


class Oracle(Counting):
    """The replica that is done first. Not even the oracle knows how long an answer becomes, or who comes next."""

    def __init__(self) -> None:
        super().__init__()
        self._engines: Mapping[str, Engine] = {}

    def see(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        return self.least(replicas, lambda replica: self._whole_s(self._engines[replica.name], question, now_s))

    def _whole_s(self, engine: Engine, question: Question, now_s: float) -> float:
        speed = engine.speed
        decoding = engine.num_decoding
        decode_s = max(speed.step_s, (decoding + 1) * speed.token_s) + engine.context_tokens * speed.context_s
        # Of the queue: what each still has to compute, chunk by chunk beside the answers being written.
        ahead = [*engine.prefilling, *engine.waiting]
        queue_s = 0.0
        needed = question.num_tokens + question.output_tokens
        for job in engine.prefilling:
            queue_s += self._prefill_s(engine, job.done_tokens, job.arrival.question.num_tokens)
        for number, job in enumerate(engine.waiting):
            asked = job.arrival.question
            cached = self._cached(engine, asked, [*engine.prefilling, *list(engine.waiting)[:number]])
            queue_s += self._prefill_s(engine, cached, asked.num_tokens)
            needed += asked.num_tokens - cached + question.output_tokens
        cached = self._cached(engine, question, ahead)
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

    def _cached(self, engine: Engine, question: Question, ahead: Sequence[Job]) -> int:
        """What will be there when those ahead are computed."""
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
