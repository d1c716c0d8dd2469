"""From a request to token ids: the model's chat template, tools, and the safety of what users write.

**Tools.** Where the model's template renders tool definitions, calls and results, they go through it. Where it does not, a
preamble in the form that Hermes and Qwen models were trained on is put in front of the system prompt: JSON schemas in
`<tools></tools>`; calls are `<tool_call>` blocks, results `<tool_response>` blocks in a user turn.

**A stable prefix.** The prompt of turn k, with the answer's ids, is a prefix of the prompt of turn k + 1 where the template
allows it, so that its KV is found again. Therefore `tool_choice` never takes definitions away but adds a sentence to the
last message; the ids that clients give to tool calls are replaced by their place in the conversation; dates are those of the
day, without the time. The prefix breaks where an answer was not made of the tokens that its text encodes to (sampled
tokens need not be the tokenizer's own), where a pre-tokenizer joins the first characters of an answer to the
template's last (both newlines, say), and where a template trims an answer or drops its thinking from the history; from there on
the prompt is computed anew, and nothing is ever wrong.

**Seams.** What a user or the system says in several parts is encoded part by part: a part's tokens do not depend on what
follows. So a cache mark behind a part means the same tokens in every prompt that begins with the same parts. An assistant's
turn has no such joints, because the model wrote it in one go. `places` tells where in the rendered text each part lies.

**Control tokens.** A user who writes `<|im_end|>` must not end his turn. Control tokens in text that did not come from the
template are cut in two by a character that occurs nowhere else; after rendering the prompt is split there and the pieces are
encoded apart, so the text is read as text. In an assistant's turns only the tokenizer's special tokens are cut: others
(`<think>`) it may have generated itself. Prompts of `/v1/completions` are raw: control tokens in them are meant.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jinja2
import msgspec

from anaphora.backends.engine_messages import ChatMessage, Defuse, Mark, Written, no_mark
from anaphora.errors import InvalidRequest
from anaphora.types import Message, Request, TextPart, Tool, ToolResultPart, ToolUsePart

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_STRFTIME = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
_SEAMLESS_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
_SEAMLESS_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
_MIN_MEMO_CHARS = 256
_MEMO_ENTRIES = 128
_PRIVATE = re.compile("[\U000f0000-\U000ffffd]")
_HI = Message("user", (TextPart("hi"),))
_TOOL = Tool("anaphora_tool", "A probe.", {"type": "object", "properties": {}})


class Seam(msgspec.Struct, frozen=True, array_like=True):
    """A place in the rendered text that no token reaches across: the tokens before it do not depend on what is behind it."""

    char: int
    num_tokens: int
    """Before it."""


class Tokenised(msgspec.Struct, frozen=True):
    """One prompt as the model reads it."""

    ids: list[int]
    seams: list[Seam] = []
    """In order. None: it is a raw prompt."""
    signs: _Signs | None = None
    text: str = ""
    """As it was rendered, signs and all."""


class Place(msgspec.Struct, frozen=True):
    """Where a part lies in the rendered text without its signs. Of tools and calls only one place inside may be known."""

    start: int
    end: int


class _Signs(msgspec.Struct, frozen=True):
    """Characters that stand for something in a rendered prompt, and occur in no text of its own."""

    cut: str
    """Inside a control token that is text. "" where there are none."""
    joint: str
    """Behind a part that is encoded by itself."""
    taken: frozenset[str]
    """Those that do occur."""

    def marks(self) -> Iterator[str]:
        """All others."""
        return (char for char in _private() if char not in self.taken and char not in (self.cut, self.joint))

    def without(self, text: str) -> str:
        return text.replace(self.joint, "").replace(self.cut, "") if self.cut else text.replace(self.joint, "")


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
        apart = {
            token.content: id
            for id, token in added.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        self._apart = _any_of(apart)
        """Tokens that are the same wherever they stand."""
        self._apart_ids = frozenset(apart.values())
        self._seamless = len(apart) == len(added) and _is_seamless(self._backend)
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
        self.tools_place = self._tools_place() if self.native_tools else "first"
        """Where tools are rendered: ahead of everything, behind the system prompt, or at a place that moves as the conversation
        goes on (Mistral's: with the last user message)."""

    # -- the two questions -------------------------------------------------------------------------------------------

    def encode_chat(self, request: Request) -> list[int]:
        """Token ids of `request.messages`, ready for the model to answer (or to go on, where the last message is its own).

        Raises InvalidRequest where the messages cannot be rendered; `param` names the field.
        """
        return self.tokenise(request).ids

    def tokenise(self, request: Request) -> Tokenised:
        """The same with its seams. Raises as `encode_chat` does."""
        if self._source is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        if not request.messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        signs = self._signs(request)
        text = self._rendered(request, signs)
        ids: list[int] = []
        seams: list[Seam] = []
        char = 0
        for piece in re.split(f"([{signs.cut}{signs.joint}])", text):
            if piece == signs.joint:
                seams.append(Seam(char, len(ids)))
            elif piece != signs.cut:
                ids += self._encode_piece(piece, request.tenant, seams, char, len(ids))
                char += len(piece)
        return Tokenised(ids, seams, signs, text)

    def places(self, request: Request, tokenised: Tokenised) -> dict[int, Place] | None:
        """Where the parts of `request` lie, by their number in `engine_messages`; parts that are not rendered have no place.

        None: the template does not say, because it renders other words where a part is marked.
        """
        assert tokenised.signs is not None
        marks = _Marks(tokenised.signs)
        text = self._rendered(request, tokenised.signs, marks)
        if marks.removed(text) != tokenised.text:
            return None
        return marks.places(text, tokenised.signs)

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

    def render(self, request: Request) -> str:
        """The prompt as text, and nothing else in it."""
        signs = self._signs(request)
        return signs.without(self._rendered(request, signs))

    def _signs(self, request: Request) -> _Signs:
        texts: list[str] = []

        def note(text: str, own: bool) -> str:
            texts.append(text)
            return text

        Written(request, note, native=self.native_tools)
        taken = frozenset(char for text in texts for char in _PRIVATE.findall(text))
        free = (char for char in _private() if char not in taken)
        cut = next(free) if any(self._control.search(text) for text in texts) else ""
        return _Signs(cut, next(free), taken)

    def _rendered(self, request: Request, signs: _Signs, mark: Mark = no_mark) -> str:
        defuse: Defuse = lambda text, own: self._cut(text, signs.cut, own) if signs.cut else text  # noqa: E731
        written = Written(request, defuse, native=self.native_tools, joint=signs.joint, mark=mark)
        if not self._system_role:
            written.fold_system()
        last = written.messages[-1]
        going_on = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
        try:
            return self._apply(written.messages, written.tools, going_on=going_on)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error

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
        call = ToolUsePart("probe", "anaphora_call", '{"anaphora_argument": 1}')
        result = ToolResultPart("probe", (TextPart("anaphora_result"),))
        conversation = (_HI, Message("assistant", (call,)), Message("user", (result,)))
        defined = Written(Request("", messages=(_HI,), tools=(_TOOL,)), _as_it_is, native=True)
        used = Written(Request("", messages=conversation), _as_it_is, native=True)
        answered = self._probe(used.messages, [])
        return "anaphora_tool" in self._probe(defined.messages, defined.tools) and all(
            word in answered for word in ("anaphora_call", "anaphora_argument", "anaphora_result")
        )

    def _tools_place(self) -> Literal["first", "behind the system prompt", "anywhere"]:
        said = [("system", "anaphora_system")] if self._system_role else []
        said += [("user", "anaphora_first"), ("assistant", "an answer"), ("user", "anaphora_last")]
        messages: list[ChatMessage] = [{"role": role, "content": text} for role, text in said]
        tools = Written(Request("", messages=(_HI,), tools=(_TOOL,)), _as_it_is, native=True).tools
        text = self._probe(messages, tools)
        tool, system, first = (text.find(word) for word in ("anaphora_tool", "anaphora_system", "anaphora_first"))
        if tool < 0 or tool > first:
            return "anywhere"
        return "behind the system prompt" if 0 <= system < tool else "first"

    # -- text → ids --------------------------------------------------------------------------------------------------

    def _encode_piece(self, text: str, tenant: str, seams: list[Seam], char: int, num_tokens: int) -> list[int]:
        """The ids of a piece that begins at character `char` with `num_tokens` tokens before it; its seams are added."""
        if self._seamless:
            return self._encode(text, tenant, seams, char, num_tokens)
        ids = self._encode_inner(text) if char else self._encoded(text)
        numbers = [number for number, id in enumerate(ids) if id in self._apart_ids]
        places = list(self._apart.finditer(text))
        if len(numbers) == len(places):
            for number, place in zip(numbers, places, strict=True):
                seams.append(Seam(char + place.start(), num_tokens + number))
                seams.append(Seam(char + place.end(), num_tokens + number + 1))
        return ids

    def _encode(self, text: str, tenant: str, seams: list[Seam], char: int, num_tokens: int) -> list[int]:
        """As `tokenizer(text, add_special_tokens=False)`.

        Where added tokens are seams that nothing reaches across, what lies between them is encoded apart and remembered:
        turn after turn, only what is new is encoded. The memory is per tenant, or its speed would tell who wrote what.
        """
        ids: list[int] = []
        at = 0
        for found in self._all_added.finditer(text):
            ids += self._between(text[at : found.start()], tenant)
            seams.append(Seam(char + found.start(), num_tokens + len(ids)))
            ids.append(self._ids[found[0]])
            at = found.end()
            seams.append(Seam(char + at, num_tokens + len(ids)))
        ids += self._between(text[at:], tenant)
        return ids

    def _between(self, text: str, tenant: str) -> Sequence[int]:
        return self._encoded(text) if len(text) < _MIN_MEMO_CHARS else self._memo(text, tenant)

    def _packed(self, text: str, tenant: str) -> array[int]:
        return array("i", self._encoded(text))

    def _encode_inner(self, text: str) -> list[int]:
        """Of a text that goes on where another ended: without the space some tokenizers put in front."""
        newline, ids = self._encoded("\n"), self._encoded("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._encoded(text)

    def _encoded(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text holds half a surrogate pair, which is no character") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids


class _Marks:
    """Puts a character of its own at the end of each part, and finds it again."""

    def __init__(self, signs: _Signs) -> None:
        self._free = signs.marks()
        self._parts: dict[str, tuple[int, str]] = {}

    def __call__(self, number: int, text: str) -> str:
        """Ahead of white space at the end, which templates may strip."""
        head = text.rstrip()
        if not head:
            return text
        mark = next(self._free)
        self._parts[mark] = (number, text)
        return head + mark + text[len(head) :]

    def removed(self, text: str) -> str:
        return _PRIVATE.sub(lambda found: "" if found[0] in self._parts else found[0], text)

    def places(self, text: str, signs: _Signs) -> dict[int, Place]:
        bare = signs.without(self.removed(text))
        places: dict[int, Place] = {}
        num_signs = 0
        for found in _PRIVATE.finditer(text):
            char = found[0]
            if char in self._parts:
                number, part = self._parts[char]
                places.setdefault(number, _place(bare, found.start() - num_signs, part))
            num_signs += char in self._parts or char in (signs.cut, signs.joint)
        return places


def _place(bare: str, end: int, part: str) -> Place:
    """Of `part` that ends at `end` of the text, where it stands there as it is, perhaps stripped."""
    head = part.rstrip()
    space = part[len(head) :]
    for beginning in (head, head.lstrip()):
        if bare.endswith(beginning, 0, end):
            start = end - len(beginning)
            return Place(start, end + len(space) if bare.startswith(space, end) else end)
    return Place(end, end)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _as_it_is(text: str, own: bool) -> str:
    return text


def _private() -> Iterator[str]:
    return map(chr, range(0xF0000, 0xFFFFE))


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
