"""How long a prompt is to the embedded engine, block by block, in tokens of the prompt it really computes.

A block ends at a seam of the rendered text (`engine_template.Seam`): there, and nowhere else, tokens do not depend on what
follows, so two prompts that begin with the same blocks have the same tokens up to the same end, and a promise that was made
for one is backed by KV in the other. Where a block ends between two seams its end is moved

- forward, if only the template's own words lie between (the end of a turn, say);
- else back, to the last seam that nothing of a later block is in front of: the prefix is cut, and less is promised.

What an assistant said is moved back only: the words behind it depend on whether it goes on, by a tool call for example.
Tools that a template renders behind the system prompt have no length of their own, because in the order of prompt caching
they come first; they count together with the system prompt. Where a template moves them about as the conversation goes on
nothing can be promised at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from anaphora.backends.engine_template import Place, Seam, Template, Tokenised
from anaphora.breakpoints import steps
from anaphora.prompt import Block, BlockKind, Lengths, Prompt
from anaphora.types import MediaPart, Request, TextPart, ThinkingPart, ToolResultPart, ToolUsePart

_PARTS: dict[BlockKind, type] = {"thinking": ThinkingPart, "tool_use": ToolUsePart, "tool_result": ToolResultPart}


def lengths(template: Template, request: Request, prompt: Prompt, tokenised: Tokenised) -> Lengths | None:
    """`tokenised` is `request`, and `prompt` is it as prompt caching sees it; its blocks' contents are not looked at.

    None: it cannot be told where the blocks end. Raises the InvalidRequests of `Template.encode_chat`.
    """
    numbers = [0] * len(prompt.blocks) if request.prompts else _numbers(request, prompt)
    if numbers is None:
        return None
    if request.prompts:
        ends: tuple[int, ...] = (len(tokenised.ids),) * len(numbers)
    else:
        places = None if request.tools and template.tools_place == "anywhere" else template.places(request, tokenised)
        if places is None:
            return None
        tools_first = template.tools_place == "first"
        found = [
            None if number is None or (block.section == "tools" and not tools_first) else places.get(number)
            for number, block in zip(numbers, prompt.blocks, strict=True)
        ]
        ends = _ends(prompt.blocks, found, tokenised.seams)
    total = len(tokenised.ids)
    return Lengths(ends, total, steps(tokenised.ids) if prompt.dialect == "openai" else ())


def _ends(blocks: Sequence[Block], places: Sequence[Place | None], seams: Sequence[Seam]) -> tuple[int, ...]:
    chars = [seam.char for seam in seams]
    # From which character on something of a later block is there.
    last = max(chars, default=0)
    starts = [last + 1 if place is None else place.start for place in places]
    limits = [*accumulate(reversed(starts), min, initial=last + 1)][::-1][1:]
    ends: list[int] = []
    reach = end = 0
    for block, place, limit in zip(blocks, places, limits, strict=True):
        if place is not None:
            reach = max(reach, place.end)
            end = max(end, _seam(chars, seams, reach, limit, said=block.role == "assistant" and block.kind == "text"))
        ends.append(end)
    return tuple(ends)


def _seam(chars: Sequence[int], seams: Sequence[Seam], reach: int, limit: int, *, said: bool) -> int:
    """Tokens up to the seam for a block that ends at `reach`, where the next begins at `limit`. `said` by an assistant."""
    at = bisect_left(chars, reach)
    if at < len(chars) and chars[at] <= limit and (chars[at] == reach or not said):
        return seams[at].num_tokens
    before = bisect_right(chars, min(reach, limit)) - 1
    return seams[before].num_tokens if before >= 0 else 0


def _numbers(request: Request, prompt: Prompt) -> list[int | None] | None:
    """For every block the number of the part that it ends (`engine_messages`); None for a block that ends none.

    Of the parts of what one tool answered in OpenAI's dialect only the last one ends it. None for all: the two do not match.
    """
    parts = [part for message in request.messages for part in message.content]
    numbers: list[int | None] = []
    number = 0
    before: Block | None = None
    for block in prompt.blocks:
        if block.kind == "empty":
            numbers.append(None)
            continue
        goes_on = (
            prompt.dialect == "openai"
            and before is not None
            and before.kind == block.kind == "tool_result"
            and before.message == block.message
        )
        if goes_on:
            numbers[-1] = None
        else:
            if number >= len(request.tools) + len(parts) or not _fits(block, request, parts, number):
                return None
            number += 1
        numbers.append(number - 1)
        before = block
    return numbers if number == len(request.tools) + len(parts) else None


def _fits(block: Block, request: Request, parts: Sequence[object], number: int) -> bool:
    if number < len(request.tools):
        return block.section == "tools"
    part = parts[number - len(request.tools)]
    if block.section == "tools":
        return False
    return isinstance(part, _PARTS.get(block.kind, TextPart | MediaPart))


__all__ = ["lengths"]
