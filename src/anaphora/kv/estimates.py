"""Load a prefix, or compute it again? Running estimates of both, and the decision. Pure: times are handed in.

- Computing a token costs more the more tokens stand before it: seconds per token are a line over its position.
- Loading from a tier costs a latency and a bandwidth: seconds are a line over the bytes.

Both lines follow what was measured lately. Where nothing was measured yet, loading is tried: it usually pays, and only trying
tells. A tier that was found not to pay is tried again after a while: its load, or the engine's, may have changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

RETRY_S = 300.0


class Line:
    """y ≈ offset + slope · x by least squares, older points counting less. Neither part is ever negative."""

    def __init__(self, keep: float = 0.9) -> None:
        """`keep`: what is left of a point's weight when the next one comes."""
        self._keep = keep
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def known(self) -> bool:
        return self._n > 0

    def add(self, x: float, y: float) -> None:
        keep = self._keep
        self._n = keep * self._n + 1
        self._x = keep * self._x + x
        self._y = keep * self._y + y
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y

    def fit(self) -> tuple[float, float]:
        """(offset, slope); (0, 0) where nothing is known."""
        if not self.known:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-9 * max(1.0, self._xx * self._n):
            slope = (self._n * self._xy - self._x * self._y) / spread
            if abs(slope * self._x) < 1e-6 * abs(self._y):  # level, but for rounding, which may make it fall
                slope = 0.0
            offset = (self._y - slope * self._x) / self._n
            if slope >= 0 and offset >= 0:
                return offset, slope
        if self._x > 0:  # all points at one place, or a line that would give negative times: through the origin
            return 0.0, self._y / self._x
        return self._y / self._n, 0.0


class Estimates:
    """What computing and loading cost now, on this machine."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._per_token = Line(keep=0.95)
        self._loads: dict[str, Line] = {}
        self._declined_at_s: dict[str, float] = {}
        self.declined: Counter[str] = Counter()
        """Blocks that a tier had and that were computed all the same, by tier."""

    def computed(self, start: int, end: int, seconds: float) -> None:
        """A step took `seconds` for the tokens `start .. end - 1` of one prompt, and nothing else."""
        self._per_token.add((start + end) / 2, seconds / (end - start))

    def loaded(self, tier: str, num_bytes: int, seconds: float) -> None:
        self._loads.setdefault(tier, Line()).add(num_bytes, seconds)

    def compute_s(self, start: int, end: int) -> float | None:
        """Seconds for the tokens `start .. end - 1`; None: not known yet."""
        if not self._per_token.known:
            return None
        offset, slope = self._per_token.fit()
        return offset * (end - start) + slope * (end * end - start * start) / 2

    def block_s(self) -> float | None:
        """What losing a block costs, for the order in which blocks leave a tier; None: not known yet.

        It is the same for all blocks: one that stands further back takes longer to compute, but is of no use without those
        before it, and may not be worth more than they are. A power of two, so that processes that share a tier agree.
        """
        seconds = self.compute_s(0, self._block_size)
        return 2.0 ** round(math.log2(seconds)) if seconds else None

    def load_s(self, tier: str, num_bytes: int) -> float | None:
        line = self._loads.get(tier)
        if line is None:
            return None
        offset, slope = line.fit()
        return offset + slope * num_bytes

    def bandwidth(self, tier: str) -> float | None:
        """Bytes per second of a long load; None: not known yet."""
        line = self._loads.get(tier)
        slope = line.fit()[1] if line is not None else 0.0
        return 1 / slope if slope > 0 else None

    def pays(self, tier: str, block_bytes: int) -> bool | None:
        """Whether loading 1,024 tokens from `tier` beats computing them; None: not known yet."""
        load_s = self.load_s(tier, block_bytes * 1024 // self._block_size)
        compute_s = self.compute_s(0, 1024)
        return None if load_s is None or compute_s is None else load_s < compute_s

    def worth(self, start: int, blocks: Sequence[tuple[str, int]], now_s: float) -> int:
        """How many of `blocks`, which follow the token `start - 1` without a gap, to load: as (tier, bytes) each.

        The number that saves the most time. `now_s` is any clock that does not go back.
        """
        for tier, at_s in list(self._declined_at_s.items()):
            if now_s - at_s >= RETRY_S:
                self._loads.pop(tier, None)
                del self._declined_at_s[tier]
        if not self._per_token.known:
            return len(blocks)
        best, best_saved = 0, 0.0
        spent: dict[str, float] = {}
        num_bytes: Counter[str] = Counter()
        for number, (tier, size) in enumerate(blocks, 1):
            num_bytes[tier] += size
            spent[tier] = self.load_s(tier, num_bytes[tier]) or 0.0
            saved = (self.compute_s(start, start + number * self._block_size) or 0.0) - sum(spent.values())
            if saved > best_saved:
                best, best_saved = number, saved
        for tier, _ in blocks[best:]:
            self.declined[tier] += 1
            self._declined_at_s.setdefault(tier, now_s)
        return best
