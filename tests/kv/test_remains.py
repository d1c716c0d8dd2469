"""What lies in the arena where sequences have ended."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from anaphora.kv.arena import Arena
from anaphora.kv.remains import Place, Remains
from anaphora.types import BlockHash, Scope, Tenant

SIZE = 2
CAPACITY = 24
A, B = Tenant("a"), Tenant("b")


def chain(*names: int) -> list[BlockHash]:
    """As real ones, each name stands for those before it too."""
    return [BlockHash(bytes(names[: end + 1])) for end in range(len(names))]


def test_the_longest_common_beginning_is_found() -> None:
    remains = Remains(SIZE)
    remains.left(0, chain(1, 2, 3), A)
    remains.left(10, chain(1, 2, 4, 5), A)
    assert remains.find(chain(1, 2, 4, 6)) == Place(10, 3)
    assert remains.find(chain(1, 2, 3, 4)) == Place(0, 3)
    assert remains.find(chain(2)) is None
    assert remains.find([]) is None


def test_what_is_taken_is_gone_from_there_on() -> None:
    remains = Remains(SIZE)
    remains.left(4, chain(1, 2, 3), A)
    remains.taken(0, 4)
    remains.taken(10, 20)
    assert remains.find(chain(1, 2, 3)) == Place(4, 3)
    remains.taken(7, 8)
    assert remains.find(chain(1, 2, 3)) == Place(4, 1)
    remains.taken(3, 5)
    assert remains.find(chain(1, 2, 3)) is None
    assert len(remains) == 0


def test_nothing_of_a_forgotten_tenant_is_found() -> None:
    remains = Remains(SIZE)
    remains.left(0, chain(1), A)
    remains.left(4, chain(2), B)
    remains.forget(Scope(tenant=A, tag="some"))
    assert remains.find(chain(1)) is not None
    remains.forget(Scope(tenant=A))
    assert remains.find(chain(1)) is None
    assert remains.find(chain(2)) == Place(4, 1)
    remains.forget(Scope())
    assert len(remains) == 0


class RemainsMachine(RuleBasedStateMachine):
    """Against an arena whose positions remember which block was written there last."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(CAPACITY)
        self.remains = Remains(SIZE)
        self.written: list[tuple[BlockHash, int] | None] = [None] * CAPACITY

    @rule(target=running, names=st.lists(st.integers(0, 2), min_size=1, max_size=6), more=st.integers(0, 3))
    def enter(self, names: list[int], more: int):  # type: ignore[no-untyped-def]  # Hypothesis' `multiple` has no public type
        hashes = chain(*names)
        length = len(hashes) * SIZE + more
        place = self.remains.find(hashes)
        there = 0
        if place is not None:
            self.holds(place.start, hashes[: place.num_blocks])
        if place is not None and self.arena.allocate_at(place.start, length):
            start, there = place.start, place.num_blocks
        else:
            found = self.arena.allocate(length)
            if found is None:
                return multiple()
            start = found
        self.remains.taken(start, start + length)
        self.holds(start, hashes[:there])
        for number in range(there, len(hashes)):
            for offset in range(SIZE):
                self.written[start + number * SIZE + offset] = hashes[number], offset
        for position in range(start + len(hashes) * SIZE, start + length):
            self.written[position] = None
        return start, length, hashes

    @rule(one=consumes(running), tenant=st.sampled_from([A, B]))
    def leave(self, one: tuple[int, int, list[BlockHash]], tenant: Tenant) -> None:
        start, length, hashes = one
        self.arena.free(start, length)
        self.remains.left(start, hashes, tenant)

    @rule(tenant=st.sampled_from([A, B]))
    def forget(self, tenant: Tenant) -> None:
        self.remains.forget(Scope(tenant=tenant))

    def holds(self, start: int, hashes: list[BlockHash]) -> None:
        found = self.written[start : start + len(hashes) * SIZE]
        assert found == [(block, offset) for block in hashes for offset in range(SIZE)]

    @invariant()
    def what_is_said_to_lie_somewhere_lies_there(self) -> None:
        for one in self.remains._left:
            self.holds(one.start, list(one.hashes))


TestRemainsMachine = RemainsMachine.TestCase
