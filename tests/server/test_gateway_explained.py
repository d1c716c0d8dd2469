"""Answers that come as an upstream gave them have its ids and its numbers: by these they are explained, and broken off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.server.gateways import CLAUDE, GPT, Gateway, gateway, upstream
from tests.server.provided import COMPLETION, MESSAGE, RESPONSE, Json

from anaphora.cli import main
from anaphora.clock import ManualClock
from anaphora.events import AnswerNamed
from anaphora.explain import Explanations
from anaphora.testing.upstream import Upstream
from anaphora.types import Tenant
from anaphora.wire.base import new_ids

_numbers = itertools.count()


@pytest.fixture(scope="module")
def provider() -> Iterator[Upstream]:
    with Upstream("provider") as one:
        yield one


@pytest.fixture(scope="module")
def served(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    toml = "[gateway]\nbreaker_failures = 1000\n[server]\nexplanations = 8\n"
    toml += upstream("claude", provider, "claude-*") + upstream("gpt", provider, "gpt-*")
    with gateway(toml, tmp_path_factory.mktemp("gateway")) as served:
        yield served


@pytest.fixture
def claude(served: Gateway) -> Iterator[anthropic.Anthropic]:
    with served.claude() as client:
        yield client


@pytest.fixture
def gpt(served: Gateway) -> Iterator[openai.OpenAI]:
    with served.gpt() as client:
        yield client


def fresh() -> str:
    return f"what was never asked before, number {next(_numbers)}"


def say() -> Any:
    return [{"role": "user", "content": fresh()}]


def explain(served: Gateway, name: str) -> httpx2.Response:
    return httpx2.get(f"{served.url}/anaphora/explain/{name}")


def explained(served: Gateway, name: str) -> Json:
    found: Json = explain(served, name).raise_for_status().json()
    return found


def test_a_streamed_answer_is_found_by_the_id_that_its_client_was_given(
    served: Gateway, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    with claude.messages.stream(model=CLAUDE, max_tokens=50, messages=say()) as stream:
        names = [stream.get_final_message().id]
    chunks = [chunk.id for chunk in gpt.chat.completions.create(model=GPT, messages=say(), stream=True)]
    names.append(chunks[0])
    texts = gpt.completions.create(model=GPT, prompt=fresh(), stream=True)
    names += {text.id for text in texts}
    events = list(gpt.responses.create(model=GPT, input=fresh(), stream=True))
    assert events[0].type == "response.created"
    names.append(events[0].response.id)
    for name in names:
        found = explained(served, name)
        assert (found["upstream_answer_id"], found["outcome"]) == (name, "finished")
        assert found["answer_id"] != name
        assert found == explained(served, found["request_id"])
    assert len(names) == 4


@pytest.mark.parametrize("name", ["msg_01AbCdEfGh", f"msg_{'0123456789abcdef' * 2}"])
def test_a_whole_answer_is_found_by_the_id_that_its_client_was_given(
    served: Gateway, provider: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI, name: str
) -> None:
    provider.answer(body={**MESSAGE, "id": name})
    assert claude.messages.create(model=CLAUDE, max_tokens=9, messages=say()).id == name
    assert explained(served, name)["dialect"] == "anthropic"
    provider.answer(body={**COMPLETION, "id": f"chatcmpl-{name}"})
    assert gpt.chat.completions.create(model=GPT, messages=say()).id == f"chatcmpl-{name}"
    assert explained(served, f"chatcmpl-{name}")["dialect"] == "openai_chat"
    provider.answer(body={**RESPONSE, "id": f"resp_{name}"})
    assert gpt.responses.create(model=GPT, input=fresh()).id == f"resp_{name}"
    assert explained(served, f"resp_{name}")["dialect"] == "openai_responses"


def test_of_two_answers_of_one_name_the_later_is_found_and_what_is_gone_is_not(
    served: Gateway, provider: Upstream, claude: anthropic.Anthropic
) -> None:
    provider.answer(body={**MESSAGE, "id": "msg_twice"}, count=2)
    requests = [
        claude.messages.with_raw_response.create(model=CLAUDE, max_tokens=9, messages=say()).headers["request-id"]
        for _ in range(2)
    ]
    assert explained(served, "msg_twice")["request_id"] == requests[1]
    for _ in range(7):
        claude.messages.create(model=CLAUDE, max_tokens=9, messages=say())
    assert explain(served, requests[0]).status_code == 404
    assert explained(served, "msg_twice")["request_id"] == requests[1]
    claude.messages.create(model=CLAUDE, max_tokens=9, messages=say())
    assert explain(served, "msg_twice").status_code == 404
    provider.answer(body={**MESSAGE, "id": "msg_forgotten"})
    claude.messages.create(model=CLAUDE, max_tokens=9, messages=say())
    httpx2.post(f"{served.url}/anaphora/forget", json={}).raise_for_status()
    assert explain(served, "msg_forgotten").status_code == 404


def test_the_command_takes_the_id_and_tells_it(served: Gateway, gpt: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    name = gpt.chat.completions.create(model=GPT, messages=say()).id
    assert main(["explain", name, "--url", served.url]) == 0
    assert f"known   there as {name}" in capsys.readouterr().out


# -- a stream that breaks off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "error", "malformed-json"])
def test_the_error_that_ends_a_passed_stream_goes_on_counting_where_the_stream_broke(
    served: Gateway, provider: Upstream, gpt: openai.OpenAI, fault: str
) -> None:
    provider.fault(fault, after_events=7)
    numbers, kinds = [], []
    try:
        for event in gpt.responses.create(model=GPT, input="so many words that some are left to cut", stream=True):
            numbers.append(event.sequence_number)
            kinds.append(event.type)
    except openai.APIError as error:  # as the SDK has it, `error` itself
        body: Any = error.body
        numbers.append(body["sequence_number"])
        kinds.append("error")
    assert kinds[0] == "response.created"
    assert "error" in kinds
    assert kinds.index("error") > 3
    assert numbers == list(range(len(numbers)))


def test_comments_between_the_last_event_and_the_cut_do_not_count(served: Gateway, provider: Upstream) -> None:
    created = {"type": "response.created", "sequence_number": 41, "response": {**RESPONSE, "status": "in_progress"}}
    delta = {"type": "response.output_text.delta", "sequence_number": 42, "output_index": 0, "delta": '"sequence_number": 99'}
    provider.answer(events=(created, delta, ": still there\n\n", ": and still\n\n"))
    asked = {"model": GPT, "input": fresh(), "stream": True}
    body = httpx2.post(f"{served.url}/v1/responses", json=asked, headers={"authorization": "Bearer x"}).text
    assert ": and still" in body
    assert '"type":"error","sequence_number":43,' in body
    assert '"type":"response.failed","sequence_number":44,' in body


# -- the book ---------------------------------------------------------------------------------------------------------------


def test_whatever_an_id_is_it_leads_to_the_request() -> None:
    book = Explanations(ManualClock(100.0))
    ann, bob = Tenant("ann"), Tenant("bob")
    ours = new_ids(100.0).id
    book.open(ann, f"req_{ours}", f"msg_{ours}", "anthropic")
    book.record(AnswerNamed(ann, f"req_{ours}", "msg_theirs"))
    for name in (f"req_{ours}", f"msg_{ours}", "msg_theirs"):
        assert book.request_id(ann, name) == f"req_{ours}"
    assert book.request_id(bob, "msg_theirs") == "msg_theirs"  # nobody's but Ann's
    unknown = new_ids(100.0).id
    assert book.request_id(ann, f"chatcmpl-{unknown}") == f"req_{unknown}"  # of another process, perhaps
    book.record(AnswerNamed(ann, f"req_{ours}", "x" * 1000))
    assert book.request_id(ann, "x" * 1000) == "x" * 1000
