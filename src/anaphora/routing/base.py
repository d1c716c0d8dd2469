"""What is asked, who may answer it, and the contract every strategy keeps (`anaphora.testing.routing` checks it).

A strategy is told what happens and asked who is next; it reads no clock and no network. `Router` (in `router`) keeps the list
of replicas and the order of the verbs, so that a caller can do nothing twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec

from anaphora.types import LOCAL_TENANT, BlockHash, Tenant

RequestId: TypeAlias = Hashable
"""Whatever the caller tells its requests apart by."""


class Question(msgspec.Struct, frozen=True):
    """A request as a router sees it: what its prompt begins with, and how long prompt and answer are."""

    blocks: tuple[BlockHash, ...]
    """The prompt as a chain: each hash stands for everything up to the end of its block."""
    ends: tuple[int, ...]
    """For each block, how many tokens the prompt has up to its end. Blocks need not be of one size."""
    num_tokens: int
    """Of the whole prompt; what follows the last block cannot be shared."""
    output_tokens: int = 256
    """Expected of the answer."""
    session: str | None = None
    """Of one conversation, compared as a whole. Not needed: the chain says more."""
    tenant: Tenant = LOCAL_TENANT
    priority: int = 0
    """Higher ones go first, on replicas that obey priorities."""


def question(blocks: Sequence[BlockHash], block_size: int, num_tokens: int, output_tokens: int = 256) -> Question:
    """For blocks of one size."""
    ends = tuple(range(block_size, block_size * len(blocks) + 1, block_size))
    return Question(tuple(blocks), ends, num_tokens, output_tokens)


class Price(msgspec.Struct, frozen=True):
    """Money per token, in any one currency."""

    input: float = 0.0
    cached: float = 0.0
    output: float = 0.0


class Replica(msgspec.Struct, frozen=True):
    name: str
    pool: str = ""
    """Replicas of one pool are alike: the same model on the same hardware. What is learned of speeds is shared in it."""
    price: Price = Price()
    capacity_tokens: int | None = None
    """Of its prefix cache. None: not known."""
    healthy: bool = True
    draining: bool = False
    """It finishes what it has and gets nothing new."""
    obeys_priorities: bool = False
    started_s: float = 0.0
    """When it came up, on the caller's clock. A new value says that its cache is empty."""

    @property
    def open(self) -> bool:
        return self.healthy and not self.draining


class Choice(msgspec.Struct, frozen=True):
    replica: str
    expected_s: float | None = None
    """From now until the whole answer. None: the strategy does not estimate times."""
    cached_tokens: int = 0
    """Of the prompt, expected to be found in the replica's cache."""
    reasons: Mapping[str, float] = {}
    """What the choice consists of, by name; seconds where times are estimated."""
    scores: Mapping[str, float] = {}
    """Of every replica that was compared; the smallest one won."""


class Load(msgspec.Struct, frozen=True):
    """What a replica says of itself, everybody's requests together."""

    running: int
    waiting: int
    usage: float | None = None
    """Share of its KV memory that is in use, 0 to 1."""


class BlocksStored(msgspec.Struct, frozen=True):
    """These blocks are in the replica's cache now, each with its number of tokens. `medium`: "" for the fastest place."""

    blocks: tuple[BlockHash, ...]
    sizes: tuple[int, ...]
    medium: str = ""


class BlocksRemoved(msgspec.Struct, frozen=True):
    blocks: tuple[BlockHash, ...]
    medium: str = ""


class BlocksCleared(msgspec.Struct, frozen=True):
    """The replica's cache is empty."""


CacheEvent: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared


class Strategy(Protocol):
    """Each request is `began` once, and then `ended` or `failed` once; `first_token` may come in between."""

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        """Who of `replicas` answers; None where none of them is open. Changes nothing that a second `pick` would see."""
        ...

    def began(self, request: RequestId, question: Question, choice: Choice, now_s: float) -> None:
        """`question` was sent to the chosen replica."""
        ...

    def first_token(self, request: RequestId, now_s: float) -> None: ...

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        """Answered whole. `cached_tokens`: what the replica says it found of the prompt, if it says so."""
        ...

    def failed(self, request: RequestId, now_s: float, *, fault: bool = True) -> None:
        """No whole answer. `fault`: of the replica's; False where the client left."""
        ...

    def events(self, replica: str, events: Sequence[CacheEvent], now_s: float) -> None:
        """What the replica's cache reports of itself."""
        ...

    def load(self, replica: str, load: Load, now_s: float) -> None:
        """What the replica's metrics say."""
        ...

    def removed(self, replica: str) -> None:
        """It is gone: nothing learned of it is needed any more. What it was asked may still end."""
        ...
