"""From a request to token ids: the model's chat template, tools, and the safety of what users write.

**Tools.** Where the model's template renders tool definitions, calls and results, they go through it. Where it does not, a
preamble in the form that Hermes and Qwen models were trained on is put behind the system prompt: JSON schemas in
`<tools></tools>`; calls are `<tool_call>` blocks, results `<tool_response>` blocks in a user turn.

**A stable prefix.** The prompt of turn k, with the answer's ids, is a prefix of the prompt of turn k + 1 where the template
allows it, so that its KV is found again. Therefore `tool_choice` never takes definitions away but adds a sentence to the
last message; the ids that clients give to tool calls are replaced by their place in the conversation; dates are those of the
day, without the time. The prefix breaks where an answer was not made of the tokens that its text encodes to (sampled
tokens need not be the tokenizer's own), where a pre-tokenizer joins the first characters of an answer to the
template's last (both newlines, say), and where a template trims an answer or drops its thinking from the history; from there on
the prompt is computed anew, and nothing is ever wrong.

**Control tokens.** A user who writes `<|im_end|>` must not end his turn. Control tokens in text that did not come from the
template are cut in two by a character that occurs nowhere else; after rendering the prompt is split there and the pieces are
encoded apart, so the text is read as text. In an assistant's turns only the tokenizer's special tokens are cut: others
(`<think>`) it may have generated itself. Prompts of `/v1/completions` are raw: control tokens in them are meant.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import jinja2

from anaphora.errors import InvalidRequest
from anaphora.types import (
    MediaPart,
    Message,
    Request,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
    ToolResultPart,
    ToolUsePart,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
_STRFTIME = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
_SEAMLESS_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
_SEAMLESS_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
_MIN_MEMO_CHARS = 256
_MEMO_ENTRIES = 128

ChatMessage = dict[str, Any]
"""What chat templates take: role, content, and in some places tool_calls, tool_call_id, name."""

Defuse = Callable[[str, bool], str]
"""(text, whether the model may have written it) → the text with its control tokens cut."""


class ChatTokenizer(Protocol):
    """The part of a fast transformers tokenizer that rendering needs."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def __len__(self) -> int: ...
    def get_chat_template(self, chat_template: str | None = ..., tools: list[dict[str, Any]] | None = ...) -> str: ...
    def apply_chat_template(self, conversation: list[ChatMessage], **options: Any) -> Any: ...


class Template:
    """Renders requests for one model. May be used from several threads.

    `vocab_size` bounds raw token ids (default: the tokenizer's length); `today` is what a template's `strftime_now` sees.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, vocab_size: int | None = None, today: Callable[[], date] = date.today
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._memo = lru_cache(maxsize=_MEMO_ENTRIES)(self._packed)
        self._vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self._today = today
        added = self._backend.get_added_tokens_decoder()
        self._ids = {token.content: id for id, token in added.items()}
        self._all_added = _any_of(self._ids)
        self._seamless = all(
            not (token.normalized or token.lstrip or token.rstrip or token.single_word) for token in added.values()
        ) and _is_seamless(self._backend)
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            self._source: str | None = None
            return
        self._source = source
        self._formats = _date_formats(source)
        self._special = _control_pattern(token.content for token in added.values() if token.special)
        self._control = _control_pattern(token.content for token in added.values() if token.special or token.content in source)
        self._system_role = self._supports_system()
        self.native_tools = self._supports_tools()
        """Whether tools go through the model's own template."""

    # -- the two questions -------------------------------------------------------------------------------------------

    def encode_chat(self, request: Request) -> list[int]:
        """Token ids of `request.messages`, ready for the model to answer (or to go on, where the last message is its own).

        Raises InvalidRequest where the messages cannot be rendered; `param` names the field.
        """
        if self._source is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        if not request.messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        text, cut = self.render(request)
        pieces = text.split(cut) if cut else [text]
        ids = self._encode(pieces[0], request.tenant)
        for piece in pieces[1:]:
            ids += self._encode_inner(piece, request.tenant)
        return ids

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a raw prompt, with the special tokens the tokenizer puts around one. An empty one is the BOS token."""
        if isinstance(prompt, str):
            ids = self._encoded(prompt, add_special_tokens=True)
        else:
            ids = list(prompt)
            for id in ids:
                if not 0 <= id < self._vocab_size:
                    raise InvalidRequest(
                        f"token id {id} is not in the model's vocabulary of {self._vocab_size}", param="prompt"
                    )
        if ids:
            return ids
        start = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self._tokenizer.eos_token_id
        if start is None:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return [start]

    def forget(self) -> None:
        """Drop the memory of encoded texts."""
        self._memo.cache_clear()

    # -- messages → text ---------------------------------------------------------------------------------------------

    def render(self, request: Request) -> tuple[str, str]:
        """The prompt as text, and the character that cuts control tokens in users' texts ("" where none is needed)."""
        texts: list[str] = []

        def note(text: str, own: bool) -> str:
            texts.append(text)
            return text

        messages, tools = self._write(request, note)
        cut = ""
        if any(self._control.search(text) for text in texts):
            used = set().union(*texts)
            cut = next(char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in used)
            messages, tools = self._write(request, lambda text, own: self._cut(text, cut, own))
        if tools and not self.native_tools:
            schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            _add_to_system(messages, _PREAMBLE.format(schemas=schemas))
        if tools:
            _add_sentence(messages, request.tool_choice, _chosen(request, tools))
        if not self._system_role:
            _fold_system(messages)
        last = messages[-1]
        going_on = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
        try:
            return self._apply(messages, tools if self.native_tools else [], going_on=going_on), cut
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error

    def _write(self, request: Request, defuse: Defuse) -> tuple[list[ChatMessage], list[dict[str, Any]]]:
        messages = _Writer(self.native_tools, defuse).messages(request.messages)
        return messages, [_schema(tool, defuse) for tool in request.tools]

    def _cut(self, text: str, cut: str, own: bool) -> str:
        """`text` with every control token in it cut behind its first character; `own`: the model may have written it."""
        return (self._special if own else self._control).sub(lambda found: found[0] + cut, text)

    def _apply(self, messages: list[ChatMessage], tools: list[dict[str, Any]], *, going_on: bool = False) -> str:
        source = self._tokenizer.get_chat_template(None, tools or None)
        options: dict[str, Any] = {}
        if formats := self._formats if source == self._source else _date_formats(source):
            # transformers lets no function in, so the template gets a macro over the dates its own formats ask for.
            source = "{% macro strftime_now(format) %}{{ anaphora_dates[format] }}{% endmacro +%}" + source
            today = self._today()
            options["anaphora_dates"] = {name: today.strftime(name) for name in formats}
        text = self._tokenizer.apply_chat_template(
            messages,
            chat_template=source,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
            **options,
        )
        assert isinstance(text, str)
        return text

    def _probe(self, messages: list[ChatMessage], tools: list[dict[str, Any]]) -> str:
        try:
            return self._apply(messages, tools)
        except (jinja2.TemplateError, ValueError, TypeError):
            return ""

    def _supports_system(self) -> bool:
        system: ChatMessage = {"role": "system", "content": "anaphora probe"}
        return "anaphora probe" in self._probe([system, {"role": "user", "content": "hi"}], [])

    def _supports_tools(self) -> bool:
        """Whether definitions, calls and results all come out of the template."""
        parameters = {"type": "object", "properties": {}}
        tool = _schema(Tool("anaphora_tool", "A probe.", parameters), lambda text, own: text)
        call = ToolUsePart("probe", "anaphora_call", '{"anaphora_argument": 1}')
        result = ToolResultPart("probe", (TextPart("anaphora_result"),))
        asked = Message("user", (TextPart("hi"),))
        conversation = (asked, Message("assistant", (call,)), Message("user", (result,)))
        writer = _Writer(True, lambda text, own: text)
        defined = self._probe(writer.messages((asked,)), [tool])
        used = self._probe(_Writer(True, writer.defuse).messages(conversation), [tool])
        return "anaphora_tool" in defined and all(
            word in used for word in ("anaphora_call", "anaphora_argument", "anaphora_result")
        )

    # -- text → ids --------------------------------------------------------------------------------------------------

    def _encode(self, text: str, tenant: str) -> list[int]:
        """As `tokenizer(text, add_special_tokens=False)`.

        Where added tokens are seams that nothing reaches across, what lies between them is encoded apart and remembered:
        turn after turn, only what is new is encoded. The memory is per tenant, or its speed would tell who wrote what.
        """
        if not self._seamless:
            return self._encoded(text)
        ids: list[int] = []
        at = 0
        for found in self._all_added.finditer(text):
            ids += self._between(text[at : found.start()], tenant)
            ids.append(self._ids[found[0]])
            at = found.end()
        ids += self._between(text[at:], tenant)
        return ids

    def _between(self, text: str, tenant: str) -> Sequence[int]:
        return self._encoded(text) if len(text) < _MIN_MEMO_CHARS else self._memo(text, tenant)

    def _packed(self, text: str, tenant: str) -> array[int]:
        return array("i", self._encoded(text))

    def _encode_inner(self, text: str, tenant: str) -> list[int]:
        """As `_encode`, of a text that goes on where another ended: without the space some tokenizers put in front."""
        if self._seamless:
            return self._encode(text, tenant)
        newline, ids = self._encoded("\n"), self._encoded("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._encoded(text)

    def _encoded(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text holds half a surrogate pair, which is no character") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids


class _Writer:
    """Anaphora's messages → a chat template's, with the client's tool call ids replaced by their place (`call00001`).

    The ids are nine alphanumeric characters because Mistral's templates insist on it.
    """

    def __init__(self, native_tools: bool, defuse: Defuse) -> None:
        self._native = native_tools
        self.defuse = defuse
        self._calls: dict[str, tuple[str, str]] = {}
        """Id given by the client → (id in the prompt, name of the tool)."""

    def messages(self, messages: Sequence[Message]) -> list[ChatMessage]:
        written: list[ChatMessage] = []
        for message in messages:
            if message.role == "assistant":
                written.append(self._assistant(message))
            else:
                written += self._other(message)
        return written

    def _text(self, parts: Sequence[object], own: bool = False) -> str:
        texts = []
        for part in parts:
            if isinstance(part, MediaPart):
                raise InvalidRequest(f"this model takes text only, not {part.kind} content", param="messages")
            if isinstance(part, TextPart):
                texts.append(part.text)
        # Joined before they are defused, or a control token could hide in the seam.
        return self.defuse("\n".join(texts), own)

    def _assistant(self, message: Message) -> ChatMessage:
        content = self._text(message.content, own=True)
        calls = [self._call(part) for part in message.content if isinstance(part, ToolUsePart)]
        if not calls:
            return {"role": "assistant", "content": content}
        if self._native:
            tool_calls = [{"type": "function", "id": id, "function": call} for id, call in calls]
            return {"role": "assistant", "content": content, "tool_calls": tool_calls}
        blocks = [f"{TOOL_CALL_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{TOOL_CALL_CLOSE}" for _, call in calls]
        return {"role": "assistant", "content": "\n".join([content, *blocks] if content else blocks)}

    def _call(self, part: ToolUsePart) -> tuple[str, dict[str, Any]]:
        name = self.defuse(part.name, True)
        id = f"call{len(self._calls) + 1:05d}"
        self._calls[part.id] = (id, name)
        try:
            arguments: object = json.loads(part.arguments) if part.arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = part.arguments
        return id, {"name": name, "arguments": _defused(arguments, lambda text: self.defuse(text, True))}

    def _other(self, message: Message) -> list[ChatMessage]:
        results = [self._result(part) for part in message.content if isinstance(part, ToolResultPart)]
        has_text = any(not isinstance(part, ToolResultPart | ThinkingPart) for part in message.content)
        text = self._text(message.content)
        if self._native or not results:
            return results + ([{"role": message.role, "content": text}] if has_text or not results else [])
        blocks = [f"<tool_response>\n{result['content']}\n</tool_response>" for result in results]
        return [{"role": message.role, "content": "\n".join([*blocks, text] if has_text else blocks)}]

    def _result(self, part: ToolResultPart) -> ChatMessage:
        if part.tool_use_id not in self._calls:
            raise InvalidRequest(
                f"a tool result answers {part.tool_use_id!r}, but no call before it has that id", param="messages"
            )
        id, name = self._calls[part.tool_use_id]
        content = self._text(part.content)
        return {
            "role": "tool",
            "tool_call_id": id,
            "name": name,
            "content": f"Error: {content}" if part.is_error else content,
        }


# -- pieces ------------------------------------------------------------------------------------------------------------


def _defused(value: object, defuse: Callable[[str], str]) -> Any:
    """`value` with `defuse` applied to every text in it, keys too."""
    if isinstance(value, str):
        return defuse(value)
    if isinstance(value, Mapping):
        return {defuse(str(key)): _defused(item, defuse) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defused(item, defuse) for item in value]
    return value


def _schema(tool: Tool, defuse: Defuse) -> dict[str, Any]:
    """The definition in the form templates are written for. Fields Anaphora does not know are left out: models do not
    know them either."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    defused: dict[str, Any] = _defused({"type": "function", "function": function}, lambda text: defuse(text, False))
    return defused


def _add_to_system(messages: list[ChatMessage], text: str) -> None:
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text})
    else:
        before = messages[0]["content"]
        messages[0]["content"] = f"{before}\n\n{text}" if before else text


def _chosen(request: Request, tools: list[dict[str, Any]]) -> str:
    """The name of the tool that must be called, as it stands in the prompt; "" where it is left to the model."""
    if request.tool_choice.mode != "tool":
        return ""
    for tool, schema in zip(request.tools, tools, strict=True):
        if tool.name == request.tool_choice.name:
            return str(schema["function"]["name"])
    raise InvalidRequest(f"tool_choice names {request.tool_choice.name!r}, which is not among the tools", param="tool_choice")


def _add_sentence(messages: list[ChatMessage], choice: ToolChoice, name: str) -> None:
    """Say what `tool_choice` asks for at the end of the last message, behind everything a cache may hold."""
    sentences = []
    if choice.mode in _CHOICE_SENTENCES:
        sentences.append(_CHOICE_SENTENCES[choice.mode].format(name=name))
    if not choice.parallel and choice.mode != "none":
        sentences.append(_ONE_CALL)
    last = messages[-1]
    if sentences and last["role"] != "assistant":
        last["content"] = "\n\n".join([last["content"], " ".join(sentences)] if last["content"] else [" ".join(sentences)])


def _fold_system(messages: list[ChatMessage]) -> None:
    """For templates without a system role (Gemma's): the system prompt begins the first user message."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return
    system = messages.pop(0)
    messages[0]["content"] = f"{system['content']}\n\n{messages[0]['content']}"


def _date_formats(source: str) -> frozenset[str]:
    """The formats a template asks `strftime_now` for; none where it computes one, and then it sees the real time."""
    formats = [found[1] or found[2] or "" for found in _STRFTIME.finditer(source)]
    return frozenset(formats) if source.count("strftime_now(") == len(formats) else frozenset()


def _any_of(words: Sequence[str] | Mapping[str, int]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True))) or "(?!)")


def _control_pattern(contents: Any) -> re.Pattern[str]:
    """Matches the first character of any control token in a text, overlapping ones too. White space is text to a template,
    and one character cannot be cut."""
    words = [word for word in contents if len(word) > 1 and not word.isspace()]
    return re.compile(f"(?={_any_of(words).pattern}).", re.DOTALL)


def _is_seamless(tokenizer: Tokenizer) -> bool:
    """Whether encoding what lies between two added tokens does not depend on where in the text it lies."""
    normalizer = json.loads(tokenizer.normalizer.__getstate__()) if tokenizer.normalizer is not None else None
    pre_tokenizer = json.loads(tokenizer.pre_tokenizer.__getstate__()) if tokenizer.pre_tokenizer is not None else None
    parts = _flat(pre_tokenizer, "pretokenizers")
    return (
        all(part["type"] in _SEAMLESS_NORMALIZERS for part in _flat(normalizer, "normalizers"))
        and all(part["type"] in _SEAMLESS_PRE_TOKENIZERS and not part.get("add_prefix_space") for part in parts)
        and bool(parts)
    )


def _flat(state: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    if state is None:
        return []
    return [leaf for part in state[parts] for leaf in _flat(part, parts)] if state["type"] == "Sequence" else [state]
