"""Boosted trees, read from arrays: the score of one row in some 30 µs, without the library that trained them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FIELDS = ("features", "thresholds", "next", "roots", "values")
MOST_LEAVES = 64


class Trees:
    """All trees at once, none of them walked. The leaves of a tree are the bits of a number, the leftmost the lowest. Wherever
    the row turns right, the leaves on the left are out of reach; of those that no node rules out the leftmost is the one that
    is reached.
    """

    def __init__(self, table: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raises ValueError where a tree has more than `MOST_LEAVES`."""
        following = table["next"].tolist()
        nodes, leaves = zip(*(_taken_apart(following, root) for root in table["roots"].tolist()), strict=True)
        num_nodes, num_leaves = max(map(len, nodes)), max(map(len, leaves))
        if num_leaves > MOST_LEAVES:
            raise ValueError(f"a tree of {num_leaves} leaves, more than {MOST_LEAVES}")
        # One column a tree. What is left over where a tree has fewer nodes rules out nothing.
        self._features = np.zeros((num_nodes, len(nodes)), np.intp)
        self._thresholds = np.full((num_nodes, len(nodes)), np.inf)
        bits = np.uint32 if num_leaves <= 32 else np.uint64
        self._left = np.zeros((num_nodes, len(nodes)), bits)
        values = np.zeros((len(nodes), num_leaves))
        for tree, (inner, outer) in enumerate(zip(nodes, leaves, strict=True)):
            places = [place for place, _ in inner]
            self._features[: len(inner), tree] = table["features"][places]
            self._thresholds[: len(inner), tree] = table["thresholds"][places]
            self._left[: len(inner), tree] = [left for _, left in inner]
            values[tree, : len(outer)] = table["values"][outer]
        self._values = values.ravel()
        self._firsts = np.arange(len(nodes)) * num_leaves
        self._least = int(self._features.max()) + 1

    def score(self, row: Sequence[float]) -> float:
        """The sum of what the trees say, in log-odds. Raises ValueError where the row is too short."""
        if len(row) < self._least:
            raise ValueError(f"a row of {len(row)} values, fewer than {self._least}")
        # The length is checked already: nothing wraps, and numpy is quickest so.
        values = np.fromiter(row, np.float64, len(row)).take(self._features, mode="wrap")
        right = ~(values <= self._thresholds)
        ruled_out = np.bitwise_or.reduce(self._left * right, axis=0)
        free = ruled_out + self._left.dtype.type(1)
        leaves = np.bitwise_count(ruled_out & ~free)
        return float(self._values.take(self._firsts + leaves, mode="wrap").sum())


def _taken_apart(following: Sequence[Sequence[int]], root: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The nodes of a tree, each with its leaves on the left as bits, and the leaves from left to right."""
    nodes: list[tuple[int, int]] = []
    leaves: list[int] = []

    def visit(place: int) -> None:
        larger, smaller = following[place]
        if larger == place:
            leaves.append(place)
            return
        first = len(leaves)
        visit(smaller)
        nodes.append((place, (1 << len(leaves)) - (1 << first)))
        visit(larger)

    visit(root)
    return nodes, leaves


def table_of(dump: Sequence[Mapping[str, Any]], scale: float) -> dict[str, npt.NDArray[Any]]:
    """From LightGBM's `dump_model()["tree_info"]`. Values are multiplied by `scale`, as several models are averaged."""
    features: list[int] = []
    thresholds: list[float] = []
    following: list[list[int]] = []
    values: list[float] = []

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

    roots = [add(tree["tree_structure"]) for tree in dump]
    return {
        "features": np.array(features, np.uint8),
        "thresholds": np.array(thresholds, np.float64),
        "next": np.array(following, np.uint32),
        "roots": np.array(roots, np.uint32),
        "values": np.array(values, np.float32),
    }
