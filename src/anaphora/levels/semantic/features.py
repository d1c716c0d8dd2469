"""What tells two questions apart, as numbers: what of one has no match in the other, and what the unmatched words have to do
with each other. Symmetric: each pair of one-sided values is given as the smaller and the larger one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Final

import numpy as np
import numpy.typing as npt

from anaphora.levels.semantic.lexicon import Lexicon, lexicon
from anaphora.levels.semantic.matching import RELATIONS, Match, likeness, same_words
from anaphora.levels.semantic.reading import COUNTER_PARTICLES, Reading, words_of
from anaphora.levels.semantic.slips import is_slip, is_typo

Row = list[float]


def features(a: Reading, b: Reading, similarity: float) -> Row:
    """In the order of `NAMES`."""
    match = same_words(a, b)
    row: Row = [similarity]
    row += _surface(a, b)
    row += _content(a, b, match, similarity)
    row += _lists(a, b)
    row += _order(a, b, match)
    return row


def plain_features(a: Reading, b: Reading) -> Row:
    """Those that need no lexicon of English words, in the order of `PLAIN_NAMES`."""
    match = same_words(a, b)
    typos = sum(is_typo(a.low[i], b.low[j]) for i in match.left for j in match.right)
    written, other = Counter(a.written), Counter(b.written)
    mine, theirs = list((written - other).elements()), list((other - written).elements())
    return [
        *_surface(a, b),
        *_both(len(match.left), len(match.right)),
        *_both(len(match.left) - typos, len(match.right) - typos),
        float(typos),
        len(match.shared) / max(1, len(a.low), len(b.low)),
        float(len(match.shared)),
        *_both(len(a.numbers - b.numbers), len(b.numbers - a.numbers)),
        *_both(len(a.names - b.names), len(b.names - a.names)),
        float(abs(a.negations - b.negations)),
        *_both(len(mine), len(theirs)),
        *_order(a, b, match)[:3],
        *_left_over(mine, theirs, lexicon(a.language or "en")),
    ]


def _left_over(mine: Sequence[str], theirs: Sequence[str], words: Lexicon) -> Row:
    """Of the words that only one has, those without a meaning of their own too: how many there are, slips of the pen and
    courtesies left out; and how many of them ask for something."""
    mine = [word for word in mine if word not in words.courtesy]
    theirs = [word for word in theirs if word not in words.courtesy]
    left = [word for word in mine if not any(is_slip(word, other) for other in theirs)]
    right = [word for word in theirs if not any(is_slip(word, other) for other in mine)]
    return [
        *_both(len(left), len(right)),
        *_both(sum(word in words.interrogatives for word in left), sum(word in words.interrogatives for word in right)),
    ]


def _both(one: float, other: float) -> tuple[float, float]:
    return (float(one), float(other)) if one <= other else (float(other), float(one))


def _share(one: Set[object], other: Set[object]) -> float:
    both = len(one & other)
    union = len(one) + len(other) - both
    return both / union if union else 1.0


def _surface(a: Reading, b: Reading) -> Row:
    return [
        *_both(a.num_tokens, b.num_tokens),
        *_both(len(a.low), len(b.low)),
        min(a.size, b.size) / max(1, a.size, b.size),
        _share(a.trigrams, b.trigrams),
        _share(a.bigrams, b.bigrams),
        _share(a.vocabulary, b.vocabulary),
    ]


SURFACE: Final = [
    "tokens_min",
    "tokens_max",
    "content_min",
    "content_max",
    "size_ratio",
    "trigrams",
    "bigrams",
    "token_overlap",
]


def _content(a: Reading, b: Reading, match: Match, similarity: float) -> Row:
    # What is small `dot` multiplies in half the time of `@`.
    alike: npt.NDArray[np.float32] = a.vectors.dot(b.vectors.T)
    cells: list[list[float]] = alike.tolist()
    left_credit = {place: (max(cells[place]), 0) for place in match.left}
    columns: list[tuple[float, ...]] = list(zip(*cells, strict=True)) if match.right else []
    right_credit = {place: (max(columns[place]), 0) for place in match.right}
    counts = dict.fromkeys(RELATIONS, 0)
    closest_conflict = 0.0
    for i in match.left:
        for j in match.right:
            held, credit, conflict = likeness(a.low[i], b.low[j])
            if not held:
                continue  # no more alike than their vectors, which is counted already
            for name in held:
                counts[name] += 1
            if credit is None:
                credit = cells[i][j]
            if credit > left_credit[i][0] or conflict:
                left_credit[i] = (max(credit, left_credit[i][0]), left_credit[i][1] | conflict)
            if credit > right_credit[j][0] or conflict:
                right_credit[j] = (max(credit, right_credit[j][0]), right_credit[j][1] | conflict)
            if conflict and min(a.weights[i], b.weights[j]) > closest_conflict:
                closest_conflict = min(a.weights[i], b.weights[j])
    mine = _side(a, match.left, left_credit)
    theirs = _side(b, match.right, right_credit)
    total_a, total_b = sum(a.weights) or 1.0, sum(b.weights) or 1.0
    shared = sum([a.weights[i] for i, _ in match.shared])
    sense = float(a.sense.dot(b.sense))
    row: Row = [
        sense,
        similarity - sense,
        shared,
        float(len(match.shared)),
        shared / max(total_a, total_b, 0.1),
        shared / max(min(total_a, total_b), 0.1),
        *_both(len(match.left), len(match.right)),
        closest_conflict,
        *(float(counts[name]) for name in RELATIONS),
        *_substituted(a, b, match, cells),
        *_phrases(a, b, match),
    ]
    for one, other in zip(mine, theirs, strict=True):
        row += _both(one, other)
    return row


def _side(reading: Reading, places: list[int], credit: dict[int, tuple[float, int]]) -> Row:
    """Of the words of one question that the other has not: how much is not made up for."""
    if not places:
        return list(_NOTHING_MISSING)
    missing = sorted((reading.weights[place] * (1.0 - credit[place][0]) for place in places), reverse=True)
    open_weights = [reading.weights[place] for place in places if credit[place][0] < 0.85]
    credits = sorted(credit[place][0] for place in places)
    weakest = min(places, key=lambda place: credit[place][0])
    known = sum(reading.weights) or 1.0
    return [
        sum(missing),
        sum(missing) / known,
        missing[0],
        missing[1] if len(missing) > 1 else 0.0,
        float(len(open_weights)),
        sum(open_weights),
        max(open_weights, default=0.0),
        credits[0],
        credits[1] if len(credits) > 1 else 1.0,
        sum(credits) / len(credits),
        reading.weights[weakest],
        weakest / max(1, len(reading.low) - 1),
        float(sum([1 for place in places if credit[place][1] & 2])),
        float(sum([1 for place in places if credit[place][1] & 4])),
        float(sum([1 for place in places if reading.low[place] in reading.names])),
        float(sum([1 for place in places if reading.unknown[place]])),
        float(sum([1 for place in places if reading.frame[place]])),
    ]


_NOTHING_MISSING: Final = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""What `_side` gives where every word has its match."""

SIDE: Final = [
    "missing", "missing_share", "missing_first", "missing_second", "open", "open_weight", "open_heaviest", "credit_least",
    "credit_second",
    "credit_mean", "weakest_weight", "weakest_place", "opposed", "siblings", "open_names", "open_unknown", "open_frame",
]  # fmt: skip


def _substituted(a: Reading, b: Reading, match: Match, cells: list[list[float]]) -> Row:
    """One word for one word, all else the same: the usual shape of both a synonym and a trap."""
    left = [place for place in match.left if not a.frame[place]]
    right = [place for place in match.right if not b.frame[place]]
    if len(left) != 1 or len(right) != 1:
        return [0.0, -1.0, -1.0, 0.0]
    i, j = left[0], right[0]
    around = (i > 0 and j > 0 and a.sequence[i - 1] == b.sequence[j - 1]) + (
        i + 1 < len(a.sequence) and j + 1 < len(b.sequence) and a.sequence[i + 1] == b.sequence[j + 1]
    )
    return [1.0, cells[i][j], min(a.weights[i], b.weights[j]), float(around)]


def _phrases(a: Reading, b: Reading, match: Match) -> Row:
    """What is left of both, each as one vector."""
    if not match.left or not match.right:
        return [-1.0, -1.0, -1.0]
    left = np.array([a.weights[i] for i in match.left], dtype=np.float32).dot(a.vectors[match.left])
    right = np.array([b.weights[j] for j in match.right], dtype=np.float32).dot(b.vectors[match.right])
    left_length, right_length = float(np.sqrt(left.dot(left))) + 1e-6, float(np.sqrt(right.dot(right))) + 1e-6
    whole = _both(float(left.dot(b.sense)) / left_length, float(right.dot(a.sense)) / right_length)
    return [float(left.dot(right)) / (left_length * right_length), *whole]


def _lists(a: Reading, b: Reading) -> Row:
    particles_a, particles_b = a.particles - b.particles, b.particles - a.particles
    quantifiers_a, quantifiers_b = a.quantifiers - b.quantifiers, b.quantifiers - a.quantifiers
    return [
        *_both(len(a.numbers - b.numbers), len(b.numbers - a.numbers)),
        float(len(a.numbers & b.numbers)),
        *_both(len(a.names - b.names), len(b.names - a.names)),
        float(len(a.names & b.names)),
        *_both(a.negations, b.negations),
        float((a.negations + b.negations) % 2),
        *_both(len(particles_a), len(particles_b)),
        float(sum(1 for one in particles_a for other in particles_b if frozenset((one, other)) in COUNTER_PARTICLES)),
        *_both(len(quantifiers_a), len(quantifiers_b)),
        float(sum(1 for one in quantifiers_a for other in quantifiers_b if frozenset((one, other)) in _COUNTER_QUANTIFIERS)),
        float("only" in quantifiers_a or "only" in quantifiers_b),
        float(a.kind == b.kind),
        _kinds(a.kind, b.kind),
        *_both(a.kind == "whether", b.kind == "whether"),
        float(len(a.modals ^ b.modals)),
        float(("may" in a.modals and "must" in b.modals) or ("must" in a.modals and "may" in b.modals)),
        float(("past" in a.modals) != ("past" in b.modals)),
        float(len(a.persons ^ b.persons)),
        float("you" in (a.persons ^ b.persons)),
    ]


_COUNTER_QUANTIFIERS: Final = frozenset(
    frozenset(pair.split("/"))
    for pair in words_of(
        "more/less most/least more/fewer first/last next/previous next/last always/never all/none all/no every/no many/few "
        "much/little all/some only/also one/two both/one once/twice half/double same/other same/another already/yet first/next "
        "all/one any/only all/only every/only both/either each/all"
    )
)


def _kinds(one: str, other: str) -> float:
    """0: the same; 1: one says little; 2: a yes or no, and something else; 3: different things are asked for."""
    if one == other:
        return 0.0
    if not one or not other or "what" in (one, other):
        return 1.0
    return 2.0 if "whether" in (one, other) else 3.0


LISTS: Final = [
    "numbers_min", "numbers_max", "numbers_shared", "names_min", "names_max", "names_shared", "negations_min", "negations_max",
    "negations_odd", "particles_min", "particles_max", "particles_opposed", "quantifiers_min", "quantifiers_max",
    "quantifiers_opposed",
    "only", "kind_same", "kinds", "whether_min", "whether_max", "modals", "may_must", "past", "persons", "you",
]  # fmt: skip


def _order(a: Reading, b: Reading, match: Match) -> Row:
    places = [other for _, other in match.shared]
    pairs = len(places) * (len(places) - 1) / 2
    turned = (
        sum(1 for i, one in enumerate(places) for other in places[i + 1 :] if one > other) if places != sorted(places) else 0
    )
    named = [other for mine, other in match.shared if a.low[mine] in a.names or a.content[mine].kind == "number"]
    turned_names = sum([1 for i, one in enumerate(named) for other in named[i + 1 :] if one > other])
    mine, theirs = dict(a.objects), dict(b.objects)
    others = [(what, theirs[particle]) for particle, what in a.objects if theirs.get(particle, what) != what]
    swapped, roles = len(others), 0
    if others:
        stems_a, stems_b = set(a.stems), set(b.stems)
        roles = sum([1 for what, other in others if what in stems_b and other in stems_a])
    compared = "than" in mine and "than" in theirs and mine["than"] != theirs["than"]
    passive = ("by" in a.particles) != ("by" in b.particles)
    return [
        float(turned),
        turned / pairs if pairs else 0.0,
        float(turned_names),
        float(swapped),
        float(roles),
        float(compared),
        float(passive),
    ]


ORDER: Final = ["turned", "turned_share", "turned_names", "objects_differ", "roles", "compared", "passive"]

NAMES: Final = [
    "similarity",
    *SURFACE,
    "sense", "similarity_over_sense", "shared_weight", "shared", "shared_of_longer", "shared_of_shorter", "left_min",
    "left_max",
    "conflict", *RELATIONS, "substituted", "substituted_alike", "substituted_weight", "substituted_around", "phrases",
    "phrase_whole_min", "phrase_whole_max",
    *(f"{name}_{end}" for name in SIDE for end in ("min", "max")),
    *LISTS,
    *ORDER,
]  # fmt: skip
PLAIN_NAMES: Final = [
    *SURFACE, "left_min", "left_max", "open_min", "open_max", "typo", "shared_share", "shared", "numbers_min", "numbers_max",
    "names_min",
    "names_max", "negations", "counts_min", "counts_max", *ORDER[:3],
    "over_min", "over_max", "over_asking_min", "over_asking_max",
]  # fmt: skip
