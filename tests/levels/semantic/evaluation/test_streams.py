from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from anaphora.levels.semantic.evaluation import streams
from anaphora.levels.semantic.evaluation.evaluate import Evaluated, Settings, evaluate
from anaphora.levels.semantic.evaluation.kept import Vectors
from anaphora.levels.semantic.evaluation.questions import DataSet, Wording
from anaphora.levels.semantic.evaluation.streams import Replayed
from anaphora.levels.semantic.risk import Policy
from anaphora.levels.semantic.texts import Prepared
from anaphora.levels.semantic.vcache import separable_variance

ANIMALS = ("otter", "heron", "badger", "weasel", "falcon", "beaver")


class Sure:
    """A verifier that takes the same animal for the same question."""

    def probability(self, a: Prepared, b: Prepared, similarity: float) -> float:
        return 0.999 if set(ANIMALS) & set(a.text.split()) & set(b.text.split()) else 0.0


def wordings(num: int, *, wrong: float = 0.0) -> tuple[Wording, ...]:
    """Of every animal so many; some mean something else than they look like."""
    dice = random.Random(5)
    return tuple(
        Wording(f"explain {word} {'abcdefghij'[n // 10 % 10]}{'klmnopqrst'[n % 10]}{n // 100 * 'x'} please",
                f"{word} {n}" if dice.random() < wrong else word, topic=word)
        for word in ANIMALS for n in range(num)
    )  # fmt: skip


def vectors_of(asked: Sequence[Wording]) -> Vectors:
    """Those of an animal are close to each other, and far from the others'."""
    vectors = {}
    for wording in dict.fromkeys(asked):
        dice = np.random.default_rng(abs(sum(map(ord, wording.text))))
        vector = 0.05 * dice.standard_normal(8)
        vector[ANIMALS.index(wording.topic)] += 1
        vectors[wording.text] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return vectors


def replayed(asked: Sequence[Wording], *, risk: float = 0.05, seed: int = 1) -> Replayed:
    stream = list(streams.drawn(asked, 2_000, seed))
    policy = Policy(risk, 0.95, 0.05)
    return asyncio.run(streams.ours(stream, vectors_of(asked), Sure(), policy=policy, unrelated=0.0, seed=seed))


def test_from_cold_nothing_is_served_before_there_is_evidence_and_then_nearly_everything() -> None:
    told = replayed(wordings(120))
    assert told.first_served is not None
    assert told.labels_until is not None
    assert told.labels_until >= 72  # what a risk of 5 % needs at the least, without an error
    assert told.first_served > told.labels_until
    assert told.num_wrong == 0
    assert told.num_served > 0.5 * told.num_asked
    assert told.num_audits > 0
    assert told.num_served + told.num_audits <= told.num_found <= told.num_asked


def test_where_more_is_wrong_than_the_budget_nothing_is_served() -> None:
    told = replayed(wordings(120, wrong=0.3))
    assert told.num_found_wrong > 0.1 * told.num_found
    assert told.num_served == 0
    assert told.first_served is None
    assert told.missing is not None
    assert told.missing > 0


def test_the_same_seed_gives_the_same_stream_and_another_one_another() -> None:
    asked = wordings(30)
    assert replayed(asked) == replayed(asked)
    assert list(streams.drawn(asked, 50, 1)) == list(streams.drawn(asked, 50, 1))
    assert list(streams.drawn(asked, 50, 1)) != list(streams.drawn(asked, 50, 2))


def test_topics_are_asked_by_zipfs_law() -> None:
    counts = Counter(wording.topic for wording in streams.drawn(wordings(20), 24_500, 3))
    expected = [10_000 / rank for rank in range(1, 7)]
    assert [num for _, num in counts.most_common()] == pytest.approx(expected, rel=0.1)


def test_words_that_were_computed_before_are_the_exact_levels() -> None:
    asked = wordings(1)
    stream = [asked[0], asked[0], asked[1], asked[0]]
    told = streams.by_cosine("cosine", stream, vectors_of(asked), 2.0)
    assert (told.num_asked, told.num_served, told.num_answerable) == (2, 0, 0)


def test_a_threshold_serves_from_the_second_wording_on_right_or_wrong() -> None:
    asked = [Wording("explain otter a", "otter", topic="otter"), Wording("explain otter b", "weasel", topic="otter"),
             Wording("explain otter c", "otter", topic="otter")]  # fmt: skip
    told = streams.by_cosine("cosine", asked, vectors_of(asked), 0.6)
    assert (told.num_asked, told.num_answerable, told.num_served, told.num_wrong, told.first_served) == (3, 1, 2, 1, 2)


def test_vcaches_policy_needs_labels_of_every_entry_and_then_serves() -> None:
    asked = wordings(120)
    stream = list(streams.drawn(asked, 2_000, 1))
    variance = separable_variance([0.99, 0.98, 0.5], seed=1)
    told = streams.by_vcache(stream, vectors_of(asked), variance, budget=0.05, seed=1)
    assert told.first_served is not None
    assert told.first_served > 4
    assert 0 < told.num_served < told.num_asked


def test_streams_are_summed() -> None:
    one = Replayed("way", 100, 50, 40, 4, num_served=20, num_wrong=1, num_audits=5, first_served=30, labels_until=12)
    both = streams.summed([one, Replayed("way", 100, 50)])
    assert (both.num_asked, both.num_served, both.num_wrong, both.served) == (200, 20, 1, 0.1)
    assert both.hit_rate == pytest.approx(19 / 100)
    assert (both.wrong, both.worst, both.audits) == (0.05, 0.05, 0.025)
    assert both.first_served == [30, None]


def test_a_data_set_goes_through_every_way_and_the_same_figures_come_out_again() -> None:
    asked = wordings(40)
    data = DataSet("animals", asked[::2], asked[1::2], streamed=asked)
    said: list[str] = []

    settings = Settings((0.05,), num_streams=2, num_asked=300)

    def evaluated() -> Evaluated:
        return asyncio.run(
            evaluate(data, vectors_of(asked), Sure(), lambda _l: 0.9, settings, unrelated=0.0, progress=said.append)
        )

    found = evaluated()
    assert found == evaluated()
    assert found.filled.rows[0].num_right > 0.9 * len(data.asked)  # guards refuse some of the words made up here
    assert found.streams is not None
    assert [row.way for row in found.streams.rows][:2] == ["ours, risk 5%", "vCache, δ 5%"]
    assert all(row.num_streams == 2 for row in found.streams.rows)
    assert "animals: stream 2 of 2, risk 5%" in said
