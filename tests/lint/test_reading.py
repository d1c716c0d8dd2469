"""Reading recorded requests."""

from __future__ import annotations

import json

import pytest

from anaphora.lint import BadInput, read

CHAT: dict[str, object] = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "hi"}]}


def test_every_envelope_gives_the_same_body() -> None:
    envelopes: list[dict[str, object]] = [
        CHAT,
        {"request": CHAT},
        {"request": {"body": CHAT, "headers": {}}},
        {"request": json.dumps(CHAT)},
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
        {"custom_id": "1", "params": CHAT},
    ]
    recorded = list(read("f", map(json.dumps, envelopes)))
    assert all(one.body == CHAT and one.dialect == "openai-chat" for one in recorded)


@pytest.mark.parametrize(
    "time", [1_770_000_000, 1_770_000_000_000, 1_770_000_000_000_000, "2026-02-02T02:40:00Z", "1770000000"]
)
def test_times_are_read_in_every_unit(time: object) -> None:
    (one,) = read("f", [json.dumps({"timestamp": time, "request": CHAT})])
    assert one.time_s == 1_770_000_000


def test_sessions_and_tenants_are_read_from_the_envelope_and_from_headers() -> None:
    lines = [{"session_id": 7, "tenant": "t", "request": CHAT}, {"headers": {"X-Session-Id": "s"}, "request": CHAT}]
    one, other = read("f", map(json.dumps, lines))
    assert (one.session, one.tenant, other.session) == ("7", "t", "s")


@pytest.mark.parametrize(
    ("body", "dialect"),
    [
        ({"model": "claude-opus-5", "messages": []}, "anthropic"),
        ({"model": "local", "system": "x", "messages": []}, "anthropic"),
        ({"model": "local", "messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "anthropic"),
        ({"model": "local", "messages": []}, "openai-chat"),
        ({"model": "local", "input": "x"}, "openai-responses"),
    ],
)
def test_the_dialect_is_told_by_what_only_it_has(body: object, dialect: str) -> None:
    (one,) = read("f", [json.dumps(body)])
    assert one.dialect == dialect


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "f.jsonl:2:2: not JSON"),
        ("[1]", "f.jsonl:2: not a request"),
        ('{"a": 1}', "f.jsonl:2: not a request"),
        ("[" * 100_000, "f.jsonl:2"),
    ],
)
def test_a_line_that_is_no_request_is_named(line: str, said: str) -> None:
    with pytest.raises(BadInput, match=said.replace(".", r"\.")):
        list(read("f.jsonl", [json.dumps(CHAT), line]))
