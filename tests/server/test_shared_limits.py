"""Limits that real servers hold together, with a Valkey between them that is there, goes away, and comes back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from anaphora.ledger.joint import Joint, unpacked
from anaphora.testing.valkey import ValkeyServer, server_program

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]

pytest.importorskip("redis")


def settings(url: str) -> str:
    return f"""
[cache]
shared = "{url}"

[ledger]
share_limits = true

[[ledger.limits]]
tenant = "alice"
requests_per_month = 12
tokens_per_month = 1000

[[server.keys]]
tenant = "alice"
key = "key-of-alice"

[[server.keys]]
tenant = "free"
key = "key-of-nobody-with-limits"
"""


def ask(url: str, text: str = "one two three", key: str = "key-of-alice", max_tokens: int = 10) -> httpx2.Response:
    body = {"model": "claude-opus-5-5", "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
    return httpx2.post(f"{url}/v1/messages", json=body, headers={"x-api-key": key}, timeout=60)


def failures(url: str) -> float:
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("anaphora:cache_failures") and "limits" in line
    )


def left(url: str) -> int:
    """Requests, after one more."""
    answer = ask(url)
    assert answer.status_code == 200, answer.text
    return int(answer.headers["anthropic-ratelimit-requests-remaining"])


def at(valkey: ValkeyServer) -> Joint:
    """What all servers have told."""
    keys = valkey.command("KEYS", "anaphora:limits:*alice").split(b"\r\n")[2:3]
    data = valkey.command("GET", keys[0]).partition(b"\r\n")[2][:-2] if keys else b""
    return unpacked(data)


def test_two_servers_of_two_workers_let_in_what_the_limit_says(serve: Serve, valkey: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        serve(settings(valkey), "--workers", "2", folder=tmp_path / "one") as (one, _),
        serve(settings(valkey), "--workers", "2", folder=tmp_path / "two") as (two, _),
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda number: ask([one, two][number % 2], f"question {number}"), range(40)))
        assert sorted(answer.status_code for answer in answers) == 12 * [200] + 28 * [429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "12 requests per month" in refused.text
        assert ask(two, key="key-of-nobody-with-limits").status_code == 200


def test_a_tenant_that_is_forgotten_has_used_what_it_has_used_and_a_clean_end_leaves_nothing_reserved(
    serve: Serve, valkey: str, valkey_server: ValkeyServer
) -> None:
    with serve(settings(valkey)) as (one, _), serve(settings(valkey)) as (two, _):
        usage = ask(one).json()["usage"]
        tokens = 2 * (usage["input_tokens"] + usage["output_tokens"])  # the second time is after the forget
        assert [left(two), left(one)] == [10, 9]
        forgotten = httpx2.post(f"{two}/anaphora/forget", json={}, headers={"x-api-key": "key-of-alice"}, timeout=60)
        assert forgotten.status_code == 200
        assert [left(two), left(one)] == [8, 7]
    assert at(valkey_server).leases == ()
    assert at(valkey_server).counts[-3:-1] == (5, tokens)


def test_what_a_server_has_used_counts_once_also_when_it_is_started_again(serve: Serve, valkey: str, tmp_path: Path) -> None:
    with serve(settings(valkey), folder=tmp_path) as (one, _):
        assert [left(one), left(one)] == [11, 10]
    with serve(settings(valkey), folder=tmp_path) as (one, _), serve(settings(valkey)) as (two, _):
        assert [left(two), left(one)] == [9, 8]


def test_what_a_server_has_used_before_it_shares_its_limits_counts(serve: Serve, valkey: str, tmp_path: Path) -> None:
    alone = settings(valkey).replace("share_limits = true", "share_limits = false")
    with serve(alone, folder=tmp_path) as (one, _):
        assert [left(one), left(one)] == [11, 10]
    with serve(settings(valkey), folder=tmp_path) as (one, _), serve(settings(valkey)) as (two, _):
        assert [left(two), left(one), left(two)] == [11, 8, 7]


def test_without_the_server_between_them_each_holds_the_limit_and_then_they_agree_again(serve: Serve, tmp_path: Path) -> None:
    if server_program() is None:
        pytest.skip("no Valkey server is installed")
    with ValkeyServer() as valkey, serve(settings(valkey.url)) as (one, _), serve(settings(valkey.url)) as (two, process):
        assert [left(one), left(one), left(two)] == [11, 10, 9]
        valkey.kill()
        assert [left(one), left(two), left(two)] == [9, 10, 9]
        assert failures(one) > 0
        valkey.start()
        deadline_s = time.monotonic() + 60
        while at(valkey).counts[-3] != 6:  # it came back empty
            assert time.monotonic() < deadline_s
        assert [left(one), left(two)] == [5, 4]
        process.send_signal(signal.SIGKILL)
        assert left(one) == 3


def test_where_there_is_nothing_to_share_limits_on_the_server_does_not_start(serve: Serve) -> None:
    toml = settings("").replace('shared = ""', "")
    with pytest.raises(AssertionError, match=r"ledger\.share_limits: .* set cache\.shared"), serve(toml):
        pass
