"""Thresholds on cosine that other caches come with, for vectors of length 1. Pure.

GPTCache: `Config.similarity_threshold` 0.8 is a share of the range of `SearchDistanceEvaluation`, whose `max_distance` is 4: an
answer is given from a rank 4 - d of 3.2 on, with d the squared distance that FAISS's `IndexFlatL2` finds. So d <= 0.8.

RedisVL: `SemanticCache.distance_threshold` is 0.1, a cosine distance.
"""

from __future__ import annotations


def of_squared_distance(distance: float) -> float:
    """|a - b|² = 2 - 2 cos."""
    return 1 - distance / 2


def of_distance(distance: float) -> float:
    """Cosine distance is 1 - cos."""
    return 1 - distance


def gptcache(similarity_threshold: float = 0.8, max_distance: float = 4.0) -> float:
    return of_squared_distance(max_distance - similarity_threshold * max_distance)


def redisvl(distance_threshold: float = 0.1) -> float:
    return of_distance(distance_threshold)


DEFAULTS = {"GPTCache's default": gptcache(), "RedisVL's default": redisvl()}
