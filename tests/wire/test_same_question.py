"""The law of `wire`: one question written in any dialect is one `Request`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from anaphora.keys import request_key
from anaphora.types import Request, Tenant
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_responses import OpenAIResponses

TENANT = Tenant("acme")
Json = dict[str, Any]

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
name = st.text("abcdefghij_", min_size=1, max_size=8)
scalar = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | text
value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(name, inner, max_size=3), max_leaves=6)


class ToolCall(msgspec.Struct):
    id: str
    name: str
    input: Json


class Turn(msgspec.Struct):
    """One turn of a neutral conversation: the user's (results, then texts) or the assistant's (texts, then calls)."""

    role: str
    texts: list[str]
    calls: list[ToolCall] = []
    results: list[tuple[str, list[str]]] = []


class Conversation(msgspec.Struct):
    system: list[str]
    turns: list[Turn]
    tools: list[tuple[str, str, Json]]
    choice: str
    parallel: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    stop: list[str]
    max_tokens: int
    stream: bool
    salt: str | None
    unknown: Json


user_turns = st.builds(
    Turn,
    role=st.just("user"),
    texts=st.lists(text, min_size=1, max_size=3),
    results=st.lists(st.tuples(name, st.lists(text, max_size=2)), max_size=2),
)
assistant_turns = st.builds(
    Turn,
    role=st.just("assistant"),
    texts=st.lists(text, min_size=1, max_size=2),
    calls=st.lists(st.builds(ToolCall, name, name, st.dictionaries(name, value, max_size=3)), max_size=2),
)
conversations = st.builds(
    Conversation,
    system=st.lists(text, max_size=2),
    turns=st.lists(user_turns | assistant_turns, max_size=4).flatmap(
        lambda turns: user_turns.map(lambda last: [*turns, last]),
    ),
    tools=st.lists(
        st.tuples(name, st.just("") | text, st.dictionaries(name, value, max_size=3)),
        max_size=2,
        unique_by=lambda tool: tool[0],
    ),
    choice=st.sampled_from(["auto", "none", "any", "tool"]),
    parallel=st.booleans(),
    temperature=st.none() | st.sampled_from([0, 1, 0.0, 1.0, -0.0]) | st.floats(0, 1),
    top_p=st.none() | st.floats(0, 1),
    top_k=st.none() | st.integers(0, 100),
    stop=st.lists(st.text("abc.", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 4096),
    stream=st.booleans(),
    salt=st.none() | text,
    unknown=st.dictionaries(st.sampled_from(["x_alpha", "x_beta"]), value, max_size=2),
)


def dicts(value: Any) -> Iterator[Json]:
    """All objects in a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dicts(inner)


class Pen:
    """Writes one conversation in a dialect, in any of its spellings: string or parts, defaults, order of keys."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def coin(self) -> bool:
        return self.random.random() < 0.5

    def shuffled(self, fields: Any) -> Any:
        if isinstance(fields, list):
            return [self.shuffled(item) for item in fields]
        if not isinstance(fields, dict):
            return fields
        keys = list(fields)
        self.random.shuffle(keys)
        # Arguments and schemas keep their order: their text is what the model reads.
        kept = ("input", "arguments", "parameters", "input_schema")
        return {key: fields[key] if key in kept else self.shuffled(fields[key]) for key in keys}

    def body(self, fields: Json) -> bytes:
        return json.dumps(self.shuffled(fields), ensure_ascii=self.coin(), indent=self.random.choice([None, 2])).encode()

    def texts(self, texts: list[str], kind: str = "text", mark: Json | None = None) -> Any:
        if len(texts) == 1 and self.coin():
            return texts[0]
        marks = mark if mark and self.coin() else {}
        return [{"type": kind, "text": piece, **marks} for piece in texts]

    def shared(self, talk: Conversation) -> Json:
        fields: Json = {"model": "m", **talk.unknown}
        for key, given_value in (
            ("temperature", talk.temperature),
            ("top_p", talk.top_p),
            ("top_k", talk.top_k),
            ("cache_salt", talk.salt),
        ):
            if given_value is not None or self.coin():
                fields[key] = given_value
        if talk.stream or self.coin():
            fields["stream"] = talk.stream
        if self.coin():
            fields["thinking"] = {"type": "disabled"}
        if self.coin():
            fields["metadata"] = {"user_id": "u"}
        return fields

    def anthropic(self, talk: Conversation) -> bytes:
        mark = {"cache_control": {"type": "ephemeral", "ttl": self.random.choice(["5m", "1h"])}}
        body = self.shared(talk) | {"max_tokens": talk.max_tokens, "messages": []}
        if talk.system:
            body["system"] = self.texts(talk.system, mark=mark)
        for turn in talk.turns:
            blocks: list[Json] = [
                {"type": "tool_result", "tool_use_id": call, "content": self.texts(texts), **(mark if self.coin() else {})}
                for call, texts in turn.results
            ]
            texts = self.texts(turn.texts, mark=mark)
            blocks += [{"type": "text", "text": texts}] if isinstance(texts, str) else texts
            blocks += [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input} for call in turn.calls]
            whole = isinstance(texts, str) and not turn.results and not turn.calls
            body["messages"].append({"role": turn.role, "content": texts if whole else blocks})
        if talk.tools:
            body["tools"] = [
                {"name": tool, "input_schema": schema, **({"description": about} if about or self.coin() else {})}
                for tool, about, schema in talk.tools
            ]
            choice: Json = {"type": talk.choice} | ({"name": talk.tools[0][0]} if talk.choice == "tool" else {})
            if talk.choice != "none" and (not talk.parallel or self.coin()):
                choice["disable_parallel_tool_use"] = not talk.parallel
            if choice != {"type": "auto"} or self.coin():
                body["tool_choice"] = choice
        if talk.stop or self.coin():
            body["stop_sequences"] = talk.stop
        if self.coin():
            body |= mark
        marked = [owner for owner in dicts(body) if "cache_control" in owner]
        for owner in self.random.sample(marked, max(0, len(marked) - 4)):
            del owner["cache_control"]
        return self.body(body)

    def _openai(self, talk: Conversation) -> Json:
        body = self.shared(talk)
        if self.coin():
            body |= {"presence_penalty": 0, "frequency_penalty": -0.0, "user": "u", "prompt_cache_key": "k", "store": True}
        if talk.stop or self.coin():
            body["stop"] = talk.stop[0] if len(talk.stop) == 1 and self.coin() else talk.stop
        if talk.tools and (talk.choice != "auto" or self.coin()):
            body["tool_choice"] = {"auto": "auto", "none": "none", "any": "required"}.get(talk.choice)
        if not talk.parallel or self.coin():
            body["parallel_tool_calls"] = talk.parallel
        return body

    def _tool(self, tool: tuple[str, str, Json]) -> Json:
        function: Json = {"name": tool[0], "parameters": tool[2]}
        if tool[1] or self.coin():
            function["description"] = tool[1]
        if self.coin():
            function["strict"] = False
        return function

    def chat(self, talk: Conversation) -> bytes:
        body = self._openai(talk) | {"messages": []}
        body[self.random.choice(["max_tokens", "max_completion_tokens"])] = talk.max_tokens
        if self.coin():
            body |= {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "logit_bias": None}
        messages: list[Json] = body["messages"]
        if len(talk.system) > 1 and self.coin():
            messages += [{"role": self.random.choice(["system", "developer"]), "content": piece} for piece in talk.system]
        elif talk.system:
            messages.append({"role": "system", "content": self.texts(talk.system)})
        for turn in talk.turns:
            messages += [{"role": "tool", "tool_call_id": call, "content": self.texts(texts)} for call, texts in turn.results]
            message: Json = {"role": turn.role, "content": self.texts(turn.texts)}
            if turn.calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": self.arguments(call)}}
                    for call in turn.calls
                ]
            messages.append(message)
        if talk.tools:
            body["tools"] = [{"type": "function", "function": self._tool(tool)} for tool in talk.tools]
            if talk.choice == "tool":
                body["tool_choice"] = {"type": "function", "function": {"name": talk.tools[0][0]}}
        return self.body(body)

    def responses(self, talk: Conversation) -> bytes:
        body = self._openai(talk) | {"max_output_tokens": talk.max_tokens, "input": []}
        if self.coin():
            body |= {"text": {"format": {"type": "text"}}, "truncation": "disabled", "include": []}
        system = list(talk.system)
        if system and self.coin():
            body["instructions"] = system.pop(0)
        items: list[Json] = body["input"]
        if system:
            items.append({"role": "developer", "content": self.texts(system, "input_text")})
        for turn in talk.turns:
            items += [
                {"type": "function_call_output", "call_id": call, "output": self.texts(texts, "input_text")}
                for call, texts in turn.results
            ]
            kind = "input_text" if turn.role == "user" else "output_text"
            items.append({"role": turn.role, "content": self.texts(turn.texts, kind)})
            items += [
                {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": self.arguments(call)}
                for call in turn.calls
            ]
        if talk.tools:
            body["tools"] = [{"type": "function", **self._tool(tool)} for tool in talk.tools]
            if talk.choice == "tool":
                body["tool_choice"] = {"type": "function", "name": talk.tools[0][0]}
        return self.body(body)

    def arguments(self, call: ToolCall) -> str:
        return json.dumps(call.input, ensure_ascii=self.coin(), indent=self.random.choice([None, 1]))


@given(conversations, st.integers())
def test_the_same_question_is_the_same_request_in_every_dialect(talk: Conversation, seed: int) -> None:
    pen = Pen(seed)
    requests = [
        Anthropic().parse(pen.anthropic(talk), tenant=TENANT).request,
        Anthropic().parse(pen.anthropic(talk), tenant=TENANT).request,
        OpenAIChat().parse(pen.chat(talk), tenant=TENANT).request,
        OpenAIChat().parse(pen.chat(talk), tenant=TENANT).request,
        OpenAIResponses().parse(pen.responses(talk), tenant=TENANT).request,
    ]
    for request in requests[1:]:
        assert request == requests[0]
        assert request_key(request, fingerprint="") == request_key(requests[0], fingerprint="")


@given(conversations, st.integers())
def test_streaming_changes_nothing_but_the_flag(talk: Conversation, seed: int) -> None:
    def parse(stream: bool) -> Request:
        talk.stream = stream
        return OpenAIChat().parse(Pen(seed).chat(talk), tenant=TENANT).request

    streamed, whole = parse(True), parse(False)
    assert streamed.stream
    assert not whole.stream
    assert msgspec.structs.replace(streamed, stream=False) == whole


@given(conversations, st.integers(), st.sampled_from(["text", "system", "tool", "limit", "salt", "unknown", "stop"]))
def test_a_different_question_is_a_different_request(talk: Conversation, seed: int, what: str) -> None:
    before = OpenAIChat().parse(Pen(seed).chat(talk), tenant=TENANT).request
    if what == "text":
        talk.turns[-1].texts[-1] += "!"
    elif what == "system":
        talk.system.append("!")
    elif what == "tool":
        talk.tools.append(("another_tool_of_mine", "", {}))
        talk.choice = "auto"
    elif what == "limit":
        talk.max_tokens += 1
    elif what == "salt":
        talk.salt = (talk.salt or "") + "!"
    elif what == "unknown":
        talk.unknown["x_gamma"] = 0
    else:
        talk.stop.append("!")
    assert Anthropic().parse(Pen(seed).anthropic(talk), tenant=TENANT).request != before
