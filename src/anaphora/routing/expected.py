"""Whoever is expected to be done first: one score, in seconds, for every replica, and no rule beside it.

    queue       q   until those ahead of it are prefilled, or until its memory has room, whichever is later
  + prefill     p   of what the replica's cache does not hold, loads from slower places included
  + behind      what its prefill costs those who come behind it there:  r · p · (q + p/2) / (1 - b)
  + later       what it takes of the time that all replicas have left:  p / (1 - b)
  + answer      as long as answers are expected to be, at the speed of as many streams as there are then
  + overlap     what recent traffic there lets expect of those that come while it runs
  + others      what its prefill and its answer cost the streams that run there, by a small weight
  + unexplained how much later than expected first tokens came lately: somebody else's load, a slow machine
  + failures    how often it failed lately, in waits
  + new         1/(1 + n) · q for a replica of n answers

`behind` and `later` are what a greedy choice leaves out. Of r requests a second that come to the replica, those that come
while this one waits (q) are delayed by all of its prefill, those that come while it is prefilled by half of it on average;
where replicas are busy for a share b of their time, the queue lasts 1 / (1 - b) times as long. And whoever needs no certain
replica finds one idle less often. So computing elsewhere what is cached here must save more than it costs everybody, and long
prompts keep away from where many short ones wait.

Whatever is needed for it is learned (`timing`, `holdings`). That a conversation stays where it began, that a popular prefix
spreads when its holder's queue is longer than computing it elsewhere, and that a new replica fills gradually, are consequences.

With prices, `cost_weight` w makes the score (1 - w) * seconds + w * money * seconds_per_money.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from anaphora.routing.base import CacheEvent, Choice, Load, Question, Replica, RequestId
from anaphora.routing.holdings import Holdings, Trail
from anaphora.routing.inflight import InFlight, Sent
from anaphora.routing.rates import Decaying, gathered_s
from anaphora.routing.room import Room, whole_tokens
from anaphora.routing.timing import Pools, Prefill, prefill

_BEGAN_BEFORE_S = 5.0
"""Traffic counts as if it had been watched for so long when the first request comes: one request is no rate."""
_SAME_MOMENT_S = 0.002
"""First tokens that come so close to one another were computed in one step."""


class ExpectedOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cost_weight: float = 0.0
    """0: only time counts. 1: only money, and time between equals."""
    seconds_per_money: float = 1000.0
    """What a unit of money is worth in time, where both count."""
    later_weight: float = 1.0
    """What a second of the time that all replicas have left is worth."""
    others_weight: float = 0.02
    """How much a second of delay for those who are answered there already counts beside one's own."""
    overlap_s: float = 120.0
    """How far back traffic lets expect more of it."""
    memory_s: float = 20.0
    """How long delays and failures that nothing explains are remembered."""
    failure_s: float = 30.0
    """What a failure costs whoever meets it, in seconds."""
    count_slack_tokens: int = 256
    """How many tokens less than are there a replica may say it found in its cache: it counts in blocks of its own."""


class _Note(NamedTuple):
    trail: Trail
    features: Prefill
    prefill_s: float
    wait_s: float
    due_s: float
    """When it is expected to be complete."""
    prefilled_s: float
    """Of all prefills of the replica until this one's first token."""
    crowded: bool
    """It had to wait for memory: how long its first token took says nothing of prefill."""
    known: bool
    """How fast the pool is was known when it was sent. If not, its times are guesses."""


class _Fleet(NamedTuple):
    """Of all replicas that are open, lately."""

    busy: float
    """Share of their time that they spend on prefills; at most nine tenths."""
    watched: float
    """Share of what sums over recent traffic come to that they have come to yet: less than all of it at the beginning."""
    late_s: float
    """How much later than expected a first token came on average: what is late everywhere tells nothing of one of them."""
    stretch: Mapping[str, float]
    """Of pools that have given no first token yet: how many times longer than was guessed it takes."""


class _State:
    """What is known of one replica."""

    def __init__(self, options: ExpectedOptions) -> None:
        self.holdings = Holdings()
        self.started_s: float | None = None
        self.num_answers = 0
        self.last_turn = 0
        self.room = Room()
        self.last_first_s = 0.0
        self.departing: list[_Note] = []
        self.departing_from_s = 0.0
        self.prefilled_s = 0.0
        self.recent_s = Decaying(options.overlap_s)
        self.recent_requests = Decaying(options.overlap_s)
        self.late_s = Decaying(options.memory_s)
        self.late_weight = Decaying(options.memory_s)
        self.failures = Decaying(options.memory_s)
        self.foreign_waiting = Decaying(options.memory_s)
        self.foreign_running = Decaying(options.memory_s)


class Expected:
    def __init__(self, options: ExpectedOptions | None = None) -> None:
        self._options = options or ExpectedOptions()
        self.in_flight: InFlight[_Note] = InFlight()
        self._states: dict[str, _State] = {}
        self._pools = Pools()
        self._turn = 0
        self._mean_prefill_s = 0.0
        self._began_s: float | None = None

    # -- choosing ------------------------------------------------------------------------------------------------------

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        best: tuple[float, float, int] | None = None
        chosen: tuple[str, float, int, dict[str, float]] | None = None
        scores: dict[str, float] = {}
        fleet = self._fleet(replicas, now_s)
        for replica in replicas:
            state = self._state(replica)
            if not replica.open:
                continue
            own_s, cached, parts, money = self._estimate(question, replica, state, fleet, now_s)
            seconds = sum(parts.values())
            weight = self._options.cost_weight
            score = (1 - weight) * seconds + weight * money * self._options.seconds_per_money
            scores[replica.name] = score
            rank = (score, seconds, state.last_turn)
            if best is None or rank < best:
                best = rank
                chosen = (replica.name, own_s, cached, parts)
        if chosen is None:
            return None
        name, own_s, cached, parts = chosen
        return Choice(name, own_s, cached, parts, scores)

    def _fleet(self, replicas: Sequence[Replica], now_s: float) -> _Fleet:
        states = [self._state(replica) for replica in replicas if replica.open]
        recent_s = sum(state.recent_s(now_s) for state in states)
        late_s, weight = sum(state.late_s(now_s) for state in states), sum(state.late_weight(now_s) for state in states)
        overlap_s, began_s = self._options.overlap_s, now_s if self._began_s is None else min(now_s, self._began_s)
        watched = gathered_s(overlap_s, now_s - began_s + _BEGAN_BEFORE_S) / overlap_s
        busy = min(0.9, recent_s / (watched * overlap_s * max(1, len(states))))
        return _Fleet(busy, watched, late_s / weight if weight > 0 else 0.0, self._stretch(replicas, now_s))

    def _stretch(self, replicas: Sequence[Replica], now_s: float) -> dict[str, float]:
        """Whoever waits longest for a pool's very first token says how slow it is at least; expected is that it takes as long
        again, there and at all of its kind."""
        stretch: dict[str, float] = {}
        for replica in replicas:
            if not replica.open or self._pools.known(replica.name):
                continue
            head = next((one for one in self.in_flight.of(replica.name) if one.first_s is None), None)
            if head is not None:
                guess_s = self._pools.of(replica.name).prefill_s(replica.name, head.note.features)
                times = 2 * (now_s - head.began_s) / max(guess_s, _SAME_MOMENT_S)
                stretch[replica.pool] = max(stretch.get(replica.pool, 1.0), times)
        return stretch

    def _estimate(
        self, question: Question, replica: Replica, state: _State, fleet: _Fleet, now_s: float
    ) -> tuple[float, int, dict[str, float], float]:
        """(seconds until it is complete, cached tokens, parts of the score, money)"""
        options, timing = self._options, self._pools.of(replica.name)
        match = state.holdings.match(question)
        cached = min(match.num_tokens, question.num_tokens - 1)
        sent = self.in_flight.of(replica.name)
        decoding = sum(1 for one in sent if one.first_s is not None)
        foreign = state.foreign_running(now_s)

        features = prefill(question.num_tokens, cached, sum(match.slower.values()), decoding)
        stretch = fleet.stretch.get(replica.pool, 1.0)
        prefill_s = stretch * timing.prefill_s(replica.name, features)
        queue_s = self._queue_s(question, replica, state, sent, stretch, now_s)
        queue_s += state.foreign_waiting(now_s) * self._mean_prefill_s
        # Whoever runs there now is, on average, half way through: half of them are company for the whole answer.
        beside = len(sent) + foreign
        context = state.room.whole_tokens / 2 + question.num_tokens
        token_s = timing.token_s(replica.name, beside / 2 + 1, context)
        answer_s = question.output_tokens * token_s
        alone_s = timing.token_s(replica.name, beside / 2, state.room.whole_tokens / 2)
        overlap = options.overlap_s / answer_s if answer_s > 0 else 0.0
        stalled_s = (decoding + foreign) * (timing.stall * prefill_s + question.output_tokens * (token_s - alone_s))
        requests_per_s = state.recent_requests(now_s) / (fleet.watched * options.overlap_s)
        behind = requests_per_s * (queue_s + prefill_s / 2) / (1 - fleet.busy)
        late_s = max(0.0, (state.late_s(now_s) + 4 * fleet.late_s) / (4 + state.late_weight(now_s)))
        failures = state.failures(now_s)
        parts = {
            "queue": queue_s,
            "prefill": prefill_s,
            "behind": behind * prefill_s,
            "later": options.later_weight * prefill_s / (1 - fleet.busy),
            "answer": answer_s,
            "overlap": state.recent_s(now_s) / (1 + overlap),
            "others": options.others_weight * stalled_s,
            "unexplained": late_s,
            "failures": options.failure_s * failures / (1 + failures),
            "new": queue_s / (1 + state.num_answers),
        }
        price = replica.price
        money = price.input * (question.num_tokens - cached) + price.cached * cached + price.output * question.output_tokens
        return queue_s + prefill_s + answer_s + late_s, cached, parts, money

    def _queue_s(
        self, question: Question, replica: Replica, state: _State, sent: Sequence[Sent[_Note]], stretch: float, now_s: float
    ) -> float:
        timing = self._pools.of(replica.name)
        drain_s = 0.0
        head = True
        for one in sent:
            if one.first_s is not None:
                continue
            if replica.obeys_priorities and one.question.priority < question.priority and not head:
                continue
            note = one.note
            left_s = note.prefill_s if note.known else stretch * timing.prefill_s(replica.name, note.features)
            if head:
                # What was computed of it already counts; once it is late, it is expected to be late for as long again.
                left_s = abs(left_s - (now_s - max(one.began_s, state.last_first_s)))
                head = False
            drain_s += left_s
        return max(drain_s, self._room_s(question, replica, state, sent, now_s))

    def _room_s(self, question: Question, replica: Replica, state: _State, sent: Sequence[Sent[_Note]], now_s: float) -> float:
        """Until those there have given back what the question needs of memory."""
        if replica.capacity_tokens is None:
            return 0.0
        room = state.room
        lacking: float = room.taken_tokens + room.needed_tokens(question) - replica.capacity_tokens
        if lacking <= 0:
            return 0.0
        room_s = 0.0
        share = room.taken_tokens / max(1, room.whole_tokens)  # of what each would give back if nothing were shared
        for one in sorted(sent, key=lambda one: one.note.due_s):
            room_s = abs(one.note.due_s - now_s)
            lacking -= share * whole_tokens(one.question)
            if lacking <= 0:
                break
        return room_s

    # -- learning ------------------------------------------------------------------------------------------------------

    def began(self, request: RequestId, question: Question, choice: Choice, now_s: float) -> None:
        self._began_s = now_s if self._began_s is None else self._began_s
        name = choice.replica
        state, timing = self._states[name], self._pools.of(name)
        decoding = sum(1 for one in self.in_flight.of(name) if one.first_s is not None)
        match = state.holdings.match(question)
        features = prefill(question.num_tokens, match.num_tokens, sum(match.slower.values()), decoding)
        prefill_s = timing.prefill_s(name, features)
        capacity = state.holdings.capacity_tokens
        state.room.take(question)
        crowded = capacity is not None and state.room.taken_tokens > capacity and self.in_flight.count(name) > 0
        trail = state.holdings.sent(question)
        expected_s = choice.expected_s or 0.0
        wait_s = choice.reasons.get("queue", 0.0)
        known = self._pools.known(name)
        note = _Note(trail, features, prefill_s, wait_s, now_s + expected_s, state.prefilled_s, crowded, known)
        self.in_flight.began(request, Sent(question, choice, now_s, note))
        state.recent_s.add(prefill_s, now_s)
        state.recent_requests.add(1.0, now_s)
        self._mean_prefill_s += 0.02 * (prefill_s - self._mean_prefill_s)
        self._turn += 1
        state.last_turn = self._turn

    def first_token(self, request: RequestId, now_s: float) -> None:
        sent = self.in_flight[request]
        if sent.first_s is not None:
            return
        sent.first_s = now_s
        name, note = sent.choice.replica, sent.note
        state = self._states.get(name)
        if state is None:
            return
        state.holdings.settled(note.trail)
        self._learn_prefill(name, state, now_s)
        if not state.departing:
            state.departing_from_s = max(sent.began_s, state.last_first_s)
        state.departing.append(note)
        state.last_first_s = now_s
        if note.known:
            state.late_s.add(now_s - sent.began_s - note.wait_s - note.prefill_s, now_s)
            state.late_weight.add(1.0, now_s)
        state.prefilled_s += note.prefill_s
        left_s = note.due_s - sent.began_s - note.wait_s - note.prefill_s
        sent.note = note._replace(due_s=now_s + max(0.0, left_s), prefilled_s=state.prefilled_s)

    def _learn_prefill(self, name: str, state: _State, now_s: float) -> None:
        """Prompts are prefilled one after the other: each took from the one before it, or from when it came."""
        if not state.departing or now_s - state.last_first_s <= _SAME_MOMENT_S:
            return
        took_s = state.last_first_s - state.departing_from_s
        if took_s > 0 and not any(note.crowded for note in state.departing):
            whole = state.departing[0].features
            for note in state.departing[1:]:
                whole += note.features
            self._pools.prefilled(name, whole, took_s)
        state.departing = []

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        sent = self.in_flight.over(request)
        name, note = sent.choice.replica, sent.note
        state = self._states.get(name)
        if state is None:
            return
        self._learn_prefill(name, state, now_s)
        state.num_answers += 1
        state.room.give(sent.question)
        slack = self._options.count_slack_tokens
        state.holdings.answered(sent.question, note.trail, output_tokens, cached_tokens, slack)
        if sent.first_s is not None and output_tokens > 1 and now_s > sent.first_s:
            token_s = (now_s - sent.first_s) / (output_tokens - 1)
            share = (state.prefilled_s - note.prefilled_s) / (now_s - sent.first_s) * token_s
            beside = len(self.in_flight.of(name)) + 1
            context = state.room.whole_tokens + whole_tokens(sent.question)
            self._pools.decoded(name, beside, context, share, token_s)

    def failed(self, request: RequestId, now_s: float, *, fault: bool = True) -> None:
        sent = self.in_flight.over(request)
        state = self._states.get(sent.choice.replica)
        if state is None:
            return
        state.room.give(sent.question)
        if sent.first_s is None:
            state.holdings.failed(sent.question, sent.note.trail)
        if fault:
            state.failures.add(1.0, now_s)

    def events(self, replica: str, events: Sequence[CacheEvent], now_s: float) -> None:
        self._states.setdefault(replica, _State(self._options)).holdings.events(events)

    def load(self, replica: str, load: Load, now_s: float) -> None:
        """Requests there that are not ours."""
        state = self._states.get(replica)
        if state is None:
            return
        sent = self.in_flight.of(replica)
        waiting = sum(1 for one in sent if one.first_s is None)
        for known, foreign in (
            (state.foreign_waiting, max(0, load.waiting - waiting)),
            (state.foreign_running, max(0, load.running + min(0, load.waiting - waiting) - (len(sent) - waiting))),
        ):
            known.add(foreign - known(now_s), now_s)

    def removed(self, replica: str) -> None:
        self._states.pop(replica, None)
        self._pools.removed(replica)

    def _state(self, replica: Replica) -> _State:
        state = self._states.get(replica.name)
        if state is None:
            state = self._states[replica.name] = _State(self._options)
        if state.started_s is None:
            for one in self.in_flight.of(replica.name):
                state.room.take(one.question)
        elif replica.started_s != state.started_s:
            state.num_answers = 0
            state.holdings.clear()
        state.started_s = replica.started_s
        state.holdings.capacity_tokens = replica.capacity_tokens
        self._pools.joins(replica.name, replica.pool)
        return state
