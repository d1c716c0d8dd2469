"""From token ids to an answer's parts, a token at a time: detokenising, stop strings, tool calls.

Each class is the state of one sequence. What it returns is final: nothing is ever taken back. (The other direction, from a
request to token ids, is `engine_template`.)
"""

from __future__ import annotations

import codecs
import json
import re
import uuid
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from anaphora.backends.engine_messages import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from anaphora.types import TextDelta, Tool, ToolUseDelta

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class FastTokenizer(Protocol):
    """The part of a transformers tokenizer that detokenising needs."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...
    def __hash__(self) -> int: ...


# -- ids → text --------------------------------------------------------------------------------------------------------

_MAX_HELD = 16
"""Tokens that a decoder which keeps rewriting its text may hold back; never met, but it bounds the window."""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
_FALLBACK_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Vocabulary:
    """What all sequences of one tokenizer share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        decoder = tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
        self.byte_level = state["type"] == "ByteLevel"
        self._byte_fallback = '"ByteFallback"' in json.dumps(state)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, id: int) -> bytes:
        """A byte-level token's bytes; none for special tokens and ids outside the vocabulary, which decoding leaves out."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._read(id)
        return found

    def _read(self, id: int) -> bytes:
        token = None if id in self.special else self.tokenizer.id_to_token(id)
        if token is None:
            return b""
        # As the ByteLevel decoder does: an added token with a character outside the alphabet is plain text as a whole.
        if any(char not in _BYTE_OF for char in token):
            return token.encode()
        return bytes(_BYTE_OF[char] for char in token)

    def skipped(self, id: int) -> bool:
        return id in self.special or self.tokenizer.id_to_token(id) is None

    def is_byte(self, id: int) -> bool:
        """A byte-fallback token: what it decodes to depends on the whole run of such tokens around it."""
        return self._byte_fallback and _FALLBACK_BYTE.fullmatch(self.tokenizer.id_to_token(id) or "") is not None

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: FastTokenizer) -> _Vocabulary:
    return _Vocabulary(tokenizer.backend_tokenizer)


class Detokenizer:
    """Incremental decoding: everything it returns, joined, is `tokenizer.decode(all ids, skip_special_tokens=True)`.

    Byte-level tokenizers (GPT-2's kind: Llama 3, Qwen, SmolLM) go through their bytes. Others are decoded over a window: the
    tokens that were given out last, for the sake of the spaces at the seam, and those since. Either way the time is linear.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._vocabulary = _vocabulary(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        self._num_given = 0
        """How many tokens at the window's start have been given out."""

    def push(self, id: int) -> str:
        """The text that became final with this token; "" while a character is incomplete."""
        if self._vocabulary.byte_level:
            return self._utf8.decode(self._vocabulary.bytes_of(id))
        if self._vocabulary.skipped(id):
            return ""
        self._window.append(id)
        if self._vocabulary.is_byte(id):
            return ""
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD. The detokenizer is spent."""
        if self._vocabulary.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        given = self._vocabulary.decode(self._window[: self._num_given])
        text = self._vocabulary.decode(self._window)
        unsettled = not text.startswith(given) or text.endswith("�")
        if unsettled and not final and len(self._window) - self._num_given < _MAX_HELD:
            return ""
        if len(text) > len(given):  # else the seam still needs what lies before it
            self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        return text[len(given) :]


# -- stop strings ------------------------------------------------------------------------------------------------------


class StopStrings:
    """Cuts a stream of text before the first stop string. Holds back only what may still become one.

    The first is the one that is complete first; of several complete at the same character, the longest. So the result does
    not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(sorted(filter(None, stops), key=len, reverse=True))
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is final, the stop string that was met or None). After a match everything is swallowed."""
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        text = self._held + text
        ends = [(at + len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, self._matched = min(ends, key=lambda found: found[0])  # the longest comes first among equals
            self._held = ""
            return text[: end - len(self._matched)], self._matched
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


# -- tool calls --------------------------------------------------------------------------------------------------------

_CALL_KEYS = ("name", "arguments", "parameters", "type", "function")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```)?", re.DOTALL)


class _Unfinished(Exception):
    """The JSON text ends within a string: there may be more of it."""


class _NoCall(Exception):
    """The text is no call of an offered tool."""


class ToolCallParser:
    """Finds tool calls in generated text; everything else passes through as text, live, and nothing is lost.

    A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere (the closing tag may be missing at the end
    of the answer), or an answer that is nothing but such an object, or a list of them, bare or in a ```json fence, with
    `arguments` or `parameters`. `{"type": "function", "function": {...}}` around it is taken off. White space around calls is
    dropped. What is malformed or names no offered tool is given back as the text it was. Arguments come out as compact
    JSON, in the order the model wrote them, in one delta with the call's id and name.

    An answer that begins like a bare call is held back until it stops looking like one or ends.
    """

    def __init__(
        self,
        tools: Iterable[Tool],
        new_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}",
        choice: int = 0,
    ) -> None:
        self._offered = frozenset(tool.name for tool in tools)
        self._new_id = new_id
        self._choice = choice
        self._held = ""
        self._state: Callable[[list[TextDelta | ToolUseDelta]], bool] = self._begin if self._offered else self._pass
        self._block = 0
        """While in a block: where its opening tag lies in `_held`; white space before it."""
        self._searched = 0
        """While in a block: up to where `_held` has no closing tag that could end it."""
        self._after_call = False
        self.num_calls = 0

    def push(self, text: str) -> list[TextDelta | ToolUseDelta]:
        self._held += text
        deltas: list[TextDelta | ToolUseDelta] = []
        while self._state(deltas):
            pass
        return deltas

    def flush(self) -> list[TextDelta | ToolUseDelta]:
        """What was held back, at the end of the answer: a call if it is one, else text."""
        deltas: list[TextDelta | ToolUseDelta] = []
        if self._state == self._bare and not self._call(_unfenced(self._held), deltas, bare=True):
            self._state = self._text
        elif self._state == self._bare:
            self._held = ""
        while self._state(deltas) or self._close(deltas):
            pass
        if self._held.strip() or not self.num_calls:
            self._emit(len(self._held), deltas)
        return deltas

    # Each state looks at `_held`, and says whether there is more to do before the next text.

    def _pass(self, deltas: list[TextDelta | ToolUseDelta]) -> bool:
        self._emit(len(self._held), deltas)
        return False

    def _begin(self, deltas: list[TextDelta | ToolUseDelta]) -> bool:
        looks = _looks_like_bare_call(self._held)
        if looks is not None:
            self._state = self._bare if looks else self._text
        return looks is False

    def _bare(self, deltas: list[TextDelta | ToolUseDelta]) -> bool:
        return False

    def _text(self, deltas: list[TextDelta | ToolUseDelta]) -> bool:
        if self._after_call:
            self._held = self._held.lstrip()
            self._after_call = not self._held
        start = self._held.find(TOOL_CALL_OPEN)
        end = start if start >= 0 else len(self._held) - _overlap(self._held, TOOL_CALL_OPEN)
        settled = len(self._held[:end].rstrip())
        self._emit(settled, deltas)
        if start < 0:
            return False
        self._state, self._block = self._call_block, start - settled
        self._searched = self._block + len(TOOL_CALL_OPEN)
        return True

    def _call_block(self, deltas: list[TextDelta | ToolUseDelta]) -> bool:
        while (end := self._held.find(TOOL_CALL_CLOSE, self._searched)) >= 0:
            after = end + len(TOOL_CALL_CLOSE)
            try:
                done = self._call(self._held[self._block + len(TOOL_CALL_OPEN) : end], deltas)
            except _Unfinished:  # this closing tag lies within an argument
                self._searched = after
                continue
            self._leave_block(after if done else 0, deltas)
            return True
        # The tag may come in pieces.
        self._searched = max(self._searched, len(self._held) - len(TOOL_CALL_CLOSE) + 1)
        return False

    def _close(self, deltas: list[TextDelta | ToolUseDelta]) -> bool:
        """At the end: a block without a closing tag, or one whose JSON never became complete."""
        if self._state != self._call_block:
            return False
        try:
            done = self._call(self._held[self._block + len(TOOL_CALL_OPEN) :], deltas)
        except _Unfinished:
            done = False
        self._leave_block(len(self._held) if done else 0, deltas)
        return True

    def _leave_block(self, done: int, deltas: list[TextDelta | ToolUseDelta]) -> None:
        """Drop `done` characters that became a call; if none did, the opening tag was text, and what follows is read again."""
        if done:
            self._held = self._held[done:]
            self._after_call = True
        else:
            self._emit(self._block + len(TOOL_CALL_OPEN), deltas)
        self._state = self._text

    def _emit(self, length: int, deltas: list[TextDelta | ToolUseDelta]) -> None:
        if length:
            deltas.append(TextDelta(self._choice, self._held[:length]))
            self._held = self._held[length:]

    def _call(self, text: str, deltas: list[TextDelta | ToolUseDelta], *, bare: bool = False) -> bool:
        """Add the calls `text` consists of; False where it is none. Raises _Unfinished unless `bare`."""
        try:
            calls = [_read_call(value, self._offered, bare=bare) for value in _read_json(text)]
        except _NoCall:
            return False
        except _Unfinished:
            if bare:
                return False
            raise
        for name, arguments in calls:
            deltas.append(ToolUseDelta(self._choice, self.num_calls, arguments, self._new_id(), name))
            self.num_calls += 1
        return bool(calls)


def _unfenced(text: str) -> str:
    fenced = _FENCE.fullmatch(text.strip())
    return fenced[1] if fenced else text


def _looks_like_bare_call(text: str) -> bool | None:
    """Whether an answer that begins with `text` may consist of bare calls; None: too early to say."""
    text = text.lstrip()
    if text.startswith("```"):
        language = re.match(r"[a-z]*", text[3:])
        assert language is not None
        if not "json".startswith(language[0]):
            return False
        text = text[3 + len(language[0]) :].lstrip()
    elif "```".startswith(text):
        return None
    for opening in ("[", "{", '"'):
        if not text:
            return None
        if text[0] != opening:
            if opening == "[":
                continue
            return False
        text = text[1:].lstrip() if opening != '"' else text[1:]
    key, quote, _ = text.partition('"')
    if quote:
        return key in _CALL_KEYS
    return None if any(known.startswith(key) for known in _CALL_KEYS) else False


def _refuse_constant(name: str) -> object:
    raise _NoCall(name)


def _read_json(text: str) -> list[object]:
    """One JSON value, or the items of a list. Raw newlines within strings are let pass: models write them."""
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            raise _Unfinished from error
        raise _NoCall from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise _NoCall from error
    return value if isinstance(value, list) else [value]


def _read_call(value: object, offered: frozenset[str], *, bare: bool) -> tuple[str, str]:
    """(name, arguments as compact JSON). Raises _NoCall."""
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in offered:
        raise _NoCall
    if bare and not ("arguments" in value or "parameters" in value):
        raise _NoCall
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # OpenAI's own form: JSON text within JSON
        try:
            (arguments,) = _read_json(arguments)
        except (_Unfinished, ValueError) as error:
            raise _NoCall from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _NoCall
    try:
        compact = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        compact.encode()
    except (ValueError, RecursionError) as error:  # 1e999, or half a surrogate pair: no text that JSON could carry on
        raise _NoCall from error
    return value["name"], compact
