"""How many good pairs the verifier serves, and how many traps.

Test pairs are the 600 of the package `fow-cache` (pip install fow-cache), which nothing here was trained or tuned on. At the
shipped threshold, with and without the guards, and swept; by kind; with bootstrap intervals. `--languages` tests Spanish and
Russian on questions of XQuAD, changed by rule. CheckList with a capability left out is part of what `scripts/train_verifier.py`
prints, as a capability is a group there.

    ANAPHORA_DATA=/path/to/data python benchmarks/verifier.py [--languages]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anaphora.backends.encoders.minilm import MiniLM
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.texts import normal_form, prepare
from anaphora.levels.semantic.verifier import Verifier

Array = npt.NDArray[np.float64]
ALLOWED = (0.01, 0.03, 0.05, 0.10)


class Pair(NamedTuple):
    a: str
    b: str
    same: bool
    kind: str


class Scored(NamedTuple):
    """One method's scores of all pairs."""

    name: str
    scores: Array
    threshold: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", action="store_true")
    options = parser.parse_args()
    try:
        from fow_cache.data import load_questions
    except ImportError:
        print("fow-cache is not installed: its pairs are skipped", file=sys.stderr)
    else:
        pairs = [
            Pair(item["a"], item["b"], item["same_answer"], f"{item['category']} {item['style']}") for item in load_questions()
        ]
        fow(pairs)
    data = os.environ.get("ANAPHORA_DATA")
    if options.languages and data is None:
        print("ANAPHORA_DATA is not set: the rest is skipped", file=sys.stderr)
        return 2
    if options.languages and data:
        languages(Path(data))
    return 0


def fow(pairs: Sequence[Pair]) -> None:
    verifier = Verifier.load()
    encoder = MiniLM()
    vectors = {text: encoder.encode([text])[0] for pair in pairs for text in (pair.a, pair.b)}
    cosine = np.array([float(vectors[pair.a] @ vectors[pair.b]) for pair in pairs])
    prepared = [(prepare(pair.a), prepare(pair.b)) for pair in pairs]
    scores = np.array([verifier.probability(a, b, float(s)) for (a, b), s in zip(prepared, cosine, strict=True)])
    equal = np.array([normal_form(pair.a) == normal_form(pair.b) for pair in pairs])
    refused = np.array([not same and refusal(a, b) is not None for (a, b), same in zip(prepared, equal, strict=True)])
    scores, cosine = np.where(equal, 1.0, scores), np.where(equal, 1.0, cosine)
    good = np.array([pair.same for pair in pairs])
    print(
        f"{good.sum()} good pairs, {(~good).sum()} traps; "
        f"equal normal form: {equal[good].mean():.1%} / {equal[~good].mean():.1%}"
    )
    print(
        f"guards alone keep {(~refused)[good].mean():.1%} of the good, "
        f"and let {(~refused)[~good].mean():.1%} of the traps pass\n"
    )
    methods = [
        Scored("cosine", cosine, None),
        Scored("cosine + guards", np.where(refused, -1.0, cosine), None),
        Scored("verifier", scores, verifier.threshold),
        Scored("verifier + guards", np.where(refused, -1.0, scores), verifier.threshold),
    ]
    for method in methods:
        table(method, good)
    for method in methods[2:]:
        by_kind(method, pairs)
    timing(verifier, prepared, cosine)


def table(method: Scored, good: Array) -> None:
    low, high = interval(lambda places: served_at(method.scores[places], good[places], 0.03), len(good))
    swept = "  ".join(f"{allowed:.0%}: {served_at(method.scores, good, allowed):.1%}" for allowed in ALLOWED)
    print(
        f"{method.name}: AUC {auc(method.scores, good):.3f}; "
        f"good served at most x of traps  {swept}  (3 %: {low:.0%}-{high:.0%})"
    )
    if method.threshold is not None:
        for threshold in (method.threshold, 0.5, 0.7, 0.8, 0.9, 0.95):
            at = method.scores >= threshold
            intervals = [
                interval(lambda places, of=of, at=at: at[places][of[places]].mean(), len(good)) for of in (good, ~good)
            ]  # type: ignore[misc]
            (a, b), (c, d) = intervals
            shipped = " (shipped)" if threshold == method.threshold else ""
            print(
                f"  p >= {threshold:.3f}{shipped}: good {at[good].mean():.1%} ({a:.0%}-{b:.0%}), "
                f"traps {at[~good].mean():.1%} ({c:.1%}-{d:.1%})"
            )


def by_kind(method: Scored, pairs: Sequence[Pair]) -> None:
    print(f"\n{method.name}, served at the shipped threshold, and at 3 % of traps")
    good = np.array([pair.same for pair in pairs])
    loose = threshold_at(method.scores, good, 0.03)
    groups: dict[str, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        groups[pair.kind].append(place)
    for kind, places in sorted(groups.items(), key=lambda item: (not pairs[item[1][0]].same, item[0])):
        at = method.scores[places]
        print(f"  {kind:24} {len(places):4}  {(at >= (method.threshold or 1)).mean():6.1%}  {(at >= loose).mean():6.1%}")
    print()


def threshold_at(scores: Array, good: Array, allowed: float) -> float:
    traps = np.sort(scores[~good])[::-1]
    return float(np.nextafter(traps[min(int(allowed * len(traps)), len(traps) - 1)], 2.0))


def served_at(scores: Array, good: Array, allowed: float) -> float:
    return float((scores[good] >= threshold_at(scores, good, allowed)).mean())


def interval(figure: Callable[[Any], float], size: int, rounds: int = 1000) -> tuple[float, float]:
    """95 %, by drawing the pairs again."""
    dice = np.random.default_rng(1)
    drawn = [figure(dice.integers(0, size, size)) for _ in range(rounds)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def auc(scores: Array, good: Array) -> float:
    more = (scores[good][:, None] > scores[~good][None]).mean()
    return float(more + 0.5 * (scores[good][:, None] == scores[~good][None]).mean())


def timing(verifier: Verifier, prepared: Sequence[Any], cosine: Array) -> None:
    """CPU time, each text prepared and read once before."""
    took = []
    for (a, b), similarity in zip(prepared, cosine, strict=True):
        began = time.thread_time()
        verifier.probability(a, b, float(similarity))
        took.append((time.thread_time() - began) * 1e3)
    print(f"CPU time a pair: p50 {np.percentile(took, 50):.3f} ms, p95 {np.percentile(took, 95):.3f} ms")


def languages(data: Path) -> None:
    verifier = Verifier.load()
    for language in ("es", "ru"):
        pairs = made_pairs(data, language, random.Random(1))
        kinds: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
        for pair in pairs:
            a, b = prepare(pair.a), prepare(pair.b)
            served = normal_form(pair.a) == normal_form(pair.b) or verifier.probability(a, b, 0.0) >= verifier.plain_threshold
            kinds[f"{'same' if pair.same else 'other'}: {pair.kind}"].append((served, served and refusal(a, b) is None))
        for kind, found in sorted(kinds.items()):
            alone, guarded = np.array(found).mean(axis=0)
            print(f"{language} {kind:32} {len(found):5}  served {alone:6.1%}, with guards {guarded:6.1%}")


def made_pairs(data: Path, language: str, dice: random.Random) -> list[Pair]:
    """Questions of XQuAD against themselves, a little changed, and against others on the same paragraph."""
    with gzip.open(data / f"xquad/xquad.{language}.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    thanks = {"es": ("Por favor, ", ", gracias"), "ru": ("Пожалуйста, ", ", спасибо")}[language]
    pairs = []
    vocabulary = [
        word
        for article in articles
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
        for word in re.findall(r"[^\W\d_]{5,}", entry["question"])
    ]
    for article in articles:
        for paragraph in article["paragraphs"]:
            asked = [entry["question"] for entry in paragraph["qas"]]
            for place, text in enumerate(asked):
                words = re.findall(r"[^\W\d_]{5,}", text)
                pairs.append(Pair(text, text.lower().rstrip("?"), True, "case and marks"))
                pairs.append(Pair(text, text.rstrip("?") + thanks[1], True, "thanks"))
                if words:
                    word = dice.choice(words)
                    pairs.append(
                        Pair(text, text.replace(word, word[:2] + word[3] + word[2] + word[4:], 1), True, "slip of the pen")
                    )
                    pairs.append(Pair(text, text.replace(word, dice.choice(vocabulary), 1), False, "one word for another"))
                    pairs.append(Pair(text, text.replace(word + " ", "", 1), False, "one word less"))
                if re.search(r"\d", text):
                    pairs.append(
                        Pair(
                            text,
                            re.sub(r"\d", lambda digit: str((int(digit.group()) + 3) % 10), text, count=1),
                            False,
                            "number",
                        )
                    )
                pairs += [Pair(text, other, False, "another on the paragraph") for other in asked[place + 1 :]]
    return [pair for pair in pairs if pair.a != pair.b]


if __name__ == "__main__":
    sys.exit(main())
