from __future__ import annotations

import numpy as np
import pytest

from anaphora.levels.semantic.evaluation.ways import DEFAULTS, gptcache, of_distance, of_squared_distance, redisvl


def test_distances_of_vectors_of_length_one_become_their_cosine() -> None:
    a, b = np.array([0.6, 0.8]), np.array([1.0, 0.0])
    cosine = float(a @ b)
    assert of_squared_distance(float(((a - b) ** 2).sum())) == pytest.approx(cosine)
    assert of_distance(1 - cosine) == pytest.approx(cosine)


def test_the_defaults_of_other_caches_are_the_cosines_that_their_settings_stand_for() -> None:
    assert gptcache() == pytest.approx(0.6)  # a rank of 4 - d >= 3.2, so a squared distance of at most 0.8
    assert gptcache(0.95) == pytest.approx(0.9)
    assert redisvl() == pytest.approx(0.9)
    assert list(DEFAULTS.values()) == [gptcache(), redisvl()]
