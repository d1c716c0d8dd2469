"""Memory for prompts: never more than there is room for, and what was used last stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anaphora.prompt import Block, Lengths, Prompt
from anaphora.testing.upstream.prefixes import Prefixes
from anaphora.types import Tenant

ALICE, BOB = Tenant("alice"), Tenant("bob")
TOKENS = 10


def prompt(words: str) -> tuple[Prompt, Lengths]:
    """A block of 10 tokens for each letter."""
    blocks = tuple(Block("messages", "text", word.encode(), f"{number}") for number, word in enumerate(words))
    ends = tuple(TOKENS * number for number in range(1, len(words) + 1))
    return Prompt("anthropic", "m", blocks), Lengths(ends, ends[-1] if ends else 1)


texts = st.text("ab", min_size=1, max_size=6)


@given(st.lists(texts, max_size=20))
def test_without_end_everything_that_was_ever_used_is_there(history: list[str]) -> None:
    prefixes = Prefixes(10**9)
    for number, text in enumerate(history):
        before = history[:number]
        longest = max((len(common(text, other)) for other in before), default=0)
        assert prefixes.use(ALICE, *prompt(text)) == TOKENS * longest


@given(st.lists(texts, max_size=20), st.integers(0, 8))
def test_what_was_just_used_is_there_as_far_as_there_is_room(history: list[str], room: int) -> None:
    prefixes = Prefixes(TOKENS * room)
    for text in history:
        prefixes.use(ALICE, *prompt(text))
        assert prefixes.use(ALICE, *prompt(text)) == TOKENS * min(room, len(text))


def test_what_was_used_longest_ago_leaves_first() -> None:
    prefixes = Prefixes(TOKENS * 4)
    for text in ("aa", "bb", "aa", "cc"):
        prefixes.use(ALICE, *prompt(text))
    assert prefixes.use(ALICE, *prompt("aa")) == 2 * TOKENS
    assert prefixes.use(ALICE, *prompt("bb")) == 0


def test_nobody_reads_what_another_wrote() -> None:
    prefixes = Prefixes(1000)
    prefixes.use(ALICE, *prompt("aa"))
    assert prefixes.use(BOB, *prompt("aa")) == 0


def common(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
