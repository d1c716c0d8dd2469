"""What was asked for lately is a copy that never says more than the store it is of."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.embedding.recent import Known, Recent, Uses
from anaphora.types import Key

ONE, OTHER = b"a" * 32, b"b" * 32


def known(name: str, *, size: int = 10, expires_at_s: float = math.inf) -> Known:
    return Known(Key(name.encode()), bytes(size), 0.0, expires_at_s, 0.0)


def test_a_text_is_found_in_its_own_space_only() -> None:
    recent = Recent(1 << 20)
    recent.put(ONE, "a", known("a"), (1,))
    assert recent.get(ONE, ["a", "b"], (1,)) == [known("a"), None]
    assert recent.get(OTHER, ["a"], (1,)) == [None]


def test_under_another_mark_nothing_is_left() -> None:
    recent = Recent(1 << 20)
    recent.put(ONE, "a", known("a"), (1,))
    recent.put(ONE, "b", known("b"), (2,))
    assert recent.get(ONE, ["a", "b"], (2,)) == [None, known("b")]
    assert recent.get(ONE, ["a", "b"], (3,)) == [None, None]
    assert (len(recent), recent.used_bytes) == (0, 0)


def test_a_newer_value_takes_the_place_of_the_older() -> None:
    recent = Recent(1 << 20)
    recent.put(ONE, "a", known("a"), (1,))
    used = recent.used_bytes
    recent.put(ONE, "a", known("a", size=20), (1,))
    assert recent.get(ONE, ["a"], (1,)) == [known("a", size=20)]
    assert (len(recent), recent.used_bytes) == (1, used + 10)


def test_it_says_from_when_on_something_may_have_expired() -> None:
    recent = Recent(1 << 20)
    recent.put(ONE, "a", known("a", expires_at_s=7), (1,))
    recent.put(ONE, "b", known("b"), (1,))
    assert recent.expires_from_s == 7
    recent.clear()
    assert recent.expires_from_s == math.inf


PUTS = st.tuples(st.sampled_from([ONE, OTHER]), st.sampled_from("abcdefgh"), st.integers(0, 3000), st.integers(1, 2))


@given(st.integers(0, 5000), st.lists(PUTS, max_size=60))
def test_it_gives_the_latest_value_of_its_mark_and_never_passes_its_capacity(
    capacity: int, puts: list[tuple[bytes, str, int, int]]
) -> None:
    recent = Recent(capacity)
    latest: dict[tuple[bytes, str], Known] = {}
    mark = 0
    for seed, text, size, more in puts:
        if more == 2:  # something was forgotten
            mark += 1
            latest.clear()
        latest[seed, text] = known(text, size=size)
        recent.put(seed, text, latest[seed, text], (mark,))
        assert 0 <= recent.used_bytes <= capacity
        here = 0
        for space in (ONE, OTHER):
            for name, found in zip("abcdefgh", recent.get(space, "abcdefgh", (mark,)), strict=True):
                assert found is None or found == latest[space, name]
                here += found is not None
        assert here == len(recent)
        assert (recent.used_bytes == 0) == (here == 0)


@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=5), max_size=12))
def test_uses_are_told_once_each_in_the_order_of_the_last(batches: list[list[str]]) -> None:
    uses = Uses(limit=8)
    for batch in batches:
        uses.note([known(name) for name in batch])
    all_of_them = [name for batch in batches for name in batch]
    told = [one.key.decode() for one in uses.take()]
    assert told == sorted(set(all_of_them), key=lambda name: max(n for n, other in enumerate(all_of_them) if other == name))
    assert uses.take() == []
