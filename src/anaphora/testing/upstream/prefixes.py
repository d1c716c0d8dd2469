"""A provider's memory for prompts, as far as it can be seen from outside: it holds so many tokens, and what was used longest
ago leaves first. No I/O."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from anaphora.prompt import Lengths, Prompt
from anaphora.types import Tenant


class Prefixes:
    """Prompts are kept block by block, and where their tokens are known, in steps of 128 tokens."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        self._pieces: OrderedDict[bytes, int] = OrderedDict()
        """Tokens of its own of every piece, the least recently used first. A piece's name covers all that is before it."""
        self._tokens = 0

    def use(self, tenant: Tenant, prompt: Prompt, lengths: Lengths) -> int:
        """How many of its leading tokens are here; from now on the whole prompt is, or as much of it as there is room for."""
        pieces = _pieces(tenant, prompt, lengths)
        found = 0
        for name, end, _ in pieces:
            if name not in self._pieces:
                break
            found = end
        for name, _, own in reversed(pieces):  # the beginning last: of a prompt its end leaves first
            self._tokens += own - self._pieces.pop(name, 0)
            self._pieces[name] = own
        while self._tokens > self._capacity:
            self._tokens -= self._pieces.popitem(last=False)[1]
        return found


def _pieces(tenant: Tenant, prompt: Prompt, lengths: Lengths) -> list[tuple[bytes, int, int]]:
    """(name, where it ends, tokens of its own), in order."""
    digest = hashlib.sha256(f"{tenant} {prompt.model} {prompt.cache_key or ''}".encode())
    root = digest.digest()
    ends: list[tuple[int, bytes]] = []
    for block, end in zip(prompt.blocks, lengths.ends, strict=True):
        digest.update(len(block.content).to_bytes(8, "big") + block.content)
        ends.append((end, digest.digest()))
    ends += [(128 * number, root + step) for number, step in enumerate(lengths.steps, 1)]
    ends.sort()
    starts = [0, *(end for end, _ in ends)]
    return [(name, end, end - start) for (end, name), start in zip(ends, starts, strict=False)]
