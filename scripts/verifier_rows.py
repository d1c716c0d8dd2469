"""The rows the verifier is trained on. Sources and their licences are in docs/semantic-verifier.md; none is share-alike,
so that the weights may be shipped. Questions of `fow-cache` and of Quora are never among them."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from verifier_edits import OTHER, SAME, edited, paired

Vectors = npt.NDArray[np.float32]
Encode = Callable[[Sequence[str]], Vectors]

SEED: Final = 20261122
OWN: Final = Path(__file__).parent / "questions"
SIGNS: Final = {"=": "base", "+": "minimal", "~": "reworded", "-": "trap minimal", "/": "trap reworded"}
NEAR: Final = 0.84
"""Two questions of one intent, each the other's nearest, with at least this cosine are taken for the same question."""


class Row(NamedTuple):
    """Two questions, and whether the answer to one answers the other."""

    a: str
    b: str
    same: bool
    group: str
    """What it was made from: no group is split between training and test."""
    kind: str
    weight: float = 1.0
    source: str = ""
    """Whose questions they are."""


def own_groups(folder: Path = OWN) -> list[tuple[str, list[tuple[str, str]]]]:
    """(file, [(kind, question)]) of the questions written for this purpose."""
    groups = []
    for path in sorted(folder.glob("*.txt")):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            lines = [(SIGNS[line[0]], line[2:].strip()) for line in block.splitlines() if line[:1] in SIGNS]
            if lines:
                groups.append((path.stem, lines))
    return groups


def own_rows(groups: list[tuple[str, list[tuple[str, str]]]], dice_of: Callable[[str], random.Random]) -> Iterator[Row]:
    """Every pair whose label is known; two traps may happen to ask the same, so they are not paired."""
    for file, lines in groups:
        name = f"own/{file}/{lines[0][1]}"
        dice = dice_of(name)
        same = [(kind, text) for kind, text in lines if not kind.startswith("trap")]
        traps = [(kind, text) for kind, text in lines if kind.startswith("trap")]
        for place, (_, one) in enumerate(same):
            for kind, other in same[place + 1 :]:
                yield Row(one, other, True, name, f"own {kind}" if place == 0 else "own inner", 6.0)
            for kind, other in traps:
                yield Row(
                    one, other, False, name, f"own {kind}" if place == 0 else "own inner trap", 3.0 if place == 0 else 2.0
                )
        for _, text in lines:
            if (near := edited(text, SAME[:5], dice)) is not None:
                yield Row(text, near[0], True, name, "own near", 2.0)
        for (_, one), (_, other) in [(dice.choice(same), dice.choice(traps)) for _ in range(3 if traps else 0)]:
            if (near := edited(one, SAME, dice)) is not None:
                yield Row(near[0], other, False, name, "own trap edited", 2.0)
        for _ in range(3):
            one, other = dice.choice(same)[1], dice.choice(same)[1]
            if one != other and (change := edited(other, OTHER, dice)) is not None:
                yield Row(one, change[0], False, name, f"own changed {change[1]}", 2.0)
            if one != other and (near := edited(other, SAME, dice)) is not None:
                yield Row(one, near[0], True, name, "own same edited", 2.0)


def intents(data: Path) -> dict[str, list[str]]:
    """Questions of banking77 and clinc150 by what they are about."""
    by_intent: dict[str, list[str]] = defaultdict(list)
    with gzip.open(data / "banking77/train.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_intent["banking " + row["category"]].append(" ".join(row["text"].split()))
    with gzip.open(data / "clinc150/train_val.json.gz", "rt", encoding="utf-8") as file:
        for text, intent in json.load(file)["train"]:
            by_intent["clinc " + intent].append(text)
    return by_intent


def edited_rows(texts: Sequence[str], dice: random.Random, source: str) -> Iterator[Row]:
    """Rule-made paraphrases and changes; a changed paraphrase is still a change."""
    for text in texts:
        near = edited(text, SAME, dice)
        if near is None:
            continue
        yield Row(text, near[0], True, text, f"{source} {near[1]}")
        again = edited(near[0], SAME, dice)
        if again is not None and dice.random() < 0.5:
            yield Row(text, again[0], True, text, f"{source} twice")
        change = edited(text, OTHER, dice)
        if change is not None:
            yield Row(text, change[0], False, text, f"{source} {change[1]}")
            if dice.random() < 0.6:
                yield Row(near[0], change[0], False, text, f"{source} {change[1]} edited")


def changed_rows(pairs: Sequence[tuple[str, str]], dice: random.Random, source: str) -> Iterator[Row]:
    """Paraphrases, the same with one change, and with something appended to both."""
    for one, other in pairs:
        yield Row(one, other, True, one, source, 2.0)
        change = edited(other, OTHER, dice)
        if change is not None:
            yield Row(one, change[0], False, one, f"{source} {change[1]}")
        a, b, same = paired(one, other, dice)
        yield Row(a, b, same, one, f"{source} appended")


def neighbours(by_intent: dict[str, list[str]], encode: Encode) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Mutual neighbours inside an intent; and nearest neighbours of another intent."""
    names = [(intent, text) for intent, texts in by_intent.items() for text in dict.fromkeys(texts)]
    vectors = encode([text for _, text in names])
    labels = np.unique([intent for intent, _ in names], return_inverse=True)[1]
    same: list[tuple[str, str]] = []
    other: list[tuple[str, str]] = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        inside = vectors[mine] @ vectors[mine].T
        np.fill_diagonal(inside, -1.0)
        inside[inside > 0.995] = -1.0
        best = inside.argmax(axis=1)
        same += [
            (names[mine[i]][1], names[mine[j]][1])
            for i, j in enumerate(best) if best[j] == i and i < j and inside[i, j] >= NEAR
        ]  # fmt: skip
        outside = vectors[mine] @ vectors.T
        outside[:, mine] = -1.0
        nearest = outside.argmax(axis=1)
        scores = outside[np.arange(len(mine)), nearest]
        other += [(names[mine[i]][1], names[nearest[i]][1]) for i in np.argsort(-scores)[: len(mine) // 6]]
    return same, other


def checklist(data: Path, per_test: int = 120) -> Iterator[Row]:
    """Pairs of the CheckList suite; the capability is the group."""
    taken: dict[str, int] = defaultdict(int)
    with gzip.open(data / "checklist-qqp/checklist_qqp.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            taken[row["test"]] += 1
            if taken[row["test"]] <= per_test:
                yield Row(
                    row["a"], row["b"], bool(row["same"]), f"checklist/{row['capability']}", f"checklist {row['capability']}"
                )


def mock(data: Path) -> list[tuple[str, str]]:
    """Statements on machine learning, and the same in other words."""
    pairs = json.loads((data / "gptcache-mock/mock_data.json").read_text(encoding="utf-8"))
    return [(pair["origin"], pair["similar"]) for pair in pairs]


def seeded(source: str) -> random.Random:
    """Each source has its own, so that a row added to one changes nothing in the others."""
    return random.Random(f"{SEED} {source}")


def all_rows(data: Path, encode: Encode) -> list[Row]:
    """Everything in English, in an order that depends on the seed alone."""
    by_intent = intents(data)
    texts = sorted({text for texts in by_intent.values() for text in texts if len(text) < 300})
    same, other = neighbours(by_intent, encode)
    rows = [row._replace(source="own") for row in own_rows(own_groups(), seeded)]
    ours = list(edited_rows(seeded("sample").sample(texts, 3_000), seeded("edited"), "edited"))
    ours += changed_rows(same, seeded("weak"), "weak")
    ours += [Row(one, another, False, one, "another intent") for one, another in other]
    banking = {text for intent, texts in by_intent.items() if intent.startswith("banking") for text in texts}
    rows += [row._replace(source="banking77" if row.group in banking else "clinc150") for row in ours]
    rows += [row._replace(source="mock") for row in changed_rows(mock(data), seeded("mock"), "mock")]
    rows += [row._replace(source="checklist") for row in checklist(data)]
    return [row for row in dict.fromkeys(rows) if row.a != row.b]
