"""Whose price holds: the user's, our profiles', the public list's; and who has none."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from anaphora.errors import ConfigError
from anaphora.ledger.prices import Prices, load
from anaphora.types import Usage

MILLION = Usage(input_tokens=1_000_000)
UPSTREAMS = {"anthropic": "https://api.anthropic.com", "deepseek": "https://api.deepseek.com", "own": "http://10.0.0.5:8000"}


def written(tmp_path: Path, text: str) -> Prices:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    return Prices(load(path), addresses=UPSTREAMS)


def test_an_upstream_is_priced_by_the_models_profile() -> None:
    usage = Usage(
        input_tokens=100,
        output_tokens=10,
        cache_read_input_tokens=1000,
        cache_creation_input_tokens=600,
        written={"5m": 400, "1h": 200},
    )
    # $4 in, $20 out; a read costs a twentieth of that, a write 1.25 or 2 times
    expected = (100 * 4 + 10 * 20 + 1000 * Decimal("0.2") + 400 * 5 + 200 * 8) / 10**6
    assert Prices(addresses=UPSTREAMS).cost("claude-opus-5-5", "anthropic", usage) == expected


def test_writes_of_no_known_lifetime_are_of_the_one_nobody_has_to_ask_for() -> None:
    usage = Usage(cache_creation_input_tokens=1_000_000)
    assert Prices(addresses=UPSTREAMS).cost("claude-opus-5-5", "anthropic", usage) == 5


def test_a_model_that_no_profile_knows_is_looked_up_by_the_upstreams_address() -> None:
    pytest.importorskip("genai_prices")
    prices = Prices(addresses=UPSTREAMS)
    found = prices.cost("deepseek-chat", "deepseek", MILLION)
    assert found is not None
    assert found > 0
    assert prices.cost("deepseek-chat", "own", MILLION) is None


def test_sound_has_a_price_of_its_own() -> None:
    pytest.importorskip("genai_prices")
    prices = Prices(addresses={"openai": "https://api.openai.com"})
    text, sound = (
        prices.cost("gpt-4o-mini-realtime-preview", "openai", Usage(input_tokens=1000, details=details))
        for details in ({}, {"audio_input": 1000})
    )
    assert text is not None
    assert sound is not None
    assert sound > text


def test_what_this_server_computes_itself_is_free_whatever_its_models_are_called() -> None:
    assert Prices().cost("claude-opus-5-5", "", MILLION) == 0
    assert Prices(emulates=True).cost("claude-opus-5-5", "", MILLION) == 4
    assert Prices(emulates=True).cost("echo", "", MILLION) == 0


def test_the_users_own_prices_come_first_and_the_most_specific_of_them_holds(tmp_path: Path) -> None:
    prices = written(
        tmp_path,
        """
        [[price]]
        model = "*"
        upstream = "own"
        input = 0
        output = 0
        [[price]]
        model = "claude-*"
        input = 3
        output = 15
        [[price]]
        model = "claude-opus-*"
        input = 7.5
        output = 15
        """,
    )
    assert prices.cost("llama", "own", MILLION) == 0
    assert prices.cost("claude-haiku-9", "anthropic", MILLION) == 3
    assert prices.cost("claude-opus-5-5", "anthropic", MILLION) == Decimal("7.5")
    assert prices.cost("claude-opus-5-5", "", MILLION) == Decimal("7.5")


def test_a_longer_prompt_costs_more_as_a_whole(tmp_path: Path) -> None:
    prices = written(
        tmp_path,
        """
        [[price]]
        model = "m"
        input = 1
        output = 2
        cache_read = 0.1
        above = [{ tokens = 200000, input = 3 }, { tokens = 100000, input = 2 }]
        """,
    )

    def cost(plain: int, read: int = 0) -> Decimal:
        found = prices.cost("m", "", Usage(input_tokens=plain, cache_read_input_tokens=read))
        assert found is not None
        return found * 10**6

    assert cost(100_000) == 100_000
    assert cost(100_001) == 200_002
    assert cost(150_000, 50_001) == 450_000 + Decimal("5000.1")


def test_every_kind_of_token_may_have_its_price(tmp_path: Path) -> None:
    prices = written(
        tmp_path,
        """
        [[price]]
        model = "m"
        input = 1
        output = 2
        cache_write = 1.25
        cache_write_1h = 2
        reasoning = 3
        audio_input = 40
        """,
    )
    usage = Usage(
        input_tokens=1000,
        output_tokens=100,
        cache_creation_input_tokens=30,
        written={"5m": 10, "1h": 20},
        details={"reasoning": 60, "audio_input": 200},
    )
    expected = 800 + 200 * 40 + Decimal("12.5") + 40 + 40 * 2 + 60 * 3
    assert prices.cost("m", "", usage) == expected / 10**6


def test_an_estimate_needs_no_list_and_no_upstream() -> None:
    assert Prices(addresses=UPSTREAMS).estimate("claude-opus-5-5", MILLION) == 4
    assert Prices(addresses=UPSTREAMS).estimate("deepseek-chat", MILLION) == 0
    assert Prices().estimate("claude-opus-5-5", MILLION) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[price]]\nmodel = 'm'\ninput = 1", r"price\[0\]: input and output are needed"),
        ("[[price]]\nmodel = 'm'\ninput = 1\noutput = -1", r"price\[0\]\.output: a price is a number from 0 on"),
        ("[[price]]\nmodel = 'm'\ninput = 1\noutput = nan", r"price\[0\]\.output: a price is a number from 0 on"),
        ("[[price]]\nmodel = 'm'\ninput = 1\noutput = 0.0000001", "more than 6 decimals"),
        ("[[price]]\nmodel = 'm'\ninput = 1\noutput = 1\ncached = 1", "cached"),
        ("[[prices]]\nmodel = 'm'", "unknown key prices"),
        ("price = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        written(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")
