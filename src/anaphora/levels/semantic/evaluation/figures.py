"""Shares, and how sure they are. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95


def at_most(num_wrong: int, num: int, confidence: float = CONFIDENCE) -> float:
    """The largest share of wrong ones that `num_wrong` of `num` still leaves possible (Clopper and Pearson, one-sided).

    It is for one look at the end. What is served is decided by bounds that hold at any time (`bounds`), which are wider.
    """
    if num == 0 or num_wrong >= num:
        return 1.0
    low, high = num_wrong / num, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _at_most_so_many(num_wrong, num, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most_so_many(most: int, num: int, share: float) -> float:
    """The probability of no more than `most` of `num`, each with the probability `share`."""
    if share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    terms = [
        math.lgamma(num + 1)
        - math.lgamma(k + 1)
        - math.lgamma(num - k + 1)
        + k * math.log(share)
        + (num - k) * math.log1p(-share)
        for k in range(most + 1)
    ]
    largest = max(terms)
    return math.exp(largest) * math.fsum(math.exp(term - largest) for term in terms)


def interval(flags: Sequence[bool], *, rounds: int = 1000, seed: int = 1) -> tuple[float, float]:
    """95 % interval of the share of true ones, by drawing them again."""
    if not flags:
        return 0.0, 1.0
    # To draw n of n with replacement, and count the true ones, is to draw from the binomial distribution.
    drawn = np.random.default_rng(seed).binomial(len(flags), sum(flags) / len(flags), rounds) / len(flags)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def loosest(scores: npt.ArrayLike, right: npt.ArrayLike, allowed: float) -> float:
    """The threshold with the most right ones among which at most `allowed` of all that reach it are wrong; infinity: none."""
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    if not len(values):
        return math.inf
    order = np.argsort(-values, kind="stable")
    values, wrong = values[order], np.cumsum(~truth[order])
    num = np.arange(1, len(values) + 1)
    last_of_its_value = np.append(values[1:] != values[:-1], True)
    kept = np.flatnonzero(last_of_its_value & (wrong <= allowed * num))
    return float(values[kept[-1]]) if len(kept) else math.inf
