"""How long a prompt is to the echo engine, block by block: an emulator's count, near a real tokenizer's but not the same.

A token is a run of up to 7 letters and digits, or of up to 3 other characters, with the white space before it. On English
prose that is within 2 % of SmolLM2's count, on source code some 15 % below it. With a model's own tokenizer the count is that
model's. A text is as long as its own tokens, a tool and a tool's call as their compact JSON, a picture, sound or file
`MEDIA_TOKENS` whatever its size. Nothing is added between blocks or at the end, so the parts of a prompt add up.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import msgspec

from anaphora.breakpoints import steps
from anaphora.errors import ConfigError
from anaphora.prompt import Block, Lengths, Prompt

TOKEN = re.compile(r"\s*+(?:\w{1,7}+|[^\w\s]{1,3}+)|\s++")
_ASCII_TOKEN = re.compile(TOKEN.pattern, re.ASCII)  # the same where there is nothing else, and faster
MEDIA_TOKENS = 1_600

_MEDIA = frozenset({"image", "audio", "file", "document"})

_LONG = 256
"""Characters; shorter texts are counted faster than found."""
_MAX_COUNTS = 65_536
_MAX_IDS = 2_000_000
"""Eight bytes each."""

Number = Callable[[str], Iterable[int]]
"""A text to numbers, one for each of its tokens."""


def tokens(text: str) -> list[str]:
    return (_ASCII_TOKEN if text.isascii() else TOKEN).findall(text)


def hashed(text: str) -> Iterable[int]:
    return map(zlib.crc32, map(str.encode, tokens(text)))


def of_model(file: str) -> Number:
    """As the tokenizer in `file`, a `tokenizer.json`, does it. ConfigError: there is none that can be read."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            f"engine.tokenizer needs a package that is not installed ({error}): pip install 'anaphora[local]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(Path(file).read_text("utf-8"))
    except Exception as error:  # the package raises nothing more special
        raise ConfigError(f"engine.tokenizer: {file} cannot be read: {error}") from error

    def number(text: str) -> Iterable[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return number


class Counter:
    """Prompts repeat themselves from turn to turn, so what was counted is remembered: by digest, never the text itself."""

    def __init__(self, number: Number | None = None) -> None:
        """None: by the rule above."""
        self._number = number or hashed
        self._counts: dict[bytes, int] = {}
        self._ids: dict[bytes, array[int]] = {}
        self._num_ids = 0
        self._hashes = number is None

    def num_tokens(self, text: str) -> int:
        if len(text) < _LONG:
            return self._count(text)
        name = _digest(text)
        count = self._counts.get(name)
        if count is None:
            if len(self._counts) >= _MAX_COUNTS:
                self._counts.clear()
            count = self._counts[name] = self._count(text)
        return count

    def lengths(self, prompt: Prompt) -> Lengths:
        """Of at least one token in all."""
        if prompt.dialect == "anthropic":  # has no use for steps
            ends = tuple(accumulate(map(self._num_tokens, prompt.blocks)))
            return Lengths(ends, max(1, ends[-1]) if ends else 1)
        numbers: array[int] = array("q")
        ends = tuple([self._append(numbers, block) for block in prompt.blocks])
        return Lengths(ends, max(1, len(numbers)), steps(numbers))

    def _count(self, text: str) -> int:
        return len(tokens(text)) if self._hashes else sum(1 for _ in self._number(text))

    def _num_tokens(self, block: Block) -> int:
        return sum(MEDIA_TOKENS if media else self.num_tokens(text) for text, media in _texts_of(block))

    def _append(self, numbers: array[int], block: Block) -> int:
        """Puts numbers that stand for the block's tokens behind `numbers`, and says how many those are then. The same texts in
        another role are other tokens."""
        start = len(numbers)
        for text, media in _texts_of(block):
            numbers.extend([zlib.crc32(text.encode())] * MEDIA_TOKENS if media else self._token_ids(text))
        if len(numbers) > start:
            role = f"{block.section} {block.role} {block.kind}".encode()
            numbers[start] = zlib.crc32(role, numbers[start])
        return len(numbers)

    def _token_ids(self, text: str) -> array[int]:
        if len(text) < _LONG:
            return array("q", self._number(text))
        name = _digest(text)
        found = self._ids.get(name)
        if found is None:
            found = array("q", self._number(text))
            self._num_ids += len(found)
            if self._num_ids > _MAX_IDS:
                self._ids.clear()
                self._num_ids = len(found)
            self._ids[name] = found
        return found


def _texts_of(block: Block) -> Iterator[tuple[str, bool]]:
    _, *parts = msgspec.json.decode(block.content)
    for part in parts:
        yield from _texts(part)


def _texts(part: object) -> Iterator[tuple[str, bool]]:
    """(text, False) for what is as long as its text; (text, True) for a picture, sound or file."""
    if isinstance(part, str):
        yield part, False
        return
    if isinstance(part, dict):
        if part.keys() == {"text", "type"} and isinstance(part["text"], str):
            yield part["text"], False
            return
        if part.get("type") in _MEDIA and not _is_text(part.get("source")):
            yield msgspec.json.encode(part).decode(), True
            return
        if part.get("type") == "tool_result" and isinstance(part.get("content"), list):
            for inner in part["content"]:
                yield from _texts(inner)
            return
    yield msgspec.json.encode(part).decode(), False


def _is_text(source: object) -> bool:
    return isinstance(source, dict) and source.get("type") in ("text", "content")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
