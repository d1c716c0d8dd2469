"""What the readers of prompts share: the canonical bytes of a block (S2).

A block's own fields are an envelope that providers read by name: their order says nothing, and absent, null and empty are
one. What lies inside a field (schemas, tool input) is text to the model and keeps the order it came in. Marks are taken out
where a mark may stand and nowhere else: a tool's input may have a `cache_control` of its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator

from anaphora.wire.base import encode, tool_extra
from anaphora.wire.fields import Json

MARKS = frozenset({"cache_control", "prompt_cache_breakpoint"})


def objects(value: object) -> Iterator[tuple[int, Json]]:
    """The objects of an array with their places; nothing if it is none. Whoever wants complaints parses the body."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield index, item


def envelope(block: Json, silent: frozenset[str] = MARKS) -> Json:
    """The fields of `block` that say something, by name."""
    return {key: block[key] for key in sorted(block) if key not in silent and block[key] is not None and block[key] != []}


def text_envelope(text: object) -> Json:
    return {"text": text, "type": "text"}


def block_content(role: str, body: object, *more: object) -> bytes:
    """Canonical bytes of one block. `more`: what of its message belongs to it, such as a name."""
    return encode([role, body, *more])


def tool_content(function: Json, schema: str) -> bytes:
    """A function, whichever dialect defines it; `schema` names the field with its parameters."""
    known = frozenset({"type", "name", "description", schema}) | MARKS
    extra = envelope(tool_extra(function, known))
    return encode(
        [
            "tool",
            function.get("name"),
            function.get("description") or "",
            function.get(schema) or {},
            *([extra] if extra else []),
        ]
    )


def media_digest(data: object) -> str:
    """Digest of the bytes that base64 text stands for; of the text itself where it is no base64."""
    text = data if isinstance(data, str) else ""
    try:
        return hashlib.sha256(base64.b64decode(text)).hexdigest()
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        return hashlib.sha256(text.encode()).hexdigest()


def json_text(value: object) -> str:
    """Compact JSON, keys as they came: readable, and the same only for the same value."""
    return encode(value).decode()
