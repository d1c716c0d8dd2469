"""Questions asked one after the other of a cache that is empty at first, with what each way of deciding gives. Pure.

Ours is the real thing: `comparing.compare`, and the evidence of `risk`, with the labels that audits would give if comparisons
of answers were always right. A question asked in words that were computed before is the exact level's, whatever the way of
deciding, and counts for none.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import msgspec

from anaphora.levels.semantic.audits import keep
from anaphora.levels.semantic.comparing import Verifies, compare, digest_of
from anaphora.levels.semantic.evaluation.figures import at_most
from anaphora.levels.semantic.evaluation.kept import Kept, Vector, Vectors, space_of
from anaphora.levels.semantic.evaluation.questions import Wording, is_right
from anaphora.levels.semantic.risk import Audit, Evidence, Label, Policy, Serve
from anaphora.levels.semantic.texts import prepare
from anaphora.levels.semantic.vcache import Entry, Variance

EVERY_S = 10.0
"""Between two questions."""
ZIPF = 1.0


class Replayed(msgspec.Struct):
    """What one way of deciding gave."""

    way: str
    num_asked: int = 0
    """In words that were not computed before."""
    num_answerable: int = 0
    """There was a right answer."""
    num_found: int = 0
    """Something might have been given: no step said no."""
    num_found_wrong: int = 0
    num_served: int = 0
    num_wrong: int = 0
    num_audits: int = 0
    """Could have been given, and were computed all the same."""
    first_served: int | None = None
    """Questions asked until the first one that was given an answer, itself included."""
    labels_until: int | None = None
    """Of those, how many were compared."""
    missing: int | None = None
    """Where nothing was served: right ones more, none wrong, after which something would have been."""


class Summed(msgspec.Struct, frozen=True):
    """Several streams together."""

    way: str
    num_streams: int
    num_asked: int
    served: float
    """Of all that were asked."""
    hit_rate: float
    """Right ones, of those with a right answer."""
    num_found: int
    num_found_wrong: int
    num_served: int
    num_wrong: int
    wrong: float
    wrong_at_most: float
    worst: float
    """Of one stream."""
    audits: float
    """Of all that were asked."""
    first_served: list[int | None]
    labels_until: list[int | None]
    missing: list[int | None]


def drawn(wordings: Sequence[Wording], num: int, seed: int, *, exponent: float = ZIPF) -> Iterator[Wording]:
    """Topics by Zipf's law, in an order that the seed decides; then one of a topic's wordings, each as likely."""
    dice = random.Random(seed)
    topics: dict[str, list[Wording]] = {}
    for wording in wordings:
        topics.setdefault(wording.topic, []).append(wording)
    order = sorted(topics)
    dice.shuffle(order)
    shares = list(accumulate((rank + 1) ** -exponent for rank in range(len(order))))
    for topic in dice.choices(order, cum_weights=shares, k=num):
        yield dice.choice(topics[topic])


class _Cache:
    """What was computed."""

    def __init__(self, vectors: Vectors) -> None:
        self.kept = Kept(vectors)
        self._computed: set[tuple[str, str]] = set()
        self._meanings: set[str] = set()

    def is_repeat(self, asked: Wording) -> bool:
        return (asked.space, asked.text) in self._computed

    def answers(self, asked: Wording) -> bool:
        return asked.means in self._meanings

    def compute(self, asked: Wording, *, add: bool = True) -> int:
        self._computed.add((asked.space, asked.text))
        self._meanings.add(asked.means)
        return self.kept.add(asked) if add else 0


async def ours(
    stream: Sequence[Wording], vectors: Vectors, verifier: Verifies, *, policy: Policy, unrelated: float, seed: int
) -> Replayed:
    dice = random.Random(seed)
    told, cache, evidence = Replayed(f"ours, risk {policy.budget:.0%}"), _Cache(vectors), Evidence(policy)
    refuted: OrderedDict[tuple[int, bytes], None] = OrderedDict()
    num_labels = 0
    for place, asked in enumerate(stream):
        if cache.is_repeat(asked):
            continue
        told.num_asked += 1
        told.num_answerable += cache.answers(asked)
        prepared, at = prepare(asked.text), place * EVERY_S

        async def vector(text: str = asked.text) -> Vector:
            return vectors[text]

        spaces = [space_of(asked)]
        found = await compare(
            prepared, spaces, cache.kept, verifier, vector, lambda *pair: pair in refuted, unrelated=unrelated
        )
        if found.candidate and found.entry is not None and found.score is not None:
            wrong = not is_right(asked, cache.kept.wording(found.entry.id))
            told.num_found += 1
            told.num_found_wrong += wrong
            u = dice.random()
            outcome = evidence.decide(found.score, u, at)
            if isinstance(outcome, Serve):
                if told.first_served is None:
                    told.first_served, told.labels_until = told.num_asked, num_labels
                told.num_served += 1
                told.num_wrong += wrong
                continue
            told.num_audits += isinstance(outcome, Audit)
            evidence.add(Label(found.score, wrong, u, outcome.inclusion, at=at))
            num_labels += 1
            if wrong:
                keep(refuted, (found.entry.id, digest_of(prepared)), None)
        cache.compute(asked)
    if told.first_served is None:
        told.missing = min(rung.missing for rung in evidence.rungs(len(stream) * EVERY_S))
    return told


def by_cosine(way: str, stream: Sequence[Wording], vectors: Vectors, threshold: float) -> Replayed:
    told, cache = Replayed(way), _Cache(vectors)
    for asked in stream:
        if cache.is_repeat(asked):
            continue
        told.num_asked += 1
        told.num_answerable += cache.answers(asked)
        nearest = cache.kept.nearest(asked)
        if nearest is not None and nearest[1] >= threshold:
            _serve(told, wrong=not is_right(asked, cache.kept.wording(nearest[0])))
        else:
            cache.compute(asked)
    told.num_found, told.num_found_wrong = told.num_served, told.num_wrong
    return told


def by_vcache(stream: Sequence[Wording], vectors: Vectors, variance: Variance, *, budget: float, seed: int) -> Replayed:
    """Every question is compared with its nearest entry; it becomes one where that one's answer was wrong."""
    dice = random.Random(seed)
    told, cache = Replayed(f"vCache, δ {budget:.0%}"), _Cache(vectors)
    entries: dict[int, Entry] = {}
    for asked in stream:
        if cache.is_repeat(asked):
            continue
        told.num_asked += 1
        told.num_answerable += cache.answers(asked)
        nearest = cache.kept.nearest(asked)
        if nearest is None:
            entries[cache.compute(asked)] = Entry(variance)
            continue
        identity, cosine = nearest
        wrong = not is_right(asked, cache.kept.wording(identity))
        told.num_found += 1
        told.num_found_wrong += wrong
        if entries[identity].serves(cosine, dice.random(), budget):
            _serve(told, wrong=wrong)
            continue
        entries[identity].add(cosine, right=not wrong)
        added = cache.compute(asked, add=wrong)
        if wrong:
            entries[added] = Entry(variance)
    return told


def nearest_cosines(stream: Sequence[Wording], vectors: Vectors) -> list[float]:
    """Of every question with what was asked before, each wording once."""
    cache, cosines = _Cache(vectors), []
    for asked in stream:
        if cache.is_repeat(asked):
            continue
        nearest = cache.kept.nearest(asked)
        if nearest is not None:
            cosines.append(nearest[1])
        cache.compute(asked)
    return cosines


def _serve(told: Replayed, *, wrong: bool) -> None:
    if told.first_served is None:
        told.first_served = told.num_asked
    told.num_served += 1
    told.num_wrong += wrong


def summed(runs: Sequence[Replayed]) -> Summed:
    asked, served, wrong = (sum(getattr(run, name) for run in runs) for name in ("num_asked", "num_served", "num_wrong"))
    answerable = sum(run.num_answerable for run in runs)
    return Summed(
        way=runs[0].way,
        num_streams=len(runs),
        num_asked=asked,
        served=served / asked if asked else 0.0,
        hit_rate=(served - wrong) / answerable if answerable else 0.0,
        num_found=sum(run.num_found for run in runs),
        num_found_wrong=sum(run.num_found_wrong for run in runs),
        num_served=served,
        num_wrong=wrong,
        wrong=wrong / served if served else 0.0,
        wrong_at_most=at_most(wrong, served),
        worst=max(run.num_wrong / run.num_served if run.num_served else 0.0 for run in runs),
        audits=sum(run.num_audits for run in runs) / asked if asked else 0.0,
        first_served=[run.first_served for run in runs],
        labels_until=[run.labels_until for run in runs],
        missing=[run.missing for run in runs],
    )
