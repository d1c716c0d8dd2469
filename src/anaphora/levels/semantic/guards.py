"""What makes two questions different for certain, however near their vectors are. Pure.

Guards know words, not meanings: they refuse where a difference is plain to see, and leave the rest to the verifier. What they
cannot read they refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from anaphora.levels.semantic.asking import asks_otherwise
from anaphora.levels.semantic.facts import Facts
from anaphora.levels.semantic.lexicon import lexicon, units
from anaphora.levels.semantic.numbers import Number
from anaphora.levels.semantic.roles import another_agent, crossed, turned_round
from anaphora.levels.semantic.texts import Prepared

Guard = Callable[[Prepared, Prepared], bool]


def refusal(a: Prepared, b: Prepared) -> str | None:
    """The name of the first guard that tells the two apart. The same whichever comes first; never for equal normal forms."""
    if a.normal == b.normal:
        return None
    return next((name for name, differ in GUARDS.items() if differ(a, b)), None)


def _language(a: Prepared, b: Prepared) -> bool:
    """The answers would be in two languages, or in one that has no lexicon."""
    return a.language != b.language or not a.language or _unequal("language", a.facts, b.facts)


def _unread(a: Prepared, b: Prepared) -> bool:
    return not a.content or not b.content


def _code(a: Prepared, b: Prepared) -> bool:
    return a.facts.codes != b.facts.codes


# Numbers, dates, names --------------------------------------------------------------------------------------------------


def _number(a: Prepared, b: Prepared) -> bool:
    one, other = a.facts.numbers, b.facts.numbers
    if not one and not other:
        return False
    if any(not number.soft for rest in _unmatched(one, other) for number in rest):
        return True
    return _exchanged(one, other)


def _unmatched(one: Iterable[Number], other: Iterable[Number]) -> tuple[list[Number], list[Number]]:
    rest, left = [], list(other)
    for number in one:
        match = next((candidate for candidate in left if _same_amount(number, candidate)), None)
        if match is None:
            match = next((candidate for candidate in left if candidate.value == number.value), None)
        if match is None:
            rest.append(number)
        else:
            left.remove(match)
    return rest, left


def _same_amount(a: Number, b: Number) -> bool:
    if a.amount is not None and b.amount is not None:
        return a.amount == b.amount
    return a.value == b.value and a.unit == b.unit


def _exchanged(one: tuple[Number, ...], other: tuple[Number, ...]) -> bool:
    """Two adults and one child, one adult and two children; from 5 to 10, from 10 to 5."""
    things = {number.value: number.beside for number in one}
    others = {number.value: number.beside for number in other}
    if len(things) < 2 or things.keys() != others.keys():
        return False
    if any(things.values()) or any(others.values()):
        return any(
            things[x] != others[x] and things[x] == others[y] and others[x] == things[y] and things[x] and others[x]
            for x in things
            for y in things
        )
    return list(things) != list(others)


def _unit(a: Prepared, b: Prepared) -> bool:
    if not (a.facts.numbers and b.facts.numbers) and not ("unit" in a.facts.marks and "unit" in b.facts.marks):
        return False
    if _converted(a.facts, b.facts):
        return False
    pairs = ((number, other) for number in a.facts.numbers for other in b.facts.numbers if number.value == other.value)
    return _clash("unit", a.facts, b.facts, lambda unit: units()[unit].dimension) or (
        len(a.facts.numbers) == len(b.facts.numbers) == 1
        and any(one.unit and two.unit and one.unit != two.unit for one, two in pairs)
    )


def _converted(a: Facts, b: Facts) -> bool:
    """The same amounts in other units: 90 minutes, 1.5 hours."""
    one = sorted(number.amount for number in a.numbers if number.amount)
    other = sorted(number.amount for number in b.numbers if number.amount)
    return bool(one) and one == other


def _date(a: Prepared, b: Prepared) -> bool:
    one, other = set(a.facts.marks.get("date", ())), set(b.facts.marks.get("date", ()))
    differ = one ^ other
    if not (one and other):
        differ -= _NOW | _HOURS
    return bool(differ) or _clash("frequency", a.facts, b.facts)


_NOW: Final = frozenset(("today", "tonight", "thisweek", "thismonth", "thisyear"))
"""What is asked without a date is often asked of now."""
_HOURS: Final = frozenset(("am", "pm", "noon", "night", "evening"))


def _name(a: Prepared, b: Prepared) -> bool:
    return (
        _unequal("name", a.facts, b.facts)
        or any(not _mentions(b, name) for name in a.facts.names)
        or any(not _mentions(a, name) for name in b.facts.names)
    )


def _mentions(text: Prepared, name: str) -> bool:
    if name in text.facts.known:
        return True
    if "-" in name and name.replace("-", "") in text.facts.known:
        return True
    # VPN, virtual private network
    initials = "".join(token.low[0] for token in text.tokens if token.kind == "word")
    return len(name) > 2 and name in initials


# Negation and opposites -------------------------------------------------------------------------------------------------


def _negation(a: Prepared, b: Prepared) -> bool:
    if "negation" not in a.facts.marks and "negation" not in b.facts.marks:
        return False
    if not _negated(a) ^ _negated(b):
        return _count("negation", "except", a.facts) != _count("negation", "except", b.facts)
    if len(_turned(a, b)) == 1:
        return False  # not invisible, visible
    # cannot log in, fails to log in
    calm, denied = (a, b) if _negated(b) else (b, a)
    return _count("failing", "yes", calm.facts) <= _count("failing", "yes", denied.facts)


def _negated(text: Prepared) -> bool:
    plain = _count("negation", "not", text.facts)
    return (plain or min(1, _count("negation", "emphatic", text.facts))) % 2 == 1


def _opposite(a: Prepared, b: Prepared) -> bool:
    turned = _turned(a, b)
    if len(turned) == 1 and _negated(a) ^ _negated(b):
        return False
    if len(turned) == 2 and _degree(a) != _degree(b) and turned & {_MORE}:
        return False  # more patient, less impatient
    return bool(turned)


_MORE: Final = "more"


def _degree(text: Prepared) -> tuple[int, int]:
    return _count("degree", "more", text.facts), _count("degree", "less", text.facts)


def _turned(a: Prepared, b: Prepared) -> frozenset[str]:
    """The pairs of opposites of which each text has another side."""
    turned = {_MORE} if _clash("degree", a.facts, b.facts) else set[str]()
    if a.facts.turning != b.facts.turning:
        ours, theirs = _sides_beyond(a.facts, b.facts), _sides_beyond(b.facts, a.facts)
        for pair in ours - theirs:
            back = ("-" if pair[0] == "+" else "+") + pair[1:]
            if back in theirs and back not in ours:
                # A word may be in several pairs; they count once.
                turned.add("listed")
    if _derived(a, b):
        turned.add("derived" if "listed" not in turned else "listed")
    return frozenset(turned)


def _sides_beyond(text: Facts, other: Facts) -> set[str]:
    """Of the words that it has more often than the other."""
    rest = list(other.turning)
    sides: set[str] = set()
    for word in text.turning:
        if word in rest:
            rest.remove(word)
        else:
            sides.update(word[1])
    return sides


def _derived(a: Prepared, b: Prepared) -> bool:
    """Lock and unlock, import and export, useful and useless."""
    prefixes = lexicon(a.language or "en").prefixes
    ours, theirs = a.facts.words - b.facts.words, b.facts.words - a.facts.words
    for word in ours:
        for against in theirs:
            if word[-1] == against[-1]:
                same = 0
                while same < min(len(word), len(against)) and word[-1 - same] == against[-1 - same]:
                    same += 1
                ends = word[: len(word) - same], against[: len(against) - same]
                if same > 2 and (min(ends), max(ends)) in prefixes:
                    return True
            if (word.endswith("ful") and against == word[:-3] + "less") or (
                word.endswith("less") and against == word[:-4] + "ful"
            ):
                return True
    return False


# Who does what ----------------------------------------------------------------------------------------------------------


def _order(a: Prepared, b: Prepared) -> bool:
    if "joining" in a.facts.marks and "joining" in b.facts.marks:
        return False
    return (
        crossed(a.facts, b.facts)
        or (set(a.content) ^ set(b.content) <= lexicon(a.language or "en").filler and turned_round(a.facts, b.facts))
        or another_agent(a.facts, b.facts)
        or another_agent(b.facts, a.facts)
    )


# Words that matter ------------------------------------------------------------------------------------------------------


def _quantifier(a: Prepared, b: Prepared) -> bool:
    return _unequal("limit", a.facts, b.facts) or _clash("quantifier", a.facts, b.facts)


def _question(a: Prepared, b: Prepared) -> bool:
    asked = frozenset((a.facts.question, b.facts.question))
    return len(asked) == 2 and asked in _OTHER_QUESTIONS


_CERTAIN = ("who", "when", "where", "why", "many", "long", "far", "old", "often", "tall", "big", "fast")
_NEAR = {
    frozenset(pair)
    for pair in (("when", "long"), ("far", "long"), ("tall", "big"), ("often", "many"), ("big", "many"), ("many", "long"))
}
_OTHER_QUESTIONS: Final = (
    {frozenset((one, other)) for one in _CERTAIN for other in _CERTAIN if one != other}
    | {frozenset(pair) for pair in (("how", "why"), ("how", "who"), ("how", "many"), ("how", "much"))}
    | {frozenset(("much", one)) for one in ("who", "when", "where", "why", "often", "old")}
) - _NEAR


def _tense(a: Prepared, b: Prepared) -> bool:
    return _unequal("aspect", a.facts, b.facts) or _clash("tense", a.facts, b.facts)


def _modality(a: Prepared, b: Prepared) -> bool:
    if a.facts.question or b.facts.question:
        return False  # how can I, how should I
    return _clash("modality", a.facts, b.facts)


def _person(a: Prepared, b: Prepared) -> bool:
    if _clash("person", a.facts, b.facts):
        return True
    return any(
        "person" in one.marks and "person" not in other.marks and bool(other.owners - one.owners)
        for one, other in ((a.facts, b.facts), (b.facts, a.facts))
    )


def _format(a: Prepared, b: Prepared) -> bool:
    return _unequal("format", a.facts, b.facts) or _clash("manner", a.facts, b.facts)


def _kind(a: Prepared, b: Prepared) -> bool:
    return _clash("kind", a.facts, b.facts, lambda value: value.partition(":")[0])


def _scope(a: Prepared, b: Prepared) -> bool:
    return _unequal("scope", a.facts, b.facts) or _added(a, b) or _added(b, a)


def _added(a: Prepared, b: Prepared) -> bool:
    """`b` says all that `a` does, and narrows it: a refund, a refund after the trial."""
    if not b.facts.governed or not set(a.content) <= set(b.content):
        return False
    added = set(b.content) - set(a.content) - lexicon(a.language or "en").filler
    return not added.isdisjoint(b.facts.governed) and all(
        b.facts.roles.get(word) in lexicon(b.language or "en").conditions for word in added
    )


# How marks are compared -------------------------------------------------------------------------------------------------


def _unequal(group: str, a: Facts, b: Facts) -> bool:
    one, other = a.marks.get(group, ()), b.marks.get(group, ())
    return one != other and set(one) != set(other)


def _clash(group: str, a: Facts, b: Facts, kind: Callable[[str], str] = lambda value: "") -> bool:
    """Each has one that the other has not, of one kind."""
    if group not in a.marks or group not in b.marks or a.marks[group] == b.marks[group]:
        return False
    one, other = set(a.marks[group]), set(b.marks[group])
    return not {kind(value) for value in one - other}.isdisjoint(kind(value) for value in other - one)


def _count(group: str, value: str, facts: Facts) -> int:
    return facts.marks.get(group, ()).count(value)


GUARDS: Final[dict[str, Guard]] = {
    "language": _language,
    "unread": _unread,
    "code": _code,
    "unit": _unit,
    "number": _number,
    "date": _date,
    "name": _name,
    "negation": _negation,
    "opposite": _opposite,
    "order": _order,
    "quantifier": _quantifier,
    "question": _question,
    "tense": _tense,
    "modality": _modality,
    "person": _person,
    "format": _format,
    "kind": _kind,
    "scope": _scope,
    "asked": asks_otherwise,
}
"""In the order in which they are asked."""
