"""What of a request goes across to an upstream of another dialect, how, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming, ResponseCreateParamsStreaming
from tests.wire.shapes import misfits
from tests.wire.test_same_question import Conversation, Pen, conversations
from tests.wire.test_upstream_requests import BASE, TALKS, Json, ask, parse, refused, translate

from anaphora.errors import InvalidRequest
from anaphora.wire.upstream_anthropic import UpstreamAnthropic
from anaphora.wire.upstream_chat import UpstreamChat
from anaphora.wire.upstream_responses import UpstreamResponses

SHAPES: dict[tuple[str, bool], Any] = {
    ("anthropic", False): MessageCreateParamsNonStreaming,
    ("anthropic", True): MessageCreateParamsStreaming,
    ("openai_chat", False): CompletionCreateParamsNonStreaming,
    ("openai_chat", True): CompletionCreateParamsStreaming,
    ("openai_responses", False): ResponseCreateParamsNonStreaming,
    ("openai_responses", True): ResponseCreateParamsStreaming,
}

SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "string"}}}
IMAGE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
PDF: Json = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
PLAIN: Json = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hi"}, "title": "a.txt"}


def check_shape(dialect: str, body: Json) -> None:
    """The official SDK would send it."""
    shape = SHAPES[dialect, bool(body.get("stream"))]
    # The newest version of the API has dropped these; the one that a translated request names has them.
    fields = {key: given for key, given in body.items() if (dialect, key) not in _OLDER}
    assert misfits(fields, shape) == []


_OLDER = {("anthropic", "temperature"), ("anthropic", "top_p"), ("anthropic", "top_k")}


def user(*blocks: Json) -> list[Json]:
    return [{"role": "user", "content": list(blocks)}]


def ask_anthropic(target: str, *blocks: Json) -> Any:
    """The content that a user's message of `blocks` becomes."""
    body = translate("anthropic", target, {**BASE["anthropic"], "messages": user(*blocks)})
    check_shape(target, body)
    return body["input" if target == "openai_responses" else "messages"][0]["content"]


@given(conversations, st.integers(), st.sampled_from(TALKS), st.sampled_from(TALKS))
def test_a_translated_body_has_the_shape_that_the_official_sdk_has(
    talk: Conversation, seed: int, source: str, target: str
) -> None:
    talk.unknown, talk.salt, talk.top_k = {}, None, None
    talk.stop = [] if target == "openai_responses" else talk.stop
    talk.tools = [(tool, about, {"type": "object", "properties": {}}) for tool, about, _ in talk.tools]
    pen = Pen(seed)
    body = {"anthropic": pen.anthropic, "openai_chat": pen.chat, "openai_responses": pen.responses}[source](talk)
    if source != target:
        check_shape(target, translate(source, target, json.loads(body)))


# -- media -----------------------------------------------------------------------------------------------------------------


def test_images_go_across() -> None:
    url = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    assert ask_anthropic("openai_chat", IMAGE, url) == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ]
    assert ask_anthropic("openai_responses", IMAGE, url) == [
        {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto"},
        {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "auto"},
    ]
    there = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]
    body = translate("openai_chat", "anthropic", {"model": "m", "messages": user(*there)})
    assert body["messages"][0]["content"] == [IMAGE]
    check_shape("anthropic", body)


def test_documents_go_across() -> None:
    assert ask_anthropic("openai_chat", PDF) == [
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk=", "filename": "document.pdf"}}
    ]
    assert ask_anthropic("openai_responses", PLAIN) == [
        {"type": "input_file", "file_data": "data:text/plain;base64,aGk=", "filename": "a.txt"}
    ]
    there = {"type": "file", "file": {"file_data": "data:text/plain;base64,aGk=", "filename": "a.txt"}}
    body = translate("openai_chat", "anthropic", {"model": "m", "messages": user(there)})
    assert body["messages"][0]["content"] == [PLAIN]
    check_shape("anthropic", body)


@pytest.mark.parametrize(
    ("source", "target", "block", "param"),
    [
        ("openai_chat", "anthropic", {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, ""),
        ("openai_chat", "anthropic", {"type": "image_url", "image_url": {"url": "https://a/b", "detail": "low"}}, ".detail"),
        ("openai_chat", "anthropic", {"type": "file", "file": {"file_data": "aGk="}}, ""),
        ("openai_chat", "anthropic", {"type": "file", "file": {"file_data": "data:text/plain;base64,/w=="}}, ""),
        ("openai_chat", "anthropic", {"type": "file", "file": {"file_id": "f"}}, ""),
        ("openai_chat", "openai_responses", {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, ""),
        ("anthropic", "openai_chat", {**IMAGE, "source": {"type": "file", "file_id": "f"}}, ""),
        ("anthropic", "openai_responses", {**PDF, "source": {"type": "file", "file_id": "f"}}, ""),
        ("anthropic", "openai_chat", {**PDF, "source": {"type": "url", "url": "https://a/b"}}, ""),
        ("anthropic", "openai_chat", {**PDF, "context": "Of last year."}, ".context"),
        ("anthropic", "openai_chat", {"type": "search_result", "source": "s", "title": "t", "content": []}, ""),
        ("anthropic", "openai_responses", {"type": "container_upload", "file_id": "f"}, ""),
    ],
)
def test_media_that_the_other_side_does_not_know_are_refused(source: str, target: str, block: Json, param: str) -> None:
    body = {**BASE[source], "messages": user({"type": "text", "text": "?"}, block)}
    assert refused(source, target, body) == f"messages[0].content[1]{param}"


# -- tools -----------------------------------------------------------------------------------------------------------------

CALL: Json = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
RESULT: Json = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain", "is_error": True}
WORK: list[Json] = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "sig"}, CALL]},
    {"role": "user", "content": [RESULT, {"type": "text", "text": "And?"}]},
]


def test_calls_and_results_keep_their_ids_and_errors_are_said_in_words() -> None:
    chat = translate("anthropic", "openai_chat", {**BASE["anthropic"], "messages": WORK})
    check_shape("openai_chat", chat)
    call = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    failed = [{"type": "text", "text": "The tool call failed:"}, {"type": "text", "text": "rain"}]
    assert chat["messages"] == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": failed},
        {"role": "user", "content": "And?"},
    ]


def test_signed_thinking_goes_to_responses_and_other_thinking_nowhere() -> None:
    body = translate("anthropic", "openai_responses", {**BASE["anthropic"], "messages": WORK})
    # The SDK's type asks for an id; the API does not where nothing is stored.
    sealed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "sig"}
    assert body["input"][1] == sealed
    body["input"][1] = {**sealed, "id": "rs_1"}
    check_shape("openai_responses", body)
    thought = [{"role": "user", "content": "?"}, {"role": "assistant", "reasoning_content": "hm", "content": "a"}, *user()]
    written = translate("openai_chat", "anthropic", {"model": "m", "messages": thought})
    assert written["messages"][1]["content"] == [{"type": "text", "text": "a"}]


def test_thinking_goes_along_to_chat_where_the_upstream_takes_it() -> None:
    request = parse("anthropic", {**BASE["anthropic"], "messages": WORK})
    messages: Any = UpstreamChat(extensions=True).write(request, model="m")["messages"]
    assert messages[1]["reasoning_content"] == "hm"


def test_what_was_only_thought_is_no_message() -> None:
    messages = [WORK[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]}, WORK[0]]
    body = translate("anthropic", "openai_chat", {**BASE["anthropic"], "messages": messages})
    assert [message["role"] for message in body["messages"]] == ["user", "user"]


def test_arguments_that_are_no_object_are_wrapped_for_anthropic() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"city'}}
    messages = [*user(), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "?"}]
    body = translate("openai_chat", "anthropic", {"model": "m", "messages": messages})
    assert body["messages"][1]["content"][0]["input"] == {"INVALID_JSON": '{"city'}


def test_a_result_with_an_image_goes_to_responses_but_not_to_chat() -> None:
    messages = [*WORK[:2], {"role": "user", "content": [{**RESULT, "content": [IMAGE], "is_error": False}]}]
    body = translate("anthropic", "openai_responses", {**BASE["anthropic"], "messages": messages})
    assert body["input"][-1]["output"][0]["type"] == "input_image"
    assert refused("anthropic", "openai_chat", {**BASE["anthropic"], "messages": messages}) == (
        "messages[2].content[0].content[0]"
    )


def test_tools_are_defined_and_chosen_in_each_sides_words() -> None:
    tools = [{"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True}]
    choice = {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    named = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    assert ask("anthropic", "openai_chat", tools=tools, tool_choice=choice) == {
        "tools": [{"type": "function", "function": named}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
    }
    assert ask("anthropic", "openai_responses", tools=tools, tool_choice=choice) == {
        "tools": [{"type": "function", **named}],
        "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": False,
    }
    there = [{"type": "function", "function": named}, {"type": "function", "function": {"name": "g"}}]
    assert ask("openai_chat", "anthropic", tools=there, tool_choice="required", parallel_tool_calls=False) == {
        "tools": [*tools, {"name": "g", "input_schema": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    assert ask("openai_chat", "anthropic", tools=there, tool_choice="none")["tool_choice"] == {"type": "none"}
    assert ask("anthropic", "openai_chat", tools=tools, tool_choice={"type": "any"})["tool_choice"] == "required"


@pytest.mark.parametrize("target", ["openai_chat", "openai_responses"])
def test_what_only_anthropic_knows_of_tools_is_refused(target: str) -> None:
    tool = {"name": "f", "input_schema": SCHEMA}
    assert refused("anthropic", target, BASE["anthropic"] | {"tools": [{**tool, "defer_loading": True}]}) == (
        "tools[0].defer_loading"
    )
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert refused("anthropic", target, BASE["anthropic"] | {"tools": [tool, search]}) == "tools[1]"


# -- messages --------------------------------------------------------------------------------------------------------------


def test_system_text_is_where_each_side_has_it() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *BASE["openai_chat"]["messages"]]
    assert translate("openai_chat", "anthropic", {"model": "m", "messages": messages})["system"] == [
        {"type": "text", "text": "Be brief."}
    ]
    assert translate("openai_chat", "openai_responses", {"model": "m", "messages": messages})["instructions"] == "Be brief."
    assert ask("anthropic", "openai_chat", system="Be brief.")["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("target", "messages", "param"),
    [
        ("anthropic", [*user(), {"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}], "messages[2]"),
        ("anthropic", [{"role": "system", "content": "alone"}], "messages"),
        ("anthropic", [{"role": "user", "content": "a", "name": "Ann"}], "messages[0].name"),
        ("openai_responses", [{"role": "user", "content": "a", "name": "Ann"}], "messages[0].name"),
        ("openai_responses", [*user(), {"role": "assistant", "content": "Once"}], "messages[1]"),
    ],
)
def test_messages_that_the_other_side_cannot_have_are_refused(target: str, messages: list[Json], param: str) -> None:
    assert refused("openai_chat", target, {"model": "m", "messages": messages}) == param


def test_an_answer_that_has_begun_goes_to_anthropic_alone() -> None:
    messages = [*BASE["anthropic"]["messages"], {"role": "assistant", "content": "Once"}]
    assert refused("anthropic", "openai_chat", {**BASE["anthropic"], "messages": messages}) == "messages[1]"
    body = translate("openai_responses", "anthropic", {"model": "m", "input": messages})
    assert body["messages"][-1]["role"] == "assistant"


# -- sampling, limits, the rest ----------------------------------------------------------------------------------------------


def test_limits_and_sampling_have_each_sides_names() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "stop": ["a", "b"], "stream": True}
    assert ask("openai_chat", "anthropic", **fields) == {
        "temperature": 0.5,
        "top_p": 0.9,
        "stop_sequences": ["a", "b"],
        "stream": True,
    }
    body = translate("anthropic", "openai_chat", BASE["anthropic"] | {"stop_sequences": ["a"], "stream": True})
    assert body["max_completion_tokens"] == 9
    assert body["stop"] == ["a"]
    assert body["stream_options"] == {"include_usage": True}
    assert translate("anthropic", "openai_responses", BASE["anthropic"])["max_output_tokens"] == 9
    older = UpstreamChat(limit="max_tokens").write(parse("anthropic", BASE["anthropic"]), model="m")
    assert (older["max_tokens"], older.get("max_completion_tokens")) == (9, None)


def test_anthropic_is_told_a_limit_where_the_client_has_none() -> None:
    request = parse("openai_chat", {"model": "m", "messages": BASE["openai_chat"]["messages"]})
    assert UpstreamAnthropic(max_tokens=77).write(request, model="m")["max_tokens"] == 77


def test_a_prewarm_is_said_where_it_can_be() -> None:
    body = translate("anthropic", "openai_responses", BASE["anthropic"] | {"max_tokens": 0})
    assert body["prompt_cache_options"] == {"prewarm": True}
    assert translate("openai_responses", "anthropic", BASE["openai_responses"] | {"max_output_tokens": 0})["max_tokens"] == 0
    assert refused("anthropic", "openai_chat", BASE["anthropic"] | {"max_tokens": 0}) == "max_tokens"


@pytest.mark.parametrize(
    ("target", "fields", "param"),
    [
        ("anthropic", {"temperature": 1.5}, "temperature"),
        ("anthropic", {"seed": 0}, "seed"),
        ("anthropic", {"min_p": 0.1}, "min_p"),
        ("anthropic", {"presence_penalty": 1}, "presence_penalty"),
        ("anthropic", {"frequency_penalty": -1}, "frequency_penalty"),
        ("anthropic", {"n": 2}, "n"),
        ("anthropic", {"logprobs": True}, "logprobs"),
        ("anthropic", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("anthropic", {"stop": [" "]}, "stop[0]"),
        ("anthropic", {"verbosity": "low"}, "verbosity"),
        ("anthropic", {"cache_salt": "s"}, "cache_salt"),
        ("anthropic", {"x_new": 1}, "x_new"),
        ("anthropic", {"response_format": {"type": "json_object"}}, "response_format"),
        (
            "anthropic",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "description": "d", "schema": {}}}},
            "response_format.json_schema.description",
        ),
        (
            "anthropic",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ("anthropic", {"reasoning_effort": "minimal"}, "reasoning_effort"),
        ("openai_responses", {"seed": 0}, "seed"),
        ("openai_responses", {"stop": ["a"]}, "stop"),
        ("openai_responses", {"n": 2}, "n"),
        ("openai_responses", {"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
def test_wishes_of_chat_that_the_other_side_does_not_have_are_refused(target: str, fields: Json, param: str) -> None:
    assert refused("openai_chat", target, BASE["openai_chat"] | fields) == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": 5}, "top_k"),
        ({"stop_sequences": list("abcde")}, "stop"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"speed": "fast"}, "speed"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "thinking"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, "thinking.display"),
        ({"output_config": {"effort": "low", "x": 1}}, "output_config.x"),
    ],
)
def test_wishes_of_anthropics_that_chat_does_not_have_are_refused(fields: Json, param: str) -> None:
    assert refused("anthropic", "openai_chat", BASE["anthropic"] | fields) == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"x": 1}}, "text"),
    ],
)
def test_wishes_of_responses_that_anthropic_does_not_have_are_refused(fields: Json, param: str) -> None:
    assert refused("openai_responses", "anthropic", BASE["openai_responses"] | fields) == param


def test_an_upstream_that_knows_more_is_told_more() -> None:
    fields: Json = {"top_k": 5, "cache_salt": "s", "stop_sequences": list("abcde"), "max_tokens": 0}
    request = parse("anthropic", BASE["anthropic"] | fields)
    body = UpstreamChat(extensions=True).write(request, model="m")
    assert {key: body[key] for key in ("top_k", "cache_salt", "stop", "max_completion_tokens")} == {
        "top_k": 5,
        "cache_salt": "s",
        "stop": list("abcde"),
        "max_completion_tokens": 0,
    }
    assert UpstreamResponses(extensions=True).write(request, model="m")["stop"] == list("abcde")
    chat = parse("openai_chat", BASE["openai_chat"] | {"seed": 7, "min_p": 0.5})
    assert UpstreamAnthropic(extensions=True).write(chat, model="m")["seed"] == 7


FORM = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}


def test_a_schema_for_the_answer_goes_across() -> None:
    output = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert ask("anthropic", "openai_chat", output_config=output) == {"response_format": FORM}
    text = {"format": {"type": "json_schema", "name": "answer", "strict": True, "schema": SCHEMA}}
    assert ask("anthropic", "openai_responses", output_config=output) == {"text": text}
    assert ask("openai_chat", "anthropic", response_format=FORM) == {"output_config": output}
    assert ask("openai_responses", "anthropic", text=text) == {"output_config": output}
    assert ask("openai_responses", "openai_chat", text=text) == {"response_format": FORM}
    assert ask("openai_chat", "openai_responses", response_format=FORM) == {"text": text}


def test_effort_goes_across() -> None:
    assert ask("anthropic", "openai_chat", output_config={"effort": "max"}) == {"reasoning_effort": "max"}
    assert ask("openai_chat", "anthropic", reasoning_effort="low") == {"output_config": {"effort": "low"}}
    assert ask("openai_responses", "anthropic", reasoning={"effort": "none"}) == {"thinking": {"type": "disabled"}}
    assert ask("openai_chat", "openai_responses", reasoning_effort="minimal") == {"reasoning": {"effort": "minimal"}}
    assert ask("anthropic", "openai_chat", thinking={"type": "adaptive"}) == {}


def test_a_wish_to_see_summaries_of_thinking_goes_across() -> None:
    shown = {"type": "adaptive", "display": "summarized"}
    assert ask("anthropic", "openai_responses", thinking=shown) == {"reasoning": {"summary": "auto"}}
    assert ask("openai_responses", "anthropic", reasoning={"summary": "auto"}) == {"thinking": shown}


def test_thinking_may_be_asked_of_anthropics_models_in_chat() -> None:
    budget = {"type": "enabled", "budget_tokens": 2048}
    assert ask("openai_chat", "anthropic", thinking=budget) == {"thinking": budget}


def test_a_translated_answer_is_stored_nowhere() -> None:
    assert translate("anthropic", "openai_responses", BASE["anthropic"])["store"] is False


@pytest.mark.parametrize("target", TALKS)
def test_raw_prompts_go_to_no_other_dialect(target: str) -> None:
    request = parse("openai_completions", {"model": "m", "prompt": "Once"})
    for upstream in (UpstreamAnthropic(), UpstreamChat(), UpstreamResponses()):
        with pytest.raises(InvalidRequest) as error:
            upstream.write(request, model="m")
        assert error.value.param == "prompt"
    assert refused(target, "openai_completions", BASE[target]) == "messages"
