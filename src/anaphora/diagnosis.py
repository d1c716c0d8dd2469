"""What differs between two prompts, in the words of the dialect's own diagnostics and in ours. Pure.

A `Sketch` is what is kept of a prompt to compare later ones with: digests, lengths and parameters, never its content.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from anaphora.prompt import AnthropicReason, Diagnosis, Lengths, OpenAIReason, Prompt

Reason = Literal[
    "unmarked",  # no breakpoint: nothing asked for caching
    "too_short",  # every boundary is below the model's minimum
    "first",  # no earlier prompt of this tenant to read from
    "changed",  # the prompt parts from the nearest earlier one at `path`
    "model",  # the same prompt was seen, with another model
    "cache_key",  # the same prompt was seen, under another `prompt_cache_key`
    "parameters",  # the same prompt was seen, with other values of `names`
    "no_boundary",  # the same blocks were seen, but no entry was left behind any of them
    "out_of_window",  # an entry lives behind `path`, where this request does not look: too far back, or no boundary of its own
    "not_yet_visible",  # the request that writes it has not begun to answer
    "expired",  # it was there, and its lifetime has passed
    "recomputed",  # it was promised, but the engine had lost it
]


class Miss(msgspec.Struct, frozen=True):
    """Why nothing, or less than possible, was read."""

    reason: Reason
    lost_tokens: int = 0
    """Tokens that would have been read otherwise, as far as that is known."""
    path: str = ""
    """The first block that differs from the nearest earlier prompt, or behind which the entry lies."""
    names: tuple[str, ...] = ()
    """Of the parameters that differ."""
    common_tokens: int = 0
    """Length of the prefix that the nearest earlier prompt shares."""
    earlier_id: str = ""
    """The answer to that prompt."""
    earlier_s: float | None = None
    """When that prompt arrived."""


State = Literal["absent", "expired", "pending", "readable"]
"""What the books know of a boundary."""


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
    chain, chain_2 = one.chain, other.chain
    num = min(len(chain), len(chain_2))
    if not num or chain[0] != chain_2[0]:
        return 0
    if chain[num - 1] == chain_2[num - 1]:
        return num
    # Once two chains part they never meet again, so the place can be halved in on.
    return bisect_left(range(num), True, 1, key=lambda i: chain[i] != chain_2[i])


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


# -- in our own words --------------------------------------------------------------------------------------------------


def why(
    prompt: Prompt,
    now: Sketch,
    read: int,
    recent: Iterable[Sketch],
    boundaries: Iterable[tuple[int, State, str]],
    *,
    minimum: int,
    cause: Reason | None = None,
) -> Miss | None:
    """Why no more than `read` tokens were read; None if there was no more to read.

    `recent` are earlier prompts of the same tenant. `boundaries` are the lengths, states and paths of this prompt's own ones,
    longest first. `cause`: a reason that is known already.
    """
    if cause is not None:
        return Miss(reason=cause)
    if read and read == now.kept:
        return None
    nearest = max(recent, key=lambda s: (common_blocks(s, now), s.model == now.model, s.started_s), default=None)
    if nearest is None:
        return Miss(reason="first")
    same = common_blocks(nearest, now)
    common = now.ends[same - 1] if same else 0

    def because(reason: Reason, lost: int, path: str = "", names: tuple[str, ...] = ()) -> Miss:
        return Miss(reason, max(0, lost), path, names, common, nearest.response_id, nearest.started_s)

    for tokens, state, path in boundaries:
        if tokens <= read:
            break
        if state != "absent":
            return because(_LOST[state], tokens - read, path)
    lost = nearest.kept - read
    if read and (lost <= 0 or nearest.model != now.model):
        return None
    path = prompt.blocks[same].path if same < len(prompt.blocks) else ""
    if common <= read or common < minimum:
        return because("changed", lost, path)
    if nearest.model != now.model:
        return because("model", min(lost, common))
    if nearest.cache_key != now.cache_key:
        return because("cache_key", min(lost, common))
    names = changed_salts(nearest, now)
    if names:
        return because("parameters", min(lost, common), names=names)
    return because("changed", lost, path) if nearest.kept > common else because("no_boundary", common - read)


_LOST: dict[State, Reason] = {"expired": "expired", "pending": "not_yet_visible", "readable": "out_of_window"}
