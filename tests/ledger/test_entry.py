"""One request as a row: tokens add up to the provider's, money is exact, and nothing is saved twice."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.events import Answered
from anaphora.ledger.entry import PER_USD, Entry, entry, uncached, units, usd, usd_text
from anaphora.ledger.prices import Above, Price, Prices
from anaphora.types import Choice, Completion, Tenant, TextPart, Usage
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Rendering, new_ids
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_responses import OpenAIResponses

NOW_S = 1_800_000_000.0
counts = st.integers(0, 10**7)
LIFETIMES = ("5m", "30m", "1h", "12h")


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    written = draw(st.dictionaries(st.sampled_from(LIFETIMES), counts))
    other = draw(counts)
    plain, output = draw(counts), draw(counts)
    kinds = {"audio_input": draw(st.integers(0, plain)), "reasoning": draw(st.integers(0, output))}
    return Usage(
        input_tokens=plain,
        output_tokens=output,
        cache_read_input_tokens=draw(counts),
        cache_creation_input_tokens=sum(written.values()) + other,
        written=written,
        details=draw(st.sampled_from([{}, kinds])),
    )


rates = st.decimals(0, 1000, places=6)
prices = st.builds(
    Price,
    model=st.just("m*"),
    input=rates,
    output=rates,
    cache_read=st.none() | rates,
    cache_write=st.none() | rates,
    cache_write_1h=st.none() | rates,
    reasoning=st.none() | rates,
    above=st.just(()) | st.tuples(st.builds(Above, tokens=counts, input=rates, cache_read=rates)),
)
sources = st.sampled_from(["hit", "miss", "collapsed", "bypass"])
outcomes = st.sampled_from(["finished", "failed", "left"])


def answered(
    source: Literal["hit", "miss", "collapsed", "bypass"],
    usage: Usage,
    outcome: Literal["finished", "failed", "left"] = "finished",
    **more: Any,
) -> Answered:
    return Answered(Tenant("a"), "m", source, outcome, usage, ("end_turn",), 1.0, 0.25, **more)


@given(usages(), sources, outcomes, st.booleans(), prices)
def test_paid_and_saved_are_what_it_would_have_cost(
    usage: Usage, source: Any, outcome: Any, refresh: bool, price: Price
) -> None:
    """Without the caches it would have been computed: a computed answer plain, a remembered one as it was computed. What was
    only computed to be remembered would not have been."""
    pricing = Prices((price,))
    made = entry(answered(source, usage, outcome, begun=usage, refresh=refresh), NOW_S, pricing)
    expected = 0 if refresh else counterfactual(source, usage, outcome, pricing)
    assert made.paid + made.saved_prompts + made.saved_answers == expected
    assert not made.saved_answers or not made.saved_prompts


def counterfactual(source: str, usage: Usage, outcome: str, pricing: Prices) -> int:
    computed = source in ("miss", "bypass")
    if not computed and outcome != "finished":
        return 0
    cost = pricing.cost("m", "", uncached(usage) if computed else usage)
    assert cost is not None
    return units(cost)


def test_what_was_computed_to_audit_another_answer_is_told_apart() -> None:
    made = entry(answered("miss", Usage(input_tokens=3), audit=True), NOW_S, Prices(()))
    assert made.level == "audit"
    assert entry(answered("collapsed", Usage(input_tokens=3)), NOW_S, Prices(())).level == "collapsed"
    assert entry(answered("hit", Usage(input_tokens=3), level="semantic"), NOW_S, Prices(())).level == "semantic"


@given(usages(), prices)
def test_a_price_of_six_decimals_is_never_rounded(usage: Usage, price: Price) -> None:
    cost = Prices((price,)).cost("m", "", usage)
    assert cost is not None
    assert usd(units(cost)) == cost
    assert Decimal(usd_text(units(cost))) == cost


@given(usages())
def test_what_is_read_saves_the_plain_price_less_the_price_of_a_read(usage: Usage) -> None:
    price = Price(model="m", input=Decimal(10), output=Decimal(50), cache_read=Decimal("0.5"), cache_write=Decimal("12.5"))
    made = entry(answered("miss", usage), NOW_S, Prices((price,)))
    assert usd(made.saved_prompts) * 10**6 == Decimal("9.5") * made.cache_read - Decimal("2.5") * (
        usage.cache_creation_input_tokens
    )


DIALECTS: tuple[Dialect, ...] = (Anthropic(), OpenAIChat(), OpenAIResponses())


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@given(usage=usages())
def test_plain_and_read_and_written_are_the_providers_total(dialect: Dialect, usage: Usage) -> None:
    """As the very bytes that a client gets say it."""
    made = entry(answered("miss", usage), NOW_S, Prices())
    completion = Completion("m", (Choice((TextPart("hello"),), "end_turn"),), usage)
    told = json.loads(dialect.render(completion, Rendering("m", writes_billed=True), new_ids(NOW_S)))["usage"]
    assert (made.prompt, made.output) == totals(dialect.name, told)
    assert made.prompt == made.input + made.cache_read + usage.cache_creation_input_tokens


def totals(dialect: str, told: dict[str, Any]) -> tuple[int, int]:
    if dialect == "anthropic":
        names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        return sum(told[name] for name in names), told["output_tokens"]
    chat = "prompt_tokens" in told
    return told["prompt_tokens" if chat else "input_tokens"], told["completion_tokens" if chat else "output_tokens"]


PRICE = Price(model="m", input=Decimal(1), output=Decimal(2))


def test_an_answer_of_a_computation_that_others_pay_for_charges_nothing_and_saves_it_all() -> None:
    usage = Usage(input_tokens=100, output_tokens=10)
    hit = entry(answered("hit", usage, level="exact"), NOW_S, Prices((PRICE,)))
    collapsed = entry(answered("collapsed", usage), NOW_S, Prices((PRICE,)))
    assert (hit.level, collapsed.level) == ("exact", "collapsed")
    for made in (hit, collapsed):
        assert (made.tokens, made.paid, made.saved_answers) == (0, 0, 120 * PER_USD // 10**6)
        assert (made.saved_input, made.saved_output) == (100, 10)


def test_a_model_without_a_price_is_flagged() -> None:
    made = entry(answered("miss", Usage(input_tokens=5), upstream="u"), NOW_S, Prices())
    assert (made.priced, made.paid, made.input) == (0, 0, 5)


def test_an_upstream_that_does_not_tell_its_usage_is_not_taken_to_be_free() -> None:
    made = entry(answered("miss", Usage(), upstream="u"), NOW_S, Prices((PRICE,)))
    assert (made.priced, made.paid) == (0, 0)


@pytest.mark.parametrize("count", [-1, 10**9 + 1, 2**70])
@pytest.mark.parametrize("source", ["miss", "hit"])
def test_nonsense_of_an_upstream_spoils_no_sums(source: Any, count: int) -> None:
    for usage in (
        Usage(input_tokens=count),
        Usage(input_tokens=5, written={"5m": count}),
        Usage(5, details={"reasoning": count}),
    ):
        made = entry(answered(source, usage, upstream="u"), NOW_S, Prices((PRICE,)))
        assert (made.priced, made.tokens, made.paid, made.saved_answers, made.saved_input) == (0, 0, 0, 0, 0)


def test_an_amount_that_the_book_has_no_place_for_is_no_price() -> None:
    dear = Price(model="m", input=Decimal(10**9), output=Decimal(0))
    made = entry(answered("miss", Usage(input_tokens=10**7)), NOW_S, Prices((dear,)))
    assert (made.priced, made.paid, made.input) == (0, 0, 10**7)


def test_our_own_engine_costs_nothing_and_is_priced() -> None:
    made = entry(answered("miss", Usage(input_tokens=5)), NOW_S, Prices())
    assert (made.priced, made.paid) == (1, 0)


def test_the_upstreams_own_count_wins_over_ours_and_the_difference_is_counted() -> None:
    told, ours = Usage(input_tokens=90, cache_read_input_tokens=10), Usage(input_tokens=103)
    made = entry(answered("miss", told, upstream="u", billed=ours), NOW_S, Prices((PRICE,)))
    assert (made.input, made.cache_read, made.off) == (90, 10, 3)


def test_without_an_upstream_the_rules_of_prompt_caching_say_what_was_charged() -> None:
    computed, ruled = (
        Usage(input_tokens=100, details={"reasoning": 3}, output_tokens=4),
        Usage(input_tokens=20, cache_read_input_tokens=80, output_tokens=4),
    )
    made = entry(answered("miss", computed, billed=ruled), NOW_S, Prices((PRICE,)))
    assert (made.input, made.cache_read, made.reasoning, made.off) == (20, 80, 3, 0)


def test_what_was_cut_is_charged_as_far_as_it_is_known() -> None:
    begun = Usage(input_tokens=100, output_tokens=7)
    left = entry(answered("miss", Usage(), "left", begun=begun), NOW_S, Prices((PRICE,)))
    assert (left.input, left.output, left.estimated) == (100, 7, 1)
    finished_without_it = entry(
        answered("miss", Usage(), "left", begun=begun), NOW_S, Prices((PRICE,)), Usage(input_tokens=100, output_tokens=50)
    )
    assert (finished_without_it.output, finished_without_it.estimated) == (50, 0)
    refused = entry(answered("miss", Usage(), "failed"), NOW_S, Prices((PRICE,)))
    assert (refused.tokens, refused.paid, refused.priced, refused.estimated) == (0, 0, 1, 0)


def test_times_and_names_are_kept() -> None:
    made = entry(
        answered("miss", Usage(), asked="alias", answered="real", request_id="req_1", workspace="w", tag="t", upstream="u"),
        NOW_S,
        Prices(),
    )
    assert made == Entry(
        at_us=1_800_000_000_000_000,
        request_id="req_1",
        tenant="a",
        workspace="w",
        tag="t",
        asked="alias",
        model="real",
        upstream="u",
        level="computed",
        outcome="finished",
        first_us=250_000,
        whole_us=1_000_000,
        priced=0,
    )
