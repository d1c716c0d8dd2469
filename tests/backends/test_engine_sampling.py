from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.backends.engine_sampling import (
    Sampled,
    SampledRow,
    SamplingPlan,
    model_defaults,
    plan_for,
    sample,
)
from anaphora.errors import InvalidRequest
from anaphora.types import Sampling


def tokens_of(sampled: list[Sampled]) -> list[int]:
    return [one.token for one in sampled]


def stream(logits: torch.Tensor, plan: SamplingPlan, num_tokens: int) -> list[int]:
    row = SampledRow(plan)
    return [sample(logits, [row])[0].token for _ in range(num_tokens)]


def naive_weights(logits: list[float], plan: SamplingPlan, counts: dict[int, int]) -> list[float]:
    """The documented order of operations, one token at a time, in double precision."""
    scores = [
        score - plan.frequency_penalty * counts.get(i, 0) - (plan.presence_penalty if counts.get(i, 0) else 0.0)
        for i, score in enumerate(logits)
    ]
    best = max(scores)
    z = [(score - best) / plan.temperature for score in scores]
    if 0 < plan.top_k < len(z):
        kth = sorted(z, reverse=True)[plan.top_k - 1]
        z = [x if x >= kth else -math.inf for x in z]
    weights = [math.exp(x) for x in z]
    total = math.fsum(weights)
    p = [w / total for w in weights]
    if plan.top_p < 1:
        mass = 0.0
        for last in sorted(p, reverse=True):
            mass += last
            if mass >= plan.top_p:
                break
        p = [x if x >= last else 0.0 for x in p]
    return [x if x >= plan.min_p * max(p) else 0.0 for x in p]


plans = st.builds(
    SamplingPlan,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([1.0, 0.95, 0.83, 0.41, 0.07]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.053, 0.31]),
    seed=st.integers(0, 2**64 - 1),
    frequency_penalty=st.sampled_from([0.0, 0.53, -0.4]),
    presence_penalty=st.sampled_from([0.0, 0.61]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(plans, min_size=1, max_size=4), st.integers(2, 120), st.integers(0, 10_000))
def test_every_row_draws_from_the_distribution_the_documented_order_gives(
    batch: list[SamplingPlan], vocabulary: int, noise: int
) -> None:
    # Coarse logits, so that ties are common; an irrational scale, so that no sum of them meets a threshold exactly.
    steps = torch.randint(-8, 9, (len(batch), vocabulary), generator=torch.Generator().manual_seed(noise))
    logits = steps.float() * (math.pi / 7)
    rows = [SampledRow(plan) for plan in batch]
    twins = [SampledRow(plan) for plan in batch]
    for _ in range(3):
        expected = []
        for row, twin, scores in zip(rows, twins, logits.tolist(), strict=True):
            weights = naive_weights(scores, row.plan, row.counts)
            at, token, mass = twin.draw() * math.fsum(weights), 0, weights[0]
            while mass <= at and token + 1 < vocabulary:
                token += 1
                mass += weights[token]
            expected.append((token, abs(mass - at), weights))
        for got, (token, margin, weights) in zip(tokens_of(sample(logits, rows)), expected, strict=True):
            assert weights[got] > 0
            assert got == token or margin < 1e-5  # a draw within rounding of the border between two tokens


@settings(deadline=None, max_examples=25)
@given(plans, st.lists(plans, max_size=5), st.integers(0, 5), st.integers(0, 10_000))
def test_a_seeded_row_draws_the_same_tokens_alone_and_among_others(
    plan: SamplingPlan, others: list[SamplingPlan], place: int, noise: int
) -> None:
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(noise)) * 3
    alone, together = SampledRow(plan), SampledRow(plan)
    place = min(place, len(others))
    rows = [SampledRow(other) for other in others]
    rows.insert(place, together)
    batch = logits[1 : len(rows) + 1].clone() if len(rows) < 6 else logits.clone()
    batch[place] = logits[0]
    for _ in range(4):
        assert sample(logits[:1], [alone])[0] == sample(batch, rows)[place]


def test_a_large_vocabulary_is_cut_exactly_where_a_full_sort_cuts_it() -> None:
    logits = torch.randn(3, 49_152, generator=torch.Generator().manual_seed(3)) * torch.tensor([[0.5], [2.0], [6.0]])
    for top_p in (0.1, 0.5, 0.9, 0.999, 1 - 1e-9):
        rows = [SampledRow(SamplingPlan(top_p=top_p, seed=seed)) for seed in (1, 2, 3)]
        p = torch.softmax(logits - logits.amax(-1, keepdim=True), -1)
        ordered = p.sort(descending=True).values
        kept = ((ordered.double().cumsum(-1) - ordered) < top_p).sum(-1, keepdim=True)
        nucleus = p >= ordered.gather(1, kept - 1)
        for _ in range(5):
            drawn = torch.tensor(tokens_of(sample(logits, rows)))
            assert bool(nucleus.gather(1, drawn.unsqueeze(1)).all())


def test_draws_follow_the_distribution() -> None:
    weights = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.02, 0.005])
    num_draws = 4000
    drawn = stream(weights.log().unsqueeze(0), SamplingPlan(seed=7), num_draws)
    chi2 = sum(
        (drawn.count(i) - num_draws * float(w)) ** 2 / (num_draws * float(w)) for i, w in enumerate(weights / weights.sum())
    )
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001


def test_temperature_zero_takes_the_lowest_of_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    rows = [SampledRow(SamplingPlan(temperature=0.0)), SampledRow(SamplingPlan(temperature=1e-9))]
    assert tokens_of(sample(logits, rows)) == [1, 0]


def test_a_greedy_row_stays_greedy_next_to_a_sampled_one() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    greedy, hot = SampledRow(SamplingPlan(temperature=0.0)), SampledRow(SamplingPlan(temperature=5.0, seed=1))
    best = int(logits[0].argmax())
    assert [sample(logits, [greedy, hot])[0].token for _ in range(20)] == [best] * 20


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = torch.zeros(1, 500)
    assert stream(logits, SamplingPlan(seed=11), 20) == stream(logits, SamplingPlan(seed=11), 20)
    assert stream(logits, SamplingPlan(seed=11), 20) != stream(logits, SamplingPlan(seed=12), 20)
    assert stream(logits, SamplingPlan(), 20) != stream(logits, SamplingPlan(), 20)


def test_a_frequency_penalty_wears_a_token_out() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert stream(logits, SamplingPlan(temperature=0.0, frequency_penalty=0.75), 6) == [0, 0, 1, 0, 1, 2]


def test_a_presence_penalty_counts_a_token_once() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    assert stream(logits, SamplingPlan(temperature=0.0, presence_penalty=0.5), 4) == [0, 1, 0, 0]


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(1, 50)
    before = logits.clone()
    stream(logits, SamplingPlan(seed=1, top_k=5, top_p=0.5, min_p=0.1, frequency_penalty=1.0, logprobs=3), 5)
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(5))
    plan = SamplingPlan(temperature=0.2, top_k=3, frequency_penalty=2.0, presence_penalty=1.0, seed=3, logprobs=5)
    rows = [SampledRow(plan), SampledRow(SamplingPlan(seed=1))]
    raw = torch.log_softmax(logits, -1)
    for _ in range(5):
        asked, silent = sample(logits, rows)
        assert asked.logprob == pytest.approx(float(raw[0, asked.token]))
        assert [token for token, _ in asked.top] == raw[0].topk(5).indices.tolist()
        assert [value for _, value in asked.top] == pytest.approx(raw[0].topk(5).values.tolist())
        assert silent.logprob is None
        assert silent.top == ()


def test_zero_logprobs_are_those_of_the_chosen_token_alone() -> None:
    (one,) = sample(torch.zeros(1, 4), [SampledRow(SamplingPlan(temperature=0.0, logprobs=0))])
    assert one.logprob == pytest.approx(-math.log(4))
    assert one.top == ()


def test_bfloat16_logits_are_taken() -> None:
    (one,) = sample(torch.tensor([[0.0, 9.0]], dtype=torch.bfloat16), [SampledRow(SamplingPlan(seed=0, top_p=0.5))])
    assert one.token == 1


def test_a_batch_of_no_rows_is_no_tokens() -> None:
    assert sample(torch.zeros(0, 10), []) == []


@pytest.mark.parametrize("temperature", [1e-4, 1e30])
def test_extreme_temperatures_and_scores_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[3e38, 1e38, -3e38, -torch.inf]])
    row = SampledRow(SamplingPlan(temperature=temperature, seed=1, top_p=0.99))
    assert all(sample(logits, [row])[0].token in (0, 1, 2) for _ in range(20))


def test_a_request_that_says_nothing_takes_the_models_defaults() -> None:
    defaults = model_defaults({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": False, "eos_token_id": 2})
    assert plan_for(Sampling(), defaults) == SamplingPlan(temperature=0.6, top_k=20, top_p=0.9)
    said = Sampling(temperature=0.0, top_k=-1, top_p=1.0, min_p=0.1, seed=4, logprobs=2)
    assert plan_for(said, defaults) == SamplingPlan(temperature=0.0, min_p=0.1, seed=4, logprobs=2)
    assert plan_for(Sampling(), model_defaults({"temperature": None})) == SamplingPlan()


def test_choices_of_one_seeded_request_differ_and_the_first_has_its_seed() -> None:
    seeds = [plan_for(Sampling(seed=-3), choice=choice).seed for choice in range(4)]
    assert seeds[0] == -3 & 0xFFFF_FFFF_FFFF_FFFF
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("frequency_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(param: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan_for(Sampling(**{param: value}))  # type: ignore[arg-type]
    assert refused.value.param == param
