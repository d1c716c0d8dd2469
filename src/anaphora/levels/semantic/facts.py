"""What a text says that vectors do not see: its numbers, names, negations, marked words, and who does what. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from anaphora.levels.semantic.lexicon import FOLDED, Lexicon, Mark, Phrase
from anaphora.levels.semantic.numbers import Number, numbers_of
from anaphora.levels.semantic.tokens import Token


class Facts(msgspec.Struct, frozen=True, gc=False):
    marks: Mapping[str, tuple[str, ...]] = {}
    """Values of marked words and phrases by their group, each as often as it comes."""
    turning: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Words that have opposites, as written in the lexicon or by stem, with the pairs they belong to."""
    numbers: tuple[Number, ...] = ()
    names: frozenset[str] = frozenset()
    """What is written with a capital where words are not, and what has letters and digits. By stem."""
    roles: Mapping[str, str] = {}
    """Of words that come once: the preposition they stand after, or nothing."""
    governed: frozenset[str] = frozenset()
    """Words straight after a preposition."""
    order: tuple[str, ...] = ()
    """Words without a preposition, in their order."""
    agents: frozenset[str] = frozenset()
    """Who does it, where the sentence is passive."""
    question: str = ""
    """The question word that opens it: who, when, many."""
    known: frozenset[str] = frozenset()
    """All words in lower case, and all stems."""
    words: frozenset[str] = frozenset()
    """Single words that carry content: in lower case, and their stems."""
    codes: tuple[str, ...] = ()
    """Pieces of code, addresses, names of files; sorted."""
    owners: frozenset[str] = frozenset()
    """Whose: John's."""


class Wording(NamedTuple):
    """Those of the facts that are told at once of the tokens."""

    known: frozenset[str]
    words: frozenset[str]
    codes: tuple[str, ...]
    owners: frozenset[str]


def facts_of(tokens: Sequence[Token], words: Lexicon) -> Facts:
    wording = wording_of(tokens)
    found = list(_marked(tokens, wording.known, words))
    marks: dict[str, tuple[str, ...]] = {}
    turning = []
    for places, key, own in found:
        opposites, negated = [], False
        for group, value in own:
            if group == "opposite":
                opposites.append(value)
                continue
            if group == "negation":
                negated = True
            elif group in ("modality", "tense") and not _asked(tokens, places[0], words):
                continue
            marks[group] = (*marks.get(group, ()), value)
        # Negations are counted, not compared.
        if opposites and not negated:
            turning.append((key, tuple(opposites)))
    roles, agents, governed = _roles(tokens, words)
    return Facts(
        marks=marks,
        turning=tuple(turning),
        numbers=numbers_of(tokens, words),
        names=_names(tokens, found),
        roles=roles,
        governed=governed,
        order=order_of(roles),
        agents=agents,
        question=_question(tokens, found),
        known=wording.known,
        words=wording.words,
        codes=wording.codes,
        owners=wording.owners,
    )


def wording_of(tokens: Sequence[Token]) -> Wording:
    known: list[str] = []
    carrying: list[str] = []
    codes: list[str] = []
    for token in tokens:
        low, stem = token.low, token.stem
        known += (low, stem)
        if token.content and token.kind == "word":
            carrying += (low, stem)
        elif token.kind == "code":
            codes.append(token.text)
    return Wording(
        frozenset(known),
        frozenset(carrying),
        tuple(sorted(codes)),
        frozenset([token.stem for token in tokens if token.text.endswith("'s") and token.text[:1].isupper()]),
    )


def order_of(roles: Mapping[str, str]) -> tuple[str, ...]:
    return tuple([stem for stem, role in roles.items() if not role])


def _asked(tokens: Sequence[Token], place: int, words: Lexicon) -> bool:
    """`Can I`, `why did it`; not `I must know`. In Russian a question may begin with anything."""
    return place == 0 or (place < 3 and (tokens[0].low in words.asking or words.language == "ru"))


_Found = tuple[Sequence[int], str, tuple[Mark, ...]]


def _marked(tokens: Sequence[Token], known: frozenset[str], words: Lexicon) -> Iterator[_Found]:
    """Places, key and marks of each marked word; the words of a phrase have none of their own."""
    taken: set[int] = set()
    ends = words.ends
    for place, token in enumerate(tokens):
        start = token.stem if token.content else token.low
        # Most end in a word that is not there.
        phrases = words.phrases[start] if start in ends and not known.isdisjoint(ends[start]) else ()
        if place in taken or not (phrases or token.marks):
            continue
        for phrase in phrases:
            if (phrase.words[-1] in known or phrase.stems[-1] in known) and (places := _phrase_at(tokens, place, phrase)):
                taken.update(places)
                same = [other.marks for other in phrases if other.words == phrase.words and other.apart == phrase.apart]
                yield places, " ".join(phrase.words), tuple(mark for marks in same for mark in marks)
                break
        else:
            if token.marks and _counts(tokens, place, words):
                yield (place,), token.stem, token.marks


def _phrase_at(tokens: Sequence[Token], start: int, phrase: Phrase) -> list[int]:
    """Where its words are; none if it does not stand here."""
    if phrase.stems[0] != tokens[start].stem and phrase.words[0] != tokens[start].low:
        return []
    places = [start]
    last = len(phrase.words) - 1
    for number in range(1, last + 1):
        reach = 5 if phrase.apart and number == last else 1
        for place in range(places[-1] + 1, min(places[-1] + 1 + reach, len(tokens))):
            token = tokens[place]
            if tokens[place - 1].after:
                return []
            if token.low == phrase.words[number] or token.stem == phrase.stems[number]:
                places.append(place)
                break
        else:
            return []
    return places


def _counts(tokens: Sequence[Token], place: int, words: Lexicon) -> bool:
    token = tokens[place]
    after_number = place > 0 and tokens[place - 1].kind == "number"
    if token.low in words.attached:
        return after_number
    if token.low in words.doubtful:
        before_number = place + 1 < len(tokens) and tokens[place + 1].kind == "number"
        return after_number or before_number or (token.text[:1].isupper() and not token.opens)
    return True


_NAMED = ("name", "date", "language", "unit", "format")


def _names(tokens: Sequence[Token], found: Sequence[_Found]) -> frozenset[str]:
    capitals = [(place, token) for place, token in enumerate(tokens) if token.named]
    if not capitals or not any(token.text[-1:].islower() for token in tokens):
        return frozenset()  # none, or all of it is in capitals
    named = {place for places, _, marks in found for group, _ in marks if group in _NAMED for place in places}
    inner = [token for token in tokens if token.kind == "word" and token.content and not token.opens]
    titled = len(inner) > 4 and sum([token.text[:1].isupper() for token in inner]) > 0.7 * len(inner)
    return frozenset(
        [
            token.stem
            for place, token in capitals
            if (token.named == "digits" or not titled) and place not in named and token.low not in FOLDED
        ]
    )


_SAME_ROLE = {"со": "с", "во": "в", "ко": "к", "обо": "о", "об": "о", "изо": "из", "del": "de", "al": "a", "vs": "versus"}


def _roles(tokens: Sequence[Token], words: Lexicon) -> tuple[dict[str, str], frozenset[str], frozenset[str]]:
    """Roles in the order of the words, agents, and what is governed."""
    roles: dict[str, str] = {}
    twice, governed = set(), []
    role, governs = "", False
    for token in tokens:
        low = token.low
        if token.content and governs:
            governed.append(token.stem)
        if low in words.prepositions:
            role, governs = _SAME_ROLE.get(low, low), True
        else:
            governs = governs and not token.content
            if low in words.asking:
                role = ""  # in which year did he
            elif token.content:
                if token.stem in roles:
                    twice.add(token.stem)
                roles[token.stem] = role
        if token.after:
            role = ""
    for stem in twice:
        del roles[stem]
    agents: frozenset[str] = frozenset()
    if not words.passive.isdisjoint([token.low for token in tokens]):
        agents = frozenset(stem for stem, role in roles.items() if role == words.agent)
    return roles, agents, frozenset(governed)


def _question(tokens: Sequence[Token], found: Sequence[_Found]) -> str:
    for (place, *_), _, marks in found:
        for group, value in marks:
            if group == "question" and (place == 0 or tokens[place].opens or (place == 1 and not tokens[0].content)):
                return value
    return ""
