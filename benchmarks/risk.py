"""What three ways of deciding serve of the same simulated traffic, and how much of it is wrong. Prints JSON.

Ours serves by evidence on a verifier's score, vCache's policy learns every cached answer's own similarity, and a fixed
threshold on similarity is what most caches have. Questions are asked by Zipf's law; whether a cached answer suits a would-be
hit depends on its similarity to a threshold that is the answer's own. The verifier's score is a noisy sight of the true
probability.

    python benchmarks/risk.py [--hits 30000] [--runs 1] [--budget 0.01]

`served`: share of would-be hits that were served without being computed. `wrong`: share of those that were wrong. `audited`:
share of would-be hits that could have been served and were computed all the same. `wrong_worst`: of the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from statistics import fmean

import msgspec

from anaphora.levels.semantic.risk import Audit, Evidence, Label, Policy, Serve
from anaphora.levels.semantic.vcache import Entry, separable_variance

NUM_ANSWERS = 2_000
THRESHOLDS = (0.8, 0.9, 0.95, 0.98)
EVERY_S = 10.0
"""Between two would-be hits."""


class Hit(msgspec.Struct, frozen=True):
    """A would-be hit: of which answer, how similar, what the verifier says, and the truth."""

    answer: int
    similarity: float
    score: float
    wrong: bool


class Tally(msgspec.Struct):
    served: int = 0
    wrong: int = 0
    audited: int = 0


Traffic = Callable[[random.Random, int], Iterator[Hit]]


def steady(rng: random.Random, num_hits: int) -> Iterator[Hit]:
    return _traffic(rng, num_hits)


def overconfident(rng: random.Random, num_hits: int) -> Iterator[Hit]:
    """The verifier takes 0.6 for 0.97."""
    return _traffic(rng, num_hits, confidence=3.0)


def changing(rng: random.Random, num_hits: int) -> Iterator[Hit]:
    """From the middle on a tenth of all right answers is out of date, whatever they look like."""
    return _traffic(rng, num_hits, outdated=0.1)


TRAFFICS: dict[str, Traffic] = {"steady": steady, "overconfident": overconfident, "changing": changing}


def _traffic(rng: random.Random, num_hits: int, *, confidence: float = 1.0, outdated: float = 0.0) -> Iterator[Hit]:
    own = [rng.betavariate(16, 4) for _ in range(NUM_ANSWERS)]
    popularity = list(accumulate(1 / (rank + 1) for rank in range(NUM_ANSWERS)))
    for i, answer in enumerate(rng.choices(range(NUM_ANSWERS), cum_weights=popularity, k=num_hits)):
        same = rng.random() < 0.1
        similarity = 1.0 if same else round(rng.betavariate(12, 2.5), 3)
        logit = 8.0 if same else 40 * (similarity - own[answer])
        right = rng.random() < 1 / (1 + math.exp(-logit))
        if right and i > num_hits / 2 and rng.random() < outdated:
            right = False
        seen = confidence * (0.8 * logit + rng.gauss(0, 1))
        yield Hit(answer, similarity, 1.0 if same else 1 / (1 + math.exp(-seen)), not right)


def ours(rng: random.Random, hits: list[Hit], budget: float) -> Tally:
    evidence, tally = Evidence(Policy(budget=budget)), Tally()
    for i, hit in enumerate(hits):
        u, at = rng.random(), i * EVERY_S
        outcome = evidence.decide(hit.score, u, at)
        if isinstance(outcome, Serve):
            tally.served += 1
            tally.wrong += hit.wrong
        else:
            tally.audited += isinstance(outcome, Audit)
            evidence.add(Label(hit.score, hit.wrong, u, outcome.inclusion, at=at))
    return tally


def vcache(rng: random.Random, hits: list[Hit], budget: float) -> Tally:
    """The workload's own similarities make its variance."""
    variance = separable_variance([hit.similarity for hit in hits[:2_000]], seed=1)
    entries, tally = [Entry(variance) for _ in range(NUM_ANSWERS)], Tally()
    for hit in hits:
        if entries[hit.answer].serves(hit.similarity, rng.random(), budget):
            tally.served += 1
            tally.wrong += hit.wrong
        else:
            entries[hit.answer].add(hit.similarity, right=not hit.wrong)
    return tally


def fixed(hits: list[Hit], threshold: float) -> Tally:
    served = [hit for hit in hits if hit.similarity >= threshold]
    return Tally(len(served), sum(hit.wrong for hit in served))


def measured(num_hits: int, num_runs: int, budget: float) -> dict[str, dict[str, dict[str, float]]]:
    """By traffic, by way of deciding."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, traffic in TRAFFICS.items():
        tallies: dict[str, list[Tally]] = {}
        for seed in range(num_runs):
            hits = list(traffic(random.Random(seed), num_hits))
            tallies.setdefault("ours", []).append(ours(random.Random(seed), hits, budget))
            tallies.setdefault("vcache", []).append(vcache(random.Random(seed), hits, budget))
            for threshold in THRESHOLDS:
                tallies.setdefault(f"fixed {threshold}", []).append(fixed(hits, threshold))
        figures[name] = {way: _summed(runs, num_hits) for way, runs in tallies.items()}
    return figures


def _summed(runs: list[Tally], num_hits: int) -> dict[str, float]:
    shares = [run.wrong / run.served if run.served else 0.0 for run in runs]
    return {
        "served": round(fmean(run.served for run in runs) / num_hits, 4),
        "wrong": round(sum(run.wrong for run in runs) / max(1, sum(run.served for run in runs)), 5),
        "wrong_worst": round(max(shares), 5),
        "audited": round(fmean(run.audited for run in runs) / num_hits, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hits", type=int, default=30_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.01)
    options = parser.parse_args()
    print(json.dumps(measured(options.hits, options.runs, options.budget), indent=2))


if __name__ == "__main__":
    main()
