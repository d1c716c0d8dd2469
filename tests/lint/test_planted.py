"""Every invalidator, planted in a real session: found with its code and place, and nothing else with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.lint.sample import Line, bodies, chain, chat, report, responses, session

Plant = Callable[[], list[Line]]


def system(line: Line) -> dict[str, Any]:
    block: dict[str, Any] = line["request"]["system"][0]
    return block


def put_line(line: Line, text: str) -> None:
    """A second line of the system prompt."""
    first, rest = system(line)["text"].split("\n", 1)
    system(line)["text"] = f"{first}\n{text}\n{rest}"


def with_lines(texts: Callable[[int], str]) -> list[Line]:
    lines = session()
    for number, line in enumerate(lines):
        put_line(line, texts(number))
    return lines


def timestamp() -> list[Line]:
    return with_lines(lambda number: f"Current time: 2026-03-02T09:{number:02}:05Z")


def spelt_date() -> list[Line]:
    return with_lines(lambda number: f"Today is Monday, March {2 + number}, 2026.")


def uuid() -> list[Line]:
    return with_lines(lambda number: f"Run 0b9f6a1e-7c1d-4e0b-9a51-{number:012d}")


def request_id() -> list[Line]:
    return with_lines(lambda number: f"Trace: req_01HZX{number}K4Q9")


def hex_id() -> list[Line]:
    return with_lines(lambda number: f"Build 9fceb02d0ae598e95dc970b74767f1937{number}")


def counter() -> list[Line]:
    return with_lines(lambda number: f"You have {40 - number} steps left.")


def user_in_session() -> list[Line]:
    return with_lines(lambda number: f"User: {'Ada Byron' if number < 4 else 'Grace Hopper'}")


def user_between_sessions() -> list[Line]:
    lines = session()
    others = session()
    for line in lines:
        put_line(line, "You are talking to Ada Byron. Customer id: 4711")
    for line in others:
        put_line(line, "You are talking to Grace Hopper. Customer id: 1234")
        line["session"] = "other"
        line["timestamp"] = _later(line["timestamp"], 240)
        first = line["request"]["messages"][0]["content"][0]
        first["text"] = "The night audit prints the city tax twice. Why?"
    return lines + others


def tool_keys() -> list[Line]:
    lines = session()
    for body in bodies(lines)[3:]:
        schema = body["tools"][1]["input_schema"]
        schema["properties"] = dict(reversed(schema["properties"].items()))
    return lines


def call_keys() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        call = body["messages"][1]["content"][1]
        call["input"] = dict(reversed(call["input"].items()))
    return lines


def tool_order() -> list[Line]:
    lines = session()
    for number, body in enumerate(bodies(lines)):
        body["tools"] = body["tools"][number % 5 :] + body["tools"][: number % 5]
    return lines


def tool_set() -> list[Line]:
    lines = session()
    for body in bodies(lines)[4:]:
        del body["tools"][4]
    return lines


def tool_schema() -> list[Line]:
    lines = session()
    for body in bodies(lines)[4:]:
        body["tools"][3]["description"] += " Prefer small selections."
    return lines


def line_endings() -> list[Line]:
    lines = session()
    for line in lines[4:]:
        system(line)["text"] = system(line)["text"].replace("\n", "\r\n")
    return lines


def whitespace() -> list[Line]:
    lines = session()
    for line in lines[4:]:
        system(line)["text"] = system(line)["text"].replace("\n\n", "\n\n\n", 1)
    return lines


def unicode_form() -> list[Line]:
    lines = session()
    for number, line in enumerate(lines):
        put_line(line, "The house is called Caf\u00e9 am Hafen." if number < 4 else "The house is called Cafe\u0301 am Hafen.")
    return lines


def few_shot() -> list[Line]:
    lines = session()
    for line in lines[4:]:
        text = system(line)["text"]
        start, rest = text.split("Example A.", 1)
        one, two = rest.split("Example B.", 1)
        two, end = two.split("Example C.", 1)
        system(line)["text"] = f"{start}Example B.{two}Example A.{one}Example C.{end}"
    return lines


def few_shot_messages() -> list[Line]:
    lines = session()
    shots = [
        [
            {"role": "user", "content": "Example: the tax is wrong. " * 20},
            {"role": "assistant", "content": "See rates.py. " * 20},
        ],
        [
            {"role": "user", "content": "Example: a room is taken. " * 20},
            {"role": "assistant", "content": "See rooms.py. " * 20},
        ],
    ]
    for number, body in enumerate(bodies(lines)):
        order = shots if number < 4 else shots[::-1]
        body["messages"] = [message for shot in order for message in shot] + body["messages"]
    return lines


def edited_system() -> list[Line]:
    lines = session()
    for line in lines[4:]:
        system(line)["text"] += "\nBe brief from now on."
    return lines


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgoAAAANSUhEUgAA" * 8}}


def image_appears() -> list[Line]:
    lines = session()
    for number, body in enumerate(bodies(lines)):
        if number == 7:
            body["messages"][-1]["content"].insert(0, IMAGE)
    return lines


def image_again() -> list[Line]:
    lines = session()
    for number, body in enumerate(bodies(lines)):
        data = IMAGE["source"]["data"][: -number or None]  # type: ignore[index]
        source = {"type": "base64", "media_type": "image/png", "data": data}
        body["messages"][0]["content"].insert(0, {"type": "image", "source": source})
    return lines


def tool_choice() -> list[Line]:
    lines = session()
    bodies(lines)[7]["tool_choice"] = {"type": "none"}
    return lines


def parallel_calls() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        body["tool_choice"]["disable_parallel_tool_use"] = True
    return lines


def effort() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        body["output_config"] = {"effort": "low"}
    return lines


def thinking() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        body["thinking"] = {"type": "adaptive"}
    return lines


def web_search() -> list[Line]:
    lines = session()
    for number, body in enumerate(bodies(lines)):
        body["messages"][0]["content"][0]["citations"] = {"enabled": number > 4}
    return lines


def model() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        body["model"] = "claude-sonnet-5-5"
    return lines


def speed() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        body["speed"] = "fast"
    return lines


def edited_history() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        body["messages"][2]["content"][0]["content"] = "src/booking/stays.py:19: (shortened)"
    return lines


def dropped_history() -> list[Line]:
    lines = session()
    for body in bodies(lines)[5:]:
        del body["messages"][1:3]
    return lines


def varying_mark() -> list[Line]:
    lines = session()[:3]
    for number, line in enumerate(lines):
        body = line["request"]
        body["system"][0].pop("cache_control")
        body["messages"] = [
            {
                "role": "user",
                "content": [{"type": "text", "text": f"Question {'abc'[number]}?", "cache_control": {"type": "ephemeral"}}],
            }
        ]
        line["session"] = f"question-{number}"
    return lines


def marked_reminder() -> list[Line]:
    lines = session()
    for body in bodies(lines):
        body["messages"][0]["content"][0]["text"] += " The log of that night says: " + "booking refused; " * 100
        body["messages"][-1]["content"][-1].pop("cache_control", None)
        reminder = {"type": "text", "text": "Reminder: no apologies.", "cache_control": {"type": "ephemeral"}}
        body["messages"][-1]["content"].append(reminder)
    return lines


def too_short() -> list[Line]:
    lines = session()
    for body in bodies(lines):
        body["tools"] = []
        body["system"] = [
            {"type": "text", "text": "You mend faults in a booking service.", "cache_control": {"type": "ephemeral"}}
        ]
        body["messages"][-1]["content"][-1].pop("cache_control")
    return lines[:2]


def five_marks() -> list[Line]:
    lines = session()
    for index in (0, 1, 2):
        bodies(lines)[7]["tools"][index]["cache_control"] = {"type": "ephemeral"}
    return lines


def ttl_order() -> list[Line]:
    lines = session()
    bodies(lines)[7]["messages"][-1]["content"][-1]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    return lines


def jump() -> list[Line]:
    lines = session()[:2]
    body = bodies(lines)[1]
    for line in lines:
        line["request"]["system"][0].pop("cache_control")
    body["messages"][1:1] = [{"role": ("assistant", "user")[n % 2], "content": f"Step {n} of a long turn."} for n in range(24)]
    return lines


def no_marks() -> list[Line]:
    lines = session()
    for body in bodies(lines):
        body["system"][0].pop("cache_control")
        body["messages"][-1]["content"][-1].pop("cache_control")
    return lines


def gap() -> list[Line]:
    lines = session()
    for line in lines[4:]:
        line["timestamp"] = _later(line["timestamp"], 900)
    return lines


def parallel() -> list[Line]:
    lines = []
    for number in range(4):
        line = session()[0]
        line["session"] = f"fan-{number}"
        line["timestamp"] = _later(line["timestamp"], 0.05 * number)
        line["request"]["messages"][0]["content"][0]["text"] = f"Look at file {'wxyz'[number]}."
        lines.append(line)
    return lines


def chat_timestamp() -> list[Line]:
    lines = chat()
    for number, body in enumerate(bodies(lines)):
        body["messages"][0]["content"] = f"Now: 2026-03-02 09:{number:02}\n" + body["messages"][0]["content"]
    return lines


def chat_argument_keys() -> list[Line]:
    lines = chat()
    for body in bodies(lines)[5:]:
        function = body["messages"][2]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(dict(reversed(json.loads(function["arguments"]).items())))
    return lines


def chat_format() -> list[Line]:
    lines = chat()
    bodies(lines)[7]["response_format"] = {"type": "json_object"}
    return lines


def chat_effort() -> list[Line]:
    lines = chat("gpt-5.6-sol")
    bodies(lines)[7]["reasoning_effort"] = "high"
    return lines


def service_tier() -> list[Line]:
    lines = chat("gpt-5.6-sol")
    for body in bodies(lines)[5:]:
        body["service_tier"] = "priority"
    return lines


def cache_key() -> list[Line]:
    lines = chat("gpt-5.6-sol")
    for number, body in enumerate(bodies(lines)):
        body["prompt_cache_key"] = "one" if number < 5 else "two"
    return lines


def extended() -> list[Line]:
    lines = chat("gpt-5.6-sol")[:2]
    body = bodies(lines)[1]
    body["messages"] = body["messages"][:2]
    body["messages"][1]["content"] += "\nIt also happens in February."
    return lines


def explicit() -> list[Line]:
    lines = responses()
    for body in bodies(lines)[6:]:
        body["prompt_cache_options"] = {"mode": "explicit"}
        text = body["input"][0]["content"]
        mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}
        body["input"][-1] = {"role": "user", "content": [{"type": "input_text", "text": f"{text} (again)", **mark}]}
    return lines[:7]


def openai_gap() -> list[Line]:
    lines = responses()
    for line in lines[4:]:
        line["timestamp"] = _later(line["timestamp"], 3600)
    return lines


def over_rate() -> list[Line]:
    lines = []
    for number in range(20):
        line = chat("gpt-5.6-sol")[0]
        line["session"] = f"client-{number}"
        line["timestamp"] = _later(line["timestamp"], 2.0 * number)
        line["request"]["prompt_cache_key"] = "all"
        line["request"]["messages"][1]["content"] = f"Question {number}: why?"
        lines.append(line)
    return lines


def chain_timestamp() -> list[Line]:
    lines = chain()
    for number, body in enumerate(bodies(lines)):
        body["instructions"] = f"Now: 2026-03-02 09:{number:02}\n" + body["instructions"]
    return lines


def chain_tool_order() -> list[Line]:
    lines = chain()
    for body in bodies(lines)[3:]:
        body["tools"].reverse()
    return lines


def chain_model() -> list[Line]:
    lines = chain()
    bodies(lines)[6]["model"] = "gpt-6-sol"
    return lines[:7]


def chain_without_instructions() -> list[Line]:
    lines = chain()
    for line in lines:
        del line["response"]  # answers need not be recorded
    for body in bodies(lines)[1:]:
        del body["instructions"]
    return lines


def _later(timestamp: str, seconds: float) -> str:
    return (datetime.fromisoformat(timestamp) + timedelta(seconds=seconds)).isoformat()


PLANTED: list[tuple[Plant, str, int, str]] = [
    (timestamp, "timestamp", 2, "system.0.text"),
    (spelt_date, "timestamp", 2, "system.0.text"),
    (uuid, "uuid", 2, "system.0.text"),
    (request_id, "request-id", 2, "system.0.text"),
    (hex_id, "request-id", 2, "system.0.text"),
    (counter, "volatile-value", 2, "system.0.text"),
    (user_in_session, "user-field", 5, "system.0.text"),
    (user_between_sessions, "user-field", 9, "system.0.text"),
    (tool_keys, "json-key-order", 4, "tools.1.input_schema.properties"),
    (call_keys, "json-key-order", 6, "messages.1.content.1.input"),
    (tool_order, "tool-order", 2, "tools.0"),
    (tool_set, "tool-set-changed", 5, "tools"),
    (tool_schema, "tool-schema-drift", 5, "tools.3.description"),
    (line_endings, "line-endings", 5, "system.0.text"),
    (whitespace, "whitespace-drift", 5, "system.0.text"),
    (unicode_form, "unicode-drift", 5, "system.0.text"),
    (few_shot, "few-shot-shuffle", 5, "system.0.text"),
    (few_shot_messages, "few-shot-shuffle", 5, "messages.0.content"),
    (edited_system, "system-changed", 5, "system.0.text"),
    (image_appears, "image-presence", 8, "messages.14.content.0"),
    (image_again, "image-reencoded", 2, "messages.0.content.0"),
    (tool_choice, "tool-choice-changed", 8, "tool_choice"),
    (parallel_calls, "parallel-calls-changed", 6, "tool_choice.disable_parallel_tool_use"),
    (effort, "effort-changed", 6, "output_config.effort"),
    (thinking, "thinking-changed", 6, "thinking"),
    (model, "model-changed", 6, "model"),
    (speed, "tier-changed", 6, "speed"),
    (edited_history, "history-edited", 6, "messages.2.content.0.content"),
    (dropped_history, "history-dropped", 6, "messages.1.content.0"),
    (chain_timestamp, "timestamp", 2, "instructions"),
    (chain_tool_order, "tool-order", 4, "tools[0]"),
    (chain_model, "model-changed", 7, "model"),
    (chain_without_instructions, "instructions-dropped", 2, "instructions"),
    (varying_mark, "mark-on-varying-block", 3, "messages.0.content.0"),
    (marked_reminder, "mark-on-varying-block", 2, "messages.1.content.0"),
    (too_short, "prefix-too-short", 1, "system.0"),
    (five_marks, "too-many-marks", 8, "messages.14.content.0"),
    (ttl_order, "ttl-order", 8, "messages.14.content.0"),
    (jump, "lookback-jump", 2, "messages.26.content.0"),
    (no_marks, "no-breakpoint", 2, "cache_control"),
    (gap, "gap-over-ttl", 5, "messages.6.content.0"),
    (parallel, "parallel-cold-start", 2, "system.0"),
    (chat_timestamp, "timestamp", 2, "messages[0].content"),
    (chat_argument_keys, "json-key-order", 6, "messages[2].tool_calls[0].function.arguments"),
    (chat_format, "format-changed", 8, "response_format"),
    (chat_effort, "effort-changed", 8, "reasoning_effort"),
    (service_tier, "tier-changed", 6, "service_tier"),
    (cache_key, "cache-key-changed", 6, "prompt_cache_key"),
    (extended, "same-message-extended", 2, "messages[1].content"),
    (explicit, "implicit-to-explicit", 7, "prompt_cache_options.mode"),
    (openai_gap, "gap-over-ttl", 5, "input[8]"),
    (over_rate, "key-over-rate", 16, "prompt_cache_key"),
]


@pytest.mark.parametrize(("plant", "code", "line", "path"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED])
def test_a_planted_invalidator_is_found_where_it_is_and_nothing_else_is(plant: Plant, code: str, line: int, path: str) -> None:
    findings = report(plant()).findings
    assert [(finding.code, finding.line, finding.path) for finding in findings] == [(code, line, path)]


def test_every_code_has_a_session_in_which_it_is_planted() -> None:
    from anaphora.lint import RULES

    planted = {code for _, code, _, _ in PLANTED}
    assert set(RULES) - planted == {"server-tools-changed"}
    assert {finding.code for finding in report(web_search()).findings} >= {"server-tools-changed"}
