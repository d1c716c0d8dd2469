"""What of a body becomes part of the question, and how."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from anaphora.types import (
    LOCAL_TENANT,
    MediaPart,
    Message,
    ModelInfo,
    Part,
    Request,
    Sampling,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
    ToolResultPart,
    ToolUsePart,
)
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Rendering
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses

Json = dict[str, Any]

BASE: dict[str, Json] = {
    "anthropic": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]},
    "openai_chat": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]},
    "openai_completions": {"model": "m", "max_tokens": 9, "prompt": "?"},
    "openai_responses": {"model": "m", "max_output_tokens": 9, "input": "?"},
}
DIALECTS: list[Dialect] = [Anthropic(), OpenAIChat(), OpenAICompletions(), OpenAIResponses()]
each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)


def ask(dialect: Dialect, change: Json | None = None, version: str | None = None) -> Request:
    body = json.dumps(BASE[dialect.name] | (change or {})).encode()
    return dialect.parse(body, tenant=LOCAL_TENANT, version=version).request


def look(dialect: Dialect, change: Json) -> Rendering:
    return dialect.parse(json.dumps(BASE[dialect.name] | change).encode(), tenant=LOCAL_TENANT).rendering


def content(dialect: Dialect, *parts: Json) -> tuple[Part, ...]:
    """The parts of a user message that has `parts`."""
    key = "input" if dialect.name == "openai_responses" else "messages"
    return ask(dialect, {key: [{"role": "user", "content": list(parts)}]}).messages[0].content


# -- what is neutral, what is kept -----------------------------------------------------------------------------------------

NEUTRAL: list[Json] = [
    {"metadata": {"user_id": "u"}},
    {"service_tier": "auto"},
    {"cache_control": {"type": "ephemeral"}},
    {"user": "u"},
    {"safety_identifier": "u"},
    {"store": False},
    {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
    {"diagnostics": {"previous_message_id": None}},
    {"thinking": {"type": "disabled"}},
    {"temperature": None, "x_unknown": None, "cache_salt": None},
]


@each_dialect
@pytest.mark.parametrize("change", NEUTRAL, ids=lambda change: next(iter(change)))
def test_what_cannot_change_the_answer_does_not_change_the_question(dialect: Dialect, change: Json) -> None:
    assert ask(dialect, change) == ask(dialect)


@each_dialect
def test_fields_that_nobody_knows_are_part_of_the_question(dialect: Dialect) -> None:
    assert ask(dialect, {"x_new": [1]}).extra == {"x_new": [1]}
    assert ask(dialect, {"logit_bias": {"5": 1}}).extra == {"logit_bias": {"5": 1}}
    assert ask(dialect, {"thinking": {"type": "adaptive"}}).extra == {"thinking": {"type": "adaptive"}}


@each_dialect
def test_sampling_is_understood_in_every_dialect(dialect: Dialect) -> None:
    fields = {"temperature": 1, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": 7, "presence_penalty": 2}
    sampling = Sampling(temperature=1.0, top_p=0.5, top_k=0, min_p=0.1, seed=7, presence_penalty=2.0)
    assert ask(dialect, fields).sampling == sampling


@each_dialect
def test_a_cache_salt_and_the_limit_are_kept(dialect: Dialect) -> None:
    request = ask(dialect, {"cache_salt": "s"})
    assert (request.cache_salt, request.max_tokens, request.model) == ("s", 9, "m")


# -- messages --------------------------------------------------------------------------------------------------------------


def test_neighbours_of_one_role_are_one_message() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    one = (Message("user", (TextPart("a"), TextPart("b"))),)
    assert ask(OpenAIChat(), {"messages": messages}).messages == one
    assert ask(Anthropic(), {"messages": messages}).messages == one


def test_messages_of_two_names_stay_apart() -> None:
    messages = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "user", "content": "b", "name": "Bob"}]
    assert [message.name for message in ask(OpenAIChat(), {"messages": messages}).messages] == ["Ann", "Bob"]


def test_a_system_message_in_the_middle_stays_where_it_is() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    request = ask(Anthropic(), {"messages": messages})
    assert [message.role for message in request.messages] == ["user", "system", "assistant", "user"]
    assert request == ask(OpenAIChat(), {"messages": messages})


def test_an_empty_system_field_says_nothing() -> None:
    assert ask(Anthropic(), {"system": ""}) == ask(Anthropic(), {"system": []}) == ask(Anthropic())
    assert ask(OpenAIResponses(), {"instructions": ""}) == ask(OpenAIResponses())


def test_tool_messages_fold_into_the_user_message_behind_them() -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call("a", '{"x": 1}'), call("b", "")]},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "and?"},
    ]
    assert ask(OpenAIChat(), {"messages": messages}).messages == (
        Message("assistant", (ToolUsePart("a", "t", '{"x":1}'), ToolUsePart("b", "t", "{}"))),
        Message(
            "user",
            (ToolResultPart("a", (TextPart("one"),)), ToolResultPart("b", (TextPart("two"),)), TextPart("and?")),
        ),
    )


def call(call_id: str, arguments: str) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": "t", "arguments": arguments}}


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    messages = [{"role": "assistant", "tool_calls": [call("a", '{"x": ')]}, {"role": "user", "content": "?"}]
    assert ask(OpenAIChat(), {"messages": messages}).messages[0].content == (ToolUsePart("a", "t", '{"x": '),)


def test_a_tool_result_may_be_an_error_or_empty() -> None:
    blocks: list[Json] = [
        {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": "broke"},
        {"type": "tool_result", "tool_use_id": "b"},
    ]
    expected = (ToolResultPart("a", (TextPart("broke"),), is_error=True), ToolResultPart("b", ()))
    assert content(Anthropic(), *blocks) == expected


def test_thinking_comes_back_in_every_dialect() -> None:
    user = {"role": "user", "content": "?"}
    anthropic = [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]}, user]
    chat = [{"role": "assistant", "reasoning_content": "hm", "content": ""}, user]
    responses = [{"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}, user]
    first = ask(Anthropic(), {"messages": anthropic})
    assert first.messages[0].content == (ThinkingPart("hm"),)
    assert first == ask(OpenAIChat(), {"messages": chat}) == ask(OpenAIResponses(), {"input": responses})


def test_cache_marks_leave_no_trace_anywhere() -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    stop = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    plain: Json = {"type": "text", "text": "a"}
    assert content(Anthropic(), plain | mark) == content(Anthropic(), plain)
    assert content(OpenAIChat(), plain | stop) == content(OpenAIChat(), plain | mark) == content(OpenAIChat(), plain)
    typed: Json = {"type": "input_text", "text": "a"}
    assert content(OpenAIResponses(), typed | stop) == content(OpenAIResponses(), typed)
    tool: Json = {"name": "t", "input_schema": {}}
    assert ask(Anthropic(), {"tools": [tool | mark]}) == ask(Anthropic(), {"tools": [tool]})


# -- media -----------------------------------------------------------------------------------------------------------------


def test_an_image_is_the_same_in_every_dialect() -> None:
    base64 = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    url = "data:image/png;base64,aGk="
    inline = (MediaPart("image", "image/png", {"base64": "aGk="}),)
    assert content(Anthropic(), base64) == inline
    assert content(OpenAIChat(), {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}) == inline
    assert content(OpenAIResponses(), {"type": "input_image", "image_url": url}) == inline
    linked = (MediaPart("image", "", {"url": "https://x/y.png"}),)
    assert content(Anthropic(), {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}) == linked
    assert content(OpenAIChat(), {"type": "image_url", "image_url": {"url": "https://x/y.png"}}) == linked
    assert content(OpenAIResponses(), {"type": "input_image", "image_url": "https://x/y.png"}) == linked


def test_how_closely_to_look_at_an_image_is_part_of_the_question() -> None:
    part = content(OpenAIChat(), {"type": "image_url", "image_url": {"url": "https://x", "detail": "high"}})[0]
    assert part == MediaPart("image", "", {"url": "https://x"}, {"detail": "high"})


def test_documents_and_sounds_are_media() -> None:
    pdf = {"type": "document", "title": "T", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
    expected = (MediaPart("document", "application/pdf", {"base64": "aGk="}, {"title": "T"}),)
    file = {"filename": "T", "file_data": "data:application/pdf;base64,aGk="}
    assert content(Anthropic(), pdf) == expected
    assert content(OpenAIChat(), {"type": "file", "file": file}) == expected
    assert content(OpenAIResponses(), {"type": "input_file", **file}) == expected
    sound = content(OpenAIChat(), {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}})
    assert sound == (MediaPart("audio", "audio/wav", {"base64": "aGk="}),)


# -- tools -----------------------------------------------------------------------------------------------------------------

TOOL: Json = {"name": "t", "description": "d", "parameters": {"type": "object"}, "strict": True}


def test_a_tool_and_its_unknown_fields_are_kept() -> None:
    expected = (Tool("t", "d", {"type": "object"}, {"strict": True}),)
    anthropic = {"name": "t", "description": "d", "input_schema": {"type": "object"}, "strict": True}
    assert ask(Anthropic(), {"tools": [anthropic]}).tools == expected
    assert ask(OpenAIChat(), {"tools": [{"type": "function", "function": TOOL}]}).tools == expected
    assert ask(OpenAIResponses(), {"tools": [{"type": "function", **TOOL}]}).tools == expected


def test_without_tools_there_is_nothing_to_choose() -> None:
    assert ask(OpenAIChat(), {"tool_choice": "none", "parallel_tool_calls": False}).tool_choice == ToolChoice()
    assert ask(Anthropic(), {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}) == ask(Anthropic())


# -- single dialects -------------------------------------------------------------------------------------------------------


def test_chat_log_probabilities_are_those_of_the_chosen_token_and_the_best_others() -> None:
    assert ask(OpenAIChat(), {"logprobs": True}).sampling.logprobs == 0
    assert ask(OpenAIChat(), {"logprobs": True, "top_logprobs": 5}).sampling.logprobs == 5
    assert ask(OpenAIChat(), {"logprobs": False}).sampling.logprobs is None
    assert look(OpenAIChat(), {"logprobs": True}).logprobs


def test_chat_usage_in_the_stream_is_a_matter_of_rendering() -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}, "n": 3}
    assert look(OpenAIChat(), asked) == Rendering("m", stream=True, include_usage=True, num_choices=3)
    assert msgspec.structs.replace(ask(OpenAIChat(), asked), stream=False) == ask(OpenAIChat(), {"n": 3})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3))), ("", ("",))],
)
def test_completions_takes_text_and_tokens_one_or_many(prompt: object, prompts: tuple[object, ...]) -> None:
    assert ask(OpenAICompletions(), {"prompt": prompt}).prompts == prompts
    assert look(OpenAICompletions(), {"prompt": prompt, "n": 2, "best_of": 2}).num_choices == 2 * len(prompts)


def test_completions_writes_sixteen_tokens_unless_told_otherwise() -> None:
    assert ask(OpenAICompletions(), {"max_tokens": None}).max_tokens == 16
    assert ask(OpenAICompletions(), {"max_tokens": 0, "echo": True}).max_tokens == 0


def test_responses_can_prewarm() -> None:
    assert ask(OpenAIResponses(), {"prompt_cache_options": {"prewarm": True}}).max_tokens == 0


def test_responses_wishes_are_put_in_chats_words() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    responses = ask(OpenAIResponses(), {"text": {"format": form, "verbosity": "low"}, "reasoning": {"effort": "high"}})
    chat = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "verbosity": "low",
        "reasoning_effort": "high",
    }
    assert responses == ask(OpenAIChat(), chat)


def test_responses_log_probabilities_follow_include() -> None:
    include = {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]}
    assert ask(OpenAIResponses(), include).sampling.logprobs == 0
    assert ask(OpenAIResponses(), include | {"top_logprobs": 4}).sampling.logprobs == 4
    assert ask(OpenAIResponses(), {"include": ["reasoning.encrypted_content"]}) == ask(OpenAIResponses())


def test_anthropic_takes_both_versions_and_none() -> None:
    assert ask(Anthropic()) == ask(Anthropic(), version="2023-06-01") == ask(Anthropic(), version="2026-10-21")


def test_counting_tokens_reads_the_same_question_without_a_limit() -> None:
    body = {key: value for key, value in BASE["anthropic"].items() if key != "max_tokens"} | {"system": "s"}
    counted = Anthropic().parse_count_tokens(json.dumps(body).encode(), tenant=LOCAL_TENANT)
    assert counted == msgspec.structs.replace(ask(Anthropic(), {"system": "s"}), max_tokens=None)


def test_anthropic_models_page_back() -> None:
    models = tuple(ModelInfo(name) for name in "abcd")
    page = json.loads(Anthropic().render_models(models, limit=2, before_id="d"))
    assert ([model["id"] for model in page["data"]], page["has_more"]) == (["b", "c"], True)
    assert (page["first_id"], page["last_id"]) == ("b", "c")
