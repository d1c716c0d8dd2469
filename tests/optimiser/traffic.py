"""Requests as clients send them, and a provider's books beside the optimiser's history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anaphora.clock import ManualClock
from anaphora.optimiser import History, Plan, Settings, apply, plan
from anaphora.profiles import find
from anaphora.promises import Books
from anaphora.prompt import CacheUsage, Lengths, Prompt
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic_prompt import read_prompt
from anaphora.wire.openai_prompt import read_chat

Json = dict[str, Any]
ON = Settings(mode="on")
M5: Json = {"cache_control": {"type": "ephemeral"}}
M1H: Json = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def text(words: str, **more: Any) -> Json:
    return {"type": "text", "text": words, **more}


def user(*blocks: Json | str) -> Json:
    return {"role": "user", "content": [text(one) if isinstance(one, str) else one for one in blocks]}


def says(*blocks: Json | str) -> Json:
    return {"role": "assistant", "content": [text(one) if isinstance(one, str) else one for one in blocks]}


def body(*messages: Json, system: Any = "Rules.", **fields: Any) -> Json:
    return {"model": "claude-opus-5", "max_tokens": 8, "system": system, "messages": list(messages), **fields}


class Site:
    """A client's requests go through the optimiser to a provider that keeps books. A block has `tokens` tokens."""

    def __init__(self, model: str = "claude-opus-5", *, tokens: int = 1000, settings: Settings = ON) -> None:
        self.anthropic = model.startswith("claude")
        self.profile = find(model, "anthropic" if self.anthropic else "openai")
        self.history = History()
        self.books = Books(ManualClock())
        self.tokens = tokens
        self.settings = settings
        self.now_s = 1_000_000.0
        self.sent: Json = {}

    def read(self, body: Json) -> tuple[Prompt, Lengths]:
        prompt = read_prompt(body) if self.anthropic else read_chat(body)
        ends = tuple(self.tokens * (i + 1) for i in range(len(prompt.blocks)))
        return prompt, Lengths(ends, ends[-1] if ends else 0)

    def ask(self, body: Json, after_s: float = 10.0) -> tuple[Plan, CacheUsage]:
        self.now_s += after_s
        prompt, lengths = self.read(body)
        known = self.history.know(prompt, self.profile, self.now_s)
        found = plan(prompt, lengths, self.profile, self.history, self.now_s, self.settings, known)
        self.sent = apply(body, found)
        self.history.learn(prompt, lengths, self.profile, known, self.now_s, found)
        charge = self.books.charge(LOCAL_TENANT, self.read(self.sent)[0], self.profile, lengths, self.now_s)
        self.books.visible(charge, self.now_s + 1.0)
        return found, charge.usage


def marks_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Paths and lifetimes of all marks of a body, wherever they stand."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "cache_control" and item is not None:
                yield path, item.get("ttl", "5m")
            elif key == "prompt_cache_breakpoint" and item is not None:
                yield path, item.get("ttl", "30m")
            else:
                yield from marks_in(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from marks_in(item, f"{path}.{index}")


def chat_turns(start: str, num_turns: int) -> list[Json]:
    """A conversation's messages up to the user's turn of this number."""
    turns = [message for turn in range(num_turns) for message in (says(f"{start} {turn}!"), user(f"{start} {turn}?"))]
    return [user(start), *turns]
