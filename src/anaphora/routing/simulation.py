"""A fleet of simulated replicas: continuous batching with chunked prefill, over a cache of blocks that evicts by LRU.

An engine works in steps. In each, every answer being written gets one token, and what is left of the step's budget of tokens
is prefilled, first come, first served. A step takes the longer of reading the weights and of computing its tokens, and on top
of it the attention of what is prefilled and the reading of all contexts that are decoded over:

    step = max(step_s, tokens · token_s) + prefilled tokens · their mean position · position_s + context tokens · context_s

A request is admitted where its whole prompt and answer have room, and keeps that room to its end. Blocks of prompts are found
again as soon as they are computed, while the rest of their prompt still is; those of answers are not, since traces do not name
them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from anaphora.routing.base import Question, Replica, Strategy
from anaphora.types import BlockHash


class Speed(msgspec.Struct, frozen=True):
    """Of one replica. The defaults are Qwen2.5-7B-Instruct-1M in bfloat16 on one H100 80 GB, by arithmetic and not measured:
    40 % of its 989 TFLOP/s for 15.2 GFLOP a token (and 401 KFLOP a pair of tokens), 70 % of its 3.35 TB/s for 15.2 GB of
    weights and 57 KB of KV a token; what 72 GB leave free of weights and activations is KV."""

    step_s: float = 0.0065
    token_s: float = 38e-6
    position_s: float = 1.01e-9
    context_s: float = 24.5e-9
    chunk_tokens: int = 2048
    """Tokens a step may compute."""
    max_running: int = 256
    capacity_tokens: int = 900_000
    """Room for KV."""


class Arrival(msgspec.Struct, frozen=True):
    at_s: float
    """When it comes; where it is `after` another one, how long after that one's answer is complete."""
    question: Question
    """Without what is expected of the answer: nobody knows that beforehand."""
    output_tokens: int
    after: int | None = None
    """The number of the arrival whose answer it waits for. None: it waits for nobody."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one arrival."""

    replica: str
    num_tokens: int
    cached_tokens: int
    first_s: float
    whole_s: float


class Replayed(msgspec.Struct, frozen=True):
    outcomes: list[Outcome]
    """In the order of the arrivals."""
    prefill_s: float
    """All replicas together, in steps with prefill in them."""


class BlockCache:
    """Blocks with how many requests use each. Those that nobody uses leave by LRU when room is needed."""

    def __init__(self, capacity_tokens: int) -> None:
        self._free = capacity_tokens
        self._users: dict[BlockHash, int] = {}
        self._idle: OrderedDict[BlockHash, None] = OrderedDict()
        self._sizes: dict[BlockHash, int] = {}
        self._idle_tokens = 0

    @property
    def available_tokens(self) -> int:
        return self._free + self._idle_tokens

    def present(self, question: Question) -> int:
        """Blocks from the head on."""
        low, high, sizes = 0, len(question.blocks), self._sizes
        while low < high:  # no chain has a hole: its end is always older than its head
            middle = (low + high) // 2
            if question.blocks[middle] in sizes:
                low = middle + 1
            else:
                high = middle
        return low

    def hold(self, blocks: Sequence[BlockHash]) -> None:
        for block in blocks:
            users = self._users.get(block, 0)
            if not users:
                del self._idle[block]
                self._idle_tokens -= self._sizes[block]
            self._users[block] = users + 1

    def take(self, num_tokens: int) -> None:
        """Room for `num_tokens` that are nobody else's; at most what is available."""
        while self._free < num_tokens:
            block, _ = self._idle.popitem(last=False)
            size = self._sizes.pop(block)
            self._idle_tokens -= size
            self._free += size
        self._free -= num_tokens

    def give(self, num_tokens: int) -> None:
        self._free += num_tokens

    def publish(self, block: BlockHash, size: int) -> None:
        """A block that lay in taken room is computed, and held by its request."""
        if block in self._sizes:
            self.hold((block,))
            self._free += size
            return
        self._sizes[block] = size
        self._users[block] = 1

    def release(self, blocks: Sequence[BlockHash]) -> None:
        """The chain's end first, so that it leaves first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._idle[block] = None
                self._idle_tokens += self._sizes[block]


class Job:
    __slots__ = (
        "arrival",
        "at_s",
        "cached_tokens",
        "done_tokens",
        "first_s",
        "num_blocks",
        "private_tokens",
        "request",
        "taken_tokens",
    )

    def __init__(self, request: int, arrival: Arrival, at_s: float) -> None:
        self.request = request
        self.arrival = arrival
        self.at_s = at_s
        self.cached_tokens = 0
        self.num_blocks = 0
        """Found or computed, and held."""
        self.done_tokens = 0
        self.private_tokens = 0
        self.taken_tokens = 0
        """Room that nobody else had computed into when it was admitted."""
        self.first_s = 0.0


class Engine:
    """One simulated replica. `advance` finishes the present stretch of steps, `ask` adds a request between two steps."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.cache = BlockCache(speed.capacity_tokens)
        self.waiting: deque[Job] = deque()
        self.prefilling: deque[Job] = deque()
        self.until_s: float | None = None
        """When the present stretch ends. None: idle."""
        self._decoding: list[tuple[int, int, Job]] = []
        self._context = 0
        self._step = 0
        self._from_s = 0.0
        self._steps = 0
        self._prefills: list[Job] = []
        self._refused: tuple[int, int] | None = None
        self.prefill_s = 0.0
        """Spent on steps with prefill in them."""

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    @property
    def context_tokens(self) -> int:
        return self._context

    def remaining(self) -> list[tuple[int, int]]:
        """(steps to go, tokens it will give back) of each answer being written, the first to end first."""
        return [(finish - self._step, job.taken_tokens) for finish, _, job in sorted(self._decoding)]

    def ask(self, job: Job, now_s: float) -> None:
        self.waiting.append(job)
        if self.until_s is None:
            self._plan(now_s)
        elif not self._prefills and self._steps > 1:
            # Nothing but decoding was planned, many steps at once: the new one is seen after the step under way.
            step_s = (self.until_s - self._from_s) / self._steps
            self._steps = min(self._steps, int((now_s - self._from_s) / step_s) + 1)
            self.until_s = self._from_s + self._steps * step_s

    def advance(self) -> Iterator[tuple[Job, bool]]:
        """The stretch is over. Yields (request, whether it is complete) for each first token and each end."""
        now_s = self.until_s
        assert now_s is not None
        self._step += self._steps
        self._context += self._steps * len(self._decoding)
        while self._decoding and self._decoding[0][0] <= self._step:
            _, _, job = heapq.heappop(self._decoding)
            self._context -= job.arrival.question.num_tokens + job.arrival.output_tokens
            self._leave(job)
            yield job, True
        for job in self._prefills:
            if job.done_tokens < job.arrival.question.num_tokens:
                continue
            self.prefilling.remove(job)
            job.first_s = now_s
            yield job, False
            if job.arrival.output_tokens <= 1:
                self._leave(job)
                yield job, True
                continue
            self._context += job.arrival.question.num_tokens + 1
            heapq.heappush(self._decoding, (self._step + job.arrival.output_tokens - 1, job.request, job))
        self._plan(now_s)

    def _compute(self, job: Job, num_tokens: int) -> None:
        """Blocks are found by whoever is admitted next as soon as they are in a step, as in vLLM: within it they are written
        before they are read."""
        question = job.arrival.question
        job.done_tokens += num_tokens
        for index in range(job.num_blocks, bisect_right(question.ends, job.done_tokens)):
            size = question.ends[index] - (question.ends[index - 1] if index else 0)
            self.cache.publish(question.blocks[index], size)
            job.private_tokens -= size
            job.num_blocks += 1

    def _leave(self, job: Job) -> None:
        self.cache.give(job.private_tokens)
        self.cache.release(job.arrival.question.blocks)

    def _admit(self) -> bool:
        """The first of those that wait, if there is room for all of it."""
        if not self.waiting or len(self.prefilling) + len(self._decoding) >= self.speed.max_running:
            return False
        job = self.waiting[0]
        refused = (job.request, self.cache.available_tokens)
        if refused == self._refused:
            return False
        question = job.arrival.question
        present = min(
            self.cache.present(question), bisect_left(question.ends, question.num_tokens)
        )  # the last token is computed
        cached = question.ends[present - 1] if present else 0
        needed = question.num_tokens - cached + job.arrival.output_tokens
        held = question.blocks[:present]
        self.cache.hold(held)
        if needed > self.cache.available_tokens:
            self.cache.release(held)
            self._refused = refused
            return False
        self.cache.take(needed)
        job.num_blocks, job.cached_tokens, job.done_tokens = present, cached, cached
        job.private_tokens = job.taken_tokens = needed
        self.prefilling.append(self.waiting.popleft())
        return True

    def _plan(self, now_s: float) -> None:
        """The next step, or as many as nothing but decoding is to be done in."""
        speed, num_decoding = self.speed, len(self._decoding)
        self._from_s, self._steps, self._prefills = now_s, 1, []
        budget = speed.chunk_tokens - num_decoding
        tokens, attention = num_decoding, 0.0
        while budget > 0:
            if len(self._prefills) == len(self.prefilling) and not self._admit():
                break
            job = self.prefilling[len(self._prefills)]
            part = min(budget, job.arrival.question.num_tokens - job.done_tokens)
            self._prefills.append(job)
            attention += part * (job.done_tokens + part / 2)
            self._compute(job, part)
            tokens += part
            budget -= part
        if not self._prefills and not num_decoding:
            self.until_s = None
            return
        step_s = max(speed.step_s, tokens * speed.token_s)
        if not self._prefills:
            self._steps = max(1, self._decoding[0][0] - self._step)
        grown = num_decoding * self._steps * (self._steps - 1) / 2
        took_s = self._steps * step_s + attention * speed.position_s
        took_s += (self._steps * self._context + grown) * speed.context_s
        self.until_s = now_s + took_s
        if self._prefills:
            self.prefill_s += took_s


@runtime_checkable
class Seeing(Protocol):
    """A strategy that looks into the engines: for comparison only."""

    def see(self, engines: Mapping[str, Engine]) -> None: ...


def replay(
    arrivals: Sequence[Arrival], speeds: Mapping[str, Speed], strategy: Strategy, replicas: Sequence[Replica]
) -> Replayed:
    """What becomes of `arrivals` where `strategy` sends each to one of `replicas` when it comes.

    The expected length of an answer is the mean of those that have ended.
    """
    engines = {replica.name: Engine(speeds[replica.name]) for replica in replicas}
    if isinstance(strategy, Seeing):
        strategy.see(engines)
    outcomes: dict[int, Outcome] = {}
    num_ended, ended_tokens = 1, 256
    coming = [(arrival.at_s, number) for number, arrival in enumerate(arrivals) if arrival.after is None]
    heapq.heapify(coming)
    followers: dict[int, list[int]] = {}
    for number, arrival in enumerate(arrivals):
        if arrival.after is not None:
            followers.setdefault(arrival.after, []).append(number)
    while True:
        name, until_s = min(
            ((name, engine.until_s) for name, engine in engines.items() if engine.until_s is not None),
            key=lambda item: item[1],
            default=("", math.inf),
        )
        if coming and coming[0][0] <= until_s:
            at_s, number = heapq.heappop(coming)
            arrival = arrivals[number]
            question = msgspec.structs.replace(arrival.question, output_tokens=max(1, ended_tokens // num_ended))
            choice = strategy.pick(question, replicas, at_s)
            assert choice is not None
            strategy.began(number, question, choice, at_s)
            engines[choice.replica].ask(Job(number, arrival, at_s), at_s)
        elif name:
            for job, complete in engines[name].advance():
                if not complete:
                    strategy.first_token(job.request, until_s)
                    continue
                arrival = job.arrival
                num_ended, ended_tokens = num_ended + 1, ended_tokens + arrival.output_tokens
                strategy.ended(job.request, until_s, output_tokens=arrival.output_tokens, cached_tokens=job.cached_tokens)
                outcomes[job.request] = Outcome(
                    name,
                    arrival.question.num_tokens,
                    job.cached_tokens,
                    job.first_s - job.at_s,
                    until_s - job.at_s,
                )
                for number in followers.get(job.request, ()):
                    heapq.heappush(coming, (until_s + arrivals[number].at_s, number))
        else:
            prefill_s = sum(engine.prefill_s for engine in engines.values())
            return Replayed([outcomes[number] for number in range(len(arrivals))], prefill_s)
