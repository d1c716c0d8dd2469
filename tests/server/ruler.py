"""Prompts of an exact number of tokens, for each kind of engine that the vectors of prompt caching are tried on.

The vectors count a block as what is rendered of it. A chat template puts words of its own in front of each block and behind
the last one, so texts are made shorter by what stands in front of them, and `tail` is taken off what is billed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


class Ruler(Protocol):
    tail: int
    """Tokens behind the last block."""

    def fit(self, body: dict[str, Any], *, to_the_end: bool = False) -> dict[str, Any]:
        """`body` with its blocks as long as the number of words in their texts; `to_the_end`: the last one with the tail."""
        ...


class EchoRuler:
    """The emulator has no template."""

    tail = 0

    def fit(self, body: dict[str, Any], *, to_the_end: bool = False) -> dict[str, Any]:
        return body


class ChatMLRuler:
    """SmolLM2's template, written down here by hand: what is measured must not be the measure."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tail = self._count(TAIL)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def fit(self, body: dict[str, Any], *, to_the_end: bool = False) -> dict[str, Any]:
        body = json.loads(json.dumps(body))  # texts are changed in place
        tools = body.get("tools") or []
        for number, tool in enumerate(tools):
            self._fit_tool(tool.get("function", tool), number)
        open_turn, glue = ("system", BEHIND_TOOLS) if tools else ("", "")  # whose, and what stands in front of the next block
        blocks: list[dict[str, Any]] = []
        for role, blocks in _turns(body):
            for block in blocks:
                if role == open_turn:  # neighbours of one role are one turn
                    glue += "\n\n" if glue else "\n"
                else:
                    glue += ("<|im_end|>\n" if open_turn else DEFAULT if role != "system" else "") + f"<|im_start|>{role}\n"
                    open_turn = role
                self._fit_text(block, glue)
                glue = ""
        if to_the_end:
            key = _key(blocks[-1])
            blocks[-1][key] = blocks[-1][key].rsplit(" ", self.tail)[0]
        return body

    def _fit_text(self, block: dict[str, Any], front: str) -> None:
        """Off the beginning: what two prompts have in common stays as long as it was."""
        words = block.get(_key(block), "").split(" ")
        if len(words) > 1:
            block[_key(block)] = " ".join(words[min(self._count(front + "word") - 1, len(words) - 1) :])

    def _fit_tool(self, tool: dict[str, Any], number: int) -> None:
        words = tool.get("description", "").split(" ")
        parameters = tool.get("parameters") or tool.get("input_schema")
        front = "\n" if number else BEFORE_TOOLS

        def size(description: list[str]) -> int:
            function = {"name": tool["name"], "description": " ".join(description), "parameters": parameters}
            return self._count(front + json.dumps({"type": "function", "function": function}))

        if len(words) > 1:
            tool["description"] = " ".join(words[: max(1, 2 * len(words) - size(words))])


def _key(block: dict[str, Any]) -> str:
    return "content" if "content" in block else "text"


def _turns(body: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Role and blocks, the system prompt first."""
    if body.get("system"):
        yield "system", body["system"]
    for message in body.get("messages") or body.get("input") or []:
        role = "system" if message["role"] == "developer" else message["role"]
        yield role, message["content"] if isinstance(message["content"], list) else [message]


TAIL = "<|im_end|>\n<|im_start|>assistant\n"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
BEFORE_TOOLS = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
BEHIND_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
