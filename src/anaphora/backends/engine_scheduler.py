"""Continuous batching: which tokens of which sequences run in the next step, and what comes out of it.

A step packs one token of every decoding sequence and a chunk of prompt tokens of those still prefilling into one forward
pass. The chunk is small while others decode (`mixed_chunk`), so a long prompt keeps their streams waiting for one chunk at
most; alone it is large (`prefill_chunk`).

Life of a sequence: waiting → (match the prefix cache, take an arena extent, load the matched blocks) → prefilling → decoding
→ finished. When the arena is full, the youngest running sequence is preempted: it goes back to waiting with the tokens it
has, and finds its own blocks in the cache when it returns.

Everything here runs on the engine's one thread.
"""

from __future__ import annotations

import itertools
from collections import deque

import msgspec
import torch

from anaphora.backends.engine_attention import Segment
from anaphora.backends.engine_model import Model
from anaphora.backends.engine_offload import SlowerTiers
from anaphora.backends.engine_sampling import sample
from anaphora.backends.engine_sequences import Generation, Job
from anaphora.clock import Clock
from anaphora.errors import ServiceError
from anaphora.keys import block_hashes
from anaphora.kv.arena import Arena
from anaphora.kv.cache import KVCache
from anaphora.kv.ends import PromptEnd, PromptEnds, end_key
from anaphora.kv.pool import KVPool
from anaphora.kv.remains import Remains
from anaphora.kv.tails import Tails
from anaphora.types import (
    Begin,
    BlockHash,
    Delta,
    End,
    Finish,
    FinishReason,
    Scope,
    Tenant,
)

_ARRIVAL_S = 0.002
"""With nothing to compute, how long to wait at once for blocks on their way: new requests are looked at in between."""
_RESERVE = 256
"""Arena positions taken beyond the prompt at first; more are taken as the answer grows."""


class SchedulerOptions(msgspec.Struct, frozen=True):
    max_num_seqs: int
    prefill_chunk: int
    mixed_chunk: int
    prefix_caching: bool


class Counters:
    """Totals since the engine started; read by `stats`."""

    def __init__(self) -> None:
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.num_preemptions = 0
        self.request_success = 0
        self.request_queue_time_seconds = 0.0
        self.forward_seconds = 0.0
        self.num_steps = 0
        self.request_prefill_kv_computed_tokens = 0


class Scheduler:
    def __init__(
        self,
        model: Model,
        pool: KVPool,
        arena: Arena,
        cache: KVCache,
        options: SchedulerOptions,
        *,
        ends: PromptEnds,
        tiers: SlowerTiers,
        clock: Clock,
    ) -> None:
        self._model = model
        self._pool = pool
        self._arena = arena
        self._cache = cache
        self._ends = ends
        self._tails = Tails(cache.num_blocks)
        self._remains = Remains(pool.block_size)
        self._tiers = tiers
        self._options = options
        self._clock = clock
        self._waiting: deque[tuple[Job, Generation]] = deque()
        self._running: list[tuple[Job, Generation]] = []
        self.counters = Counters()

    # -- verbs -------------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, job: Job) -> None:
        self._waiting.extend((job, sequence) for sequence in job.generations)

    def cancel(self, id: object) -> None:
        """Drop a request wherever it is; its place is free at once. Unknown ids are ignored: it may just have finished."""
        self._waiting = deque(item for item in self._waiting if item[0].id != id)
        for job, sequence in [item for item in self._running if item[0].id == id]:
            self._leave(job, sequence)

    def forget(self, scope: Scope) -> int:
        """Drop the cached blocks of `scope.tenant` and return how many. Requests of it that are here already leave none."""
        for job, _ in itertools.chain(self._running, self._waiting):
            job.forgotten = job.forgotten or scope.tenant in (None, job.tenant)
        self._ends.forget(scope)
        self._tails.forget(scope)
        self._remains.forget(scope)
        return self._cache.forget(scope)

    def fail_all(self, error: ServiceError) -> None:
        """End every request in the engine with `error`; the engine itself goes on."""
        jobs = {id(job): job for job, _ in itertools.chain(self._running, self._waiting)}
        for job in jobs.values():
            job.fail(error)
            self.cancel(job.id)

    def step(self) -> bool:
        """Run one forward pass. False where there is nothing left to do."""
        self._cache.expire(self._clock.now_s())
        self._tiers.settle()
        self._admit()
        answered = self._answer_known()
        batch = self._pack()
        if not batch:
            if not answered and self._tiers.awaited:
                self._tiers.wait(_ARRIVAL_S)
            # The only one running may just have given up its extent, to come back where there is more room.
            return answered or bool(self._waiting) or self._tiers.awaited
        started_s = self._clock.monotonic_s()
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        rows: list[int] = []
        sampled: list[tuple[Job, Generation]] = []
        for job, sequence, count in batch:
            assert sequence.extent is not None
            past = sequence.num_computed
            segments.append(Segment(len(tokens), count, sequence.extent[0], past))
            tokens += sequence.tokens[past : past + count]
            positions += range(past, past + count)
            if past + count == len(sequence.tokens) and job.max_tokens > 0:
                rows.append(len(tokens) - 1)
                sampled.append((job, sequence))
        hidden = self._model.forward(tokens, positions, tuple(segments), rows)
        logits = self._model.logits(hidden) if rows else None
        elapsed_s = self._clock.monotonic_s() - started_s
        self.counters.forward_seconds += elapsed_s
        self.counters.num_steps += 1
        if len(batch) == 1:
            _, only, count = batch[0]
            self._tiers.computed(only.num_computed, only.num_computed + count, elapsed_s)
        for job, sequence, count in batch:
            before = sequence.num_computed
            sequence.num_computed += count
            self.counters.request_prefill_kv_computed_tokens += max(0, min(count, sequence.num_prompt - before))
            if self._caches(job):
                self._commit(sequence, cost_s=elapsed_s * self._pool.block_size / len(tokens))
        if logits is not None:
            self._keep_ends(sampled, hidden)
            self._advance(sampled, logits)
        for job, sequence, _ in batch:
            if job.max_tokens == 0 and sequence.num_left == 0:
                self._finish(job, sequence, "max_tokens", [])
        return True

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move sequences from waiting to running while there is room. One whose next block is just being computed by a
        running sequence, or brought back from a slower tier, stays until that block is there; those behind it may pass."""
        held: list[tuple[Job, Generation]] = []
        while self._waiting and len(self._running) < self._options.max_num_seqs:
            job, sequence = self._waiting.popleft()
            if self._being_computed(job, sequence) or self._tiers.holds(job, sequence):
                held.append((job, sequence))
                continue
            length = min(len(sequence.tokens) + min(_RESERVE, job.max_tokens - sequence.num_generated), self._arena.capacity)
            place = self._remains.find(sequence.hashes)
            if place is not None and self._arena.allocate_at(place.start, length):
                start, num_there = place.start, place.num_blocks
            else:
                found, num_there = self._arena.allocate(length), 0
                if found is None:  # before the match: a look that comes to nothing must not count as a use of the blocks
                    held.append((job, sequence))
                    break
                start = found
            self._remains.taken(start, start + length)
            self._enter(job, sequence, (start, start + length), num_there)
        self._waiting.extendleft(reversed(held))

    def _caches(self, job: Job) -> bool:
        return self._options.prefix_caching and not job.forgotten

    def _being_computed(self, job: Job, sequence: Generation) -> bool:
        """Whether it is worth waiting for a prefix longer than the cached one."""
        if not self._caches(job):
            sequence.hashes = []
            return False
        if sequence.awaited is not None and self._cache.is_coming(sequence.awaited):
            return True  # asked in every step for everybody who waits: the whole prefix is looked up only when it has changed
        if not sequence.hashes:
            sequence.hashes = block_hashes(sequence.namespace, sequence.tokens, self._pool.block_size)
        sequence.awaited = self._cache.awaited(sequence.hashes, len(sequence.tokens), tenant=job.tenant)
        return sequence.awaited is not None

    def _enter(self, job: Job, sequence: Generation, extent: tuple[int, int], num_there: int) -> None:
        """`num_there`: so many of its first blocks lie in the extent already."""
        lease = self._cache.match(sequence.hashes, len(sequence.tokens), tenant=job.tenant)
        matched = lease.num_matched_blocks
        self._pool.load(lease.block_ids[num_there:], extent[0] + num_there * self._pool.block_size)
        sequence.lease, sequence.extent = lease, extent
        sequence.num_committed = matched
        sequence.num_computed = matched * self._pool.block_size
        self._pin(sequence)
        self._cache.announce(lease, sequence.hashes[matched:])
        self._running.append((job, sequence))
        end = self._ends.get(self._end_key(sequence)) if self._caches(job) and self._all_but_the_end(sequence) else None
        if end is not None:
            self._pool.write_arena(extent[0] + sequence.num_computed, end.kv)
            sequence.known, sequence.num_computed = end.hidden, len(sequence.tokens)
        elif self._caches(job):
            self._load_tail(sequence, job.tenant)
        if sequence.reused is None:
            self._count_first_entry(job, sequence)

    def _load_tail(self, sequence: Generation, tenant: Tenant) -> None:
        """The tokens behind the matched blocks that it shares with a block of another prompt. The last one is left to compute.

        Without any matched block, all that two prompts share are the first words of the model's template."""
        assert sequence.extent is not None
        at, size = sequence.num_computed, self._pool.block_size
        if not at:
            return
        following = sequence.tokens[at : min(at + size, len(sequence.tokens) - 1)]
        for tail in self._tails.find(_parent(sequence, at // size), following, tenant):
            block_id = self._cache.find(tail.block, tenant=tenant)
            if block_id is not None:
                self._pool.load_head(block_id, tail.num_tokens, sequence.extent[0] + at)
                sequence.num_computed += tail.num_tokens
                return

    def _count_first_entry(self, job: Job, sequence: Generation) -> None:
        sequence.reused = sequence.num_computed
        counters = self.counters
        prompt = sequence.choice // job.num_choices
        if prompt not in job.reused:
            # Choices of one prompt after the first read what the first has just computed: no read of an earlier request.
            job.reused[prompt] = sequence.reused
            counters.prompt_tokens += sequence.num_prompt
            counters.prefix_cache_queries += sequence.num_prompt
            counters.prefix_cache_hits += sequence.reused
        if not job.begun:
            job.begun = True
            counters.request_queue_time_seconds += self._clock.monotonic_s() - job.submitted_s
            job.emit([Begin(job.model, job.usage()), *job.preface])

    # -- prompts that are known to their last token --------------------------------------------------------------------

    def _all_but_the_end(self, sequence: Generation) -> bool:
        """Whether it stands on all blocks that `match` ever gives."""
        return sequence.num_computed == (len(sequence.tokens) - 1) // self._pool.block_size * self._pool.block_size

    def _end_key(self, sequence: Generation) -> BlockHash:
        num_blocks = (len(sequence.tokens) - 1) // self._pool.block_size
        return end_key(_parent(sequence, num_blocks), sequence.tokens[num_blocks * self._pool.block_size :])

    def _keep_ends(self, sampled: list[tuple[Job, Generation]], hidden: torch.Tensor) -> None:
        """Of prompts that were just computed to their end; `hidden` has a row for each of `sampled`."""
        for (job, sequence), row in zip(sampled, hidden, strict=True):
            if sequence.num_generated or not self._caches(job) or (key := self._end_key(sequence)) in self._ends:
                continue
            assert sequence.extent is not None
            start = (sequence.num_prompt - 1) // self._pool.block_size * self._pool.block_size
            kv = self._pool.read_arena(sequence.extent[0] + start, sequence.num_prompt - start)
            self._ends.put(key, PromptEnd(job.tenant, kv, row.clone()))

    def _answer_known(self) -> bool:
        """The first token of those that need no forward pass. False where there are none."""
        known = [(job, sequence) for job, sequence in self._running if sequence.known is not None]
        answering: list[tuple[Job, Generation]] = []
        hidden: list[torch.Tensor] = []
        for job, sequence in known:
            assert sequence.known is not None
            if job.max_tokens == 0:
                self._finish(job, sequence, "max_tokens", [])
                continue
            answering.append((job, sequence))
            hidden.append(sequence.known)
            sequence.known = None
        if answering:
            self._advance(answering, self._model.logits(torch.stack(hidden)))
        return bool(known)

    # -- packing -----------------------------------------------------------------------------------------------------

    def _pack(self) -> list[tuple[Job, Generation, int]]:
        """The next batch as (job, sequence, number of its next tokens). Decoding sequences come with one token each."""
        decoding = [(job, s) for job, s in self._running if s.num_left == 1]
        batch = []
        for job, sequence in decoding:
            # Those who are looked at later are younger: they may just have been preempted to make room for this one.
            if sequence.extent is not None and self._make_room(job, sequence):
                batch.append((job, sequence, 1))
        batch = [(job, s, n) for job, s, n in batch if s.extent is not None]
        prefilling = [(job, s) for job, s in self._running if s.num_left > 1]
        if not prefilling:
            return batch
        budget = self._options.mixed_chunk if batch else self._options.prefill_chunk
        # Half of the budget belongs to the oldest, so that it always gets on; the rest goes to those nearest to their first
        # token, so that a warm request does not wait behind a cold one.
        shares = {id(prefilling[0][1]): min(prefilling[0][1].num_left, budget if len(prefilling) == 1 else budget // 2)}
        left = budget - sum(shares.values())
        for _, sequence in sorted(prefilling, key=lambda item: item[1].num_left):
            already = shares.get(id(sequence), 0)
            extra = min(sequence.num_left - already, left)
            shares[id(sequence)] = already + extra
            left -= extra
        return batch + [(job, s, shares[id(s)]) for job, s in prefilling if shares.get(id(s), 0) > 0]

    def _make_room(self, job: Job, sequence: Generation) -> bool:
        """See to it that the extent holds the sequence's next token. False if the sequence itself had to leave."""
        assert sequence.extent is not None
        start, end = sequence.extent
        if len(sequence.tokens) <= end - start:
            return True
        more = max(1, min(_RESERVE, job.max_tokens - sequence.num_generated + 1, self._arena.capacity - (end - start)))
        while not self._arena.extend(end, more):
            moved = self._arena.allocate(end - start + more)
            if moved is not None:
                self._remains.taken(moved, moved + end - start)
                self._pool.move(start, moved, sequence.num_computed)
                self._arena.free(start, end - start)
                start, end = moved, moved + end - start
                break
            victim_job, victim = self._running[-1]
            self._preempt(victim_job, victim)
            if victim is sequence:
                return False
        self._remains.taken(end, end + more)
        sequence.extent = (start, end + more)
        return True

    def _preempt(self, job: Job, sequence: Generation) -> None:
        self._leave(job, sequence)
        sequence.known = None
        sequence.num_computed = 0
        sequence.num_committed = 0
        self.counters.num_preemptions += 1
        self._waiting.appendleft((job, sequence))

    # -- results -----------------------------------------------------------------------------------------------------

    def _commit(self, sequence: Generation, *, cost_s: float) -> None:
        """Give the blocks that became full to the cache, generated ones included."""
        size = self._pool.block_size
        full = sequence.num_computed // size
        if full <= sequence.num_committed:
            return
        assert sequence.lease is not None
        assert sequence.extent is not None
        known = len(sequence.hashes)
        if full > known:
            parent = sequence.hashes[-1] if known else sequence.namespace
            sequence.hashes += block_hashes(parent, sequence.tokens[known * size : full * size], size)
        stored = self._cache.allocate(sequence.lease, sequence.hashes[sequence.num_committed : full])
        sequence.num_committed += stored.num_adopted
        self._pool.save(stored.block_ids, sequence.extent[0] + sequence.num_committed * size)
        self._cache.commit(sequence.lease, len(stored.block_ids), cost_s=cost_s)
        for number in range(sequence.num_committed, sequence.num_committed + len(stored.block_ids)):
            tokens = sequence.tokens[number * size : (number + 1) * size]
            self._tails.add(_parent(sequence, number), sequence.hashes[number], tokens, sequence.lease.tenant)
        self._tiers.committed(sequence, sequence.num_committed, stored.block_ids, cost_s, size)
        sequence.num_committed += len(stored.block_ids)
        self._pin(sequence)

    def _pin(self, sequence: Generation) -> None:
        """What was promised of it, as far as it is committed."""
        while sequence.keep and sequence.keep[0][0] <= sequence.num_committed:
            num_blocks, until_s = sequence.keep.pop(0)
            self._cache.pin(sequence.hashes[num_blocks - 1], until_s)
            self._tiers.pinned(sequence, num_blocks, until_s, self._clock.now_s())

    def _advance(self, sampled: list[tuple[Job, Generation]], logits: torch.Tensor) -> None:
        drawn = sample(logits, [sequence.row for _, sequence in sampled])
        for (job, sequence), result in zip(sampled, drawn, strict=True):
            token = result.token
            sequence.tokens.append(token)
            job.output_tokens += 1
            self.counters.generation_tokens += 1
            if token in job.eos_ids:
                self._finish(job, sequence, "end_turn", [])
                continue
            deltas = list(sequence.output.push(result))
            if sequence.output.stopped_by is not None:
                self._finish(job, sequence, "stop_sequence", deltas)
            elif sequence.output.complete:
                self._finish(job, sequence, "end_turn", deltas)
            elif sequence.num_generated >= job.max_tokens or len(sequence.tokens) >= self._arena.capacity:
                self._finish(job, sequence, "max_tokens", deltas)
            elif deltas:
                job.emit(deltas)

    def _finish(self, job: Job, sequence: Generation, reason: FinishReason, deltas: list[Delta]) -> None:
        deltas = [*deltas, *sequence.output.finish()]
        stop = sequence.output.stopped_by
        if stop is not None:
            reason = "stop_sequence"
        if sequence.output.called_tools and reason == "end_turn":
            reason = "tool_use"
        deltas.append(Finish(sequence.choice, reason, stop))
        self._leave(job, sequence)
        job.num_unfinished -= 1
        if job.num_unfinished == 0:
            self.counters.request_success += 1
            deltas.append(End(job.usage(), self._clock.monotonic_s() - job.submitted_s))
        job.emit(deltas)

    def _leave(self, job: Job, sequence: Generation) -> None:
        self._running = [item for item in self._running if item[1] is not sequence]
        if sequence.lease is not None:
            if not self._tiers.keep(job, sequence):
                self._cache.release(sequence.lease)
            sequence.lease = None
        if sequence.extent is not None:
            start, end = sequence.extent
            self._arena.free(start, end - start)
            if self._caches(job):
                self._remains.left(start, sequence.hashes[: sequence.num_computed // self._pool.block_size], job.tenant)
            sequence.extent = None


def _parent(sequence: Generation, number: int) -> bytes:
    """What names everything before the `number`-th block."""
    return sequence.hashes[number - 1] if number else sequence.namespace
