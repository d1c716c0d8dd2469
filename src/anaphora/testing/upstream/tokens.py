"""`/tokenize`, as vLLM has it beside the provider's API: which tokens a prompt has there. Pure.

The tokens are no model's. Prompts that begin alike have tokens that begin alike, which is what matters.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import msgspec

TOKENIZE = "/tokenize"
CHARS_PER_TOKEN = 5
VOCABULARY = 50_000
CONTEXT = 1 << 20


class _Body(msgspec.Struct, frozen=True):
    prompt: str = ""
    messages: list[dict[str, Any]] = []
    tools: Any = None


def tokens(prompt: str) -> list[int]:
    """Of a text."""
    starts = range(0, len(prompt), CHARS_PER_TOKEN)
    return [crc32(prompt[start : start + CHARS_PER_TOKEN].encode()) % VOCABULARY for start in starts]


def prompt_of(body: bytes) -> str:
    """The one text that a body of `/tokenize`, or of a question, is to a model. Raises MsgspecError."""
    found = msgspec.json.decode(body, type=_Body)
    if not found.messages:
        return found.prompt
    tools = "" if not found.tools else f"<tools>{msgspec.json.encode(found.tools).decode()}"
    said = [f"<{message.get('role')}>{_text(message.get('content'))}" for message in found.messages]
    return tools + "".join(said) + "<assistant>"


def _text(content: Any) -> str:
    return content if isinstance(content, str) else msgspec.json.encode(content).decode()


def tokenized(body: bytes) -> bytes:
    """The answer. Raises MsgspecError."""
    found = tokens(prompt_of(body))
    return msgspec.json.encode({"count": len(found), "max_model_len": CONTEXT, "tokens": found})
