"""`GET /anaphora/explain` on a real server: the reason for every miss, by any id a client knows, for its own tenant only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest

from anaphora.cli import main

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]

RULES = "Now: 2026-03-02T09:00:05Z\n" + "Follow the rule.\n" * 300
_KEYS = itertools.count()


class Client:
    """An organisation of its own."""

    def __init__(self, url: str) -> None:
        self.key = f"key-{next(_KEYS)}"
        self.http = httpx2.Client(base_url=url, headers={"x-api-key": self.key})

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.close()

    def message(self, system: str = RULES, question: str = "hello", **body: Any) -> httpx2.Response:
        marked = [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
        messages = [{"role": "user", "content": question}]
        full = {"model": "claude-opus-5", "max_tokens": 5, "system": marked, "messages": messages, **body}
        return self.http.post("/v1/messages", json=full)

    def explain(self, name: str) -> Any:
        response = self.http.get(f"/anaphora/explain/{name}")
        response.raise_for_status()
        return response.json()


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    with serve("[server]\nexplanations = 8\n", "--virtual-clock", remember=False) as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_the_first_request_has_nothing_to_read(client: Client) -> None:
    found = client.explain(client.message().json()["id"])
    assert (found["answered_by"], found["outcome"], found["levels"]) == ("backend", "finished", [])
    assert found["prompt_cache"]["profile"] == "claude-opus-5"
    assert found["prompt_cache"]["miss"]["reason"] == "first"


def test_a_full_read_has_no_miss(client: Client) -> None:
    client.message()
    found = client.explain(client.message(question="and now?").json()["id"])
    assert found["prompt_cache"]["miss"] is None
    assert found["prompt_cache"]["read_tokens"] > 1000


def test_a_changed_time_is_named_with_place_loss_and_fix(client: Client) -> None:
    first = client.message().json()["id"]
    found = client.explain(client.message(RULES.replace("09:00", "10:17")).json()["id"])
    miss = found["prompt_cache"]["miss"]
    assert (miss["reason"], miss["code"], miss["path"], miss["earlier_id"]) == ("changed", "timestamp", "system.0", first)
    assert miss["offset"] == RULES.index("09:00")
    assert 0 < miss["differs_at"] < 20
    assert "09:00:05" in miss["before"]
    assert "10:17:05" in miss["after"]
    assert miss["lost_tokens"] > 1000
    assert miss["lost_usd"] > 0
    assert miss["fix"].startswith("Take the time out of the prefix")


def test_an_expired_entry_and_other_parameters_are_told_apart(client: Client) -> None:
    client.message()
    client.http.post("/anaphora/clock", json={"advance_s": 301}).raise_for_status()
    late = client.explain(client.message().json()["id"])
    assert late["prompt_cache"]["miss"]["code"] == "gap-over-ttl"
    fast = client.explain(client.message(speed="fast").json()["id"])
    assert (fast["prompt_cache"]["miss"]["code"], fast["prompt_cache"]["miss"]["names"]) == ("tier-changed", ["speed"])


def test_a_request_is_found_by_its_header_and_by_its_answer(client: Client) -> None:
    message = client.message()
    chat = client.http.post("/v1/chat/completions", json={"model": "gpt-5", "messages": [{"role": "user", "content": "hi"}]})
    response = client.http.post("/v1/responses", json={"model": "gpt-5", "input": "hi"})
    for answer, header in ((message, "request-id"), (chat, "x-request-id"), (response, "x-request-id")):
        by_header = client.explain(answer.headers[header])
        assert by_header == client.explain(answer.json()["id"])
        assert by_header["answer_id"] == answer.json()["id"]


def test_a_streamed_answer_is_explained_too(client: Client) -> None:
    found = client.explain(client.message(stream=True).headers["request-id"])
    assert (found["outcome"], found["answered_by"], found["kv_reused_tokens"]) == ("finished", "backend", 0)


def test_a_refusal_is_told_with_its_words(client: Client) -> None:
    refused = client.message(model="no-such-model")
    assert refused.status_code == 404
    found = client.explain(refused.headers["request-id"])
    assert found["outcome"] == "failed"
    assert "no-such-model" in found["error"]
    assert found["prompt_cache"] is None


def test_nobody_sees_another_tenants_requests(url: str, client: Client) -> None:
    answer = client.message().json()["id"]
    with Client(url) as other:
        assert other.http.get(f"/anaphora/explain/{answer}").status_code == 404
        assert other.http.get("/anaphora/explain").json() == {"requests": []}


def test_only_the_latest_requests_are_kept(client: Client) -> None:
    answers = [client.message(question=f"question {number}").json()["id"] for number in range(9)]
    assert client.http.get(f"/anaphora/explain/{answers[0]}").status_code == 404
    latest = [found["answer_id"] for found in client.http.get("/anaphora/explain").json()["requests"]]
    assert latest == answers[:0:-1]
    assert len(client.http.get("/anaphora/explain?limit=3").json()["requests"]) == 3
    assert client.http.get("/anaphora/explain?limit=0").status_code == 400


def test_what_is_forgotten_is_explained_no_more(client: Client) -> None:
    answer = client.message().json()["id"]
    client.http.post("/anaphora/forget", json={}).raise_for_status()
    assert client.http.get(f"/anaphora/explain/{answer}").status_code == 404
    found = client.explain(client.message(RULES.replace("09:00", "10:17")).json()["id"])
    assert found["prompt_cache"]["miss"]["reason"] == "first"


def test_an_answer_from_memory_names_its_level_and_a_fresh_one_why_not(serve: Serve) -> None:
    with serve() as (url, _), Client(url) as client:
        first, again = client.message(), client.message()
        fresh = client.http.post("/v1/messages", content=first.request.read(), headers={"cache-control": "no-cache"})
        levels = [client.explain(answer.json()["id"])["levels"] for answer in (first, again, fresh)]
        assert [[level["reason"] for level in asked] for asked in levels] == [["absent"], [], ["no_cache"]]
        hit = client.explain(again.json()["id"])
        assert (hit["answered_by"], hit["prompt_cache"], hit["kv_reused_tokens"]) == ("exact", None, None)


def test_reasons_and_promises_are_counted(client: Client) -> None:
    for system in (RULES, RULES, RULES.replace("09:00", "10:17")):
        client.message(system)
    stats = client.http.get("/anaphora/stats").json()
    assert stats["prompt_cache"]["misses"] == {"first": 1, "changed": 1}
    assert stats["prompt_cache"]["read_tokens"] > 1000
    assert stats["promises"]["entries"] >= 2
    assert stats["promises"]["protected_tokens"] > 2000
    metrics = client.http.get("/metrics").text
    assert 'anaphora:prompt_cache_misses_total{model="claude-opus-5",reason="changed"}' in metrics
    assert 'anaphora:prompt_cache_tokens_total{kind="read",model="claude-opus-5"}' in metrics
    assert 'anaphora:promises_lost_total{why="broken"} 0.0' in metrics


def test_the_command_prints_the_latest_and_one_in_words(url: str, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.message()
    answer = client.message(RULES.replace("09:00", "10:17")).json()["id"]
    flags = ["--url", url, "--api-key", client.key]
    assert main(["explain", *flags]) == 0
    table = capsys.readouterr().out
    assert answer in table
    assert "timestamp" in table
    assert main(["explain", answer, *flags]) == 0
    told = capsys.readouterr().out
    assert "changed (timestamp)" in told
    assert "fix     Take the time out" in told
    assert main(["explain", "msg_unknown", *flags]) == 1
    assert "is not among the latest 8 requests" in capsys.readouterr().err
