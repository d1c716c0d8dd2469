"""What a test upstream tells about what reached it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from anaphora.testing.upstream import Upstream

QUESTION: Any = [{"role": "user", "content": "What now?"}]


def test_a_request_arrives_with_everything_but_its_secrets(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    claude.messages.create(
        model="claude-opus-5",
        max_tokens=5,
        messages=QUESTION,
        extra_body={"of_the_future": {"a": 1}},
        extra_headers={"x-api-key": "secret", "authorization": anthropic.omit},
    )
    gpt.chat.completions.create(model="gpt-4.1", messages=QUESTION, extra_headers={"x-tag": "mine"})
    one, two = upstream.requests()
    assert (one.number + 1, one.method, one.path, one.model) == (two.number, "POST", "/v1/messages", "claude-opus-5")
    assert one.body["of_the_future"] == {"a": 1}
    assert (one.auth, two.auth) == ("x-api-key", "bearer")
    assert (one.headers["x-api-key"], two.headers["authorization"]) == ("***", "***")
    assert two.headers["x-tag"] == "mine"
    assert "secret" not in httpx2.get(f"{upstream.url}/testing/requests").text
    assert (one.outcome, one.status, one.fault, one.left_s) == ("finished", 200, None, None)


def test_every_path_of_the_provider_is_told_and_no_other(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    claude.messages.count_tokens(model="claude-opus-5", messages=QUESTION)
    gpt.models.list()
    httpx2.get(f"{upstream.url}/health")
    httpx2.get(f"{upstream.url}/v1/no/such/path")
    requests = upstream.requests()
    assert [(request.method, request.path, request.status) for request in requests] == [
        ("POST", "/v1/messages/count_tokens", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/no/such/path", 404),
    ]
    assert upstream.requests("/v1/models") == [requests[1]]


def test_a_client_that_leaves_a_stream_is_noticed(upstream: Upstream, gpt: openai.OpenAI) -> None:
    upstream.fault("stall", after_events=3)
    stream = gpt.chat.completions.create(model="gpt-4.1", messages=QUESTION, stream=True)
    assert len(list(itertools.islice(stream, 3))) == 3
    assert upstream.seen(settled_within_s=0).outcomes == {"running": 1}
    stream.close()
    [request] = upstream.requests()
    assert (request.outcome, request.num_events) == ("left", 3)
    assert request.left_s is not None
    seen = upstream.seen(settled_within_s=0)
    assert (seen.settled, seen.outcomes) == (True, {"left": 1, "running": 0})


def test_each_of_many_simultaneous_requests_is_counted_once(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    def ask(number: int) -> str:
        message: Any = {"role": "user", "content": f"number {number}"}
        answer = claude.messages.create(model="claude-opus-5", max_tokens=9, messages=[message])
        block: Any = answer.content[0]
        return str(block.text)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers == [f"number {number}" for number in range(100)]
    seen = upstream.seen()
    assert seen.outcomes == {"finished": 100, "running": 0}
    assert {request.body["messages"][0]["content"] for request in seen.requests} == set(answers)
    last = seen.requests[-1].number
    assert upstream.seen(after=last - 3).requests == seen.requests[-3:]


def test_a_body_that_is_no_json_is_told_as_text(upstream: Upstream) -> None:
    assert httpx2.post(f"{upstream.url}/v1/messages", content=b"{not json").status_code == 400
    [request] = upstream.requests()
    assert request.body == "{not json"


def test_only_the_latest_requests_are_kept_and_all_are_counted() -> None:
    with Upstream(keep=2) as upstream, httpx2.Client(base_url=upstream.url) as client:
        for number in range(5):
            client.post("/v1/completions", json={"model": "gpt-4.1", "prompt": f"{number}"})
        seen = upstream.seen()
    assert [request.body["prompt"] for request in seen.requests] == ["3", "4"]
    assert seen.outcomes == {"finished": 5, "running": 0}


def test_what_is_still_under_way_is_an_error_to_who_counts_on_its_end(upstream: Upstream, gpt: openai.OpenAI) -> None:
    upstream.fault("stall", after_events=1)
    with gpt.chat.completions.create(model="gpt-4.1", messages=QUESTION, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(TimeoutError, match="still under way"):
            upstream.requests(within_s=0.1)
    assert [request.outcome for request in upstream.requests()] == ["left"]


def test_instances_have_names_and_share_nothing() -> None:
    with Upstream("north", models=["gpt-4.1"], keys=["n"]) as north, Upstream("south", models=["my-own-model"]) as south:
        north.fault("500")
        with openai.OpenAI(base_url=south.openai_base_url, api_key="any", max_retries=0) as client:
            raw = client.chat.completions.with_raw_response.create(model="my-own-model", messages=QUESTION)
            assert raw.headers["x-testing-upstream"] == "south"
            assert [model.id for model in client.models.list()] == ["my-own-model"]
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="gpt-4.1", messages=QUESTION)
        assert north.requests() == []
        with openai.OpenAI(base_url=north.openai_base_url, api_key="n", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as failed:
                client.chat.completions.create(model="gpt-4.1", messages=QUESTION)
            assert failed.value.response.headers["x-testing-upstream"] == "north"
            assert client.chat.completions.create(model="gpt-4.1", messages=QUESTION).choices
        with (
            openai.OpenAI(base_url=north.openai_base_url, api_key="another", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.chat.completions.create(model="gpt-4.1", messages=QUESTION)


def test_no_answer_says_that_anaphora_gave_it(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    raw = claude.messages.with_raw_response.create(model="claude-opus-5", max_tokens=5, messages=QUESTION)
    assert not [name for name in raw.headers if name.startswith("x-anaphora") or name in ("cache-status", "age")]
    assert raw.headers["request-id"].startswith("req_")
