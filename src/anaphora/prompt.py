"""A request as a provider's prompt caching sees it: blocks in render order, marks on some of them, and what else decides
whether a prefix is the same. Words only; the rules are in `breakpoints`, the provider's numbers in `profiles/`.

`wire` reads a `Prompt` off a body beside the `Request`. The `Request` never holds marks: moving one is asking the same
question. Rule numbers (R1, P2, S2, ...) are those of docs/prompt-caching.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Section = Literal["tools", "system", "messages"]
BlockKind = Literal[
    "tool", "text", "empty", "thinking", "image", "audio", "document", "tool_use", "tool_result", "server_tool_result"
]
TTL = Literal["5m", "1h", "30m", "12h"]

TTL_S: dict[TTL, float] = {"5m": 300.0, "1h": 3600.0, "30m": 1800.0, "12h": 43200.0}


class Block(msgspec.Struct, frozen=True, omit_defaults=True):
    """One position of the prefix. Blocks come in render order: tools, system, messages (R1)."""

    section: Section
    kind: BlockKind
    content: bytes
    """What makes two blocks the same: role and body as canonical bytes, keys in the order they came (S2), marks taken out."""
    path: str
    """Where it stands in the body, in the dialect's own style: `messages.0.content.4`, `messages[0].content[4]`."""
    role: str = ""
    """As in the body, but OpenAI's `developer` is `system`, and what a tool answered there is of role `tool`."""
    message: int = -1
    """Index of its message; -1 for tools and for a system field."""
    mark: TTL | None = None
    """The client's explicit breakpoint after this block."""


class Prompt(msgspec.Struct, frozen=True, omit_defaults=True):
    dialect: Literal["anthropic", "openai"]
    model: str
    blocks: tuple[Block, ...]
    automatic: TTL | None = None
    """Anthropic: top-level `cache_control` (R17)."""
    system_salt: bytes = b""
    """Canonical bytes of what invalidates from the system section on: speed, web search, citations (S2)."""
    message_salt: bytes = b""
    """Canonical bytes of what invalidates the messages: tool_choice, parallel calls, images present, thinking, effort (S2).
    For OpenAI what must be identical beside the blocks: response format, effort, verbosity, parallel calls (P10)."""
    salts: dict[str, str] = {}
    """The same, by name and in readable form, for rules, diagnostics and explanations; a default that is spelled out reads like
    one that is not. Anthropic: speed, web_search, web_fetch, citations, format (system); tool_choice, parallel_tool_use,
    images, thinking, effort (messages). OpenAI: parallel_tool_use, format, effort, verbosity, context_management,
    service_tier."""
    mode: Literal["implicit", "explicit"] | None = None
    """OpenAI `prompt_cache_options.mode`; None: not given."""
    ttl: TTL | None = None
    """OpenAI `prompt_cache_options.ttl`. Marks without a TTL of their own have it already."""
    retention: Literal["in_memory", "24h"] | None = None
    """OpenAI `prompt_cache_retention`, of models without `ttl`: how long an entry may be kept at most."""
    cache_key: str | None = None
    """OpenAI `prompt_cache_key`: requests with different keys share nothing (S5)."""
    options_given: tuple[str, ...] = ()
    """Which caching fields the body really had: profiles without them answer 400."""
    diagnose: bool = False
    """The body asked for diagnostics (Anthropic `diagnostics`, OpenAI `comparison_response_id`)."""
    previous_id: str | None = None
    """The earlier answer to compare with, where one was named."""


AnthropicReason = Literal[
    "model_changed", "tools_changed", "system_changed", "messages_changed", "previous_message_not_found", "unavailable"
]
OpenAIReason = Literal[
    "model_changed",
    "prompt_cache_key_changed",
    "tools_changed",
    "text_format_changed",
    "reasoning_effort_changed",
    "verbosity_changed",
    "context_compacted",
    "input_changed",
    "service_tier_changed",
    "comparison_response_not_found",
    "unavailable",
]


class Diagnosis(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why less was read than could have been, in the dialect's own words (§1.11, §2.5)."""

    reason: AnthropicReason | OpenAIReason
    missed_tokens: int = 0
    """Prompt tokens that would have been read had the prefix not changed."""
    reusable_tokens: int | None = None
    """OpenAI: tokens of the reusable prefix of the answer that was compared with."""


class Lengths(msgspec.Struct, frozen=True):
    """Tokens of a rendered prompt. `ends[i]` is the number of tokens up to and including block i, so it never falls."""

    ends: tuple[int, ...]
    total: int
    """All prompt tokens, with what the template puts behind the last block."""
    steps: tuple[bytes, ...] = ()
    """One digest for every full 128 tokens of the rendered prompt, each covering all tokens before it: what the classic
    profiles compare (`breakpoints.steps` makes them). Empty: not known, whole blocks are compared instead."""


class CacheUsage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the dialect's rules say was read and written. plain + read + all writes = the whole prompt, always."""

    plain: int
    read: int = 0
    written: dict[TTL, int] = {}
