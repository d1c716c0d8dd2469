"""How many questions with the same answer the guards of the semantic level let pass, and how many of the others they refuse.

Reads checklist-qqp, gptcache-mock and xquad under $ANAPHORA_DATA, the pairs of the package fow-cache where it is installed, and
the traps of the tests. No embedding and no verifier takes part: what is refused here never reaches them.

    pip install fow-cache
    ANAPHORA_DATA=/path/to/data python benchmarks/guards.py
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import math
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.texts import prepare

TRAPS = Path(__file__).parent.parent / "tests" / "levels" / "semantic"


class Pair(NamedTuple):
    group: str
    one: str
    other: str
    same: bool


class Share:
    """A share with its 95 % interval (Wilson)."""

    def __init__(self) -> None:
        self.hits = self.total = 0

    def add(self, hit: bool) -> None:
        self.hits += hit
        self.total += 1

    def __str__(self) -> str:
        if not self.total:
            return "-"
        share, z, n = self.hits / self.total, 1.96, self.total
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return f"{100 * share:5.1f} % [{100 * (middle - half):.0f}, {100 * (middle + half):.0f}] of {n}"


def main() -> int:
    root = os.environ.get("ANAPHORA_DATA")
    print(f"{'pairs':58} {'same answer, passed':26} {'other answer, refused':26} refused by")
    if root is None:
        print("ANAPHORA_DATA is not set: without checklist-qqp, gptcache-mock and xquad", file=sys.stderr)
    else:
        data = Path(root)
        report("checklist-qqp", checklist(data))
        report("gptcache-mock", mock(data))
        for language in ("en", "es", "ru"):
            report(f"xquad {language}", other_questions(data, language))
    if importlib.util.find_spec("fow_cache") is None:
        print("fow-cache is not installed: without its pairs", file=sys.stderr)
    else:
        report("fow-cache", fow())
    for language in ("en", "es", "ru"):
        report(f"own {language}", own(language))
    return 0


def report(name: str, pairs: Iterable[Pair]) -> None:
    pairs = list(pairs)
    groups = dict.fromkeys(pair.group for pair in pairs)
    for group in groups if len(groups) > 1 else ():
        line(f"{name}, {group}", [pair for pair in pairs if pair.group == group])
    line(name, pairs)
    preparing, refusing = timed(pairs)
    print(f"{'':58} prepare p50 {preparing:.0f} us of CPU, a pair p50 {refusing:.0f} us")


def line(name: str, pairs: list[Pair]) -> None:
    passed, refused = Share(), Share()
    names: Counter[str] = Counter()
    for pair in pairs:
        guard = refusal(prepare(pair.one), prepare(pair.other))
        if pair.same:
            passed.add(guard is None)
        else:
            refused.add(guard is not None)
        if guard is not None:
            names[guard] += 1
    by = ", ".join(f"{guard} {count}" for guard, count in names.most_common(6))
    print(f"{name:58} {passed!s:26} {refused!s:26} {by}")


def timed(pairs: list[Pair]) -> tuple[float, float]:
    preparing, refusing = [], []
    for pair in pairs[:: max(1, len(pairs) // 500)]:
        started = time.thread_time_ns()
        one, other = prepare.__wrapped__(pair.one), prepare.__wrapped__(pair.other)
        preparing.append((time.thread_time_ns() - started) / 2000)
        started = time.thread_time_ns()
        refusal(one, other)
        refusing.append((time.thread_time_ns() - started) / 1000)
    return sorted(preparing)[len(preparing) // 2], sorted(refusing)[len(refusing) // 2]


def checklist(data: Path) -> Iterator[Pair]:
    with gzip.open(data / "checklist-qqp" / "checklist_qqp.jsonl.gz", "rt", encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            yield Pair(row["capability"], row["a"], row["b"], bool(row["same"]))


def mock(data: Path) -> Iterator[Pair]:
    for row in json.loads((data / "gptcache-mock" / "mock_data.json").read_text(encoding="utf-8")):
        yield Pair("", row["origin"], row["similar"], True)


def other_questions(data: Path, language: str) -> Iterator[Pair]:
    """Different questions on one paragraph."""
    with gzip.open(data / "xquad" / f"xquad.{language}.json.gz", "rt", encoding="utf-8") as file:
        for article in json.load(file)["data"]:
            for paragraph in article["paragraphs"]:
                for one, other in combinations([question["question"] for question in paragraph["qas"]], 2):
                    yield Pair("", one, other, False)


def fow() -> Iterator[Pair]:
    for row in importlib.import_module("fow_cache").load_questions():
        yield Pair(f"{row['category']}, {row['style']}", row["a"], row["b"], row["same_answer"])


def own(language: str) -> Iterator[Pair]:
    rows = tomllib.loads((TRAPS / f"traps_{language}.toml").read_text(encoding="utf-8"))
    for _, one, other in rows["traps"]:
        yield Pair("", one, other, False)
    for one, other in rows["good"]:
        yield Pair("", one, other, True)


if __name__ == "__main__":
    sys.exit(main())
