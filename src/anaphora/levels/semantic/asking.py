"""Whether two questions that are worded alike ask for different things: who built it, when built it. Pure.

Whoever asks freely drops what asks, or asks by another word: how do I, a way to. So it counts only where something else stands
in its very place, between the same words, and what else is said is nearly the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from anaphora.levels.semantic.lexicon import Lexicon, lexicon
from anaphora.levels.semantic.slips import distance
from anaphora.levels.semantic.texts import Prepared
from anaphora.levels.semantic.tokens import Token


def asks_otherwise(a: Prepared, b: Prepared) -> bool:
    """Where one has a word that asks, the other has one that asks for something else, or one that does not ask."""
    words = lexicon(a.language or "en")
    if not words.interrogatives.keys() & (a.facts.known ^ b.facts.known):
        return False
    ours, theirs = _missing(a, b, words), _missing(b, a, words)
    return (len(ours) < 2 and _exchanged(a, b, theirs, words)) or (len(theirs) < 2 and _exchanged(b, a, ours, words))


_NEAR: Final = frozenset(
    frozenset(pair.split("/")) for pair in ("what/how", "what/where", "what/why", "how/where", "how/many", "who/whose")
)
"""What is the weather like, how is the weather; where can I sign up, how can I."""


def _exchanged(a: Prepared, b: Prepared, theirs: list[str], words: Lexicon) -> bool:
    asked_by = words.interrogatives
    also = {asked_by[token.low] for token in b.tokens if token.low in asked_by}
    new = [
        place
        for place, token in enumerate(b.tokens)
        if (token.content or token.low in asked_by) and token.low not in a.facts.known
    ]
    for place, token in enumerate(a.tokens):
        asked = asked_by.get(token.low)
        if asked is None or asked in also or _names(b, a, asked, words):
            continue
        for there in new:
            other = b.tokens[there]
            # At most one word of each is missing in the other, but for the one that is there instead.
            if len(theirs) - theirs.count(other.stem) > 1 or not _same_place(a.tokens, place, b.tokens, there, words):
                continue
            instead = asked_by.get(other.low)
            if _asks_not(other, token, words) if instead is None else _asks_else(asked, instead, a, b, words):
                return True
    return False


def _missing(a: Prepared, b: Prepared, words: Lexicon) -> list[str]:
    """Stems of what `a` says and `b` does not."""
    return [stem for stem in a.content if stem not in b.facts.known and stem not in words.filler]


def _names(text: Prepared, other: Prepared, asked: str, words: Lexicon) -> bool:
    """It says in a word that the other has not what is asked for: the reason, the time."""
    named = words.named.get(asked, frozenset())
    return any(noun in text.facts.known and noun not in other.facts.known for noun in named)


def _asks_else(asked: str, instead: str, a: Prepared, b: Prepared, words: Lexicon) -> bool:
    """When is the date, what is the date: the same."""
    named = words.named.get(asked, frozenset()) | words.named.get(instead, frozenset())
    return frozenset((asked, instead)) not in _NEAR and named.isdisjoint(a.facts.known | b.facts.known)


def _asks_not(other: Token, token: Token, words: Lexicon) -> bool:
    """It is no slip of the pen either."""
    return (
        other.kind == "word"
        and other.content
        and other.stem not in words.filler
        and other.low not in words.courtesy
        and other.low not in words.prepositions
        and distance(other.low, token.low) > (1 if len(token.low) < 5 else 2)
    )


def _same_place(one: Sequence[Token], i: int, other: Sequence[Token], j: int, words: Lexicon) -> bool:
    """Between the same words, or at the end of what is said together on one side."""
    before, before_other = _before(one, i, words), _before(other, j, words)
    after, after_other = _after(one, i), _after(other, j)
    return before == before_other and after == after_other and bool(before or after)


def _before(tokens: Sequence[Token], place: int, words: Lexicon) -> str:
    if place == 0 or tokens[place].opens or tokens[place - 1].after or tokens[place - 1].low in words.courtesy:
        return ""
    return tokens[place - 1].stem


def _after(tokens: Sequence[Token], place: int) -> str:
    return "" if tokens[place].after or place + 1 == len(tokens) else tokens[place + 1].stem
