"""The providers' numbers, how a model finds its profile, and what requests cost."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import msgspec
import pytest

from anaphora import profiles
from anaphora.errors import ConfigError
from anaphora.profiles import Dialect, Profile, Refusal
from anaphora.profiles.prices import Cost, cost, uncached
from anaphora.prompt import TTL, CacheUsage
from anaphora.testing.prompts import prompt


def profile(model: str) -> Profile:
    found = profiles.match(model)
    assert found is not None
    return found


MINIMUMS = {
    512: "fable-5 fable-5-1 fable-5-2 mythos-5 mythos-5-1 mythos-5-2 opus-5 opus-5-5 sonnet-5-5 haiku-5-5",
    1024: "opus-4-8 sonnet-5 sonnet-4-6 sonnet-4-5 sonnet-4 opus-4-1 opus-4",
    2048: "opus-4-7 mythos-preview 3-5-haiku",
    4096: "opus-4-6 opus-4-5 haiku-4-5",
}


@pytest.mark.parametrize(("minimum", "model"), [(n, m) for n, models in MINIMUMS.items() for m in models.split()])
def test_minimum_lengths_of_claude_models(minimum: int, model: str) -> None:
    assert profile(f"claude-{model}").minimum == minimum
    assert profile(f"claude-{model}-20260601").minimum == minimum


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("claude-opus-4-5-20251101", "claude-opus-4-5"),
        ("claude-opus-4-20250514", "claude-opus-4-1"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("anthropic/claude-opus-4.5", "claude-opus-4-5"),
        ("us.anthropic.claude-opus-4-5-20251101-v1:0", "claude-opus-4-5"),
        ("claude-opus-4-5@20251101", "claude-opus-4-5"),
        ("claude-opus-9", "anthropic"),
        ("gpt-5.6", "gpt-5.6-sol"),
        ("gpt-5.7-nova", "openai-breakpoints"),
        ("gpt-7", "openai-breakpoints"),
        ("gpt-5.4-pro", "gpt-5.4"),
        ("gpt-3.5-turbo", "openai-classic"),
        ("o3-mini-2025-01-31", "o3-mini"),
        ("gpt-4o-2024-11-20", "gpt-4o"),
    ],
)
def test_the_most_specific_pattern_wins(model: str, name: str) -> None:
    assert profile(model).name == name


def test_every_listed_model_is_found_by_its_own_name_and_has_a_price() -> None:
    for listed in profiles.known():
        assert profile(listed.name) == listed
        assert listed.price is not None, listed.name
        assert set(listed.rates.write) == set(listed.ttls), listed.name


@pytest.mark.parametrize(("dialect", "name"), [("anthropic", "anthropic"), ("openai", "openai-classic")])
def test_a_local_model_gets_the_generic_profile_of_the_dialect(dialect: Dialect, name: str) -> None:
    assert profiles.match("smollm2") is None
    assert profiles.find("smollm2", dialect).name == name
    # A Claude model asked in OpenAI's dialect, and the other way round: the dialect's own rules.
    assert profiles.find("claude-opus-5" if dialect == "openai" else "gpt-5.6-sol", dialect).name == name


def test_a_local_model_can_be_told_whom_to_behave_like() -> None:
    like = ("claude-opus-5-5", "gpt-5.5")
    assert profiles.find("smollm2", "anthropic", like).name == "claude-opus-5-5"
    assert profiles.find("smollm2", "openai", like).name == "gpt-5.5"
    assert profiles.find("smollm2", "openai", "claude-opus-5-5").name == "openai-classic"
    assert profiles.find("smollm2", "openai", "openai-breakpoints").accounting == "openai-breakpoints"


def test_an_unknown_profile_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no caching profile for 'smolm2'"):
        profiles.find("smollm2", "openai", "smolm2")
    with pytest.raises(ConfigError, match="Did you mean 'openai-classic'"):
        profiles.named("openai-clasic")


def test_fields_a_generation_does_not_have_are_refused_in_the_providers_words() -> None:
    marked = prompt(
        "user:5, user:6*30m", dialect="openai", options_given=("prompt_cache_key", "prompt_cache_breakpoint")
    ).prompt
    refused = profile("gpt-5.5").refusal(marked)
    assert refused == Refusal(
        "prompt_cache_breakpoint is not supported on this model",
        "messages.1.content.1.prompt_cache_breakpoint",
        "invalid_parameter",
    )
    options = prompt("user:5", dialect="openai", options_given=("prompt_cache_options",)).prompt
    refused = profile("gpt-4o").refusal(options)
    assert refused is not None
    assert (refused.message, refused.param) == ("Unsupported parameter: prompt_cache_options", "prompt_cache_options")
    for fine in (profile("gpt-5.6-sol"), profiles.find("smollm2", "openai")):
        assert fine.refusal(marked) is None
        assert fine.refusal(options) is None


def test_a_retention_the_model_does_not_have_is_refused() -> None:
    for retention, refused in (("24h", False), ("in_memory", True)):
        asked = prompt("user:5", dialect="openai", retention=retention).prompt
        assert (profile("gpt-5.5").refusal(asked) is not None) == refused
        assert profile("gpt-4.1").refusal(asked) is None
        assert profile("gpt-5.6-sol").refusal(asked) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[profile", "not TOML"),
        ("[[profile]]\nname = 'x'\nbase = 'y'", "base 'y' does not come before"),
        ("[[profile]]\nname = 'x'\nprovider = 'p'", "caching profile 'x'"),
        (
            "[[profile]]\nname='x'\nprovider='p'\ndialect='openai'\naccounting='openai-classic'\nminimum=1\nstep=100",
            "step must be a multiple of 128",
        ),
        (
            "[[profile]]\nname='x'\nprovider='p'\ndialect='openai'\naccounting='openai-breakpoints'\nminimum=1",
            "no `ttls`",
        ),
        ("[[profile]]\nname='x'\nprovider='p'\ndialect='openai'\naccounting='openai-classic'\nminimum=1\nwindow=3", "window"),
    ],
)
def test_a_bad_file_is_a_configuration_error_that_names_the_profile(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profiles.load(text)


# -- money -------------------------------------------------------------------------------------------------------------


def dollars(model: str, usage: CacheUsage, output_tokens: int = 0) -> Cost:
    found = cost(profile(model), usage, output_tokens, model=model)
    assert found is not None
    return found


def test_v46_an_exact_bill_of_opus_5() -> None:
    bill = dollars("claude-opus-5", CacheUsage(plain=100, read=3000, written={"5m": 5000, "1h": 2000}), 10)
    assert (bill.input, bill.output, bill.total) == (Decimal("0.05325"), Decimal("0.00025"), Decimal("0.05350"))


def test_v47_an_exact_bill_of_gpt_5_6() -> None:
    assert dollars("gpt-5.6-sol", CacheUsage(plain=0, read=12000, written={"30m": 3000}), 1).total == Decimal("0.01982")


def test_v48_one_that_warms_up_is_cheaper_than_eight_cold_ones() -> None:
    cold, warm = CacheUsage(plain=1000, written={"5m": 40_000}), CacheUsage(plain=1000, read=40_000)
    write, read = dollars("claude-sonnet-5-5", cold).total, dollars("claude-sonnet-5-5", warm).total
    assert (write, read) == (Decimal("0.102"), Decimal("0.006"))
    assert (8 * write, write + 7 * read) == (Decimal("0.816"), Decimal("0.144"))
    assert 8 * dollars("claude-sonnet-5-5", uncached(cold)).total == Decimal("0.656")


def test_twelve_hours_cost_twice_what_thirty_minutes_cost() -> None:
    half_hour = dollars("gpt-6-sol", CacheUsage(plain=0, written={"30m": 1_000_000 // 4})).total
    assert half_hour == Decimal("0.625")
    assert dollars("gpt-6-sol", CacheUsage(plain=0, written={"12h": 1_000_000 // 4})).total == 2 * half_hour


def test_beyond_a_tier_the_whole_request_costs_more() -> None:
    assert dollars("claude-haiku-5-5", CacheUsage(plain=100_000)).total == Decimal("0.010")
    assert dollars("claude-haiku-5-5", CacheUsage(plain=100_001)).total == Decimal("0.0500005")


def test_batches_cost_half() -> None:
    bill = cost(profile("claude-opus-5"), CacheUsage(plain=1_000_000), 1_000_000, model="claude-opus-5", factor=Decimal("0.5"))
    assert bill == Cost(input=Decimal("2.5"), output=Decimal("12.5"))


def test_a_model_nobody_has_a_price_for_costs_nothing_known() -> None:
    for model in ("our-own-model", "llama-3.1-8b-instruct"):  # run at home, whatever others charge for it
        assert cost(profiles.find(model, "openai"), CacheUsage(plain=10), 1, model=model) is None


def test_a_sibling_does_not_get_the_price_of_the_model_it_looks_like() -> None:
    assert profile("gpt-5.5-pro").price is None
    pytest.importorskip("genai_prices")
    assert dollars("gpt-5.5-pro", CacheUsage(plain=100_000)).input == Decimal(3)


@pytest.mark.parametrize("listed", profiles.known(), ids=lambda p: p.name)
@pytest.mark.parametrize("tokens", [50_000, 300_000])
def test_our_prices_are_those_of_the_public_table(listed: Profile, tokens: int) -> None:
    pytest.importorskip("genai_prices")
    written: dict[TTL, int] = {ttl: tokens // 10 for ttl in listed.ttls if ttl != "12h"}
    usage = CacheUsage(plain=tokens, read=tokens // 2, written=written)
    public = cost(msgspec.structs.replace(listed, price=None), usage, 1000, model=listed.name)
    if public is None:
        pytest.skip("not in the public table")
    assert cost(listed, usage, 1000, model=listed.name) == public


def test_prices_are_imported_only_when_asked_for() -> None:
    code = "import sys, anaphora.promises, anaphora.profiles.prices; print('genai_prices' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
