"""Trains the verifier of the semantic level, and writes `levels/semantic/data/verifier.npz`.

    ANAPHORA_DATA=... python scripts/train_verifier.py [--to FILE] [--vectors FILE]

Needs lightgbm and the extra `embeddings`. The same rows, the same seeds and the same machine give the same file. What it is
trained on, and what that allows, is in docs/semantic-verifier.md. The threshold and the calibration are fixed here, on
questions that the model of their fold has not seen, before any test is looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from verifier_rows import Row, all_rows

from anaphora.backends.encoders.minilm import MiniLM
from anaphora.levels.semantic.features import NAMES, PLAIN_NAMES, features, plain_features
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.reading import read
from anaphora.levels.semantic.texts import prepare
from anaphora.levels.semantic.trees import table_of
from anaphora.levels.semantic.words import DATA

Array = npt.NDArray[np.float64]

FOLDS: Final = 4
SEEDS: Final = (1, 2)
TRAPS_ALLOWED: Final = 0.015
"""Of the traps written for this purpose, that may pass at the shipped threshold. Half of what is promised, as tests differ."""
SETTINGS: Final[dict[str, Any]] = {
    "objective": "binary", "learning_rate": 0.07, "num_leaves": 24, "min_data_in_leaf": 30, "feature_fraction": 0.5,
    "bagging_fraction": 0.7, "bagging_freq": 1, "lambda_l2": 5.0, "max_bin": 63, "num_threads": 1, "deterministic": True,
    "force_row_wise": True, "verbosity": -1,
}  # fmt: skip
TREES: Final = 200


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--to", type=Path, default=Path(str(DATA / "verifier.npz")))
    arguments.add_argument("--vectors", type=Path, help="a file to keep sentence vectors in between runs")
    options = arguments.parse_args()
    if not (data := os.environ.get("ANAPHORA_DATA")):
        sys.exit("ANAPHORA_DATA is not set: there is nothing to train on")
    encoded = Encoded(options.vectors)
    fit(all_rows(Path(data), encoded.encode), encoded, options.to)


def fit(rows: Sequence[Row], encoded: Encoded, target: Path) -> None:
    """Trains both models, prints what held-out rows say, and writes the file."""
    print(f"{len(rows):,} rows, {sum(row.same for row in rows):,} of them the same question")
    table, plain = matrices(rows, encoded)
    labels, weights = np.array([row.same for row in rows], dtype=np.float64), np.array([row.weight for row in rows])
    # What the guards refuse never comes to the verifier, but it is to know why.
    refused = np.array([refusal(prepare(row.a), prepare(row.b)) is not None for row in rows])
    weights[refused] *= 0.3
    saved: dict[str, npt.NDArray[Any]] = {}
    for name, matrix, columns in (("english", table, NAMES), ("plain", plain, PLAIN_NAMES)):
        scores = held_out(matrix, labels, weights, folds_of(rows))
        slope, offset = calibrate(scores, rows, refused)
        threshold = report(name, chance(scores, slope, offset), rows, refused)
        models = [train(matrix, labels, weights, seed, columns) for seed in SEEDS]
        dump = [tree for model in models for tree in model.dump_model()["tree_info"]]
        saved |= {f"{name}_{field}": values for field, values in table_of(dump, 1 / len(SEEDS)).items()}
        saved[f"{name}_calibration"] = np.array([slope, offset, threshold])
    np.savez_compressed(target, **saved)
    print(f"{target}: {target.stat().st_size:,} bytes")


class Encoded:
    """Sentence vectors of MiniLM, each text once."""

    def __init__(self, path: Path | None) -> None:
        self._encoder = MiniLM()
        self._path = path
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}
        if path is not None and path.exists():
            with np.load(path) as kept:
                self._vectors = dict(zip(kept["keys"].tolist(), kept["vectors"].astype(np.float32), strict=True))

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        keys = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._vectors}
        order = sorted(new, key=lambda key: (self._encoder.num_tokens(new[key]), key))
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            found = self._encoder.encode([new[key] for key in batch]).astype(np.float16).astype(np.float32)  # as they are kept
            self._vectors |= dict(zip(batch, found, strict=True))
            if start % 8_000 == 0:
                self._keep()
        if new:
            self._keep()
        return np.array([self._vectors[key] for key in keys])

    def _keep(self) -> None:
        if self._path is not None:
            np.savez(self._path, keys=np.array(list(self._vectors)), vectors=np.array(list(self._vectors.values()), np.float16))


def matrices(rows: Sequence[Row], encoded: Encoded) -> tuple[Array, Array]:
    """The features of every row: all, and those that need no English."""
    texts = list(dict.fromkeys(text for row in rows for text in (row.a, row.b)))
    vectors = dict(zip(texts, encoded.encode(texts), strict=True))
    began = time.process_time()
    table, plain = np.zeros((len(rows), len(NAMES))), np.zeros((len(rows), len(PLAIN_NAMES)))
    for place, row in enumerate(rows):
        a, b = read(prepare(row.a)), read(prepare(row.b))
        table[place] = features(a, b, float(vectors[row.a] @ vectors[row.b]))
        plain[place] = plain_features(a, b)
    print(f"features: {(time.process_time() - began) / len(rows) * 1e3:.2f} ms of CPU a row, texts prepared")
    return table, plain


def folds_of(rows: Sequence[Row]) -> npt.NDArray[np.intp]:
    """A fold for each group, by its name."""
    return np.array([int(hashlib.sha256(row.group.encode()).hexdigest(), 16) % FOLDS for row in rows])


def train(matrix: Array, labels: Array, weights: Array, seed: int, columns: list[str]) -> Any:
    import lightgbm

    data = lightgbm.Dataset(matrix, labels, weight=weights, feature_name=columns, free_raw_data=True)
    return lightgbm.train({**SETTINGS, "seed": seed}, data, num_boost_round=TREES)


def held_out(matrix: Array, labels: Array, weights: Array, folds: npt.NDArray[np.intp]) -> Array:
    """The score of each row by a model that has not seen its question."""
    scores = np.zeros(len(labels))
    columns = [str(number) for number in range(matrix.shape[1])]
    for fold in range(FOLDS):
        test = folds == fold
        if test.any() and not test.all():
            model = train(matrix[~test], labels[~test], weights[~test], SEEDS[0], columns)
            scores[test] = model.predict(matrix[test], raw_score=True)
    return scores


def judged(rows: Sequence[Row]) -> npt.NDArray[np.intp]:
    """Rows that resemble what is asked in earnest: questions and traps written for this purpose."""
    kinds = ("own near", "own minimal", "own reworded", "own trap minimal", "own trap reworded")
    return np.array([place for place, row in enumerate(rows) if row.kind in kinds], dtype=np.intp)


def chance(scores: Array, slope: float, offset: float) -> Array:
    return 1.0 / (1.0 + np.exp(-(slope * scores + offset)))


def calibrate(scores: Array, rows: Sequence[Row], refused: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Platt's: log-odds as a line of the score, of what guards let pass; both labels weigh the same before that."""
    places = judged(rows)
    x, y = scores[places], np.array([rows[place].same for place in places], dtype=np.float64)
    w = np.where(y > 0, 0.5 / max(1.0, y.sum()), 0.5 / max(1.0, (1 - y).sum())) * ~refused[places]
    design, beta = np.column_stack([x, np.ones_like(x)]), np.array([1.0, 0.0])
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-design @ beta))
        slope_of = design.T @ (w * (p - y)) + 1e-4 * beta
        beta = beta - np.linalg.solve(design.T @ (design * (w * p * (1 - p))[:, None]) + 1e-4 * np.eye(2), slope_of)
    return float(max(beta[0], 1e-3)), float(beta[1])


def report(name: str, alone: Array, rows: Sequence[Row], refused: npt.NDArray[np.bool_]) -> float:
    """Prints what held-out rows say, and returns the threshold to ship: the lowest at which few enough traps pass."""
    places, probabilities = judged(rows), np.where(refused, 0.0, alone)
    p, same = probabilities[places], np.array([rows[place].same for place in places])
    print(f"{name}: held out, guards and verifier")
    for allowed in (0.01, TRAPS_ALLOWED, 0.03, 0.05):
        at = threshold_for(p[~same], allowed)
        print(f"  {allowed:.1%} of the traps pass at {at:.3f}: {(p[same] >= at).mean():.1%} of the same questions are served")
    shipped = threshold_for(p[~same], TRAPS_ALLOWED)
    kinds = np.array([f"{row.kind}, {'same' if row.same else 'other'}" for row in rows])
    for kind in np.unique(kinds):
        chosen = np.flatnonzero(kinds == kind)
        served = f"{(alone[chosen] >= shipped).mean():6.1%}, with guards {(probabilities[chosen] >= shipped).mean():6.1%}"
        print(f"  {kind:40} {len(chosen):6} rows, guards refuse {refused[chosen].mean():6.1%}, served {served}")
    return shipped


def threshold_for(traps: Array, allowed: float) -> float:
    """The lowest threshold at which no larger share of traps passes."""
    ordered = np.sort(traps)[::-1]
    place = min(int(allowed * len(ordered)), len(ordered) - 1) if len(ordered) else 0
    return float(np.nextafter(ordered[place], 2.0)) if len(ordered) else 1.0


if __name__ == "__main__":
    main()
