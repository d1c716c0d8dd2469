"""One agent's session of eight requests, as recorded, for tests to plant faults in; and the same in OpenAI's dialects."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anaphora.lint import Options, Report, lint, read

FILE = "session.jsonl"
SESSION = Path(__file__).parent / "data" / FILE

Line = dict[str, Any]


def session() -> list[Line]:
    """Anthropic, marked on the system prompt and on the last block, as it should be. A fresh copy for every test."""
    return [json.loads(line) for line in SESSION.read_text("utf-8").splitlines()]


def bodies(lines: Iterable[Line]) -> list[dict[str, Any]]:
    return [line["request"] for line in lines]


def chat(model: str = "gpt-4.1") -> list[Line]:
    """The same session in Chat Completions."""
    lines = []
    for line in session():
        body = line["request"]
        messages: list[Line] = [{"role": "system", "content": body["system"][0]["text"]}]
        for message in body["messages"]:
            messages += _chat_messages(message)
        tools = [
            {"type": "function", "function": {**_without(tool, "input_schema"), "parameters": tool["input_schema"]}}
            for tool in body["tools"]
        ]
        lines.append({**line, "request": {"model": model, "tools": tools, "messages": messages}})
    return copy.deepcopy(lines)


def responses(model: str = "gpt-5.6-sol") -> list[Line]:
    """The same session in Responses, without stored state."""
    lines = []
    for line in chat(model):
        body = line["request"]
        items: list[Line] = []
        for message in body["messages"][1:]:
            if message["role"] == "tool":
                items.append({"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]})
                continue
            if message["content"]:
                items.append({"role": message["role"], "content": message["content"]})
            calls = message.get("tool_calls", ())
            items += [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]
        tools = [{"type": "function", **tool["function"]} for tool in body["tools"]]
        instructions = body["messages"][0]["content"]
        lines.append({**line, "request": {"model": model, "instructions": instructions, "tools": tools, "input": items}})
    return lines


def report(lines: Iterable[Line], file: str = FILE, **options: Any) -> Report:
    return lint(read(file, (json.dumps(line, ensure_ascii=False) for line in lines)), Options(**options))


def chain(model: str = "gpt-5.6-sol") -> list[Line]:
    """The same session in Responses, each request continuing the stored answer to the one before."""
    lines = responses(model)
    known = 0
    for number, line in enumerate(lines):
        body = line["request"]
        items, body["input"] = body["input"], body["input"][known:]
        known = len(items)
        if number:
            body["previous_response_id"] = f"resp_{number - 1}"
        line["response"] = {"id": f"resp_{number}"}
    return lines


def _chat_messages(message: Line) -> list[Line]:
    texts = [block["text"] for block in message["content"] if block["type"] == "text"]
    results = [block for block in message["content"] if block["type"] == "tool_result"]
    calls = [
        {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": json.dumps(block["input"])}}
        for block in message["content"]
        if block["type"] == "tool_use"
    ]
    if results:
        return [{"role": "tool", "tool_call_id": block["tool_use_id"], "content": block["content"]} for block in results]
    shown: Line = {"role": message["role"], "content": "\n".join(texts) or None}
    return [{**shown, "tool_calls": calls}] if calls else [shown]


def _without(value: Line, name: str) -> Line:
    return {key: item for key, item in value.items() if key != name}
