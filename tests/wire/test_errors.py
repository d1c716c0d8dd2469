"""What a client hears when something is wrong: in its dialect's words, with the field's path in its dialect's style."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.errors import (
    BackendFailed,
    ContextTooLong,
    EngineDied,
    InvalidRequest,
    ModelNotFound,
    NotCached,
    NotFound,
    PermissionDenied,
    QueueFull,
    ServiceError,
    TooLarge,
    Unauthenticated,
)
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses

Json = dict[str, Any]
DIALECTS: list[Dialect] = [Anthropic(), OpenAIChat(), OpenAICompletions(), OpenAIResponses()]
each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)

ASKED: dict[str, Json] = {
    "anthropic": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]},
    "openai_chat": {"model": "m", "messages": [{"role": "user", "content": "?"}]},
    "openai_completions": {"model": "m", "prompt": "?"},
    "openai_responses": {"model": "m", "input": "?"},
}


def refusal(dialect: Dialect, change: Json, version: str | None = None) -> InvalidRequest:
    body = {key: value for key, value in (ASKED[dialect.name] | change).items() if value is not ...}
    with pytest.raises(InvalidRequest) as caught:
        dialect.parse(json.dumps(body).encode(), tenant=LOCAL_TENANT, version=version)
    return caught.value


# -- bodies that are no JSON object --------------------------------------------------------------------------------------


@each_dialect
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "it is empty"),
        (b"{", "it ends too early (byte 1)"),
        (b'{"a":1,}', "(byte 7)"),
        (b'{"a":1} x', "trailing characters (byte 9)"),
        (b'{"a":NaN}', "(byte 5)"),
        (b'{"a":"\xff"}', "not UTF-8 (byte 0xff)"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"[]", "must be a JSON object, not an array"),
        (b'"x"', "must be a JSON object, not a string"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_the_position(dialect: Dialect, body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        dialect.parse(body, tenant=LOCAL_TENANT)
    assert says in caught.value.message
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *("model", "messages", "input", "prompt", "system", "instructions", "max_tokens", "tools", "tool_choice", "stop", "n"),
    *("stop_sequences", "stream", "stream_options", "temperature", "top_k", "logprobs", "metadata", "thinking", "text"),
    *("reasoning", "include", "cache_control", "cache_salt", "prompt_cache_options", "seed", "echo", "best_of"),
]
BLOCK_FIELDS = ["type", "role", "content", "text", "source", "id", "name", "input", "tool_calls", "tool_call_id", "output"]
words = ["user", "assistant", "system", "tool", "text", "image", "tool_use", "tool_result", "function_call", "message", "url"]
half_right = st.recursive(
    st.sampled_from(words) | json_values,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(BLOCK_FIELDS), inner, max_size=4),
    max_leaves=12,
)


@each_dialect
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values | half_right, max_size=3))
def test_whatever_the_body_says_it_is_taken_or_refused_but_never_breaks(dialect: Dialect, changes: Json) -> None:
    body = json.dumps(ASKED[dialect.name] | changes).encode()
    try:
        parsed = dialect.parse(body, tenant=LOCAL_TENANT)
    except InvalidRequest:
        return
    assert parsed.request.tenant == LOCAL_TENANT


# -- fields --------------------------------------------------------------------------------------------------------------

USER = {"role": "user"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": ...}, "model: Field required"),
        ({"max_tokens": ...}, "max_tokens: Field required"),
        ({"max_tokens": "9"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
        ({"temperature": 1.5}, "temperature: Input should be less than or equal to 1"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"messages": ["hello"]}, "messages.0: Input should be an object"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content: Input should be a valid string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'user', 'assistant' or 'system'"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        ({"messages": [USER | {"content": "x", "name": "y"}]}, "messages.0.name: Extra inputs are not permitted"),
        (
            {"messages": [USER | {"content": [{"type": "thinking", "thinking": "x", "signature": ""}]}]},
            "messages.0.content.0.type: `thinking` blocks cannot be in messages of role 'user'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "cache_control": {}}]}]},
            "messages.0.content.0.thinking.cache_control: Extra inputs are not permitted",
        ),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}]}]},
            "messages.0.content.0.text: cache_control cannot be set for empty text blocks",
        ),
        (
            {"system": [{"type": "text", "text": "x", "cache_control": {"type": "persistent"}}]},
            "system.0.cache_control: Input tag 'persistent' found using 'type' does not match any of the expected tags: "
            "'ephemeral'",
        ),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "cache_control.ephemeral.ttl: Input should be '5m' or '1h'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0: a message with role 'system' must follow a user"),
        ({"tools": [{"name": "t"}]}, "tools.0.input_schema: Field required"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type: Input tag 'bash_20250124' is not supported"),
        ({"tool_choice": {"type": "tool", "name": "t"}}, "tool_choice: may only demand a tool when tools are given"),
        ({"stop_sequences": [" \n"]}, "stop_sequences.0: each stop sequence must contain non-whitespace"),
        ({"thinking": {"type": "enabled"}}, "thinking.enabled.budget_tokens: Field required"),
        ({"max_tokens": 0, "stream": True}, "stream: max_tokens: 0 (pre-warm) cannot be combined with stream"),
        ({"cache_salt": ""}, "cache_salt: must not be empty"),
    ],
)
def test_anthropic_names_the_field_in_the_message(change: Json, says: str) -> None:
    error = refusal(Anthropic(), change)
    assert error.message.startswith(says)
    assert error.param == says.partition(":")[0]


TOOL = {"type": "function", "function": {"name": "t"}}


@pytest.mark.parametrize(
    ("change", "param", "code", "says"),
    [
        ({"model": ...}, "model", "missing_required_parameter", "Missing required parameter: 'model'."),
        ({"messages": ...}, "messages", "missing_required_parameter", "Missing required parameter: 'messages'."),
        ({"messages": []}, "messages", "invalid_value", "Invalid 'messages': empty array."),
        (
            {"messages": [USER | {"content": 1}]},
            "messages[0].content",
            "invalid_type",
            "Invalid type for 'messages[0].content': expected a string, but got an integer instead.",
        ),
        (
            {"messages": [{"role": "function"}]},
            "messages[0].role",
            "invalid_value",
            "Invalid value: 'function'.",
        ),
        (
            {"messages": [USER | {"content": "x", "colour": "red"}]},
            "messages[0].colour",
            "unknown_parameter",
            "Unknown parameter: 'messages[0].colour'.",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
            "messages[0].content[0].image_url",
            "invalid_value",
            "Only data URLs of the form",
        ),
        (
            {"temperature": 3},
            "temperature",
            "integer_above_max_value",
            "Invalid 'temperature': integer above maximum value. Expected a value <= 2, but got 3 instead.",
        ),
        ({"top_p": -0.5}, "top_p", "decimal_below_min_value", "Invalid 'top_p': decimal below minimum value."),
        ({"n": 0}, "n", "integer_below_min_value", "Invalid 'n'"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value", "The 'top_logprobs' parameter is only allowed"),
        ({"stream_options": {}}, "stream_options", "invalid_value", "The 'stream_options' parameter is only allowed"),
        ({"functions": []}, "functions", "unsupported_parameter", "'functions' is no longer supported"),
        ({"function_call": "auto"}, "function_call", "unsupported_parameter", "'function_call' is no longer supported"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "unsupported_parameter", "Tools of type 'custom'"),
        (
            {"tools": [{"type": "function", "function": {}}]},
            "tools[0].function.name",
            "missing_required_parameter",
            "Missing required parameter: 'tools[0].function.name'.",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "u"}}},
            "tool_choice",
            "invalid_value",
            "Tool 'u' not found",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value", "Invalid 'tool_choice': may only demand a tool"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_value", "Invalid value: 'any'."),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value", "Setting 'max_tokens' and"),
        ({"stop": ["a", 1]}, "stop[1]", "invalid_type", "Invalid type for 'stop[1]'"),
    ],
)
def test_openai_names_the_field_in_param(change: Json, param: str, code: str, says: str) -> None:
    error = refusal(OpenAIChat(), change)
    assert (error.param, error.code) == (param, code)
    assert error.message.startswith(says)


@pytest.mark.parametrize(
    ("dialect", "change", "param"),
    [
        (OpenAICompletions(), {"prompt": ...}, "prompt"),
        (OpenAICompletions(), {"prompt": []}, "prompt"),
        (OpenAICompletions(), {"prompt": [1, "x"]}, "prompt[1]"),
        (OpenAICompletions(), {"prompt": [[1], [-2]]}, "prompt[1][0]"),
        (OpenAICompletions(), {"prompt": ["x", []]}, "prompt[1]"),
        (OpenAICompletions(), {"suffix": "x"}, "suffix"),
        (OpenAICompletions(), {"best_of": 2}, "best_of"),
        (OpenAIResponses(), {"input": ...}, "input"),
        (OpenAIResponses(), {"input": []}, "input"),
        (OpenAIResponses(), {"previous_response_id": "resp_1"}, "previous_response_id"),
        (OpenAIResponses(), {"conversation": "conv_1"}, "conversation"),
        (OpenAIResponses(), {"background": True}, "background"),
        (OpenAIResponses(), {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (OpenAIResponses(), {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (OpenAIResponses(), {"input": [{"type": "function_call", "call_id": "x", "name": "y"}]}, "input[0].arguments"),
    ],
)
def test_what_is_not_supported_is_refused_and_named(dialect: Dialect, change: Json, param: str) -> None:
    assert refusal(dialect, change).param == param


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k"])
def test_the_newer_anthropic_version_refuses_the_removed_sampling_fields(key: str) -> None:
    assert refusal(Anthropic(), {key: 1}, "2026-10-21").message == f"{key}: Extra inputs are not permitted"
    assert refusal(Anthropic(), {key: None}, "2026-10-21").message == f"{key}: Extra inputs are not permitted"


def test_an_unknown_anthropic_version_is_refused() -> None:
    assert "2031-01-01" in refusal(Anthropic(), {}, "2031-01-01").message


# -- what an error looks like on the wire ----------------------------------------------------------------------------------

ERRORS: list[tuple[ServiceError, str, str, str | None, str | None]] = [
    # the error, Anthropic's status and type, OpenAI's status and type, OpenAI's code, whether SDKs should retry
    (InvalidRequest("x", param="model"), "400 invalid_request_error", "400 invalid_request_error", None, None),
    (ContextTooLong("x"), "400 invalid_request_error", "400 invalid_request_error", "context_length_exceeded", None),
    (Unauthenticated("x"), "401 authentication_error", "401 authentication_error", "invalid_api_key", None),
    (PermissionDenied("x"), "403 permission_error", "403 permission_error", None, None),
    (NotFound("x"), "404 not_found_error", "404 invalid_request_error", None, None),
    (ModelNotFound("x"), "404 not_found_error", "404 invalid_request_error", "model_not_found", None),
    (TooLarge("x"), "413 request_too_large", "413 invalid_request_error", "request_too_large", None),
    (QueueFull("x"), "429 rate_limit_error", "429 rate_limit_error", "rate_limit_exceeded", "true"),
    (BackendFailed("x"), "500 api_error", "500 server_error", None, None),
    (EngineDied("x"), "529 overloaded_error", "503 server_error", "engine_unavailable", "true"),
    (NotCached("x"), "504 timeout_error", "504 server_error", "not_cached", "false"),
]


@pytest.mark.parametrize(("error", "anthropic", "openai", "code", "retry"), ERRORS, ids=lambda case: type(case).__name__)
def test_every_error_has_the_status_and_type_of_the_dialect(
    error: ServiceError, anthropic: str, openai: str, code: str | None, retry: str | None
) -> None:
    status, body, headers = Anthropic().render_error(error, "req_1")
    decoded = json.loads(body)
    assert f"{status} {decoded['error']['type']}" == anthropic
    assert decoded == {
        "type": "error",
        "error": {"type": decoded["error"]["type"], "message": "x"},
        "request_id": "req_1",
    }
    assert (headers["request-id"], headers.get("x-should-retry")) == ("req_1", retry)

    status, body, headers = OpenAIChat().render_error(error, "req_1")
    fields = json.loads(body)["error"]
    assert f"{status} {fields['type']}" == openai
    assert (fields["message"], fields["param"], fields["code"]) == ("x", error.param, code)
    assert (headers["x-request-id"], headers.get("x-should-retry")) == ("req_1", retry)


@each_dialect
def test_a_full_queue_says_when_to_come_back_in_whole_seconds(dialect: Dialect) -> None:
    assert dialect.render_error(QueueFull("x", retry_after_s=0.2), "r")[2]["retry-after"] == "1"
    assert dialect.render_error(QueueFull("x", retry_after_s=7.1), "r")[2]["retry-after"] == "8"
    assert "retry-after" not in dialect.render_error(QueueFull("x"), "r")[2]
