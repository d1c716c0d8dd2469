"""What `anaphora kv warm` and `pin` send for a recorded request. That it is of use is tested with an engine."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from anaphora.cli.kv_warm import _seconds, prewarm
from anaphora.lint import read
from anaphora.types import Tenant
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_responses import OpenAIResponses

TURN = [{"role": "user", "content": "What is a cache?"}]
TOOL = {"name": "look", "input_schema": {"type": "object"}}
DIALECTS: dict[str, Any] = {
    "anthropic": Anthropic(),
    "openai-chat": OpenAIChat(),
    "openai-responses": OpenAIResponses(),
}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "gpt-5.6", "messages": TURN, "stream": True, "stream_options": {"include_usage": True}},
        {"model": "gpt-5.6", "messages": TURN, "max_completion_tokens": 50},
        {"model": "gpt-5.6", "input": "What is a cache?", "max_output_tokens": 50, "stream": True},
        {"model": "claude-opus-5-5", "max_tokens": 9, "messages": TURN, "stream": True},
        {
            "model": "claude-opus-5-5",
            "max_tokens": 4096,
            "messages": TURN,
            "thinking": {"type": "enabled", "budget_tokens": 2048},
        },
        {"model": "claude-opus-5-5", "max_tokens": 9, "messages": TURN, "tools": [TOOL], "tool_choice": {"type": "any"}},
    ],
)
def test_every_recorded_request_becomes_a_pre_warm_that_its_dialect_takes(body: dict[str, Any]) -> None:
    (one,) = read("file", [json.dumps({"request": body})])
    sent = prewarm(one, "smollm2")
    request = DIALECTS[one.dialect].parse(json.dumps(sent).encode(), tenant=Tenant("t"), version="2023-06-01").request
    assert (request.model, request.max_tokens, request.stream) == ("smollm2", 0, False)
    assert "What is a cache?" in str(request.messages)
    assert prewarm(one, None)["model"] == body["model"]


def test_times_are_whole_seconds_up_to_a_day() -> None:
    assert [_seconds(text) for text in ("90", "90s", "45m", "8h", "1d")] == [90, 90, 2700, 28_800, 86_400]
    for text in ("", "0", "1.5h", "2d", "soon", "-5m"):
        with pytest.raises(argparse.ArgumentTypeError, match="45m"):
            _seconds(text)
