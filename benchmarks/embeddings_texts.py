"""What the benchmarks of embeddings encode: questions of banking77 and clinc150 in ANAPHORA_DATA, or else made-up ones."""

from __future__ import annotations

import csv
import gzip
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def texts() -> list[str]:
    """All different, in a fixed order that has nothing to do with what they are about."""
    data = os.environ.get("ANAPHORA_DATA")
    if not data:
        print("ANAPHORA_DATA is not set: the texts are made up", file=sys.stderr)
        return made_up(20_000)
    with gzip.open(Path(data) / "banking77" / "train.csv.gz", "rt", encoding="utf-8", newline="") as rows:
        found = [row["text"] for row in csv.DictReader(rows)]
    with gzip.open(Path(data) / "clinc150" / "train_val.json.gz", "rt", encoding="utf-8") as parts:
        found += [text for part in json.load(parts).values() for text, _ in part]
    found = list(dict.fromkeys(text for text in found if text))
    random.Random(7).shuffle(found)
    return found


def made_up(num_texts: int) -> list[str]:
    """Questions put together from words; those that share words are near to each other."""
    chance = random.Random(7)
    verbs = ("open", "close", "move", "find", "pay", "change", "check", "cancel", "renew", "lose", "report", "copy", "lock")
    things = ("account", "card", "house", "garden", "table", "window", "letter", "train", "ticket", "song", "river", "lamp")
    places = ("London", "Madrid", "Kazan", "Lima", "Oslo", "Cairo", "Quito", "Osaka", "Turin", "Perth")
    when = ("today", "on Monday", "next year", "before noon", "in spring", "after work", "at night", "tomorrow")
    found: dict[str, None] = {}
    while len(found) < num_texts:
        verb, place, (thing, other) = chance.choice(verbs), chance.choice(places), chance.sample(things, 2)
        found[
            f"How do I {verb} the {thing} of {place} and the {other} number {chance.randrange(99)} {chance.choice(when)}?"
        ] = None
    return list(found)


def drawn(num_draws: int, repeats: float, pool: Sequence[str], chance: random.Random) -> list[str]:
    """Drawn by Zipf's law from as many of `pool` as make that share of the draws repeats of earlier ones."""
    low, high = 1, len(pool)
    while low < high:  # more texts to draw from, fewer repeats
        middle = (low + high) // 2
        if expected_repeats(num_draws, middle) > repeats:
            low = middle + 1
        else:
            high = middle
    weights = list(accumulate(1 / rank for rank in range(1, low + 1)))
    return chance.choices(pool[:low], cum_weights=weights, k=num_draws)


def expected_repeats(num_draws: int, num_texts: int) -> float:
    total = sum(1 / rank for rank in range(1, num_texts + 1))
    seen = sum(1 - (1 - 1 / (rank * total)) ** num_draws for rank in range(1, num_texts + 1))
    return 1 - seen / num_draws


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {
        "commit": commit,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "load": round(os.getloadavg()[0], 1),
        "texts": "banking77 and clinc150" if os.environ.get("ANAPHORA_DATA") else "made up",
    }
