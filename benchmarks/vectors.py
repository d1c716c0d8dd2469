"""Nearest neighbours: how long a lookup takes, how many of the nearest it finds, what an entry costs. Prints JSON.

Vectors are synthetic, random directions added up: one for each topic (of a thousand vectors on average), one for each question
of it (of ten), one for each wording. So two wordings of a question have a cosine of about 0.82, two questions of a topic 0.5,
and others 0. What is looked up is a stored vector, moved to a cosine of 0.9. Processor times are of the one thread that looks;
"during_inserts" means that another thread adds so many vectors a second and its cells take them in meanwhile. "exact"
multiplies a float32 matrix by the question.

"texts" are real ones, of banking77, clinc150 and checklist-qqp in ANAPHORA_DATA, as the `static` encoder has them (256
dimensions); 500 of them are looked up among the others. Left out where ANAPHORA_DATA is unset.

    python benchmarks/vectors.py [--entries 100000 1000000] [--inserts-per-s 100]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anaphora.vectors import Vectors
from anaphora.vectors.cells import Cells
from anaphora.vectors.rows import Rows, encode, nearest

Floats = npt.NDArray[np.float32]

DIMENSIONS = 384
SPACE = b"benchmark"
TOPIC, QUESTION = 1000, 10
"""How many vectors there are of each, on average."""
OF_QUESTION, OF_WORDING = 0.8, 0.6
"""Lengths of what is added to a topic's direction."""
APART = 0.48
"""Length of what is added to a vector to make a question of it: the cosine is 0.9."""
_CHUNK = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--inserts-per-s", type=int, default=100)
    args = parser.parse_args()
    figures = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
        "few": [few(num) for num in (125, 250, 500, 1000, 2000, 4000)],
        "texts": texts(),
        "many": [many(num, args.questions, args.inserts_per_s) for num in args.entries],
    }
    print(json.dumps(figures, indent=2))


def few(num: int) -> dict[str, float]:
    """Microseconds of processor time for a lookup, one by one and in cells."""
    stored, questions = made(num, 300)
    codes = encode(stored)
    rows, cells = Rows(DIMENSIONS), Cells(DIMENSIONS)
    rows.extend(np.arange(num), codes)
    for number in range(num):
        cells.add(number, codes[number])
    return {
        "entries": num,
        "rows_us": spent_us(lambda place: nearest(rows.newest(num), questions[place], 4), len(questions)),
        "cells_us": spent_us(lambda place: cells.search(questions[place], 4), len(questions)),
        "exact_us": spent_us(lambda place: exact(stored, questions[place]), len(questions)),
    }


def many(num: int, num_questions: int, inserts_per_s: int) -> dict[str, object]:
    stored, questions = made(num, num_questions)
    before_bytes = resident_bytes()
    vectors = Vectors(DIMENSIONS)
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    for start in range(0, num, _CHUNK):
        stop = min(num, start + _CHUNK)
        vectors.add_many(SPACE, range(start, stop), stored[start:stop])
        vectors.settle()
    build_s, build_cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    figures: dict[str, object] = {
        "entries": num,
        "build_s": round(build_s),
        "build_cpu_us_per_entry": round(build_cpu_s / num * 1e6),
        "resident_bytes_per_entry": round((resident_bytes() - before_bytes) / num),
        **found(vectors, stored, questions),
        "lookup": lookups(vectors, questions),
    }
    exact_us = spent_us(lambda place: exact(stored, questions[place]), 20)
    figures["exact_us"] = exact_us
    figures["exact_to_lookup"] = round(exact_us / cpu_us(vectors, questions), 1)
    figures["during_inserts"] = during_inserts(vectors, questions, num, inserts_per_s)
    figures["file"] = filed(vectors)
    vectors.close()
    return figures


def texts() -> dict[str, float] | None:
    """Recall, and microseconds of processor time for a lookup."""
    if "ANAPHORA_DATA" not in os.environ:
        return None
    from anaphora.backends.encoders.static import Static

    read = sorted(questions_in(Path(os.environ["ANAPHORA_DATA"])))
    encoded = Static().encode(read)[np.random.default_rng(0).permutation(len(read))]
    stored, questions = np.ascontiguousarray(encoded[500:]), encoded[:500]
    vectors = Vectors(stored.shape[1])
    vectors.add_many(SPACE, range(len(stored)), stored)
    vectors.settle()
    figures = {"entries": len(stored), **found(vectors, stored, questions), "lookup_us": cpu_us(vectors, questions)}
    vectors.close()
    return figures


def questions_in(folder: Path) -> set[str]:
    with gzip.open(folder / "banking77" / "train.csv.gz", "rt") as file:
        read = {row[0] for row in csv.reader(file)}
    with gzip.open(folder / "clinc150" / "train_val.json.gz", "rt") as file:
        read |= {question for split in json.load(file).values() for question, _ in split}
    with gzip.open(folder / "checklist-qqp" / "checklist_qqp.jsonl.gz", "rt") as file:
        read |= {question for line in file for question in strings(json.loads(line))}
    return {question for question in read if len(question) > 8}


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def found(vectors: Vectors, stored: Floats, questions: Floats) -> dict[str, float]:
    """Shares of the nearest, and of the four nearest, that are among those found; how far similarities are off."""
    first = every = 0
    off: list[float] = []
    num = min(len(questions), 500)
    for question in questions[:num]:
        similarities = stored @ question
        right = np.argpartition(-similarities, 4)[:4]
        right = right[np.argsort(-similarities[right])]
        answer = vectors.search(SPACE, question, 4)
        ids = [identity for identity, _ in answer]
        first += int(right[0]) in ids
        every += len(set(ids) & set(right.tolist()))
        off += [similarity - float(similarities[identity]) for identity, similarity in answer]
    return {
        "recall_at_1": round(first / num, 4),
        "recall_at_4": round(every / num / 4, 4),
        "similarity_off_std": round(float(np.std(off)), 5),
        "similarity_off_max": round(float(np.abs(off).max()), 5),
    }


def lookups(vectors: Vectors, questions: Floats, until: Callable[[], bool] | None = None) -> dict[str, float]:
    """Until `until`, else each question once."""
    took: list[float] = []
    cpu = time.thread_time()
    place = 0
    while place < len(questions) if until is None else not until():
        begun = time.perf_counter()
        vectors.search(SPACE, questions[place % len(questions)], 4)
        took.append(time.perf_counter() - begun)
        place += 1
    cpu_s = time.thread_time() - cpu
    quantiles = np.quantile(took, [0.5, 0.99, 0.999, 1]) * 1e6
    names = ("p50_us", "p99_us", "p999_us", "max_us")
    return {
        "num": len(took),
        "cpu_us": round(cpu_s / len(took) * 1e6),
        **dict(zip(names, quantiles.round().tolist(), strict=True)),
    }


def during_inserts(vectors: Vectors, questions: Floats, num: int, per_s: int) -> dict[str, object]:
    """Lookups with and without inserts, taking turns."""
    fresh, _ = made(per_s * 12, 1)
    figures: dict[str, object] = {"inserts_per_s": per_s}
    for turn in range(2):
        done = threading.Event()
        begun = time.perf_counter()
        figures[f"without_{turn + 1}"] = lookups(vectors, questions, lambda begun=begun: time.perf_counter() - begun > 5)  # type: ignore[misc]

        def insert(turn: int = turn, done: threading.Event = done) -> None:
            for number in range(per_s * 5):
                place = turn * per_s * 5 + number
                vectors.add(SPACE, num + place, fresh[place])
                time.sleep(1 / per_s)
            done.set()

        thread = threading.Thread(target=insert)
        thread.start()
        figures[f"with_{turn + 1}"] = lookups(vectors, questions, done.is_set)
        thread.join()
        begun = time.perf_counter()
        vectors.settle()
        figures[f"merged_after_s_{turn + 1}"] = round(time.perf_counter() - begun, 2)
    return figures


def filed(vectors: Vectors) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="anaphora-bench-") as folder:
        path = Path(folder) / "vectors"
        begun_s = time.perf_counter()
        vectors.save(path)
        saved_s = time.perf_counter()
        loaded = Vectors.load(path, DIMENSIONS)
        loaded_s = time.perf_counter()
        size = path.stat().st_size
        loaded.close()
    return {
        "save_s": round(saved_s - begun_s, 2),
        "load_s": round(loaded_s - saved_s, 2),
        "bytes_per_entry": round(size / len(vectors)),
    }


def made(num: int, num_questions: int) -> tuple[Floats, Floats]:
    """Stored vectors and questions, of length one."""
    rng = np.random.default_rng(num)
    topics, of_questions = directions(rng, max(1, num // TOPIC)), directions(rng, max(1, num // QUESTION))
    stored = np.empty((num, DIMENSIONS), np.float32)
    for start in range(0, num, _CHUNK):
        size = min(num - start, _CHUNK)
        drawn = rng.integers(0, len(of_questions), size)
        meant = topics[drawn % len(topics)] + OF_QUESTION * of_questions[drawn]
        stored[start : start + size] = normalised(meant + OF_WORDING * directions(rng, size))
    questions = normalised(stored[rng.integers(0, num, num_questions)] + APART * directions(rng, num_questions))
    return stored, questions


def directions(rng: np.random.Generator, num: int) -> Floats:
    return normalised(rng.standard_normal((num, DIMENSIONS), np.float32))


def normalised(vectors: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def exact(stored: Floats, question: Floats) -> object:
    similarities = stored @ question
    return np.argpartition(-similarities, 4)[:4]


def spent_us(work: Callable[[int], object], num: int) -> float:
    work(0)
    begun = time.thread_time()
    for place in range(num):
        work(place)
    return round((time.thread_time() - begun) / num * 1e6, 1)


def cpu_us(vectors: Vectors, questions: Floats) -> float:
    return spent_us(lambda place: vectors.search(SPACE, questions[place], 4), len(questions))


def resident_bytes() -> int:
    """Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
