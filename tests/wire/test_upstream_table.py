"""The table of what is translated says what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.wire.test_upstream_requests import BASE, Json, translate

from anaphora.errors import InvalidRequest

PAGE = Path(__file__).parent.parent.parent / "docs" / "gateway.md"
FORMATS = {"Messages": "anthropic", "Chat": "openai_chat", "Responses": "openai_responses"}

SCHEMA: Json = {"type": "object", "properties": {}}
PNG, PDF = "data:image/png;base64,aGk=", "data:application/pdf;base64,aGk="
CALL: Json = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
FUNCTION: Json = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ITEM: Json = {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"}
USER: Json = {"role": "user", "content": "?"}
IMAGE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
DOCUMENT: Json = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}


def messages(*more: Json) -> Json:
    return {"messages": [USER, *more]}


def items(*more: Json) -> Json:
    return {"input": [USER, *more]}


def content(*parts: Json) -> Json:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def parts(*found: Json) -> Json:
    return {"input": [{"role": "user", "content": list(found)}]}


def same(**fields: Any) -> dict[str, Json]:
    return dict.fromkeys(FORMATS.values(), fields)


def result(**fields: Any) -> dict[str, Json]:
    return {
        "anthropic": messages({"role": "assistant", "content": [CALL]}, {"role": "user", "content": [{**RESULT, **fields}]})
    }


RESULT: Json = {"type": "tool_result", "tool_use_id": "t", "content": "a"}
TOOLS: dict[str, Json] = {
    "anthropic": {"name": "f", "input_schema": SCHEMA, "strict": True},
    "openai_chat": {"type": "function", "function": {"name": "f", "strict": True}},
    "openai_responses": {"type": "function", "name": "f", "strict": True},
}
SCHEMA_FORM: Json = {"name": "answer", "schema": SCHEMA, "strict": True}

PROBES: dict[str, dict[str, Json]] = {
    "text, system text": {
        "anthropic": {"system": "s"},
        "openai_chat": {"messages": [{"role": "system", "content": "s"}, USER]},
        "openai_responses": {"instructions": "s"},
    },
    "system messages in the middle": {
        "anthropic": messages({"role": "system", "content": "s"}),
        "openai_chat": messages({"role": "system", "content": "s"}),
        "openai_responses": items({"role": "system", "content": "s"}),
    },
    "names of users": {"openai_chat": {"messages": [{**USER, "name": "Ann"}]}},
    "an answer that has begun (last message the assistant's)": {
        "anthropic": messages({"role": "assistant", "content": "a"}),
        "openai_chat": messages({"role": "assistant", "content": "a"}),
        "openai_responses": items({"role": "assistant", "content": "a"}),
    },
    "tools, `strict`, choice of tools, parallel calls": {
        "anthropic": {"tools": [TOOLS["anthropic"]], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        "openai_chat": {"tools": [TOOLS["openai_chat"]], "tool_choice": "required", "parallel_tool_calls": False},
        "openai_responses": {"tools": [TOOLS["openai_responses"]], "tool_choice": "required", "parallel_tool_calls": False},
    },
    "other fields of tools; tools of the provider's own": {
        "anthropic": {"tools": [{**TOOLS["anthropic"], "x": 1}]},
        "openai_chat": {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
        "openai_responses": {"tools": [{**TOOLS["openai_responses"], "x": 1}]},
    },
    "calls and results, with their ids": {
        **result(),
        "openai_chat": messages(
            {"role": "assistant", "tool_calls": [FUNCTION]}, {"role": "tool", "tool_call_id": "t", "content": "a"}
        ),
        "openai_responses": items(ITEM, {"type": "function_call_output", "call_id": "t", "output": "a"}),
    },
    "a failed call (`is_error`)": result(is_error=True),
    "images (data, address)": {
        "anthropic": content(IMAGE, {"type": "image", "source": {"type": "url", "url": "https://a/b"}}),
        "openai_chat": content({"type": "image_url", "image_url": {"url": PNG}}),
        "openai_responses": parts({"type": "input_image", "image_url": PNG}),
    },
    "documents (PDF, text)": {
        "anthropic": content(
            DOCUMENT, {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}
        ),
        "openai_chat": content({"type": "file", "file": {"file_data": PDF}}),
        "openai_responses": parts({"type": "input_file", "file_data": PDF}),
    },
    "images and documents in results of tools": {
        **result(content=[IMAGE]),
        "openai_responses": items(
            ITEM,
            {"type": "function_call_output", "call_id": "t", "output": [{"type": "input_image", "image_url": PNG}]},
        ),
    },
    "files by id": {
        "anthropic": content({"type": "document", "source": {"type": "file", "file_id": "f"}}),
        "openai_chat": content({"type": "file", "file": {"file_id": "f"}}),
        "openai_responses": parts({"type": "input_file", "file_id": "f"}),
    },
    "audio": {
        "openai_chat": content({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        "openai_responses": parts({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
    },
    "what only Anthropic's models take (search results, citations, server tools)": {
        "anthropic": content({**DOCUMENT, "citations": {"enabled": True}})
    },
    "`temperature`": same(temperature=0.5),
    "`top_p`, `max_tokens`, `stream`": same(top_p=0.5, stream=True),
    "`top_k`": same(top_k=5),
    "stop strings": {
        "anthropic": {"stop_sequences": ["a"]},
        "openai_chat": {"stop": ["a"]},
        "openai_responses": {"stop": ["a"]},
    },
    "`seed`, penalties": same(seed=1, presence_penalty=1),
    "`min_p`, `cache_salt`": same(cache_salt="s"),
    "`n` above 1, `logit_bias`": {"openai_chat": {"n": 2}},
    "log-probabilities": {"openai_chat": {"logprobs": True}, "openai_responses": {"top_logprobs": 2}},
    "a pre-warm (`max_tokens` 0)": {
        "anthropic": {"max_tokens": 0},
        "openai_chat": {"max_tokens": 0},
        "openai_responses": {"max_output_tokens": 0},
    },
    "JSON schema for the answer": {
        "anthropic": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "openai_chat": {"response_format": {"type": "json_schema", "json_schema": SCHEMA_FORM}},
        "openai_responses": {"text": {"format": {"type": "json_schema", **SCHEMA_FORM}}},
    },
    "JSON without a schema": {
        "openai_chat": {"response_format": {"type": "json_object"}},
        "openai_responses": {"text": {"format": {"type": "json_object"}}},
    },
    "effort (`low` to `max`)": {
        "anthropic": {"output_config": {"effort": "xhigh"}},
        "openai_chat": {"reasoning_effort": "xhigh"},
        "openai_responses": {"reasoning": {"effort": "xhigh"}},
    },
    "verbosity": {"openai_chat": {"verbosity": "low"}, "openai_responses": {"text": {"verbosity": "low"}}},
    "thinking: adaptive": same(thinking={"type": "adaptive"}),
    "thinking: with summaries": {
        **same(thinking={"type": "adaptive", "display": "summarized"}),
        "openai_responses": {"reasoning": {"summary": "auto"}},
    },
    "thinking: a budget of tokens": same(thinking={"type": "enabled", "budget_tokens": 2048}),
    "any other field": same(x_new=1),
}


def cells() -> dict[tuple[str, str, str], str]:
    """(what, from, to) → what the page says of it."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("| ")]
    start = next(number for number, row in enumerate(rows) if row[0] == "of a request")
    ways = [way.split(" → ") for way in rows[start][1:]]
    found = {}
    for row in rows[start + 1 :]:
        if row[0] == "what":
            break
        for (source, target), cell in zip(ways, row[1:], strict=True):
            found[row[0], FORMATS[source], FORMATS[target]] = cell
    return found


CELLS = cells()


def test_every_row_has_its_probe() -> None:
    assert {what for what, _, _ in CELLS} == set(PROBES)
    filled = {(what, source) for (what, source, _), cell in CELLS.items() if cell}
    assert filled == {(what, source) for what, probes in PROBES.items() for source in probes}


@pytest.mark.parametrize(
    ("what", "source", "target"),
    [pytest.param(*key, id="-".join(key)) for key, cell in CELLS.items() if cell],
)
def test_the_table_says_what_happens(what: str, source: str, target: str) -> None:
    try:
        translate(source, target, BASE[source] | PROBES[what][source])
        refused = False
    except InvalidRequest:
        refused = True
    assert refused == CELLS[what, source, target].startswith("400")
