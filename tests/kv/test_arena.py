import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from anaphora.kv.arena import Arena

CAPACITY = 40


class ArenaMachine(RuleBasedStateMachine):
    """Against a plain list of owners, one per position."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(CAPACITY)
        self.taken = [False] * CAPACITY

    @rule(target=extents, length=st.integers(1, CAPACITY))
    def allocate(self, length: int):  # type: ignore[no-untyped-def]  # Hypothesis' `multiple` has no public type
        start = self.arena.allocate(length)
        fits = [i for i in range(CAPACITY - length + 1) if not any(self.taken[i : i + length])]
        assert start == (fits[0] if fits else None)
        if start is None:
            return multiple()
        self.taken[start : start + length] = [True] * length
        return (start, length)

    @rule(target=extents, start=st.integers(0, CAPACITY - 1), length=st.integers(1, CAPACITY))
    def allocate_at(self, start: int, length: int):  # type: ignore[no-untyped-def]  # as above
        possible = start + length <= CAPACITY and not any(self.taken[start : start + length])
        assert self.arena.allocate_at(start, length) == possible
        if not possible:
            return multiple()
        self.taken[start : start + length] = [True] * length
        return (start, length)

    @rule(target=extents, extent=consumes(extents), more=st.integers(1, 10))
    def extend(self, extent: tuple[int, int], more: int) -> tuple[int, int]:
        start, length = extent
        end = start + length
        possible = end + more <= CAPACITY and not any(self.taken[end : end + more])
        assert self.arena.extend(end, more) == possible
        if possible:
            self.taken[end : end + more] = [True] * more
            return (start, length + more)
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: tuple[int, int]) -> None:
        start, length = extent
        self.arena.free(start, length)
        self.taken[start : start + length] = [False] * length
        with pytest.raises(ValueError, match="free already"):
            self.arena.free(start, length)

    @invariant()
    def free_positions_add_up(self) -> None:
        assert self.arena.num_free == self.taken.count(False)


TestArenaMachine = ArenaMachine.TestCase


def test_an_extent_outside_the_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie"):
        Arena(8).free(6, 4)
