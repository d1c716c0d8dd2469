"""Boosted trees, read from arrays: the score of one row in some 50 µs, without the library that trained them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FIELDS = ("features", "thresholds", "next", "roots", "values")


class Trees:
    """All trees in one table. A node compares one feature with a threshold; `next` has where to go if it is larger, and if it
    is not. Leaves lead to themselves, so that all trees are walked in step, as far as the deepest one goes."""

    def __init__(self, table: Mapping[str, npt.NDArray[Any]]) -> None:
        self._features = table["features"].astype(np.intp)
        self._thresholds = table["thresholds"].astype(np.float64)
        self._next = table["next"].astype(np.intp).ravel()
        self._roots = table["roots"].astype(np.intp)
        self._values = table["values"].astype(np.float64)
        self._depth = _depth(self._next.reshape(-1, 2), self._roots)

    def score(self, row: Sequence[float]) -> float:
        """The sum of what the trees say, in log-odds."""
        goes = (np.array(row, dtype=np.float64)[self._features] <= self._thresholds).view(np.int8)
        step = self._next[2 * np.arange(len(goes)) + goes]
        place = self._roots
        for _ in range(self._depth):
            place = step[place]
        return float(self._values[place].sum())


def table_of(dump: Sequence[Mapping[str, Any]], scale: float) -> dict[str, npt.NDArray[Any]]:
    """From LightGBM's `dump_model()["tree_info"]`. Values are multiplied by `scale`, as several models are averaged."""
    features, thresholds, following, values, roots = [], [], [], [], []

    def add(node: Mapping[str, Any]) -> int:
        place = len(features)
        features.append(node.get("split_feature", 0))
        thresholds.append(node.get("threshold", 0.0))
        values.append(node.get("leaf_value", 0.0) * scale)
        following.append([place, place])
        if "split_feature" in node:
            smaller = add(node["left_child"])
            following[place] = [add(node["right_child"]), smaller]
        return place

    roots.extend(add(tree["tree_structure"]) for tree in dump)
    return {
        "features": np.array(features, np.uint8),
        "thresholds": np.array(thresholds, np.float64),
        "next": np.array(following, np.uint32),
        "roots": np.array(roots, np.uint32),
        "values": np.array(values, np.float32),
    }


def _depth(following: npt.NDArray[np.intp], roots: npt.NDArray[np.intp]) -> int:
    depth, front = 0, np.unique(roots)
    while True:
        below = np.setdiff1d(following[front].ravel(), front)
        if not len(below):
            return depth
        depth, front = depth + 1, below
