"""Where a prompt may be cached, and what a read of so many tokens means for its usage: the providers' rules, purely.

Nothing here remembers anything: a `Plan` says which boundaries a request would write and which it looks up, in what order;
`promises` knows which of them were written before. Rule numbers are those of docs/prompt-caching.md.

Boundaries are named by keys. `chain` covers the contents of all blocks up to each boundary; `Keys` puts in front of it
whose prompt it is, the model, and what else must be the same. Two prompts share a boundary exactly if their keys are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from anaphora.keys import block_hashes, digest
from anaphora.profiles import Profile
from anaphora.prompt import TTL, TTL_S, Block, CacheUsage, Lengths, Prompt

STEP = 128
"""Tokens per digest in `Lengths.steps`."""


class Breakpoint(msgspec.Struct, frozen=True):
    """A boundary that is written: behind block `block`, for the lifetime `ttl`."""

    block: int
    ttl: TTL


class Plan(msgspec.Struct, frozen=True):
    """What a request writes and looks up. All boundaries are at least the profile's minimum long."""

    writes: tuple[Breakpoint, ...] = ()
    """In prompt order, at most one for each block."""
    lookups: tuple[int, ...] = ()
    """Blocks behind which an entry may be read, longest prefix first."""
    marked: bool = False
    """There was a breakpoint at all, long enough or not."""


def steps(tokens: Sequence[int]) -> tuple[bytes, ...]:
    """`Lengths.steps` of a rendered prompt."""
    return tuple(block_hashes(b"prompt-steps", tokens, STEP))


# -- keys --------------------------------------------------------------------------------------------------------------


def chain(prompt: Prompt, profile: Profile) -> tuple[bytes, ...]:
    """One digest for every block: of its content and of everything before it in the prompt, its sections included (R1, R2).

    Marks, models, tenants and salts are not in it. OpenAI's messages are told apart even where their contents would run
    together, because their boundaries are rendered (the parts of an assistant's turn are not: Responses has them as items of
    their own, Chat in one message). Anthropic joins neighbours of one role.
    """
    digests: list[bytes] = []
    parent, stripped = b"prompt-blocks", _stripped(prompt, profile)
    joining = ("assistant",) if prompt.dialect == "openai" else ("assistant", "user")
    before: Block | None = None
    for index, block in enumerate(prompt.blocks):
        if index not in stripped:
            joined = before is not None and (block.message == before.message or block.role == before.role in joining)
            parent = digest((parent, block.section.encode(), b"+" if joined else b"|", block.content))
            before = block
        digests.append(parent)
    return tuple(digests)


def _stripped(prompt: Prompt, profile: Profile) -> frozenset[int]:
    """Thinking that a model drops from the prompt once the user has spoken again (R21)."""
    if profile.keeps_thinking:
        return frozenset()
    spoken = [b.message for b in prompt.blocks if b.section == "messages" and b.role == "user" and b.kind != "tool_result"]
    last = max(spoken, default=-1)
    return frozenset(i for i, b in enumerate(prompt.blocks) if b.kind == "thinking" and b.message < last)


class Keys:
    """Names of one prompt's boundaries, for one tenant, workspace and model (S2).

    What invalidates from a section on is in front of the boundaries of that section and of all later ones, so a change of
    `speed` leaves the tools readable, and a change of `tool_choice` the tools and the system prompt. OpenAI's parameters
    stand before everything (P10).
    """

    def __init__(self, prompt: Prompt, profile: Profile, chain: Sequence[bytes], owner: Iterable[str]) -> None:
        seed = digest((b"prompt-cache", *(part.encode() for part in owner), prompt.model.encode()))
        if prompt.dialect == "openai":
            key = b"" if prompt.cache_key is None else b"=" + prompt.cache_key.encode()
            seed = digest((seed, key, prompt.system_salt, prompt.message_salt))
            self._seeds = {"tools": seed, "system": seed, "messages": seed}
        else:
            if profile.thinking_ahead:
                seed = digest((seed, *(prompt.salts.get(name, "").encode() for name in ("thinking", "effort"))))
            system = digest((seed, b"system", prompt.system_salt))
            self._seeds = {"tools": seed, "system": system, "messages": digest((system, b"messages", prompt.message_salt))}
        self._sections = tuple(block.section for block in prompt.blocks)
        self._chain = chain

    def of_block(self, index: int) -> bytes:
        return self._seeds[self._sections[index]] + self._chain[index]

    def of_step(self, step: bytes) -> bytes:
        """`step` is one of `Lengths.steps`. Tokens do not tell sections, so everything must be the same."""
        return self._seeds["messages"] + step


# -- plans -------------------------------------------------------------------------------------------------------------


def plan(prompt: Prompt, lengths: Lengths, profile: Profile) -> Plan:
    """Which boundaries this request writes and looks up. Empty for the classic profile, which has none."""
    if profile.accounting == "openai-classic":
        return Plan()
    find = _anthropic if profile.accounting == "anthropic" else _openai
    writes, lookups = find(prompt, profile)
    long_enough = {i for i, end in enumerate(lengths.ends) if end >= profile.minimum}
    return Plan(
        writes=tuple(point for point in writes if point.block in long_enough),
        lookups=tuple(sorted(long_enough.intersection(lookups), reverse=True)),
        marked=bool(writes),
    )


def _anthropic(prompt: Prompt, profile: Profile) -> tuple[list[Breakpoint], set[int]]:
    """R3 to R7, R16 to R19."""
    points = {i: block.mark for i, block in enumerate(prompt.blocks) if block.mark is not None}
    automatic = _last_markable(prompt) if prompt.automatic is not None else None
    if automatic is not None and prompt.automatic is not None:
        points.setdefault(automatic, prompt.automatic)
    points = dict(sorted(points.items())[-profile.max_marks :])
    if points:
        for i, block in enumerate(prompt.blocks):
            if block.kind == "server_tool_result":
                points.setdefault(i, "5m")
    place = positions(prompt, profile)
    lookups: set[int] = set()
    for point in points:
        first = place[point] - profile.lookback + 1
        i = point
        while i >= 0 and place[i] >= first:
            lookups.add(i)
            i -= 1
    return [Breakpoint(i, ttl) for i, ttl in sorted(points.items())], lookups


def _last_markable(prompt: Prompt) -> int | None:
    """Where an automatic breakpoint goes (R17, R19)."""
    markable = (i for i in range(len(prompt.blocks) - 1, -1, -1) if prompt.blocks[i].kind not in ("thinking", "empty"))
    return next(markable, None)


def positions(prompt: Prompt, profile: Profile) -> tuple[int, ...]:
    """The position of every block, counted from 0. A run of tool calls, or of tool results, is one (R6)."""
    place, places = -1, []
    before = None
    for block in prompt.blocks:
        run = profile.collapse_tool_runs and block.kind in ("tool_use", "tool_result") and block.kind == before
        place += not run
        places.append(place)
        before = block.kind
    return tuple(places)


def _openai(prompt: Prompt, profile: Profile) -> tuple[list[Breakpoint], set[int]]:
    """P2, P3, P6, P8."""
    ttl = prompt.ttl or profile.ttls[0]
    explicit = [Breakpoint(i, block.mark) for i, block in enumerate(prompt.blocks) if block.mark is not None]
    lookups = {point.block for point in explicit[: profile.explicit_first] + explicit[-profile.explicit_latest :]}
    if prompt.mode == "explicit":
        return explicit[-profile.max_marks :], lookups
    ends, developer = message_ends(prompt)
    writes = dict.fromkeys(ends[-1:], ttl)
    if profile.writes_dev_end and developer is not None:
        writes[developer] = ttl
    writes |= {point.block: point.ttl for point in explicit[-(profile.max_marks - 1) :]}
    lookups.update(ends[-1 - profile.lookback :])
    if developer is not None:
        lookups.add(developer)
    return [Breakpoint(i, life) for i, life in sorted(writes.items())], lookups


def message_ends(prompt: Prompt) -> tuple[list[int], int | None]:
    """Last blocks of the eligible messages in order, and the one that ends the initial developer messages (P2).

    Eligible are user messages, the last tool answer of a group, and the last of the initial developer messages.
    """
    blocks = prompt.blocks
    ends: list[int] = []
    developer: int | None = None
    beginning = True
    for i, block in enumerate(blocks):
        if block.section == "tools":
            continue
        after = blocks[i + 1] if i + 1 < len(blocks) else None
        instructs = block.section == "system" or block.role in ("system", "developer")
        if instructs and beginning:
            developer = i
            continue
        beginning = False
        if after is not None and after.message == block.message:
            continue
        answers = block.kind == "tool_result"
        group_goes_on = answers and after is not None and after.kind == "tool_result"
        if (answers or block.role == "user") and not group_goes_on:
            ends.append(i)
    if developer is not None:
        ends.insert(0, developer)
    return ends, developer


# -- usage -------------------------------------------------------------------------------------------------------------


def usage(plan: Plan, lengths: Lengths, read: int) -> CacheUsage:
    """What is billed when `read` tokens come from the cache (R14, P5): up to the last boundary of the longest lifetime at its
    price, the rest up to the last boundary of the next one at that price, and what is behind all boundaries as plain input."""
    billed, written = read, dict[TTL, int]()
    for ttl in sorted({point.ttl for point in plan.writes}, key=TTL_S.__getitem__, reverse=True):
        top = max(lengths.ends[point.block] for point in plan.writes if point.ttl == ttl)
        if top > billed:
            written[ttl] = top - billed
            billed = top
    return CacheUsage(plain=lengths.total - billed, read=read, written=written)


def classic_read(common: int, profile: Profile) -> int:
    """Tokens a classic profile reports as read when `common` leading tokens were seen before."""
    whole = common // profile.step * profile.step
    return whole if whole >= profile.minimum else 0
