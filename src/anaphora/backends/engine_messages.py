"""Anaphora's messages and tools in the words of chat templates. Pure: what renders them is `engine_template`.

The parts of a prompt are numbered: its tools from 0, then the parts of its messages in order, whatever becomes of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anaphora.errors import InvalidRequest
from anaphora.types import (
    MediaPart,
    Message,
    ProviderPart,
    Request,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
    ToolResultPart,
    ToolUsePart,
)

TOOL_CALL_OPEN = "<tool_call>"
TOOL_CALL_CLOSE = "</tool_call>"

_PREAMBLE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{schemas}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    f"{TOOL_CALL_OPEN}{TOOL_CALL_CLOSE} XML tags:\n"
    f'{TOOL_CALL_OPEN}\n{{{{"name": <function-name>, "arguments": <args-json-object>}}}}\n{TOOL_CALL_CLOSE}'
)
_CHOICE_SENTENCES: dict[str, str] = {
    "none": "Do not call any function. Answer in plain text.",
    "any": "You must call at least one function.",
    "tool": "You must call the function {name}.",
}
_ONE_CALL = "Call at most one function."

ChatMessage = dict[str, Any]
"""What chat templates take: role, content, and in some places tool_calls, tool_call_id, name."""

Defuse = Callable[[str, bool], str]
"""(text, whether the model may have written it) → the text with its control tokens cut."""

Mark = Callable[[int, str], str]
"""(number of a part, its text) → the text with the part's own mark where it ends."""


def no_mark(number: int, text: str) -> str:
    return text


class Written:
    """One request in a template's words. `joint` is put between what two parts, or a part and Anaphora, say in one message."""

    def __init__(self, request: Request, defuse: Defuse, *, native: bool, joint: str = "", mark: Mark = no_mark) -> None:
        """`native`: the template knows tools. InvalidRequest: the messages hold what no text-only model takes."""
        self._native = native
        self._defuse = defuse
        self._joint = joint
        self._mark = mark
        self._number = len(request.tools)
        self._calls: dict[str, tuple[str, str]] = {}
        """Id given by the client → (id in the prompt, name of the tool)."""
        self.messages: list[ChatMessage] = []
        for message in request.messages:
            self.messages += [self._assistant(message)] if message.role == "assistant" else self._other(message)
        self.tools: list[dict[str, Any]] = []
        """For the template; empty where it knows none and they have become a preamble."""
        if request.tools:
            self._add_tools(request)

    def fold_system(self) -> None:
        """For templates without a system role (Gemma's): the system prompt begins the first user message."""
        messages = self.messages
        if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
            return
        system = messages.pop(0)
        messages[0]["content"] = f"{system['content']}{self._joint}\n\n{messages[0]['content']}"

    # -- tools -------------------------------------------------------------------------------------------------------

    def _add_tools(self, request: Request) -> None:
        if self._native:
            self.tools = [self._schema(tool, number) for number, tool in enumerate(request.tools)]
        else:
            schemas = [json.dumps(self._schema(tool, None), ensure_ascii=False) for tool in request.tools]
            marked = [self._mark(number, schema) + self._joint for number, schema in enumerate(schemas)]
            self._add_preamble(_PREAMBLE.format(schemas="\n".join(marked)))
        name = ""
        if request.tool_choice.mode == "tool":
            name = request.tool_choice.name or ""
            if all(tool.name != name for tool in request.tools):
                raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
        self._add_sentence(request.tool_choice, self._defuse(name, False))

    def _schema(self, tool: Tool, number: int | None) -> dict[str, Any]:
        """The definition in the form templates are written for; with the mark of `number` in its name. Fields Anaphora does
        not know are left out: models do not know them either."""
        if tool.kind != "custom":
            raise InvalidRequest(f"only a provider's own models can use the tool `{tool.kind}`", param="tools")
        parameters = tool.parameters or {"type": "object", "properties": {}}
        name = tool.name if number is None else self._mark(number, tool.name)
        function = {"name": name, "description": tool.description, "parameters": parameters}
        defused: dict[str, Any] = _defused({"type": "function", "function": function}, lambda text: self._defuse(text, False))
        return defused

    def _add_preamble(self, text: str) -> None:
        """In front of the system prompt: tools are what a prompt begins with to every cache (R1)."""
        if self.messages[0]["role"] != "system":
            self.messages.insert(0, {"role": "system", "content": text})
        else:
            behind = self.messages[0]["content"]
            self.messages[0]["content"] = f"{text}\n\n{behind}" if behind else text

    def _add_sentence(self, choice: ToolChoice, name: str) -> None:
        """Say what `tool_choice` asks for at the end of the last message, behind everything a cache may hold."""
        sentences = []
        if choice.mode in _CHOICE_SENTENCES:
            sentences.append(_CHOICE_SENTENCES[choice.mode].format(name=name))
        if not choice.parallel and choice.mode != "none":
            sentences.append(_ONE_CALL)
        last = self.messages[-1]
        if sentences and last["role"] != "assistant":
            before = [last["content"] + self._joint] if last["content"] else []
            last["content"] = "\n\n".join([*before, " ".join(sentences)])

    # -- messages ----------------------------------------------------------------------------------------------------

    def _numbered(self, message: Message) -> list[tuple[int, object]]:
        first = self._number
        self._number += len(message.content)
        return list(enumerate(message.content, first))

    def _assistant(self, message: Message) -> ChatMessage:
        parts = self._numbered(message)
        # As one text, without joints: so the model may have written it, token by token.
        texts = [self._mark(number, text) for number, text in _texts(parts)]
        content = self._defuse("\n".join(texts), True)
        calls = [(number, *self._call(part)) for number, part in parts if isinstance(part, ToolUsePart)]
        if not calls:
            return {"role": "assistant", "content": content}
        if self._native:
            tool_calls = [
                {"type": "function", "id": id, "function": {**call, "name": self._mark(number, call["name"])}}
                for number, id, call in calls
            ]
            return {"role": "assistant", "content": content, "tool_calls": tool_calls}
        blocks = [
            self._mark(number, f"{TOOL_CALL_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{TOOL_CALL_CLOSE}")
            for number, _, call in calls
        ]
        return {"role": "assistant", "content": "\n".join([content, *blocks] if content else blocks)}

    def _call(self, part: ToolUsePart) -> tuple[str, dict[str, Any]]:
        """Its id in the prompt, and the call. Ids are nine alphanumeric characters because Mistral's templates insist on it."""
        name = self._defuse(part.name, True)
        id = f"call{len(self._calls) + 1:05d}"
        self._calls[part.id] = (id, name)
        try:
            arguments: object = json.loads(part.arguments) if part.arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = part.arguments
        return id, {"name": name, "arguments": _defused(arguments, lambda text: self._defuse(text, True))}

    def _other(self, message: Message) -> list[ChatMessage]:
        """Of a user or the system. Results come first; a template that knows tools has messages of their own for them."""
        parts = self._numbered(message)
        results = [(number, self._result(part)) for number, part in parts if isinstance(part, ToolResultPart)]
        texts = self._joined(self._mark(number, text) for number, text in _texts(parts))
        has_text = any(not isinstance(part, ToolResultPart | ThinkingPart) for _, part in parts)
        if self._native or not results:
            for number, result in results:
                result["content"] = self._mark(number, result["content"])
            said = [result for _, result in results]
            return said + ([{"role": message.role, "content": texts}] if has_text or not results else [])
        blocks = [self._mark(number, f"<tool_response>\n{result['content']}\n</tool_response>") for number, result in results]
        return [{"role": message.role, "content": f"{self._joint}\n".join([*blocks, texts] if has_text else blocks)}]

    def _result(self, part: ToolResultPart) -> ChatMessage:
        if part.tool_use_id not in self._calls:
            raise InvalidRequest(
                f"a tool result answers {part.tool_use_id!r}, but no call before it has that id", param="messages"
            )
        id, name = self._calls[part.tool_use_id]
        content = self._joined(text for _, text in _texts(enumerate(part.content)))
        return {
            "role": "tool",
            "tool_call_id": id,
            "name": name,
            "content": f"Error: {content}" if part.is_error else content,
        }

    def _joined(self, texts: Iterable[str]) -> str:
        """Each defused by itself: a control token that hides between two of them is cut by the joint."""
        return f"{self._joint}\n".join(self._defuse(text, False) for text in texts)


def _texts(parts: Iterable[tuple[int, object]]) -> list[tuple[int, str]]:
    found = []
    for number, part in parts:
        if isinstance(part, MediaPart):
            raise InvalidRequest(f"this model takes text only, not {part.kind} content", param="messages")
        if isinstance(part, ProviderPart):
            raise InvalidRequest(f"only a provider's own models take `{part.kind}` blocks such as this", param="messages")
        if isinstance(part, TextPart):
            found.append((number, part.text))
    return found


def _defused(value: object, defuse: Callable[[str], str]) -> Any:
    """`value` with `defuse` applied to every text in it, keys too."""
    if isinstance(value, str):
        return defuse(value)
    if isinstance(value, Mapping):
        return {defuse(str(key)): _defused(item, defuse) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defused(item, defuse) for item in value]
    return value
