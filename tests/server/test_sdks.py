"""The official SDKs against a real server process with the echo engine: what they send must be understood, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import anthropic
import openai
import pytest

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]

KEYS = """
[engine]
aliases = ["gpt-4o", "claude-sonnet-5"]

[[server.keys]]
tenant = "alice"
key = "key-of-alice"

[[server.keys]]
tenant = "bob"
key = "key-of-bob"
"""


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    with serve(KEYS) as (url, _):
        yield url


def openai_client(url: str, key: str = "key-of-alice") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def anthropic_client(url: str, key: str = "key-of-alice") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def oai(url: str) -> Iterator[openai.OpenAI]:
    with openai_client(url) as client:
        yield client


@pytest.fixture(scope="module")
def ant(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic_client(url) as client:
        yield client


def say(text: str) -> Any:
    """Messages that both SDKs take."""
    return [{"role": "user", "content": text}]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_openai_chat(oai: openai.OpenAI) -> None:
    answer = oai.chat.completions.create(model="echo", messages=say("plain chat"))
    assert answer.choices[0].message.content == "plain chat"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 2)


def test_openai_chat_streams(oai: openai.OpenAI) -> None:
    stream = oai.chat.completions.create(
        model="echo", messages=say("streamed chat"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "streamed chat"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


def test_openai_chat_with_n_logprobs_and_tools(oai: openai.OpenAI) -> None:
    answer = oai.chat.completions.create(model="echo", messages=say("several of them"), n=3, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["several of them"] * 3
    logprobs = answer.choices[2].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["several ", "of ", "them"]
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    called = oai.chat.completions.create(model="echo", messages=say("call"), tools=[tool], tool_choice="required")
    assert called.choices[0].finish_reason == "tool_calls"
    assert called.choices[0].message.tool_calls is not None
    assert called.choices[0].message.tool_calls[0].type == "function"


def test_openai_completions(oai: openai.OpenAI) -> None:
    assert oai.completions.create(model="echo", prompt="raw text", max_tokens=10).choices[0].text == "raw text"
    stream = oai.completions.create(model="echo", prompt="raw text", max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == "raw text"


def test_openai_responses(oai: openai.OpenAI) -> None:
    assert oai.responses.create(model="echo", input="a response").output_text == "a response"
    events = list(oai.responses.create(model="echo", input="a streamed response", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    with oai.responses.stream(model="echo", input="through the wrapper") as stream:
        assert stream.get_final_response().output_text == "through the wrapper"


def test_anthropic_messages(ant: anthropic.Anthropic) -> None:
    answer = ant.messages.create(model="echo", max_tokens=50, messages=say("a message"))
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "a message"
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (2, 2)


def test_anthropic_messages_stream(ant: anthropic.Anthropic) -> None:
    with ant.messages.stream(model="echo", max_tokens=50, messages=say("a streamed message")) as stream:
        assert "".join(stream.text_stream) == "a streamed message"
        assert stream.get_final_message().stop_reason == "end_turn"


def test_anthropic_counts_tokens(ant: anthropic.Anthropic) -> None:
    assert ant.messages.count_tokens(model="echo", messages=say("one two three")).input_tokens == 3


def test_an_alias_is_the_same_model_and_is_repeated_to_the_client(oai: openai.OpenAI) -> None:
    oai.chat.completions.create(model="echo", messages=say("by another name"))
    again = oai.chat.completions.with_raw_response.create(model="gpt-4o", messages=say("by another name"))
    assert "hit" in again.headers["cache-status"]
    assert again.parse().model == "gpt-4o"


# -- models ------------------------------------------------------------------------------------------------------------


def test_both_sdks_list_and_get_models(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    for models in ([model.id for model in oai.models.list()], [model.id for model in ant.models.list()]):
        assert models[0] == "echo"
        assert {"claude-opus-5", "gpt-5.6-sol"} <= set(models)
    assert oai.models.retrieve("echo").object == "model"
    assert ant.models.retrieve("echo").type == "model"
    with pytest.raises(openai.NotFoundError):
        oai.models.retrieve("none/such")
    with pytest.raises(anthropic.NotFoundError):
        ant.models.retrieve("none")


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_a_typed_error_that_names_what_there_is(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    with pytest.raises(openai.NotFoundError, match="echo") as one:
        oai.chat.completions.create(model="mistral-9", messages=say("x"))
    assert one.value.code == "model_not_found"
    assert one.value.request_id
    with pytest.raises(anthropic.NotFoundError, match="echo") as two:
        ant.messages.create(model="llama-9", max_tokens=5, messages=say("x"))
    assert two.value.request_id


def test_a_bad_field_is_a_bad_request(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        oai.chat.completions.create(model="echo", messages=say("x"), temperature=9)
    assert error.value.param == "temperature"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ant.messages.create(model="echo", max_tokens=-1, messages=say("x"))


def test_too_long_a_prompt_is_a_bad_request(oai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        oai.chat.completions.create(model="echo", messages=say("word " * 40_000))
    assert error.value.code == "context_length_exceeded"


def test_a_stream_that_fails_before_its_first_byte_has_the_status_of_its_error(ant: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as error:
        ant.messages.create(model="echo", max_tokens=50, messages=say("word " * 40_000), stream=True)
    assert error.value.status_code == 400


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    with openai_client(url, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model="echo", messages=say("x"))
    with anthropic_client(url, "wrong") as other, pytest.raises(anthropic.AuthenticationError):
        other.messages.create(model="echo", max_tokens=5, messages=say("x"))


# -- the answer cache through both --------------------------------------------------------------------------------------


def test_what_was_asked_through_openai_is_answered_through_anthropic(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    question = say("one question, two dialects")
    first = oai.chat.completions.with_raw_response.create(model="echo", messages=question, max_tokens=100)
    second = ant.messages.with_raw_response.create(model="echo", max_tokens=100, messages=question)
    third = oai.chat.completions.with_raw_response.create(model="echo", messages=question, max_tokens=100)
    assert "fwd=miss" in first.headers["cache-status"]
    assert "hit" in second.headers["cache-status"]
    assert "hit" in third.headers["cache-status"]
    assert int(second.headers["age"]) >= 0
    assert "x-anaphora-saved-ms" in second.headers
    assert first.headers["x-anaphora-kv-reused-tokens"] == "0"
    block = second.parse().content[0]
    assert block.type == "text"
    assert block.text == first.parse().choices[0].message.content == "one question, two dialects"
    assert len({first.parse().id, third.parse().id}) == 2
    assert first.headers["x-request-id"] != third.headers["x-request-id"]


def test_what_was_streamed_is_answered_whole_and_the_other_way_round(oai: openai.OpenAI) -> None:
    stream = oai.chat.completions.create(model="echo", messages=say("streamed first"), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "streamed first"
    whole = oai.chat.completions.with_raw_response.create(model="echo", messages=say("streamed first"))
    assert "hit" in whole.headers["cache-status"]
    assert whole.parse().choices[0].message.content == "streamed first"
    with oai.chat.completions.with_streaming_response.create(
        model="echo", messages=say("streamed first"), stream=True
    ) as again:
        assert "hit" in again.headers["cache-status"]
        lines = list(again.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"


def test_tenants_never_see_each_others_answers(url: str, oai: openai.OpenAI) -> None:
    oai.chat.completions.create(model="echo", messages=say("alice's secret"))
    with openai_client(url, "key-of-bob") as bob:
        answer = bob.chat.completions.with_raw_response.create(model="echo", messages=say("alice's secret"))
    assert "fwd=miss" in answer.headers["cache-status"]


def test_cache_control_is_honoured(oai: openai.OpenAI) -> None:
    def ask(text: str, directives: str) -> str:
        answer = oai.chat.completions.with_raw_response.create(
            model="echo", messages=say(text), extra_headers={"cache-control": directives}
        )
        return str(answer.headers["cache-status"])

    assert "fwd=bypass" in ask("not to be kept", "no-store")
    assert "fwd=miss" in ask("not to be kept", "max-age=60")
    assert "hit" in ask("not to be kept", "max-age=60")
    assert "fwd=request" in ask("not to be kept", "no-cache")
    assert "hit" in ask("not to be kept", "only-if-cached")
    with pytest.raises(openai.InternalServerError) as error:
        ask("never asked before", "only-if-cached")
    assert error.value.status_code == 504
    assert error.value.response.headers["cache-status"].startswith("anaphora;")


def test_forgetting_is_of_the_callers_own(oai: openai.OpenAI, url: str) -> None:
    with openai_client(url, "key-of-bob") as bob:
        for client in (oai, bob):
            client.chat.completions.create(model="echo", messages=say("to be forgotten"))
        bob.post("/../anaphora/forget", cast_to=object, body={})
        for client, expected in ((oai, "hit"), (bob, "fwd=miss")):
            answer = client.chat.completions.with_raw_response.create(model="echo", messages=say("to be forgotten"))
            assert expected in answer.headers["cache-status"]


def test_fifty_simultaneous_identical_requests_are_computed_once(url: str) -> None:
    text = "all together now " * 200
    with openai_client(url, "key-of-bob") as client, ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(lambda _: client.chat.completions.with_raw_response.create(model="echo", messages=say(text)), range(50))
        )
        stats: Any = client.get("/../anaphora/stats", cast_to=object)
    assert all(answer.parse().choices[0].message.content == text for answer in answers)
    computed = [answer for answer in answers if "hit" not in answer.headers["cache-status"]]
    assert sum("collapsed" not in answer.headers["cache-status"] for answer in computed) == 1
    assert stats["tenant"] == "bob"
