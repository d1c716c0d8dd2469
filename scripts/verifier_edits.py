"""Questions changed by rule: so that they still ask the same, and so that they ask something else. Every rule takes a question
and a random generator, and returns the changed question, or None where it does not apply."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from anaphora.levels.semantic.reading import FRAME
from anaphora.levels.semantic.texts import prepare

Edit = Callable[[str, random.Random], str | None]


def _list(words: str) -> list[str]:
    return words.split()


_LEXICON_FILE: Final = Path(__file__).parent / "verifier_lexicon.txt"
LEXICON: Final = [line for line in _LEXICON_FILE.read_text().splitlines() if line and line[0] != "#"]
ALIKE: Final = [line[1:].split() for line in LEXICON if line[0] == "="]
EXCLUSIVE: Final = [line[1:].split() for line in LEXICON if line[0] == "|"]
OPPOSITE: Final = [[side.split() for side in line.split("/")] for line in LEXICON if line[0] not in "=|+"]

NUMERALS: Final = _list("two three four five six seven eight nine ten eleven twelve")
FRAMES: Final = [
    "how do i {}", "how can i {}", "how to {}", "what's the way to {}", "what are the steps to {}",
    "what do i need to do to {}", "i want to {}, how do i do that", "could you explain how to {}",
    "what is the best way to {}", "how does one {}", "i'd like to {}, what should i do", "tell me how to {}",
    "i need to {}, how", "how would i {}", "show me how to {}",
]  # fmt: skip
ABLE: Final = [
    "can i {}", "is it possible to {}", "am i able to {}", "is there a way to {}", "may i {}", "am i allowed to {}",
    "could i {}", "do you let me {}", "is it ok to {}", "would it be possible to {}",
]  # fmt: skip
BEFORE: Final = [
    "please ", "hi, ", "hello, ", "hey ", "quick question: ", "can you tell me ", "i was wondering, ",
    "just wondering, ", "so, ",
]  # fmt: skip
AFTER: Final = [" please", ", thanks", " thank you", ", any idea?", " pls", "??", " exactly", ", please help", " ?"]
CONTRACTED: Final = [
    ("what is", "what's"), ("how is", "how's"), ("where is", "where's"), ("i am", "i'm"), ("i have", "i've"),
    ("it is", "it's"), ("do not", "don't"), ("does not", "doesn't"), ("cannot", "can't"), ("did not", "didn't"),
    ("is not", "isn't"), ("i would", "i'd"), ("you are", "you're"), ("will not", "won't"), ("has not", "hasn't"),
    ("have not", "haven't"), ("who is", "who's"),
]  # fmt: skip
PLACES: Final = _list(
    "Spain Italy Berlin Madrid Chicago Texas Norway Kenya Peru Osaka Leeds Boston Hamburg Lyon Vienna Dubai Seoul Turin"
)
NAMES: Final = _list("Anna Peter Maria Ahmed Olga Carlos Wei Fatima George Linda Igor Sofia Kumar Emma Tom Yusuf")
BRANDS: Final = _list("Samsung Sony Lenovo Toyota Honda Nokia Huawei Dell Canon Bosch Ikea Nestle Adobe Netflix Spotify")
TIMES: Final = [
    "on Monday", "on Tuesday", "on Friday", "on Sunday", "in January", "in March", "in July", "in October", "at 9 am",
    "at 5 pm", "at noon", "today", "tomorrow", "next week", "next month", "this weekend", "in 2019", "in 2021",
    "in 2023", "in the morning", "at night", "before Christmas", "after Christmas", "during the summer",
    "during the winter", "last year", "this year",
]  # fmt: skip
SCOPES: Final = [
    "for business accounts", "for personal accounts", "for students", "for seniors", "on the free plan",
    "on the premium plan", "on my phone", "on my laptop", "for children", "for adults", "in the mobile app",
    "on the website", "for new customers", "for existing customers", "without an account", "with an account",
    "from abroad", "at home", "at work", "for my wife", "for my son", "for my company", "as a guest", "by phone",
    "by email", "by post", "online", "in person", "in a branch", "with a discount", "for online orders", "for returns",
    "in cash", "on Linux", "on Windows", "on Android", "using Python", "using Java", "for large files",
    "for two people", "per month", "per year", "if I am under 18", "if I am over 65", "only once", "more than once",
    "automatically", "manually", "for the second time", "by default", "in the EU", "outside the EU",
    "for weekend trips", "for used items", "for digital products", "without a receipt", "before it expires",
    "after it expires", "while travelling", "when offline", "for electric cars", "for beginners", "for professionals",
    "in bulk",
]  # fmt: skip
ASIDES: Final = [
    "I am new here.", "I looked everywhere already.", "My colleague asked me this.", "Sorry to bother you.",
    "I could not find it in the help.", "It is a bit urgent.", "I hope you can help.",
    "I've been wondering about this.",
]  # fmt: skip
ADJECTIVES: Final = _list(
    "old new second temporary virtual stolen damaged joint foreign international late early partial full weekly monthly "
    "registered certified experienced retired actual official local public private electronic annual spare former"
)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+|(?:[\W_])+", text)


_EMPTY: Final = FRAME | frozenset(
    _list("however though already currently suddenly recently simply still also anyway maybe perhaps very quite even today")
)
"""May be left out, and the question is the same."""


def _telling(text: str) -> list[str]:
    """Its words that have a meaning of their own."""
    return [
        token.text
        for token in prepare(text).tokens
        if token.kind == "word" and token.content and token.text.isalpha() and len(token.text) > 3 and token.low not in _EMPTY
    ]


def vocabulary(folder: Path) -> list[str]:
    """All telling words of the questions written for this purpose, in one language."""
    lines = [line[2:] for path in sorted(folder.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted({word.lower() for line in lines for word in _telling(line)})


_VOCABULARY: Final = vocabulary(Path(__file__).parent / "questions")


def _swap(text: str, old: str, new: str) -> str | None:
    changed, times = re.subn(rf"\b{re.escape(old)}\b", new, text, count=1, flags=re.IGNORECASE)
    return changed if times and changed != text else None


def _bare(text: str) -> str:
    return text.rstrip("?!. ")


def _ended(text: str, like: str) -> str:
    return text + ("?" if like.rstrip().endswith("?") else "")


# The same question -----------------------------------------------------------------------------------------------------


def recased(text: str, dice: random.Random) -> str | None:
    return dice.choice(
        [
            text.lower(),
            text.upper() if len(text) < 60 else text.lower(),
            text[:1].upper() + text[1:],
            _bare(text),
            _bare(text).lower(),
        ]
    )


def mistyped(text: str, dice: random.Random) -> str | None:
    words = _words(text)
    places = [place for place, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not places:
        return None
    place = dice.choice(places)
    word, cut = words[place], dice.randrange(1, len(words[place]) - 2)
    kind = dice.random()
    if kind < 0.4:
        words[place] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    elif kind < 0.7:
        words[place] = word[:cut] + word[cut + 1 :]
    elif kind < 0.85:
        words[place] = word[:cut] + word[cut] + word[cut:]
    else:
        words[place] = word[:cut] + dice.choice("aeionrst" if word[0].lower() < "а" else "аеионрст") + word[cut + 1 :]
    return "".join(words)


def contracted(text: str, dice: random.Random) -> str | None:
    fits = [(a, b) for pair in CONTRACTED for a, b in (pair, pair[::-1]) if re.search(rf"\b{a}\b", text, re.IGNORECASE)]
    return _swap(text, *dice.choice(fits)) if fits else None


def polite(text: str, dice: random.Random) -> str | None:
    if dice.random() < 0.5:
        return dice.choice(BEFORE).capitalize() + text[:1].lower() + text[1:]
    return _bare(text) + dice.choice(AFTER)


def aside(text: str, dice: random.Random) -> str | None:
    return f"{dice.choice(ASIDES)} {text}" if dice.random() < 0.6 else f"{_ended(_bare(text), '?')} {dice.choice(ASIDES)}"


def framed(text: str, dice: random.Random) -> str | None:
    low = _bare(text)
    for frames in (FRAMES, ABLE):
        for frame in frames:
            before, after = frame.split("{}")
            if low.lower().startswith(before) and low.lower().endswith(after) and len(low) > len(before) + len(after) + 5:
                body = low[len(before) : len(low) - len(after) or None]
                changed = dice.choice([other for other in frames if other != frame]).format(body)
                return _ended(changed[:1].upper() + changed[1:] if text[:1].isupper() else changed, text)
    return None


def numbered(text: str, dice: random.Random) -> str | None:
    for value, word in enumerate(NUMERALS, 2):
        for old, new in ((word, str(value)), (str(value), word)):
            if (changed := _swap(text, old, new)) is not None:
                return changed
    return None


def synonymous(text: str, dice: random.Random) -> str | None:
    present = set(re.findall(r"[a-z]+", text.lower()))
    fits = [(old, new) for group in ALIKE for old in group if old in present for new in group if new not in present]
    return _swap(text, *dice.choice(fits)) if fits else None


def moved(text: str, dice: random.Random) -> str | None:
    found = re.fullmatch(r"(.{12,}?) ((?:in|on|at|for|with|without|during|after|before) (?:\w+ ?){1,3})\??", text)
    if not found:
        return None
    body, adjunct = found.groups()
    return _ended(f"{adjunct[:1].upper()}{adjunct[1:]}, {body[:1].lower()}{body[1:]}", text)


SAME: Final[list[tuple[Edit, float]]] = [
    (recased, 1.0), (mistyped, 2.0), (contracted, 1.0), (polite, 1.5), (aside, 0.5), (framed, 3.0), (numbered, 1.0),
    (synonymous, 3.0), (moved, 1.0),
]  # fmt: skip

# Another question ------------------------------------------------------------------------------------------------------


def opposed(text: str, dice: random.Random) -> str | None:
    present = set(re.findall(r"[a-z]+", text.lower()))
    fits = [
        (old, new) for group in OPPOSITE for one, other in (group, group[::-1])
        for old in one if old in present for new in other
    ]  # fmt: skip
    return _swap(text, *dice.choice(fits)) if fits else None


def excluded(text: str, dice: random.Random) -> str | None:
    present = set(re.findall(r"[a-z]+", text.lower())) - {"what"}  # what stands where no other question word does
    fits = [
        (old, new)
        for group in EXCLUSIVE
        for old in group
        if old in present
        for new in group
        if new not in present and new != "what"
    ]
    return _swap(text, *dice.choice(fits)) if fits else None


def negated(text: str, dice: random.Random) -> str | None:
    found = re.search(
        r"\b(can|should|do|does|did|will|is|are|was|could|must|would|has|have)\b( (?:i|you|we|they|it|he|she|my \w+|the \w+))?",
        text,
        re.IGNORECASE,
    )
    if not found:
        return None
    verb, subject = found.group(1), found.group(2) or ""
    short = {"can": "can't", "will": "won't"}.get(verb.lower(), verb.lower() + "n't")
    short = short[:1].upper() + short[1:] if verb[:1].isupper() else short
    instead = dice.choice([f"{verb}{subject} not", f"{short}{subject}", f"{verb}{subject} never"])
    return text[: found.start()] + instead + text[found.end() :]


def other_number(text: str, dice: random.Random) -> str | None:
    found = list(re.finditer(r"\d+", text))
    if not found:
        return None
    number = dice.choice(found)
    value = int(number.group()[:9])
    new = dice.choice([value + 1, max(0, value - 1), value * 10, value + dice.randrange(2, 40), value // 2 + 7])
    return None if str(new) == number.group() else text[: number.start()] + str(new) + text[number.end() :]


def narrowed(text: str, dice: random.Random) -> str | None:
    return _ended(f"{_bare(text)} {dice.choice(dice.choice([SCOPES, SCOPES, TIMES]))}", text)


def placed(text: str, dice: random.Random) -> str | None:
    extra = dice.choice(
        [f"in {dice.choice(PLACES)}", f"for {dice.choice(NAMES)}", f"from {dice.choice(BRANDS)}", f"to {dice.choice(PLACES)}"]
    )
    return _ended(f"{_bare(text)} {extra}", text)


def qualified(text: str, dice: random.Random) -> str | None:
    found = re.search(r"\b(my|a|the|an) (\w{3,})", text)
    if not found or found.group(2) in ADJECTIVES:
        return None
    article = "a" if found.group(1) == "an" else found.group(1)
    return f"{text[: found.start()]}{article} {dice.choice(ADJECTIVES)} {found.group(2)}{text[found.end() :]}"


def asked_otherwise(text: str, dice: random.Random) -> str | None:
    heads = [
        "how do i",
        "why do i",
        "when do i",
        "where do i",
        "do i have to",
        "how often do i",
        "who can",
        "how long does it take to",
        "how much does it cost to",
    ]
    low = text.lower()
    for head in [*heads, "how can i", "how to", "can i"]:
        if low.startswith(head + " "):
            new = dice.choice([other for other in heads if other[:5] != head[:5]])
            return (new.capitalize() if text[:1].isupper() else new) + text[len(head) :]
    return None


def turned(text: str, dice: random.Random) -> str | None:
    for pattern in (r"\bfrom ((?:\w+ )?\w+) to ((?:\w+ )?\w+)", r"\b(\w+) (?:than|before|after|instead of) (\w+)"):
        found = re.search(pattern, text)
        if found and found.group(1) != found.group(2):
            (a, b), (c, d) = found.span(1), found.span(2)
            return text[:a] + found.group(2) + text[b:c] + found.group(1) + text[d:]
    return None


def lessened(text: str, dice: random.Random) -> str | None:
    """One word less, which may be all that narrowed the question."""
    telling = _telling(text)
    if len(telling) < 2:
        return None
    changed = re.sub(rf"\b{dice.choice(telling)}\b ?", "", text, count=1)
    return _ended(_bare(changed.strip()), text)


def exchanged_for(text: str, words: list[str], dice: random.Random) -> str | None:
    """One word for any other."""
    telling = _telling(text)
    return _swap(text, dice.choice(telling), dice.choice(words)) if telling else None


def exchanged(text: str, dice: random.Random) -> str | None:
    return exchanged_for(text, _VOCABULARY, dice)


OTHER: Final[list[tuple[Edit, float]]] = [
    (opposed, 4.0), (excluded, 3.0), (negated, 1.5), (other_number, 3.0), (narrowed, 2.0), (placed, 1.0),
    (qualified, 1.5), (asked_otherwise, 1.0), (turned, 3.0),
    (lessened, 2.0), (exchanged, 2.0),
]  # fmt: skip


def paired(one: str, other: str, dice: random.Random) -> tuple[str, str, bool]:
    """Something appended to both: the same, or two of a kind."""
    kind: list[str] = dice.choice([
        [f"in {place}" for place in PLACES], [f"for {name}" for name in NAMES], TIMES, SCOPES,
        [f"for {number} days" for number in (2, 3, 5, 7, 10, 14, 30, 60, 90)],
        [f"over ${number}" for number in (20, 50, 100, 200, 500, 1000)],
        [f"on version {number}" for number in ("2", "3", "10", "11", "3.1", "4.2")],
    ])  # fmt: skip
    same = dice.random() < 0.3
    first, second = dice.sample(kind, 2)
    return _ended(f"{_bare(one)} {first}", one), _ended(f"{_bare(other)} {first if same else second}", other), same


def edited(text: str, edits: list[tuple[Edit, float]], dice: random.Random) -> tuple[str, str] | None:
    """By one of the rules that apply, and its name."""
    order = sorted(edits, key=lambda edit: dice.random() ** (1 / edit[1]), reverse=True)
    for edit, _ in order:
        if (changed := edit(text, dice)) is not None and changed != text:
            return changed, edit.__name__
    return None
