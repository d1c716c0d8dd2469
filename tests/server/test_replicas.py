"""Who answers can be looked at and changed while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from tests.server.conftest import Serve

from anaphora.testing.upstream import Upstream

HEADERS = {"authorization": "Bearer mine"}


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[Upstream, Upstream]]:
    with Upstream("one", models=["house"]) as one, Upstream("two", models=["house"]) as two:
        yield one, two


def config(one: Upstream) -> str:
    return f'[[gateway.upstreams]]\nname = "one"\nbase_url = "{one.openai_base_url}"\nmodels = ["house"]\n'


def ask(client: httpx2.Client, text: str) -> httpx2.Response:
    body = {"model": "house", "messages": [{"role": "user", "content": text}]}
    return client.post("/v1/chat/completions", json=body, headers=HEADERS, timeout=30)


def change(client: httpx2.Client, **body: Any) -> httpx2.Response:
    return client.post("/anaphora/replicas", json=body, headers=HEADERS)


def names(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [replica["name"] for replica in answer.json()["replicas"]]


def test_a_replica_joins_drains_and_leaves_while_the_server_runs(serve: Serve, upstreams: tuple[Upstream, Upstream]) -> None:
    one, two = upstreams
    with serve(config(one), remember=False) as (url, _), httpx2.Client(base_url=url) as client:
        assert names(client.get("/anaphora/replicas", headers=HEADERS)) == ["one"]
        assert ask(client, "first").headers["x-anaphora-upstream"] == "one"

        added = {"name": "two", "base_url": two.openai_base_url, "models": ["house"]}
        assert names(change(client, add=added)) == ["one", "two"]
        state = change(client, drain="one").json()["replicas"]
        assert [replica["draining"] for replica in state] == [True, False]
        assert {ask(client, f"drained {i}").headers["x-anaphora-upstream"] for i in range(5)} == {"two"}
        change(client, resume="one")
        assert names(change(client, remove="two")) == ["one"]
        assert {ask(client, f"removed {i}").headers["x-anaphora-upstream"] for i in range(5)} == {"one"}

        change(client, drain="one")
        refused = ask(client, "nobody")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "upstream_draining"


def test_what_a_replica_was_asked_before_it_leaves_it_still_answers(serve: Serve, upstreams: tuple[Upstream, Upstream]) -> None:
    one, two = upstreams
    with serve(config(one), remember=False) as (url, _), httpx2.Client(base_url=url) as client, ThreadPoolExecutor() as pool:
        one.clear()
        one.fault("stall", wait_s=0.5, after_events=1)
        body = {"model": "house", "stream": True, "messages": [{"role": "user", "content": "one two three"}]}
        with client.stream("POST", "/v1/chat/completions", json=body, headers=HEADERS, timeout=30) as answer:
            assert answer.headers["x-anaphora-upstream"] == "one"
            change(client, add={"name": "two", "base_url": two.openai_base_url, "models": ["house"]})
            assert names(change(client, remove="one")) == ["two"]
            assert pool.submit(ask, client, "meanwhile").result().headers["x-anaphora-upstream"] == "two"
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert [request.outcome for request in one.requests()] != ["client gone"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "exactly one"),
        ({"drain": "one", "remove": "one"}, "exactly one"),
        ({"add": {"name": "one", "base_url": "http://127.0.0.1:1"}}, "already"),
        ({"add": {"name": "x", "base_url": "ftp://host"}}, "base_url"),
        ({"add": {"name": "x", "base_url": "http://h", "key_env": "NOT_SET_ANYWHERE"}}, "NOT_SET_ANYWHERE"),
        ({"add": {"name": "x", "base_url": "http://h", "colour": 1}}, "colour"),
        ({"remove": "nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_is_a_clear_error(
    serve: Serve, upstreams: tuple[Upstream, Upstream], body: dict[str, Any], words: str
) -> None:
    with serve(config(upstreams[0])) as (url, _), httpx2.Client(base_url=url) as client:
        answer = change(client, **body)
        assert answer.status_code in (400, 404)
        assert words in answer.json()["error"]["message"]
        assert names(client.get("/anaphora/replicas", headers=HEADERS)) == ["one"]


def test_only_administrators_may(serve: Serve, upstreams: tuple[Upstream, Upstream]) -> None:
    keys = '[[server.keys]]\ntenant = "a"\nkey = "plain"\n[[server.keys]]\ntenant = "a"\nkey = "chief"\nadmin = true\n'
    with serve(keys + config(upstreams[0])) as (url, _), httpx2.Client(base_url=url) as client:
        assert client.get("/anaphora/replicas", headers={"x-api-key": "plain"}).status_code == 403
        assert client.get("/anaphora/replicas").status_code == 401
        assert names(client.get("/anaphora/replicas", headers={"x-api-key": "chief"})) == ["one"]


def test_without_upstreams_there_are_none(serve: Serve) -> None:
    with serve("") as (url, _), httpx2.Client(base_url=url) as client:
        assert client.get("/anaphora/replicas").status_code == 404
