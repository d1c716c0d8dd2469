"""The settings of the ledger, as people give them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from anaphora.config import Config, LimitConfig, ledger_path, load, shown
from anaphora.errors import ConfigError
from anaphora.server.books import check_books


def test_limits_survive_being_handed_to_a_worker_to_the_last_decimal(tmp_path: Path) -> None:
    file = tmp_path / "anaphora.toml"
    file.write_text("[[ledger.limits]]\ntenant = 'a'\nusd_per_day = 0.1\nrequests_per_minute = 5\n")
    config = load(file, environ={}).config
    assert config.ledger.limits == (LimitConfig("a", requests_per_minute=5, usd_per_day=Decimal("0.1")),)
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config


def test_a_variable_gives_limits_as_json() -> None:
    text = '[{"tenant": "*", "usd_per_month": "12.50"}]'
    loaded = load(environ={"ANAPHORA_LEDGER_LIMITS": text})
    assert loaded.config.ledger.limits == (LimitConfig("*", usd_per_month=Decimal("12.5")),)
    assert shown(loaded)["ledger.limits"]["value"][0]["usd_per_month"] == "12.50"
    with pytest.raises(ConfigError, match=r"ledger\.limits: expected limits as JSON"):
        load(environ={"ANAPHORA_LEDGER_LIMITS": "acme=5"})


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("tenant = 'a'\nrequests_per_day = 0", "limits\\[0\\].requests_per_day"),
        ("tenant = 'a'\nusd_per_day = -1", "more than 0"),
        ("tenant = 'a'\nusd_per_day = 2000000", "less than a million dollars"),
        ("tenant = 'a'\nusd_per_day = nan", "usd_per_day"),
        ("tenant = 'a'\ntokens_per_dey = 5", "did you mean tokens_per_day"),
        ("usd_per_day = 1", "tenant"),
        ("tenant = 'a'\nusd_per_day = 1\n[[ledger.limits]]\ntenant = 'a'\nusd_per_day = 2", "has limits already"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, toml: str, words: str) -> None:
    file = tmp_path / "anaphora.toml"
    file.write_text(f"[[ledger.limits]]\n{toml}\n")
    with pytest.raises(ConfigError, match=words):
        load(file, environ={})


def test_the_ledger_lies_in_the_cache_folder_unless_it_is_said_where() -> None:
    assert ledger_path(load(environ={"ANAPHORA_CACHE_DIR": "/there"}).config) == Path("/there/ledger.db")
    assert ledger_path(load(environ={"ANAPHORA_LEDGER_PATH": "~/my.db"}).config) == Path("~/my.db").expanduser()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[ledger]\nshare_limits = true", r"ledger\.share_limits: .* set cache\.shared"),
        (
            "[ledger]\nshare_limits = true\n[cache]\nshared = 'redis://h'\n[server]\nvirtual_clock = true",
            r"ledger\.share_limits: .* not by a virtual clock",
        ),
    ],
)
def test_limits_are_shared_only_where_they_can_be(toml: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "anaphora.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=words):
        load(file, environ={})


def test_an_address_on_which_no_limits_can_be_shared_is_refused_before_anything_starts(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    file = tmp_path / "anaphora.toml"
    file.write_text("[ledger]\nshare_limits = true\n[cache]\nshared = 'redis+cluster://h:6379/3'")
    with pytest.raises(ConfigError, match=r"cache\.shared: a cluster has no numbered databases"):
        check_books(load(file, environ={}).config)
