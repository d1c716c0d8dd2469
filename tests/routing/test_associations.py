"""What a replica says of blocks of tokens holds for the pieces of text that they stand for, in whatever order it is said."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.routing.associations import Associations
from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, Question, question
from anaphora.routing.expected import Expected
from anaphora.routing.router import Route, Router
from anaphora.testing.routing import fleet
from anaphora.types import BlockHash

PIECE = 256
BLOCK = 16
BLOCKS_IN_PIECE = 3
"""A piece of so many estimated tokens has really fewer."""


def asked(path: str) -> Question:
    """A prompt of a piece for each letter, each standing for all letters up to it."""
    return question([BlockHash(path[: end + 1].encode()) for end in range(len(path))], PIECE, PIECE * len(path))


def blocks(path: str) -> list[BlockHash]:
    """The blocks of its tokens, likewise."""
    return [BlockHash(f"{path[: end + 1]}#{n}".encode()) for end in range(len(path)) for n in range(BLOCKS_IN_PIECE)]


class Known:
    """A router of one replica, which is told what its associations make of the replica's events."""

    def __init__(self, *, capacity_tokens: int | None = None, **limits: int) -> None:
        self.strategy = Expected()
        self.router = Router(self.strategy, fleet("one", capacity_tokens=capacity_tokens))
        self.associations = Associations(**limits)
        self.since: dict[str, int] = {}

    def send(self, path: str) -> Route:
        route = self.router.route(asked(path), 0.0)
        assert route is not None
        self.associations.sent(asked(path))
        self.since[path] = self.associations.num_events
        return route

    def learn(self, path: str) -> None:
        names = blocks(path)
        self._tell(self.associations.learn(asked(path), names, BLOCK, BLOCK * len(names) + 5, self.since[path]))

    def hear(self, *events: CacheEvent) -> None:
        self._tell(self.associations.events(events))

    def _tell(self, events: Sequence[CacheEvent]) -> None:
        self.router.events("one", events, 0.0)

    def believed(self, path: str) -> int:
        """Pieces of the prompt that the router takes to be there."""
        choice = self.strategy.pick(asked(path), self.router.replicas, 0.0)
        assert choice is not None
        return -(-choice.cached_tokens // PIECE)


def stored(path: str, medium: str = "") -> BlocksStored:
    names = tuple(blocks(path))
    return BlocksStored(names, (BLOCK,) * len(names), medium)


def removed(path: str, first: int = 0, medium: str = "") -> BlocksRemoved:
    return BlocksRemoved(tuple(blocks(path)[first * BLOCKS_IN_PIECE :]), medium)


def test_what_is_gone_is_not_believed_and_what_is_stored_again_is() -> None:
    known = Known()
    known.send("abc")
    known.learn("abc")
    known.hear(stored("abc"))
    assert known.believed("abc") == 3
    known.hear(removed("abc", first=2))
    assert (known.believed("abc"), known.believed("ab")) == (2, 2)
    known.hear(removed("abc"))
    assert known.believed("abc") == 0
    known.hear(stored("abc"))
    assert known.believed("abc") == 3
    known.hear(BlocksCleared())
    assert known.believed("abc") == 0


def test_what_lies_behind_a_lost_piece_is_lost_even_where_its_tokens_are_not_known() -> None:
    known = Known()
    known.send("ab")
    known.learn("ab")
    known.send("abcdef")
    known.hear(stored("ab"))
    assert known.believed("abcdef") == 6
    known.hear(BlocksRemoved(tuple(blocks("ab")[-1:])))
    assert (known.believed("abcdef"), known.believed("ab")) == (1, 1)


def test_what_was_said_before_the_tokens_were_known_counts_if_it_is_newer_than_the_request() -> None:
    known = Known()
    known.send("ab")
    known.hear(stored("ab"), removed("ab", first=1))
    assert known.believed("ab") == 2
    known.learn("ab")
    assert known.believed("ab") == 1
    other = Known()
    other.hear(stored("ab"), removed("ab"))
    other.send("ab")  # and so it will be there again
    other.learn("ab")
    assert other.believed("ab") == 2


def test_what_others_had_stored_there_is_known_too() -> None:
    known = Known()
    known.send("abcd").failed(0.0)  # it is not known how far it came
    assert known.believed("abcd") == 0
    known.hear(stored("abc"))
    known.learn("abcd")
    assert known.believed("abcd") == 3


def test_what_is_sent_again_can_be_lost_again() -> None:
    known = Known()
    for _ in range(2):
        known.send("ab")
        known.learn("ab")
        assert known.believed("ab") == 2
        known.hear(removed("ab"))
        assert known.believed("ab") == 0


def test_what_is_confirmed_is_believed_from_its_beginning_on_even_where_that_seemed_to_have_made_room() -> None:
    known = Known(capacity_tokens=4 * PIECE)
    known.send("abcd").ended(0.0, output_tokens=1)
    known.learn("abcd")
    known.hear(stored("a"))
    known.send("pqrs").ended(0.0, output_tokens=1)
    assert known.believed("abcd") == 0
    known.hear(stored("abcd"))
    assert (known.believed("abcd"), known.believed("a")) == (4, 1)


def test_a_piece_whose_beginning_is_not_said_to_be_there_is_not_confirmed() -> None:
    known = Known()
    known.send("abc").failed(0.0)
    known.learn("abc")
    known.hear(BlocksStored(tuple(blocks("abc")[BLOCKS_IN_PIECE:]), (BLOCK,) * 6))
    assert known.believed("abc") == 0
    known.hear(stored("a"))
    assert known.believed("abc") == 3


def test_what_moves_to_a_slower_place_is_there() -> None:
    known = Known()
    known.send("ab")
    known.hear(stored("ab"), stored("ab", "cpu"))
    known.learn("ab")
    known.hear(removed("ab"))
    choice = known.strategy.pick(asked("ab"), known.router.replicas, 0.0)
    assert choice is not None
    assert choice.cached_tokens == 2 * PIECE - 1
    known.hear(removed("ab", medium="cpu"))
    assert known.believed("ab") == 0


def test_a_prompt_of_less_than_a_block_teaches_nothing() -> None:
    known = Known()
    known.send("a")
    assert known.associations.learn(asked("a"), (), BLOCK, 7, 0) == []
    assert not known.associations.knows(asked("a"))


def test_what_is_remembered_has_an_end_and_begins_with_what_was_sent_last() -> None:
    known = Known(max_pieces=4, max_removed=2)
    for path in ("abcd", "axy"):
        known.send(path)
        known.learn(path)
    assert known.associations.knows(asked("axy"))
    assert known.associations.knows(asked("ab"))
    assert not known.associations.knows(asked("abc"))
    assert len(known.associations._pieces) == 4
    known.hear(stored("abcd"), removed("abcd"))
    assert len(known.associations._removed) == 2


PATHS = ("a", "ab", "abc", "abd", "abde", "axyz")
paths = st.sampled_from(PATHS)
some_blocks = st.lists(st.sampled_from(sorted({block for path in PATHS for block in blocks(path)})), min_size=1, max_size=12)
steps = st.one_of(
    st.tuples(st.sampled_from(["send", "learn", "store", "remove", "fail"]), paths),
    st.tuples(st.sampled_from(["store some", "remove some"]), some_blocks),
    st.just(("clear", "")),
)


@settings(max_examples=300)
@given(st.lists(steps, min_size=8, max_size=60))
def test_in_whatever_order_the_router_believes_in_nothing_of_which_all_is_said_to_be_gone(
    history: list[tuple[str, str | list[BlockHash]]],
) -> None:
    known = Known()
    gone: dict[BlockHash, int] = {}
    """Blocks of which the last that was said is that they are gone: when."""
    sent: dict[str, int] = {}
    learned: set[str] = set()
    for now, (step, what) in enumerate(history):
        if isinstance(what, list):
            if step == "store some":
                known.hear(BlocksStored(tuple(what), (BLOCK,) * len(what)))
                gone = {block: when for block, when in gone.items() if block not in what}
            else:
                known.hear(BlocksRemoved(tuple(what)))
                gone |= dict.fromkeys(what, now)
        elif step in ("send", "fail"):
            route = known.send(what)
            if step == "fail":
                route.failed(0.0)
            sent |= {what[: end + 1]: now for end in range(len(what))}
        elif step == "learn" and what in known.since:
            known.learn(what)
            learned |= {what[: end + 1] for end in range(len(what))}
        elif step == "store":
            known.hear(stored(what))
            gone = {block: when for block, when in gone.items() if block not in blocks(what)}
        elif step == "remove":
            known.hear(removed(what))
            gone |= dict.fromkeys(blocks(what), now)
        elif step == "clear":
            known.hear(BlocksCleared())
            gone = {block: now for path in PATHS for block in blocks(path)}
        for path in PATHS:
            for end in range(known.believed(path)):
                begin = path[: end + 1]
                asked_s = sent.get(begin, -1)
                if begin in learned:
                    assert any(gone.get(block, -1) < asked_s or block not in gone for block in blocks(begin)), (begin, now)
