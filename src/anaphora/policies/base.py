"""The contract every eviction policy keeps (`anaphora.testing.policies` checks it)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Policy(Protocol[K]):
    """An order of leaving over the keys it was told of.

    `remove` is the only way out, whether the caller evicts (room is needed), expires or forgets. The caller decides which
    victim really goes: it walks `victims()` and skips what is leased or pinned.
    """

    def insert(self, key: K, size: int, cost: float) -> None:
        """Take `key` in. `size` in bytes, `cost` in seconds it took to compute. A known key is replaced."""
        ...

    def touch(self, key: K) -> None:
        """`key` was used. Unknown keys are a KeyError."""
        ...

    def remove(self, key: K) -> None:
        """`key` is gone. Unknown keys are a KeyError."""
        ...

    def victims(self) -> Iterator[K]:
        """All keys, first to leave first. Lazy; must not be continued after the policy was changed."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...
