"""What the semantic level's lookup takes: neighbours, guards and verifier, without the encoder. Prints JSON.

The questions are made of templates ("How do I cancel a subscription on a phone in Spain?"); their vectors are those of the
encoder `static`, turned into 384 dimensions, which changes no cosine. What is looked up are stored questions in other words
("what's the way to ..."), so that guards and verifier have near questions to work on, and once in four times one that is not
stored. `scan` is what the nearest question alone takes when all are compared in float32: the ratio says what the index saves.

    python benchmarks/semantic_lookup.py [--entries 100000] [--questions 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anaphora.backends.encoders.static import Static
from anaphora.clock import SystemClock
from anaphora.levels.semantic.comparing import compare, digest_of
from anaphora.levels.semantic.entries import Entries
from anaphora.levels.semantic.forms import form_of
from anaphora.levels.semantic.texts import prepare
from anaphora.levels.semantic.verifier import shipped
from anaphora.types import Key, Tenant

DIMENSIONS = 384
SPACE = b"benchmark"
VERBS = ("cancel", "change", "renew", "find", "pay", "return", "share", "delete", "move", "check", "print", "download", "pause")
THINGS = (
    *("subscription", "order", "invoice", "password", "address", "card", "ticket", "booking", "refund", "account", "photo"),
    *("contract", "delivery", "message", "receipt", "plan", "coupon", "backup", "folder", "report", "voucher", "calendar"),
)
WHERE = ("", "on a phone", "on the website", "by mail", "in the app", "at the counter", "on a tablet", "over the telephone")
LANDS = ("Spain", "France", "Germany", "Italy", "Japan", "Brazil", "Canada", "Norway", "India", "Kenya")
PLACES = ("", *(f"in {name}" for name in LANDS))
WHEN = ("", "before Monday", "after a move", "without a card", "for a friend", "as a student", "during a trip", "with a code")
ASKING = ("How do I {} a {}", "Where can I {} my {}", "Why can't I {} the {}", "Who may {} this {}")
REWORDED = ("how can i {} a {}", "where do i {} my {}", "what stops me if I {} the {}", "who can {} this {}")


def questions(num: int, templates: tuple[str, ...]) -> list[str]:
    """The first `num`, in an order that is the same for both templates."""
    parts = list(itertools.product(range(len(ASKING)), VERBS, THINGS, WHERE, PLACES, WHEN))
    random.Random(0).shuffle(parts)
    found = []
    for number in range(num):
        asking, verb, thing, *rest = parts[number % len(parts)]
        beside = "" if number < len(parts) else f"for file {number}"
        words = " ".join(word for word in (templates[asking].format(verb, thing), *rest, beside) if word)
        found.append(f"{words}?")
    return found


def vectors(texts: list[str]) -> NDArray[np.float32]:
    model = Static(threads=1)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMENSIONS, model.dimensions)))
    return np.concatenate(
        [(model.encode(texts[start : start + 1000]) @ turn.T).astype(np.float32) for start in range(0, len(texts), 1000)]
    )


async def run(num_entries: int, num_questions: int) -> dict[str, object]:
    stored = questions(num_entries, ASKING)
    places = vectors(stored)
    rng = random.Random(1)
    asked = [rng.randrange(num_entries) for _ in range(num_questions)]
    reworded = questions(num_entries, REWORDED)
    texts = [
        f"Is it true that number {number} is never even?" if number % 4 == 3 else reworded[index]
        for number, index in enumerate(asked)
    ]
    looked = vectors(texts)
    with tempfile.TemporaryDirectory() as folder:
        entries = Entries(
            Path(folder), dimensions=DIMENSIONS, encoder="static", clock=SystemClock(), max_entries=num_entries + 1
        )
        began_s = time.process_time()
        for number, (text, vector) in enumerate(zip(stored, places, strict=True)):
            prepared = prepare(text)
            entries.add(
                space=SPACE,
                digest=digest_of(prepared),
                key=Key(number.to_bytes(32, "big")),
                text=text,
                form=form_of(prepared),
                vector=vector,
                tenant=Tenant("a"),
                model="m",
            )
        entries._held.vectors.settle()
        built_s = time.process_time() - began_s
        verifier = shipped()
        wall, cpu, candidates, exact = [], [], 0, []

        async def one(number: int) -> None:
            nonlocal candidates

            async def vector() -> NDArray[np.float32]:
                return looked[number]

            at_s, cpu_s = time.perf_counter(), time.thread_time()
            found = await compare(prepare(texts[number]), [SPACE], entries, verifier, vector, lambda entry_id, content: False)
            wall.append(time.perf_counter() - at_s)
            cpu.append(time.thread_time() - cpu_s)
            candidates += found.candidate

        for number in range(num_questions):
            await one(number)
            if number % 20 == 0:
                at_s = time.thread_time()
                int(np.argmax(places @ looked[number]))
                exact.append(time.thread_time() - at_s)
        entries.close()
    return {
        "entries": len(stored),
        "wall_ms": _spread(wall),
        "cpu_ms": _spread(cpu),
        "scan_cpu_ms": round(statistics.median(exact) * 1e3, 3),
        "candidates": candidates / num_questions,
        "built_cpu_ms_per_entry": round(built_s / num_entries * 1e3, 3),
    }


def _spread(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {name: round(ordered[int(len(ordered) * share)] * 1e3, 3) for name, share in (("p50", 0.5), ("p99", 0.99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000])
    parser.add_argument("--questions", type=int, default=1000)
    args = parser.parse_args()
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "runs": [asyncio.run(run(num, args.questions)) for num in args.entries],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
