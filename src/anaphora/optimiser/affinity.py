"""Fields and headers that send what belongs together to one place, for every provider that has one. Data and a pure rule.

A provider with many machines finds a prefix only where it was computed. What it routes by is given here for each of them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from anaphora.keys import digest
from anaphora.prompt import Lengths, Prompt


class Affinity(msgspec.Struct, frozen=True):
    by: Literal["prefix", "conversation", "tenant"]
    """What belongs together: prompts that begin alike, those of one conversation, all of a tenant."""
    field: str = ""
    """Of the body,"""
    header: str = ""
    """or of the request."""
    length: int = 32
    """Characters of the value."""


AFFINITIES: dict[str, Affinity] = {
    "openai": Affinity("prefix", field="prompt_cache_key"),
    "azure": Affinity("prefix", field="prompt_cache_key"),
    "mistral": Affinity("prefix", field="prompt_cache_key"),
    "xai": Affinity("conversation", header="x-grok-conv-id"),
    "openrouter": Affinity("conversation", field="session_id"),
    "deepseek": Affinity("tenant", field="user_id"),
}
"""By provider (docs/prompt-caching.md). Whoever is not here takes nothing, or refuses fields that it does not know."""


def beginning(prompt: Prompt, lengths: Lengths, minimum: int) -> bytes:
    """Digest of the part that prompts must share before a provider reads anything. Equal for any two that may share a read."""
    parts: list[bytes] = []
    start = 0
    for block, end in zip(prompt.blocks, lengths.ends, strict=True):
        if start >= minimum:
            break
        # No token is shorter than a byte, so texts that share so many tokens share at least so many bytes.
        parts.append(block.content[: minimum - start] if block.kind == "text" and end > minimum else block.content)
        start = end
    return digest((b"prompt-beginning", prompt.model.encode(), b"".join(parts)))


def value(affinity: Affinity, owner: str, what: bytes, partition: int = 0) -> str:
    """A name for what belongs together that says nothing about it, in ASCII. No two owners get one value, so that none can tell
    by how fast an answer comes what another has asked (S5)."""
    return digest((b"affinity", affinity.by.encode(), owner.encode(), what, partition.to_bytes(4, "big"))).hex()[
        : affinity.length
    ]
