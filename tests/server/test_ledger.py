"""The ledger of real server processes: what lands in the file, limits as the official SDKs see them, restarts and workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.ledger.entries import rows_of

from anaphora.ledger.entry import Entry

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]

KEYS = """
[[server.keys]]
tenant = "alice"
key = "key-of-alice"
workspace = "lab"

[[server.keys]]
tenant = "bob"
key = "key-of-bob"
"""
MODEL = "claude-opus-5-5"
LONG = "word " * 2000


def ask(url: str, text: str, key: str = "key-of-alice", model: str = MODEL, **headers: str) -> httpx2.Response:
    body = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": text}]}
    return httpx2.post(f"{url}/v1/messages", json=body, headers={"x-api-key": key, **headers}, timeout=60)


def written(folder: Path) -> list[Entry]:
    return rows_of(folder / "cache" / "ledger.db")


def test_what_was_answered_is_in_the_book_after_a_clean_end(serve: Serve, tmp_path: Path) -> None:
    with serve(KEYS, folder=tmp_path) as (url, _):
        first = ask(url, "one two three", **{"x-anaphora-tag": "batch 7"})
        ask(url, "one two three")
        ask(url, "one two three", "key-of-bob", **{"cache-control": "no-store"})
    entries = written(tmp_path)
    assert [(entry.tenant, entry.workspace, entry.level, entry.tag) for entry in entries] == [
        ("alice", "lab", "computed", "batch 7"),
        ("alice", "lab", "exact", ""),
        ("bob", "", "bypass", ""),
    ]
    computed, hit, bypass = entries
    usage = first.json()["usage"]
    assert (computed.prompt, computed.output) == (usage["input_tokens"], usage["output_tokens"])
    assert computed.paid == (usage["input_tokens"] * 4 + usage["output_tokens"] * 20) * 10**6
    assert (hit.paid, hit.saved_answers, bypass.paid) == (0, computed.paid, computed.paid)
    assert computed.request_id == first.headers["request-id"]
    assert {entry.model for entry in entries} == {MODEL}


def test_reads_of_prompt_caching_are_charged_and_saved_by_the_providers_rules(serve: Serve, tmp_path: Path) -> None:
    def marked(question: str) -> dict[str, Any]:
        system = [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
        return {"model": MODEL, "max_tokens": 5, "system": system, "messages": [{"role": "user", "content": question}]}

    with serve("", folder=tmp_path) as (url, _):
        usages = [httpx2.post(f"{url}/v1/messages", json=marked(text)).json()["usage"] for text in ("first?", "second?")]
    wrote, read = written(tmp_path)
    assert (
        wrote.write_1h
        == usages[0]["cache_creation_input_tokens"]
        == read.cache_read
        == usages[1]["cache_read_input_tokens"]
        > 0
    )
    for entry, usage in zip((wrote, read), usages, strict=True):
        assert entry.prompt == sum(usage[f"{kind}input_tokens"] for kind in ("", "cache_read_", "cache_creation_"))
    assert wrote.saved_prompts == -wrote.write_1h * 4 * 10**6  # twice the price of plain input
    assert read.saved_prompts == read.cache_read * Decimal("3.8") * 10**6


def test_one_tenant_sees_its_own_rows_and_no_others(serve: Serve) -> None:
    with serve(KEYS) as (url, _):
        for key in ("key-of-alice", "key-of-alice", "key-of-bob"):
            ask(url, "same question", key)
        told = {key: until_told(url, key) for key in ("key-of-alice", "key-of-bob")}
        groups = get(url, "key-of-alice", by="level,day", since="1h")["groups"]
        assert get(url, "key-of-alice", to="2020-01-01")["groups"] == []
        rows = get(url, "key-of-alice", rows="true", limit=1)["requests"]
        (rest,) = get(url, "key-of-alice", rows="true", after=rows[0]["number"])["requests"]
        wrong = [
            httpx2.get(f"{url}/anaphora/ledger?{query}", headers={"x-api-key": "key-of-bob"}).status_code
            for query in ("by=nothing", "since=soon", "limit=0")
        ]
        assert httpx2.get(f"{url}/anaphora/ledger").status_code == 401
    assert [told[key]["tenant"] for key in told] == ["alice", "bob"]
    assert [told[key]["groups"][0]["num_requests"] for key in told] == [2, 1]
    assert [group["level"] for group in groups] == ["computed", "exact"]
    assert (rows[0]["level"], rest["level"], rest["tenant"]) == ("computed", "exact", "alice")
    assert wrong == [400, 400, 400]


def get(url: str, key: str, **query: Any) -> dict[str, Any]:
    response = httpx2.get(f"{url}/anaphora/ledger", params=query, headers={"x-api-key": key})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def until_told(url: str, key: str) -> dict[str, Any]:
    """What the ledger says once it has written down everything that the account in memory has."""
    counted = httpx2.get(f"{url}/anaphora/stats", headers={"x-api-key": key}).json()["answers"]["num_requests"]
    for _ in range(10_000):
        told = get(url, key)
        if told["groups"] and told["groups"][0]["num_requests"] == counted:
            return told
    raise AssertionError("the ledger was not written")


def test_forgetting_drops_labels_and_keeps_amounts(serve: Serve, tmp_path: Path) -> None:
    with serve(KEYS, folder=tmp_path) as (url, _):
        for key in ("key-of-alice", "key-of-bob"):
            ask(url, "a secret", key, **{"x-anaphora-tag": "private"})
        httpx2.post(f"{url}/anaphora/forget", json={}, headers={"x-api-key": "key-of-alice"})
    alice, bob = written(tmp_path)
    assert (alice.tag, alice.request_id) == ("", "")
    assert alice.paid == bob.paid > 0
    assert (bob.tag, bob.request_id[:4]) == ("private", "req_")


def test_a_label_that_is_too_long_is_refused(serve: Serve) -> None:
    with serve() as (url, _):
        assert ask(url, "hello", **{"x-anaphora-tag": "x" * 129}).status_code == 400


def test_without_a_ledger_there_is_no_file_and_no_page(serve: Serve, tmp_path: Path) -> None:
    with serve("[ledger]\nenabled = false\n", folder=tmp_path) as (url, _):
        assert ask(url, "hello").status_code == 200
        assert httpx2.get(f"{url}/anaphora/ledger").status_code == 404
    assert not (tmp_path / "cache" / "ledger.db").exists()


def test_a_file_that_cannot_be_written_fails_no_request_and_is_counted(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serve(f"[ledger]\npath = '{tmp_path}/file/ledger.db'\n", folder=tmp_path) as (url, process):
        assert ask(url, "hello").status_code == 200
        for _ in range(10_000):
            if 'anaphora:cache_failures_total{operation="write",tier="ledger"}' in httpx2.get(f"{url}/metrics").text:
                break
        else:
            raise AssertionError("the failure was not counted")
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_workers_write_one_book(serve: Serve, tmp_path: Path) -> None:
    with serve(KEYS, "--workers", "2", folder=tmp_path) as (url, process):
        with ThreadPoolExecutor(8) as pool:
            assert {response.status_code for response in pool.map(lambda n: ask(url, f"number {n}"), range(40))} == {200}
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert len(written(tmp_path)) == 40


# -- limits --------------------------------------------------------------------------------------------------------------


LIMITS = (
    KEYS
    + """
[[ledger.limits]]
tenant = "alice"
requests_per_minute = 3
tokens_per_minute = 100000

[[ledger.limits]]
tenant = "*"
usd_per_day = 0.0004
"""
)


@pytest.fixture
def limited(serve: Serve) -> Iterator[str]:
    with serve(LIMITS) as (url, _):
        yield url


def test_both_sdks_see_a_rate_limit_as_their_providers(limited: str) -> None:
    say: Any = [{"role": "user", "content": "hello"}]
    alice: Any = {"api_key": "key-of-alice", "max_retries": 0}
    with openai.OpenAI(base_url=f"{limited}/v1", **alice) as client:
        answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=say)
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
        client.chat.completions.create(model=MODEL, messages=say)
        client.chat.completions.create(model=MODEL, messages=say)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=MODEL, messages=say)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 20
    with anthropic.Anthropic(base_url=limited, **alice) as claude, pytest.raises(anthropic.RateLimitError) as limit:
        claude.messages.create(model=MODEL, max_tokens=5, messages=say)
    assert "3 requests per minute" in limit.value.message
    with openai.OpenAI(base_url=f"{limited}/v1", api_key="key-of-bob", max_retries=0) as other:
        assert other.chat.completions.create(model=MODEL, messages=say, max_tokens=5)


def test_who_has_spent_a_budget_still_gets_what_is_remembered(serve: Serve, tmp_path: Path) -> None:
    """And is told to come back when the day is over, also by a server that was started again."""
    with serve(LIMITS, folder=tmp_path) as (url, process):
        answer = ask(url, "one two three " * 6, "key-of-bob")
        assert answer.headers.get("anthropic-ratelimit-requests-limit") is None
        process.terminate()
        process.wait(timeout=60)
    with serve(LIMITS, folder=tmp_path) as (url, _):
        refused = ask(url, "something else", "key-of-bob")
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "false"
        assert 0 < int(refused.headers["retry-after"]) <= 86_400
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "$0.0004 per day is reached" in refused.json()["error"]["message"]
        assert "hit" in ask(url, "one two three " * 6, "key-of-bob").headers["cache-status"]
        assert ask(url, "something else").status_code == 200


def test_a_limit_holds_for_all_workers_together(serve: Serve) -> None:
    toml = "[[ledger.limits]]\ntenant = '*'\nrequests_per_day = 10\n"
    with serve(toml, "--workers", "2") as (url, _), ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda n: ask(url, f"number {n}").status_code, range(30)))
    assert (statuses.count(200), statuses.count(429)) == (10, 20)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[[ledger.limits]]\ntenant = 'a'\n", "limits nothing"),
        ("[[ledger.limits]]\ntenant = 'a'\nusd_per_day = 0\n", r"usd_per_day: more than 0"),
        ("[[ledger.limits]]\ntenant = 'a'\nusd_per_week = 1\n", r"did you mean usd_per_month|usd_per_week"),
        ("[ledger]\nprices = 'nowhere.toml'\n", r"ledger\.prices: nowhere\.toml cannot be read"),
        ("[ledger]\nenabled = false\n[[ledger.limits]]\ntenant = 'a'\nusd_per_day = 1\n", r"set ledger\.enabled = true"),
    ],
)
def test_a_mistake_stops_the_start_in_words(serve: Serve, toml: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words), serve(toml):
        pass


def test_own_prices_hold_for_the_servers_own_engine(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text("[[price]]\nmodel = 'echo'\ninput = 1\noutput = 10\n")
    with serve(f"[ledger]\nprices = '{tmp_path}/prices.toml'\n", folder=tmp_path) as (url, _):
        ask(url, "one two three", model="echo")
    (entry,) = written(tmp_path)
    assert entry.paid == (entry.input + 10 * entry.output) * 10**6


def test_the_command_reads_a_server_as_it_reads_the_file(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anaphora.cli import main

    with serve(KEYS, folder=tmp_path) as (url, _):
        ask(url, "one")
        ask(url, "one")
        until_told(url, "key-of-alice")
        told = []
        for place in (["--url", url, "--api-key", "key-of-alice"], ["--file", str(tmp_path / "cache" / "ledger.db")]):
            for command in (["show", "--json"], ["export", "--format", "json"]):
                assert main(["ledger", *command, *place]) == 0
                told.append(json.loads(capsys.readouterr().out))
    assert told[:2] == told[2:]
    assert [group["num_requests"] for group in told[0]] == [2]
    assert [row["level"] for row in told[1]] == ["computed", "exact"]
