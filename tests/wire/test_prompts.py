"""What prompt caching sees of a body: its blocks as they were sent, and what else a prefix depends on."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.prompt import Block, Prompt
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.anthropic_prompt import read_prompt
from anaphora.wire.base import Dialect, Parsed
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses

Json = dict[str, Any]

ANTHROPIC, CHAT, RESPONSES, COMPLETIONS = Anthropic(), OpenAIChat(), OpenAIResponses(), OpenAICompletions()
PNG = base64.b64encode(b"\x89PNG, nearly").decode()
SCHEMA: Json = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}


def parse(dialect: Dialect, body: Json) -> Parsed:
    return dialect.parse(json.dumps({"model": "m", **body}).encode(), tenant=LOCAL_TENANT)


def anthropic(**body: Any) -> Prompt:
    return parse(ANTHROPIC, {"max_tokens": 9, "messages": [{"role": "user", "content": "?"}], **body}).prompt


def contents(prompt: Prompt) -> list[bytes]:
    return [block.content for block in prompt.blocks]


def outline(prompt: Prompt) -> list[tuple[str, str, str, str]]:
    return [(block.section, block.kind, block.role, block.path) for block in prompt.blocks]


# -- a conversation with everything in it ----------------------------------------------------------------------------------

AGENT: Json = {
    "model": "m",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
    "tools": [{"name": "look", "description": "Looks.", "input_schema": SCHEMA}, {"name": "act", "input_schema": {}}],
    "messages": [
        {"role": "user", "content": "Look there."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "sig"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"b": 1, "a": {"cache_control": {"type": "x"}}}},
                {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [
                        {"type": "text", "text": "A house."},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
                    ],
                },
                {"type": "tool_result", "tool_use_id": "t2", "content": "Nothing."},
                {"type": "image", "source": {"type": "url", "url": "https://x.test/y.png"}},
                {"type": "text", "text": ""},
            ],
        },
        {"role": "user", "content": "And?"},
        {"role": "system", "content": "It is late."},
    ],
}


def test_blocks_are_those_of_the_body_in_the_order_of_rendering() -> None:
    prompt = parse(ANTHROPIC, AGENT).prompt
    assert outline(prompt) == [
        ("tools", "tool", "", "tools.0"),
        ("tools", "tool", "", "tools.1"),
        ("system", "text", "system", "system.0"),
        ("system", "text", "system", "system.1"),
        ("messages", "text", "user", "messages.0.content"),
        ("messages", "thinking", "assistant", "messages.1.content.0"),
        ("messages", "text", "assistant", "messages.1.content.1"),
        ("messages", "tool_use", "assistant", "messages.1.content.2"),
        ("messages", "tool_use", "assistant", "messages.1.content.3"),
        ("messages", "tool_result", "user", "messages.2.content.0"),
        ("messages", "tool_result", "user", "messages.2.content.1"),
        ("messages", "image", "user", "messages.2.content.2"),
        ("messages", "empty", "user", "messages.2.content.3"),
        ("messages", "text", "user", "messages.3.content"),
        ("messages", "text", "system", "messages.4.content"),
    ]
    assert [block.message for block in prompt.blocks] == [-1, -1, -1, -1, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert len(set(contents(prompt))) == len(prompt.blocks)


def test_the_prompt_is_read_once_and_only_when_asked_for() -> None:
    parsed = parse(ANTHROPIC, AGENT)
    assert "prompt" not in vars(parsed)
    assert parsed.prompt is parsed.prompt


def test_counting_tokens_sees_the_same_prompt() -> None:
    body = {key: value for key, value in AGENT.items() if key != "max_tokens"}
    counted = ANTHROPIC.parse_count(json.dumps(body).encode(), tenant=LOCAL_TENANT)
    assert counted.prompt == parse(ANTHROPIC, AGENT).prompt


# -- marks are no part of anything -----------------------------------------------------------------------------------------


def places(body: Json) -> Iterator[Json]:
    """Where a mark may stand."""
    yield from body["tools"]
    yield from body["system"]
    for message in body["messages"]:
        if isinstance(message["content"], list):
            for block in message["content"]:
                if block["type"] != "thinking" and block.get("text") != "":
                    yield block
                if block["type"] == "tool_result" and isinstance(block["content"], list):
                    yield from block["content"]


NUM_PLACES = len(list(places(AGENT)))


@given(st.sets(st.integers(0, NUM_PLACES - 1), max_size=3), st.sampled_from(["5m", "1h"]), st.booleans())
def test_moving_adding_or_removing_marks_changes_neither_request_nor_contents(
    marked: set[int], ttl: str, automatic: bool
) -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": ttl}}
    body = copy.deepcopy(AGENT)
    for index, owner in enumerate(places(body)):
        if index in marked:
            owner |= mark
    if automatic:
        body |= mark
    plain, parsed = parse(ANTHROPIC, AGENT), parse(ANTHROPIC, body)
    assert parsed.request == plain.request
    assert contents(parsed.prompt) == contents(plain.prompt)
    assert outline(parsed.prompt) == outline(plain.prompt)
    assert parsed.prompt.salts == plain.prompt.salts
    assert parsed.prompt.automatic == (ttl if automatic else None)
    assert {block.mark for block in parsed.prompt.blocks} <= {None, ttl}
    assert any(block.mark for block in parsed.prompt.blocks) == bool(marked)


def test_a_mark_inside_a_tools_result_stands_for_the_whole_result() -> None:
    body = copy.deepcopy(AGENT)
    body["messages"][2]["content"][0]["content"][0]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    prompt = parse(ANTHROPIC, body).prompt
    assert [block.path for block in prompt.blocks if block.mark == "1h"] == ["messages.2.content.0"]


def test_what_looks_like_a_mark_in_a_tools_input_is_content() -> None:
    changed = copy.deepcopy(AGENT)
    changed["messages"][1]["content"][2]["input"]["a"]["cache_control"]["type"] = "y"
    assert contents(parse(ANTHROPIC, changed).prompt) != contents(parse(ANTHROPIC, AGENT).prompt)


# -- what is the same, and what is not ---------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(texts, texts)
def test_a_string_is_one_text_block(system: str, question: str) -> None:
    strings = anthropic(system=system, messages=[{"role": "user", "content": question}])
    blocks = anthropic(
        system=[{"type": "text", "text": system}],
        messages=[{"role": "user", "content": [{"text": question, "type": "text"}]}],
    )
    assert contents(strings) == contents(blocks)
    assert [block.kind for block in strings.blocks] == [block.kind for block in blocks.blocks]


@given(texts, texts)
def test_a_string_is_one_part_for_openai(developer: str, question: str) -> None:
    def chat(system: object, user: object) -> list[bytes]:
        messages = [{"role": "developer", "content": system}, {"role": "user", "content": user}]
        return contents(parse(CHAT, {"messages": messages}).prompt)

    parts = chat([{"type": "text", "text": developer}], [{"type": "text", "text": question}])
    assert chat(developer, question) == parts


def use(**fields: Any) -> Prompt:
    block = {"type": "tool_use", "id": "t", "name": "n", "input": {}, **fields}
    return anthropic(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": [block]}])


def test_the_order_of_keys_inside_input_and_schema_matters_and_of_a_blocks_own_fields_does_not() -> None:
    assert contents(use(input={"a": 1, "b": 2})) != contents(use(input={"b": 2, "a": 1}))
    one, other = {"name": "n", "input_schema": {"a": 1, "b": 2}}, {"name": "n", "input_schema": {"b": 2, "a": 1}}
    assert contents(anthropic(tools=[one])) != contents(anthropic(tools=[other]))
    turned = dict(reversed(one.items()))
    assert contents(anthropic(tools=[one])) == contents(anthropic(tools=[turned]))


def test_saying_a_default_of_a_tool_says_nothing() -> None:
    short: Json = {"name": "n", "input_schema": {}}
    long: Json = {**short, "type": "custom", "description": "", "strict": False, "cache_control": None}
    assert contents(anthropic(tools=[short])) == contents(anthropic(tools=[long]))
    assert contents(anthropic(tools=[short])) != contents(anthropic(tools=[{**short, "strict": True}]))


def image(data: str, **source: str) -> bytes:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data, **source}}
    return anthropic(messages=[{"role": "user", "content": [block]}]).blocks[0].content


def test_an_image_is_its_bytes() -> None:
    assert image(PNG) == image(f"{PNG[:4]}\n{PNG[4:]}")
    assert image(PNG) != image(base64.b64encode(b"\x89PNG, another").decode())
    assert image(PNG) != image(PNG, media_type="image/webp")
    assert image("no base64!") != image("nor this!")
    assert PNG.encode() not in image(PNG)


def test_the_same_words_of_another_role_are_another_block() -> None:
    said = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    assert len(set(contents(anthropic(messages=said)))) == 2


# -- salts -----------------------------------------------------------------------------------------------------------------

TOOLS: Json = {"tools": [{"name": "n", "input_schema": {}}]}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"speed": "fast"}, {"speed"}),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, {"format"}),
    ],
)
def test_what_invalidates_from_the_system_prompt_on_is_in_its_salt(change: Json, names: set[str]) -> None:
    plain, changed = anthropic(**TOOLS), anthropic(**TOOLS, **change)
    assert {name for name in plain.salts if plain.salts[name] != changed.salts[name]} == names
    assert plain.system_salt != changed.system_salt
    assert plain.message_salt == changed.message_salt
    assert contents(plain) == contents(changed)


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"tool_choice": {"type": "none"}}, "tool_choice", "none"),
        ({"tool_choice": {"type": "tool", "name": "n"}}, "tool_choice", "tool:n"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "parallel_tool_use", "off"),
        ({"thinking": {"type": "adaptive"}}, "thinking", "adaptive"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "thinking", "enabled:2048"),
        ({"output_config": {"effort": "max"}}, "effort", "max"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}]},
            "images",
            "present",
        ),
    ],
)
def test_what_invalidates_the_messages_is_in_their_salt(change: Json, name: str, value: str) -> None:
    plain, changed = anthropic(**TOOLS), anthropic(**TOOLS, **change)
    assert {key: changed.salts[key] for key in plain.salts if plain.salts[key] != changed.salts[key]} == {name: value}
    assert plain.message_salt != changed.message_salt
    assert plain.system_salt == changed.system_salt


@pytest.mark.parametrize(
    "change",
    [
        {"speed": "standard"},
        {"thinking": {"type": "disabled"}},
        {"output_config": {"effort": "high"}},
        {"output_config": {"format": None}},
        {"tool_choice": {"type": "auto"}},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": False}},
        {"max_tokens": 5, "stop_sequences": ["x"], "temperature": 0.5, "top_p": 0.5, "top_k": 5},
        {"stream": True, "metadata": {"user_id": "u"}},
    ],
)
def test_defaults_and_sampling_change_nothing(change: Json) -> None:
    assert anthropic(**{**TOOLS, **change}) == anthropic(**TOOLS)


def test_an_image_inside_a_tools_result_is_an_image() -> None:
    assert parse(ANTHROPIC, AGENT).prompt.salts["images"] == "present"


def test_tools_of_the_provider_and_citations_are_told_where_a_recorded_body_has_them() -> None:
    prompt = read_prompt(
        {
            "model": "m",
            "tools": [{"type": "web_search_20260318", "name": "web_search"}, {"type": "web_fetch_20260318", "name": "f"}],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "document", "source": {"type": "url", "url": "u"}, "citations": {"enabled": True}},
                        {"type": "web_search_tool_result", "tool_use_id": "t", "content": []},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "server_tool_use", "id": "t", "name": "web_search", "input": {}},
                    ],
                }
            ],
        }
    )
    assert [block.kind for block in prompt.blocks[2:]] == ["document", "server_tool_result", "thinking", "tool_use"]
    assert {prompt.salts[name] for name in ("web_search", "web_fetch", "citations")} == {"on"}


@pytest.mark.parametrize(("given_value", "previous"), [(None, None), ("msg_1", "msg_1")])
def test_diagnostics_are_asked_for_even_without_an_earlier_answer(given_value: str | None, previous: str | None) -> None:
    prompt = anthropic(diagnostics={"previous_message_id": given_value})
    assert (prompt.diagnose, prompt.previous_id, prompt.options_given) == (True, previous, ("diagnostics",))
    assert not anthropic().diagnose


# -- OpenAI ------------------------------------------------------------------------------------------------------------------

FUNCTION: Json = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
DATA_URL = f"data:image/png;base64,{PNG}"
ARGUMENTS = '{"b": 1, "a": 2}'

CHAT_AGENT: Json = {
    "tools": [{"type": "function", "function": FUNCTION}],
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look."},
                {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}},
                {"type": "file", "file": {"file_id": "f"}},
                {"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}},
            ],
        },
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "I look.",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "A house."},
        {"role": "user", "content": ""},
    ],
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "reasoning_effort": "low",
    "verbosity": "low",
}
RESPONSES_AGENT: Json = {
    "tools": [{"type": "function", **FUNCTION}],
    "input": [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look."},
                {"type": "input_image", "image_url": DATA_URL, "detail": "high"},
                {"type": "input_file", "file_id": "f"},
                {"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}},
            ],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "c", "output": "A house."},
        {"role": "user", "content": ""},
    ],
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"},
    "reasoning": {"effort": "low"},
}


def test_chat_and_responses_see_the_same_blocks_and_salts() -> None:
    chat, responses = parse(CHAT, CHAT_AGENT), parse(RESPONSES, RESPONSES_AGENT)
    assert chat.request == responses.request
    assert contents(chat.prompt) == contents(responses.prompt)
    assert chat.prompt.salts == responses.prompt.salts
    assert chat.prompt.message_salt == responses.prompt.message_salt
    assert [block.kind for block in chat.prompt.blocks] == [block.kind for block in responses.prompt.blocks]
    assert outline(chat.prompt) == [
        ("tools", "tool", "", "tools[0]"),
        ("messages", "text", "system", "messages[0].content"),
        ("messages", "text", "user", "messages[1].content[0]"),
        ("messages", "image", "user", "messages[1].content[1]"),
        ("messages", "document", "user", "messages[1].content[2]"),
        ("messages", "audio", "user", "messages[1].content[3]"),
        ("messages", "thinking", "assistant", "messages[2].reasoning_content"),
        ("messages", "text", "assistant", "messages[2].content"),
        ("messages", "tool_use", "assistant", "messages[2].tool_calls[0]"),
        ("messages", "tool_result", "tool", "messages[3].content"),
        ("messages", "empty", "user", "messages[4].content"),
    ]


def test_instructions_are_the_system_section() -> None:
    prompt = parse(RESPONSES, {"instructions": "Be brief.", "input": "Hi"}).prompt
    assert outline(prompt) == [("system", "text", "system", "instructions"), ("messages", "text", "user", "input")]
    assert [block.message for block in prompt.blocks] == [-1, 0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"parallel_tool_calls": False}, "parallel_tool_use"),
        ({"response_format": {"type": "json_object"}}, "format"),
        ({"reasoning_effort": "high"}, "effort"),
        ({"verbosity": "high"}, "verbosity"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)
def test_what_openai_wants_the_same_is_in_the_salt(change: Json, name: str) -> None:
    plain, changed = parse(CHAT, CHAT_AGENT).prompt, parse(CHAT, {**CHAT_AGENT, **change}).prompt
    assert {key for key in plain.salts if plain.salts[key] != changed.salts[key]} == {name}
    assert plain.message_salt != changed.message_salt


@pytest.mark.parametrize(
    "change",
    [
        {"tool_choice": "none"},
        {"temperature": 0.5, "seed": 3, "n": 2, "max_tokens": 7},
        {"parallel_tool_calls": True, "service_tier": "auto"},
        {"user": "u", "store": True, "stream": True},
    ],
)
def test_what_openai_does_not_look_at_changes_nothing(change: Json) -> None:
    assert parse(CHAT, {**CHAT_AGENT, **change}).prompt == parse(CHAT, CHAT_AGENT).prompt


@given(st.sets(st.integers(0, 4)), st.sampled_from([None, "30m", "12h"]))
def test_openais_marks_change_neither_request_nor_contents(marked: set[int], ttl: str | None) -> None:
    body = copy.deepcopy(CHAT_AGENT)
    body["messages"][3]["content"] = [{"type": "text", "text": "A house."}]
    owners = [*body["messages"][1]["content"], *body["messages"][3]["content"]]
    for index in marked:
        owners[index]["prompt_cache_breakpoint"] = {"mode": "explicit", **({"ttl": ttl} if ttl else {})}
    plain, parsed = parse(CHAT, CHAT_AGENT), parse(CHAT, body)
    assert parsed.request == plain.request
    assert contents(parsed.prompt) == contents(plain.prompt)
    assert [block.mark for block in parsed.prompt.blocks if block.mark] == [ttl or "30m"] * len(marked)


def test_the_detail_of_an_image_and_its_bytes_are_its_content() -> None:
    def seen(**fields: str) -> Block:
        part = {"type": "image_url", "image_url": {"url": DATA_URL, **fields}}
        return parse(CHAT, {"messages": [{"role": "user", "content": [part]}]}).prompt.blocks[0]

    assert seen() == seen(detail="auto")
    assert seen() != seen(detail="low")
    assert seen() != seen(url="https://x.test/y.png")


@pytest.mark.parametrize(("prompt", "kind"), [("x", "text"), ("", "empty"), ([1, 2], "text"), (["a", "b"], "text")])
def test_a_raw_prompt_is_one_block(prompt: object, kind: str) -> None:
    (block,) = parse(COMPLETIONS, {"prompt": prompt}).prompt.blocks
    assert (block.kind, block.path) == (kind, "prompt")
