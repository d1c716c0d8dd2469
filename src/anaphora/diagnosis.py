"""What differs between two prompts, in the words of the dialect's own diagnostics and in ours. Pure.

A `Sketch` is what is kept of a prompt to compare later ones with: digests, lengths and parameters, never its content.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

import msgspec

from anaphora.prompt import AnthropicReason, Diagnosis, Lengths, OpenAIReason, Prompt


class Sketch(msgspec.Struct):
    """A prompt that was charged. Only `response_id` is filled in later."""

    dialect: Literal["anthropic", "openai"]
    model: str
    cache_key: str | None
    salts: Mapping[str, str]
    chain: tuple[bytes, ...]
    """`breakpoints.chain`: equal up to a block exactly if everything up to it is equal."""
    tools: int
    """So many leading blocks are tools,"""
    head: int
    """and so many are tools or system."""
    ends: tuple[int, ...]
    total: int
    kept: int
    """Tokens up to its last boundary: what a request that goes on from it can read."""
    started_s: float
    response_id: str = ""


def sketch(prompt: Prompt, chain: tuple[bytes, ...], lengths: Lengths, *, kept: int, started_s: float) -> Sketch:
    sections = [block.section for block in prompt.blocks]
    tools = sections.count("tools")
    return Sketch(
        dialect=prompt.dialect,
        model=prompt.model,
        cache_key=prompt.cache_key,
        salts=prompt.salts,
        chain=chain,
        tools=tools,
        head=tools + sections.count("system"),
        ends=lengths.ends,
        total=lengths.total,
        kept=kept,
        started_s=started_s,
    )


def common_blocks(one: Sketch, other: Sketch) -> int:
    """How many leading blocks are the same."""
    # Once two chains part they never meet again, so the place can be halved in on.
    shorter = range(min(len(one.chain), len(other.chain)))
    return bisect_left(shorter, True, key=lambda i: one.chain[i] != other.chain[i])


def common_tokens(before: Sketch, now: Sketch) -> int:
    same = common_blocks(before, now)
    return min(before.ends[same - 1], now.ends[same - 1]) if same else 0


def changed_salts(before: Sketch, now: Sketch) -> tuple[str, ...]:
    """Names of the parameters that differ, sorted."""
    names = before.salts.keys() | now.salts.keys()
    return tuple(sorted(name for name in names if before.salts.get(name) != now.salts.get(name)))


def diagnose(before: Sketch | None, now: Sketch, *, read: int) -> Diagnosis | None:
    """Why `now` could not go on from `before`, in its dialect's words; None if it could. `before` is None if not known."""
    if now.dialect == "anthropic":
        if before is None:
            return Diagnosis(reason="previous_message_not_found")
        anthropic = _anthropic_reason(before, now)
        if anthropic in (None, "unavailable"):
            return None if anthropic is None else Diagnosis(reason=anthropic)
        return Diagnosis(reason=anthropic, missed_tokens=_missed(before, now, whole=anthropic == "model_changed"))
    if before is None:
        return Diagnosis(reason="comparison_response_not_found")
    openai = _openai_reason(before, now)
    if openai is None:
        # Nothing differs. If nothing was read either, the entry is gone or never was: the API has no word for that.
        return None if read or not before.kept else Diagnosis(reason="unavailable")
    if openai == "unavailable":
        return Diagnosis(reason=openai)
    whole = openai not in ("tools_changed", "input_changed")
    return Diagnosis(reason=openai, missed_tokens=_missed(before, now, whole=whole), reusable_tokens=before.kept)


def _missed(before: Sketch, now: Sketch, *, whole: bool) -> int:
    return before.total if whole else before.total - common_tokens(before, now)


def _anthropic_reason(before: Sketch, now: Sketch) -> AnthropicReason | None:
    """In the order model, tools, system, parameters, messages."""
    salts = changed_salts(before, now)
    if before.model != now.model or "speed" in salts:
        return "model_changed"
    if not _same_up_to(before, now, before.tools, now.tools):
        return "tools_changed"
    if not _same_up_to(before, now, before.head, now.head):
        return "system_changed"
    if salts:
        return "unavailable"
    return None if common_blocks(before, now) == len(before.chain) else "messages_changed"


_OPENAI_SALTS: tuple[tuple[str, OpenAIReason], ...] = (
    ("format", "text_format_changed"),
    ("effort", "reasoning_effort_changed"),
    ("verbosity", "verbosity_changed"),
    ("context_management", "context_compacted"),
    ("service_tier", "service_tier_changed"),
)


def _openai_reason(before: Sketch, now: Sketch) -> OpenAIReason | None:
    salts = changed_salts(before, now)
    if before.model != now.model:
        return "model_changed"
    if before.cache_key != now.cache_key:
        return "prompt_cache_key_changed"
    if not _same_up_to(before, now, before.tools, now.tools):
        return "tools_changed"
    for name, reason in _OPENAI_SALTS:
        if name in salts:
            return reason
    if salts:
        return "unavailable"
    return None if common_blocks(before, now) == len(before.chain) else "input_changed"


def _same_up_to(before: Sketch, now: Sketch, end: int, now_end: int) -> bool:
    return end == now_end and before.chain[:end][-1:] == now.chain[:end][-1:]
