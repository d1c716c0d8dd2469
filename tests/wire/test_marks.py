"""What may be marked, how, how often and in which order: each rule that ends in a 400, with its text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.errors import InvalidRequest
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Parsed
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_responses import OpenAIResponses

Json = dict[str, Any]

M5: Json = {"cache_control": {"type": "ephemeral"}}
M5_SPELLED: Json = {"cache_control": {"type": "ephemeral", "ttl": "5m"}}
M1H: Json = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
TOO_MANY = "A maximum of 4 blocks with cache_control may be provided. Found {}."
ORDER = (
    "{}.cache_control.ttl: a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block. "
    "Note that blocks are processed in the following order: `tools`, `system`, `messages`."
)

WRONG_TYPE = "cache_control: Input tag 'persistent' found using 'type' does not match any of the expected tags: 'ephemeral'"


def block(content: str = "x", mark: Json | None = None) -> Json:
    return {"type": "text", "text": content, **(mark or {})}


def user(*blocks: Json) -> Json:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Json) -> Json:
    return {"role": "assistant", "content": list(blocks)}


def tool(name: str, mark: Json | None = None) -> Json:
    return {"name": name, "input_schema": {"type": "object"}, **(mark or {})}


def parse(change: Json, version: str | None = None) -> Parsed:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]} | change
    return Anthropic().parse(json.dumps(body).encode(), tenant=LOCAL_TENANT, version=version)


THINKING: Json = {"type": "thinking", "thinking": "x", "signature": "s"}
RESULT: Json = {"type": "tool_result", "tool_use_id": "t"}
IMAGE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}

REFUSED: list[tuple[str, Json, str]] = [
    (
        "five marks",
        {"system": [block(mark=M5)], "messages": [user(*[block(mark=M5)] * 4)]},
        TOO_MANY.format(5),
    ),
    (
        "six marks, on tools too",
        {"tools": [tool("a", M5), tool("b", M5)], "messages": [user(*[block(mark=M5)] * 4)]},
        TOO_MANY.format(6),
    ),
    (
        "four marks and the automatic one",
        {**M5, "system": [block(mark=M5)], "messages": [user(*[block(mark=M5)] * 3, block())]},
        TOO_MANY.format(5),
    ),
    (
        "four marks, the last on the last block, and the automatic one",
        {**M5, "messages": [user(*[block(mark=M5)] * 4)]},
        TOO_MANY.format(5),
    ),
    (
        "marks inside a tool's result count",
        {
            "messages": [
                user(block(mark=M5)),
                assistant({"type": "tool_use", "id": "t", "name": "n", "input": {}, **M5}),
                user({**RESULT, "content": [block(mark=M5), block(mark=M5)], **M5}),
            ]
        },
        TOO_MANY.format(5),
    ),
    (
        "an hour behind five minutes, system and messages",
        {"system": [block(mark=M5)], "messages": [user(block(), block(mark=M1H))]},
        ORDER.format("messages.0.content.1"),
    ),
    (
        "an hour behind five minutes, tools come first wherever they stand",
        {"system": [block(mark=M1H)], "tools": [tool("a", M5)]},
        ORDER.format("system.0"),
    ),
    (
        "an hour behind five minutes in one message",
        {"messages": [user(block(mark=M1H), block(mark=M5_SPELLED), block(), block(), block(mark=M1H))]},
        ORDER.format("messages.0.content.4"),
    ),
    (
        "an hour behind five minutes among tools",
        {"tools": [tool("a", M5), tool("b", M1H)]},
        ORDER.format("tools.1"),
    ),
    (
        "an automatic hour behind five minutes",
        {**M1H, "system": [block(mark=M5)]},
        ORDER.removeprefix("{}."),
    ),
    (
        "an automatic hour on a block with five minutes",
        {**M1H, "messages": [user(block(mark=M5))]},
        "Top-level cache_control has ttl='1h' but the target block already has cache_control with ttl='5m'",
    ),
    (
        "automatic five minutes on a block with an hour, empty text behind it",
        {**M5, "messages": [user(block(mark=M1H)), assistant(block(""))]},
        "Top-level cache_control has ttl='5m' but the target block already has cache_control with ttl='1h'",
    ),
    (
        "empty text in a message",
        {"messages": [user(block("", M5))]},
        "messages.0.content.0.text: cache_control cannot be set for empty text blocks",
    ),
    (
        "empty text in the system prompt",
        {"system": [block(), block("", M5)]},
        "system.1.text: cache_control cannot be set for empty text blocks",
    ),
    (
        "empty text inside a tool's result",
        {
            "messages": [
                user(block()),
                assistant({"type": "tool_use", "id": "t", "name": "n", "input": {}}),
                user({**RESULT, "content": [block("", M5)]}),
            ]
        },
        "messages.2.content.0.content.0.text: cache_control cannot be set for empty text blocks",
    ),
    (
        "thinking",
        {"messages": [user(block()), assistant({**THINKING, **M5}, block())]},
        "messages.1.content.0.thinking.cache_control: Extra inputs are not permitted",
    ),
    (
        "a message",
        {"messages": [{"role": "user", "content": "x", **M5}]},
        "messages.0.cache_control: Extra inputs are not permitted",
    ),
    (
        "a source",
        {"messages": [user({**IMAGE, "source": {**IMAGE["source"], **M5}})]},
        "messages.0.content.0.source.cache_control: Extra inputs are not permitted",
    ),
    (
        "a tool choice",
        {"tools": [tool("a")], "tool_choice": {"type": "auto", **M5}},
        "tool_choice.cache_control: Extra inputs are not permitted",
    ),
    (
        "the citations of a document",
        {"messages": [user({**IMAGE, "type": "document", "citations": {"enabled": False, **M5}})]},
        "messages.0.content.0.citations.cache_control: Extra inputs are not permitted",
    ),
    (
        "a wrong type",
        {"system": [block(mark={"cache_control": {"type": "persistent"}})]},
        f"system.0.{WRONG_TYPE}",
    ),
    (
        "a wrong type at the top",
        {"cache_control": {"type": "persistent"}},
        WRONG_TYPE,
    ),
    (
        "no type",
        {"tools": [tool("a", {"cache_control": {"ttl": "5m"}})]},
        "tools.0.cache_control: Unable to extract tag using discriminator 'type'",
    ),
    (
        "a wrong lifetime",
        {"messages": [user(block(mark={"cache_control": {"type": "ephemeral", "ttl": "2h"}}))]},
        "messages.0.content.0.cache_control.ephemeral.ttl: Input should be '5m' or '1h'",
    ),
    (
        "an unknown field",
        {"messages": [user({**IMAGE, "cache_control": {"type": "ephemeral", "TTL": "1h"}})]},
        "messages.0.content.0.cache_control.ephemeral.TTL: Extra inputs are not permitted",
    ),
    ("no object", {"cache_control": "ephemeral"}, "cache_control: Input should be an object"),
    (
        "diagnostics with an unknown field",
        {"diagnostics": {"previous": "msg_1"}},
        "diagnostics.previous: Extra inputs are not permitted",
    ),
    (
        "diagnostics with an id that is none",
        {"diagnostics": {"previous_message_id": 1}},
        "diagnostics.previous_message_id: Input should be a valid string",
    ),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_mark_that_breaks_a_rule_is_refused_with_the_providers_text(change: Json, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(change)
    assert caught.value.message == says
    with pytest.raises(InvalidRequest) as caught:
        Anthropic().parse_count_tokens(
            json.dumps({"model": "m", "messages": [{"role": "user", "content": "?"}]} | change).encode(), tenant=LOCAL_TENANT
        )
    assert caught.value.message == says


@pytest.mark.parametrize(
    "change",
    [
        {"system": [block(mark=M5)], "messages": [user(*[block(mark=M5)] * 3)]},
        {**M5, "messages": [user(*[block(mark=M5)] * 3)]},
        {**M5, "messages": [user(block(mark=M5_SPELLED))]},
        {**M5_SPELLED, "system": [block(mark=M1H)]},
        {**M1H, "system": [block(mark=M1H)]},
        {**M1H, "tools": [tool("a", M1H)], "system": [block(mark=M1H)], "messages": [user(block(mark=M1H))]},
        {"tools": [tool("a", M1H)], "system": [block(mark=M5)], "messages": [user(block(mark=M5))]},
        {"messages": [user(block("", {"cache_control": None}))]},
        {**M5, "messages": [user(block(""))]},
        {"messages": [user({**IMAGE, **M5})]},
        {"messages": [user(block()), assistant({"type": "tool_use", "id": "t", "name": "n", "input": M1H, **M5})]},
        {"system": [block(mark={"cache_control": {"type": "ephemeral", "scope": "global"}})]},
    ],
)
def test_marks_that_keep_the_rules_are_taken(change: Json) -> None:
    assert parse(change).request.model == "m"


SYSTEM = {"role": "system", "content": "now"}


@pytest.mark.parametrize(
    ("messages", "taken"),
    [
        ([user(block()), SYSTEM], True),
        ([user(block()), SYSTEM, assistant(block()), user(block())], True),
        ([SYSTEM, user(block())], False),
        ([user(block()), SYSTEM, user(block())], False),
        ([user(block()), assistant(block()), SYSTEM], False),
    ],
)
def test_instructions_in_the_conversation_follow_the_user_and_precede_the_assistant(messages: list[Json], taken: bool) -> None:
    if taken:
        assert parse({"messages": messages}).prompt.blocks[1].role == "system"
        return
    with pytest.raises(InvalidRequest):
        parse({"messages": messages})


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": True}, "stream"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config.format"),
        ({"tools": [tool("a")], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": {"type": "tool", "name": "a"}}, "tool_choice"),
    ],
)
def test_a_prewarm_refuses_what_only_an_answer_could_use(change: Json, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse({"max_tokens": 0, **change})
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stream": False},
        {"thinking": {"type": "adaptive"}},
        {"output_config": {"effort": "max"}},
        {"tools": [tool("a")], "tool_choice": {"type": "none"}},
    ],
)
def test_a_prewarm_takes_the_rest(change: Json) -> None:
    assert parse({"max_tokens": 0, **change}).request.max_tokens == 0


@given(st.lists(st.sampled_from([None, M5, M1H]), min_size=1, max_size=8), st.sampled_from([None, M5, M1H]))
def test_marks_are_taken_exactly_where_the_rules_hold(marks: list[Json | None], automatic: Json | None) -> None:
    """The rules said once more, another way: at most four, and lifetimes never grow."""
    lives = [1 if mark is M1H else 0 for mark in marks if mark is not None]
    lives_with_it = [*lives, *([1 if automatic is M1H else 0] if automatic is not None else [])]
    allowed = len(lives_with_it) <= 4 and lives_with_it == sorted(lives_with_it, reverse=True)
    if allowed and automatic is not None and marks[-1] is not None:
        allowed = marks[-1] is automatic
    change = {**(automatic or {}), "messages": [user(*[block(mark=mark) for mark in marks])]}
    if allowed:
        assert [b.mark is not None for b in parse(change).prompt.blocks] == [mark is not None for mark in marks]
        return
    with pytest.raises(InvalidRequest):
        parse(change)


# -- OpenAI --------------------------------------------------------------------------------------------------------------

POINT: Json = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def ask(dialect: Dialect, change: Json) -> Parsed:
    body = {"model": "m"} | ({"input": "?"} if dialect.name == "openai_responses" else {"messages": [user(block())]}) | change
    return dialect.parse(json.dumps(body).encode(), tenant=LOCAL_TENANT)


def point(**fields: object) -> Json:
    return {"prompt_cache_breakpoint": fields}


CHAT, RESPONSES = OpenAIChat(), OpenAIResponses()
FUNCTION: Json = {"type": "function", "function": {"name": "f", "parameters": {}}}
FLAT: Json = {"type": "function", "name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("dialect", "change", "param", "says"),
    [
        (CHAT, {"prompt_cache_key": 1}, "prompt_cache_key", "Invalid type for 'prompt_cache_key': expected a string"),
        (
            CHAT,
            {"prompt_cache_retention": "48h"},
            "prompt_cache_retention",
            "Invalid value: '48h'. Supported values are: 'in_memory', and '24h'.",
        ),
        (CHAT, {"prompt_cache_options": []}, "prompt_cache_options", "Invalid type for 'prompt_cache_options'"),
        (
            CHAT,
            {"prompt_cache_options": {"mode": "auto"}},
            "prompt_cache_options.mode",
            "Invalid value: 'auto'. Supported values are: 'implicit', and 'explicit'.",
        ),
        (
            CHAT,
            {"prompt_cache_options": {"ttl": "12h"}},
            "prompt_cache_options.ttl",
            "Invalid value: '12h'. Supported values are: '30m'.",
        ),
        (
            RESPONSES,
            {"prompt_cache_options": {"ttl": "1h"}},
            "prompt_cache_options.ttl",
            "Invalid value: '1h'. Supported values are: '30m', and '12h'.",
        ),
        (
            CHAT,
            {"prompt_cache_options": {"prewarm": True}},
            "prompt_cache_options.prewarm",
            "Unknown parameter: 'prompt_cache_options.prewarm'.",
        ),
        (
            RESPONSES,
            {"prompt_cache_options": {"prewarm": "yes"}},
            "prompt_cache_options.prewarm",
            "Invalid type for 'prompt_cache_options.prewarm': expected a boolean",
        ),
        (
            RESPONSES,
            {"prompt_cache_options": {"comparison_response_id": 1}},
            "prompt_cache_options.comparison_response_id",
            "Invalid type",
        ),
        (
            CHAT,
            {"messages": [user(block(mark=point(mode="implicit")))]},
            "messages[0].content[0].prompt_cache_breakpoint.mode",
            "Invalid value: 'implicit'. Supported values are: 'explicit'.",
        ),
        (
            CHAT,
            {"messages": [user(block(mark=point()))]},
            "messages[0].content[0].prompt_cache_breakpoint.mode",
            "Missing required parameter",
        ),
        (
            CHAT,
            {"messages": [user(block(mark=point(mode="explicit", ttl="5m")))]},
            "messages[0].content[0].prompt_cache_breakpoint.ttl",
            "Invalid value: '5m'.",
        ),
        (
            CHAT,
            {"messages": [user({"type": "image_url", "image_url": {"url": "http://x/y.png"}, **point(mode="x")})]},
            "messages[0].content[0].prompt_cache_breakpoint.mode",
            "Invalid value: 'x'.",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", **POINT}]},
            "messages[0].prompt_cache_breakpoint",
            "Unknown parameter",
        ),
        (CHAT, {"tools": [{**FUNCTION, **POINT}]}, "tools[0].prompt_cache_breakpoint", "Unknown parameter"),
        (
            CHAT,
            {"tools": [{"type": "function", "function": {"name": "f", **POINT}}]},
            "tools[0].function.prompt_cache_breakpoint",
            "Unknown parameter",
        ),
        (RESPONSES, {"tools": [{**FLAT, **POINT}]}, "tools[0].prompt_cache_breakpoint", "Unknown parameter"),
        (
            RESPONSES,
            {"input": [assistant({"type": "output_text", "text": "x", **POINT})]},
            "input[0].content[0].prompt_cache_breakpoint",
            "Unknown parameter",
        ),
        (
            RESPONSES,
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x", **POINT}]},
            "input[0].prompt_cache_breakpoint",
            "Unknown parameter",
        ),
        (
            RESPONSES,
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_text", "text": "x", **point(ttl="30m")}],
                    }
                ]
            },
            "input[0].output[0].prompt_cache_breakpoint.mode",
            "Missing required parameter",
        ),
    ],
)
def test_openais_caching_fields_are_checked_and_named(dialect: Dialect, change: Json, param: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(dialect, change)
    assert caught.value.param == param
    assert caught.value.message.startswith(says)


def test_any_number_of_openais_marks_is_taken() -> None:
    prompt = ask(CHAT, {"messages": [user(*[block(mark=POINT)] * 7)]}).prompt
    assert [part.mark for part in prompt.blocks] == ["30m"] * 7


def test_what_the_body_says_about_caching_is_told_for_profiles_to_judge() -> None:
    prompt = ask(
        RESPONSES,
        {
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"mode": "explicit", "ttl": "12h", "comparison_response_id": "resp_1"},
            "input": [user({"type": "input_text", "text": "x", **POINT}, {"type": "input_text", "text": "y"})],
        },
    ).prompt
    assert prompt.options_given == (
        "prompt_cache_options",
        "prompt_cache_retention",
        "prompt_cache_key",
        "prompt_cache_breakpoint",
    )
    assert (prompt.mode, prompt.ttl, prompt.retention, prompt.cache_key) == ("explicit", "12h", "24h", "k")
    assert (prompt.diagnose, prompt.previous_id) == (True, "resp_1")
    assert [part.mark for part in prompt.blocks] == ["12h", None]
    assert ask(CHAT, {}).prompt.options_given == ()
