"""What remembering vectors saves and costs, without HTTP (`embeddings_http.py` has that). Prints JSON.

"cached": a batch of texts that are all known, against computing it with the same encoder, the texts sorted by length in pieces
of 32; through the level with each storage, and as a library. "batching": texts that come one at a time or many at once, with
what `batching` decides and without, and how long one question takes while a large job is being computed. "storage": bytes of a
vector, and how many of the ten nearest of 3,000 texts are still found when all vectors, those of the 500 questions too, were
stored; beside the storages of the level, 4 bits of each number, and principal components fitted on 2,500 other texts.

Both sides of a comparison take turns; times are the process's processor time, medians, where they are not "on the clock".

    [ANAPHORA_DATA=...] python benchmarks/embeddings.py [--models minilm,e5,static] [--parts cached,batching,storage]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import numpy.typing as npt
from embeddings_texts import about, texts

from anaphora.backends.encoders.base import Encoder
from anaphora.backends.encoders.encoding import Encoding
from anaphora.batching import BatchingOptions
from anaphora.build import embedding_level
from anaphora.clock import SystemClock
from anaphora.config import CacheConfig, Config, EmbeddingsConfig
from anaphora.levels.embedding import Encoded, Space, Storage
from anaphora.library import BlockingCache, Cache
from anaphora.registry import ENCODERS
from anaphora.tiers.base import ENTRY_OVERHEAD
from anaphora.types import LOCAL_TENANT

Floats = npt.NDArray[np.float32]

STORAGES: tuple[Storage, ...] = ("float16", "int8", "float32")
PIECE = 32
NUM_FITTED, NUM_STORED, NUM_QUESTIONS, NEAREST = 2500, 3000, 500, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,static")
    parser.add_argument("--parts", default="cached,batching,storage")
    parser.add_argument("--texts", type=int, default=256, help="in the batch that is known")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pool = texts()
    report: dict[str, Any] = {**about(), "rounds": args.rounds}
    for part in args.parts.split(","):
        for model in args.models.split(","):
            encoder = ENCODERS.load(model)(threads=1)
            report[f"{part} {model}"] = PARTS[part](encoder, pool, args)
            print(part, model, json.dumps(report[f"{part} {model}"]), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))
    return 0


def encoded(encoder: Encoder, some: Sequence[str]) -> Floats:
    """As one who has no batching does it: sorted by length, in pieces."""
    vectors = np.zeros((len(some), encoder.dimensions), np.float32)
    order = sorted(range(len(some)), key=lambda place: len(some[place]))
    for start in range(0, len(order), PIECE):
        piece = order[start : start + PIECE]
        vectors[piece] = encoder.encode([some[place] for place in piece])
    return vectors


def config(folder: str, storage: Storage = "float16") -> Config:
    return Config(cache=CacheConfig(dir=folder), embeddings=EmbeddingsConfig(storage=storage))


# -- what is known -----------------------------------------------------------------------------------------------------


def cached(encoder: Encoder, pool: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds for the whole batch."""
    batch = pool[: args.texts]
    with tempfile.TemporaryDirectory(prefix="anaphora-embeddings-") as folder:
        return asyncio.run(_cached(encoder, batch, folder, args.rounds))


async def _cached(encoder: Encoder, batch: list[str], folder: str, rounds: int) -> dict[str, Any]:
    def vectors(some: list[str]) -> Floats:
        return encoded(encoder, some)

    async def compute(some: list[str]) -> Encoded:
        return Encoded(vectors(some), [0] * len(some))

    async def computed() -> None:
        vectors(batch)

    space = Space(LOCAL_TENANT, encoder.name, encoder.fingerprint)
    levels = {storage: embedding_level(config(f"{folder}/{storage}", storage), SystemClock()) for storage in STORAGES}
    sides: dict[str, Callable[[], Awaitable[Any]]] = {"computed": computed}
    for storage, level in levels.items():
        sides[f"level {storage}"] = lambda level=level: level.embed(batch, space=space, compute=compute)  # type: ignore[misc]
    async with Cache(f"{folder}/cache") as cache:
        sides["library"] = lambda: cache.embed(batch, vectors, model="m")
        with BlockingCache(f"{folder}/blocking") as blocking:

            async def blocked() -> None:
                blocking.embed(batch, vectors, model="m")

            sides["library, blocking"] = blocked
            times: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds + 1):
                for side, work in sides.items():
                    for _ in range(1 if side == "computed" else 5):
                        started_s = time.process_time()
                        await work()
                        if number:  # the first one fills the caches
                            times[side].append(time.process_time() - started_s)
    for level in levels.values():
        await level.aclose()
    ms = {side: statistics.median(some) * 1000 for side, some in times.items()}
    return {side: {"ms": round(value, 2), "faster": round(ms["computed"] / value, 1)} for side, value in ms.items()}


# -- batching ----------------------------------------------------------------------------------------------------------


BATCHINGS = {
    "as it is": BatchingOptions(),
    "one by one": BatchingOptions(most_items=1),
    "waits 5 ms": BatchingOptions(most_wait_s=0.005),
    "large batches": BatchingOptions(most_tokens=1 << 14, most_items=512),
}


def batching(encoder: Encoder, pool: list[str], args: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(_batching(encoder, pool, args.rounds))


async def _batching(encoder: Encoder, pool: list[str], rounds: int) -> dict[str, Any]:
    encodings = {name: Encoding(lambda: encoder, options=options) for name, options in BATCHINGS.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in [*encodings, "no batching"]}

    def note(name: str, figure: str, value: float) -> None:
        found[name].setdefault(figure, []).append(value)

    for number in range(rounds):
        some = pool[number * 256 : (number + 1) * 256]
        for text in some[:32]:  # straight: what a thread and a queue add is the difference
            started_s = time.perf_counter()
            encoder.encode([text])
            note("no batching", "one at a time, ms on the clock", (time.perf_counter() - started_s) * 1000)
        for name, encoding in encodings.items():
            for text in some[:32]:
                started_s = time.perf_counter()
                await encoding.encode([text])
                note(name, "one at a time, ms on the clock", (time.perf_counter() - started_s) * 1000)
            used_s = time.process_time()
            await asyncio.gather(*(encoding.encode([text]) for text in some))
            note(name, "many at once, ms a text", (time.process_time() - used_s) / len(some) * 1000)
            job = asyncio.create_task(encoding.encode(some))
            for _ in range(8):
                await asyncio.sleep(0)  # until it is in the queue
            for text in pool[-4:]:
                started_s = time.perf_counter()
                await encoding.encode([text])
                note(name, "beside a job of 256, ms on the clock", (time.perf_counter() - started_s) * 1000)
                if job.done():
                    break
            await job
    for encoding in encodings.values():
        encoding.close()
    return {name: {figure: round(statistics.median(some), 2) for figure, some in of.items()} for name, of in found.items()}


# -- storage -----------------------------------------------------------------------------------------------------------


def storage(encoder: Encoder, pool: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    some = pool[: NUM_FITTED + NUM_STORED + NUM_QUESTIONS]
    vectors = encoded(encoder, some)
    fitted, stored, questions = np.split(vectors, [NUM_FITTED, NUM_FITTED + NUM_STORED])
    nearest = _nearest(questions, stored)
    rows = []
    for kind in STORAGES:
        kept, num_bytes = asyncio.run(_kept(kind, some[NUM_FITTED:], np.concatenate([stored, questions])))
        rows.append(_row(kind, num_bytes, nearest, stored, kept[: len(stored)], kept[len(stored) :]))
    rows.append(_row("4 bits", encoder.dimensions / 2, nearest, stored, _rounded(stored, 7), _rounded(questions, 7)))
    _, _, components = np.linalg.svd(fitted, full_matrices=False)
    for num in (128, 192):
        onto = components[:num].astype(np.float32)
        for name, size, kept_of in (("float16", 2, _halved), ("int8", 1, lambda some: _rounded(some, 127))):
            back = [kept_of(some @ onto.T) @ onto for some in (stored, questions)]
            rows.append(_row(f"{num} components, {name}", size * num, nearest, stored, *back))
    return rows


def _row(
    kind: str, num_bytes: float, nearest: npt.NDArray[np.intp], before: Floats, stored: Floats, questions: Floats
) -> dict[str, Any]:
    found = _nearest(questions, stored)
    same = [len(set(some) & set(others)) / NEAREST for some, others in zip(found, nearest, strict=True)]
    cosines = (_long(stored) * before).sum(axis=1)
    return {
        "storage": kind,
        "bytes": round(num_bytes),
        "recall": round(statistics.mean(same), 4),
        "least_cosine_with_itself": round(float(cosines.min()), 4),
    }


async def _kept(kind: Storage, some: list[str], vectors: Floats) -> tuple[Floats, float]:
    """What the level gives of them when they are known, and the bytes of one."""
    rows = dict(zip(some, vectors, strict=True))

    async def compute(missing: list[str]) -> Encoded:
        return Encoded(np.stack([rows[text] for text in missing]), [0] * len(missing))

    with tempfile.TemporaryDirectory(prefix="anaphora-embeddings-") as folder:
        level = embedding_level(config(folder, kind), SystemClock())
        try:
            space = Space(LOCAL_TENANT, "m", "")
            await level.embed(some, space=space, compute=compute)
            found = await level.embed(some, space=space, compute=compute)
            assert found.num_hits == len(some)
            in_memory = (await level.stats())["ram"]
            return found.vectors, in_memory.used_bytes / in_memory.num_entries - ENTRY_OVERHEAD
        finally:
            await level.aclose()


def _nearest(questions: Floats, stored: Floats) -> npt.NDArray[np.intp]:
    return np.argpartition(-(_long(questions) @ _long(stored).T), NEAREST, axis=1)[:, :NEAREST]


def _long(vectors: Floats) -> Floats:
    """At length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32), 1e-9)


def _rounded(vectors: Floats, steps: int) -> Floats:
    scales: Floats = np.abs(vectors).max(axis=1, keepdims=True) / steps
    rounded: Floats = np.rint(vectors / scales) * scales
    return rounded


def _halved(vectors: Floats) -> Floats:
    return vectors.astype(np.float16).astype(np.float32)


PARTS: dict[str, Callable[[Encoder, list[str], argparse.Namespace], Any]] = {
    "cached": cached,
    "batching": batching,
    "storage": storage,
}


if __name__ == "__main__":
    sys.exit(main())
