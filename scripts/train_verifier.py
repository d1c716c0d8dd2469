"""Trains the verifier of the semantic level, and writes `levels/semantic/data/verifier.npz`.

    ANAPHORA_DATA=... python scripts/train_verifier.py [--to FILE] [--vectors FILE]

Needs lightgbm and the extra `embeddings`. The same rows, the same seeds and the same machine give the same file. What it is
trained on, and what that allows, is in docs/semantic-verifier.md. Calibration and threshold are fixed here, before any test is
looked at: the calibration on questions that the model of their fold has not seen, the threshold on sources that a model has
not seen.
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
from verifier_languages import LANGUAGES, other_rows
from verifier_rows import Row, all_rows, seeded

from anaphora.backends.encoders.minilm import MiniLM
from anaphora.levels.semantic.evaluation.figures import at_most
from anaphora.levels.semantic.features import NAMES, PLAIN_NAMES, features, plain_features
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.reading import read
from anaphora.levels.semantic.texts import prepare
from anaphora.levels.semantic.trees import table_of
from anaphora.levels.semantic.words import DATA

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FOLDS: Final = 4
SEEDS: Final = (1, 2)
WRONG_ALLOWED: Final = 0.01
"""Of what is served at the shipped threshold, where the questions are of a source that the model has not seen: the upper end of
a one-sided 95 % interval, with as many traps as same questions asked."""
WEAK: Final = ("another intent", "weak", "weak appended")
"""Kinds whose label is a guess by intents. Trained on, and not judged by."""
WRITTEN: Final = ("own near", "own minimal", "own reworded", "own trap minimal", "own trap reworded")
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
    fit(all_rows(Path(data), encoded.encode), other_rows(seeded), encoded, options.to)


def fit(rows: Sequence[Row], others: Sequence[Row], encoded: Encoded, target: Path) -> None:
    """Trains both models, `others` for the plain one alone; prints what held-out rows say, and writes the file."""
    table, plain = matrices(rows, encoded)
    plain, both = np.vstack([plain, plain_matrix(others)]), [*rows, *others]
    # English is judged by what was written for it, and left out one source of questions at a time; statements are none.
    saved: dict[str, Any] = {
        **fitted("english", rows, table, NAMES, written(rows), ("own", "banking77", "clinc150", "checklist"), seen=("asked",)),
        **fitted("plain", both, plain, PLAIN_NAMES, np.array([row.source in LANGUAGES for row in both]), LANGUAGES),
    }
    np.savez_compressed(target, **saved)
    print(f"{target}: {target.stat().st_size:,} bytes")


def fitted(
    name: str,
    rows: Sequence[Row],
    matrix: Array,
    columns: list[str],
    judges: Flags,
    left_out: Sequence[str],
    seen: Sequence[str] = (),
) -> dict[str, npt.NDArray[Any]]:
    """What is saved of one model. `judges`: rows that resemble what it will be asked. `seen`: guards of what it has features
    for, so that it is trained, and its threshold found, as if they were not there."""
    print(f"{name}: {len(rows):,} rows, {sum(row.same for row in rows):,} of them the same question")
    labels, weights = np.array([row.same for row in rows], dtype=np.float64), np.array([row.weight for row in rows])
    # What the guards refuse never comes to the verifier, but it is to know why.
    refused = np.array([refusal(prepare(row.a), prepare(row.b)) not in (None, *seen) for row in rows])
    weights[refused] *= 0.3
    scores = held_out(matrix, labels, weights, folds_of(rows))
    slope, offset = calibrate(scores[judges], labels[judges], refused[judges])
    sources, certain = np.array([row.source for row in rows]), np.array([row.kind not in WEAK for row in rows])
    thresholds = []
    for source in left_out:
        mine, known = sources == source, sources != source
        if not mine.any() or not known.any():
            continue  # a sample
        unseen = train(matrix[known], labels[known], weights[known], SEEDS[0], columns).predict(matrix[mine], raw_score=True)
        chances, same = np.where(refused[mine], 0.0, chance(unseen, slope, offset)), labels[mine] == 1
        enough = lowest(chances[certain[mine] & same], chances[certain[mine] & ~same])
        print(f"  without {source}: of its {mine.sum():,} rows few enough are wrong from {enough:.4f}")
        thresholds.append(enough)
    threshold = max(thresholds, default=1.0)
    report(chance(scores, slope, offset), rows, refused, judges, threshold)
    models = [train(matrix, labels, weights, seed, columns) for seed in SEEDS]
    dump = [tree for model in models for tree in model.dump_model()["tree_info"]]
    table = {f"{name}_{field}": values for field, values in table_of(dump, 1 / len(SEEDS)).items()}
    return {**table, f"{name}_calibration": np.array([slope, offset, threshold])}


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


def plain_matrix(rows: Sequence[Row]) -> Array:
    return np.array([plain_features(read(prepare(row.a)), read(prepare(row.b))) for row in rows])


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


def written(rows: Sequence[Row]) -> Flags:
    """Rows that resemble what is asked in English: questions and traps written for this purpose, and near repeats."""
    return np.array([row.kind in WRITTEN for row in rows])


def chance(scores: Array, slope: float, offset: float) -> Array:
    return 1.0 / (1.0 + np.exp(-(slope * scores + offset)))


def calibrate(scores: Array, same: Array, refused: Flags) -> tuple[float, float]:
    """Platt's: log-odds as a line of the score, of what guards let pass; both labels weigh the same before that."""
    w = np.where(same > 0, 0.5 / max(1.0, same.sum()), 0.5 / max(1.0, (1 - same).sum())) * ~refused
    design, beta = np.column_stack([scores, np.ones_like(scores)]), np.array([1.0, 0.0])
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-design @ beta))
        slope_of = design.T @ (w * (p - same)) + 1e-4 * beta
        beta = beta - np.linalg.solve(design.T @ (design * (w * p * (1 - p))[:, None]) + 1e-4 * np.eye(2), slope_of)
    return float(max(beta[0], 1e-3)), float(beta[1])


def lowest(same: Array, traps: Array) -> float:
    """The lowest threshold at which few enough are wrong among what is served, with as many traps as same questions."""
    enough = 1.0
    for threshold in sorted(traps, reverse=True):
        # Just above this trap.
        passing, served = at_most(int((traps > threshold).sum()), len(traps)), float((same > threshold).mean())
        if passing <= WRONG_ALLOWED * (passing + served):
            enough = float(np.nextafter(threshold, 2.0))
        elif passing > WRONG_ALLOWED * (passing + 1.0):
            break  # too many, whatever is served
    return enough


def report(alone: Array, rows: Sequence[Row], refused: Flags, judges: Flags, shipped: float) -> None:
    """Prints what held-out rows say: groups that a model has not seen, of sources that it knows."""
    probabilities = np.where(refused, 0.0, alone)
    same = np.array([row.same for row in rows])
    print("  held out, guards and verifier, of what the calibration is made on")
    for at in (0.5, 0.7, 0.8, 0.9, 0.95, shipped):
        passing = probabilities >= at
        good, traps = passing[judges & same].mean(), passing[judges & ~same].mean()
        print(f"  from {at:.3f}: {good:.1%} of the same questions, {traps:.1%} of traps")
    kinds = np.array([f"{row.kind}, {'same' if row.same else 'other'}" for row in rows])
    for kind in np.unique(kinds):
        chosen = np.flatnonzero(kinds == kind)
        served = f"{(alone[chosen] >= shipped).mean():6.1%}, with guards {(probabilities[chosen] >= shipped).mean():6.1%}"
        print(f"  {kind:40} {len(chosen):6} rows, guards refuse {refused[chosen].mean():6.1%}, served {served}")


if __name__ == "__main__":
    main()
