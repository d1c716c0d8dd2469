"""A question as the verifier sees it: computed once per text, compared often."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from anaphora.levels.semantic.texts import Prepared
from anaphora.levels.semantic.tokens import Kind, Token
from anaphora.levels.semantic.words import UNKNOWN, words


def words_of(text: str) -> frozenset[str]:
    """Written apart by spaces."""
    return frozenset(text.split())


NEGATIONS: Final = words_of(
    "not no never none nothing nobody nowhere neither nor without cannot no ni nunca jamás nadie nada sin tampoco "
    "не ни нет без никогда нельзя ничего никто"
)
PARTICLES: Final = words_of(
    "in out on off up down over under above below before after with without from to for by into inside outside "
    "between against until since within during except through across back away instead than about at of while as if "
    "unless"
)
COUNTER_PARTICLES: Final = frozenset(
    frozenset(pair.split("/"))
    for pair in words_of(
        "in/out on/off up/down over/under above/below before/after with/without from/to for/against into/out inside/outside "
        "until/since to/against during/after during/before for/from in/before in/after for/without "
        "before/while after/while if/unless within/outside within/after"
    )
)
QUANTIFIERS: Final = words_of(
    "all every each any some both either neither more most less least fewer only just many much few several enough "
    "no none another other same first last next previous always never sometimes often usually again once twice half "
    "double one two instead too already still yet even except also"
)
MODALS: Final = {
    **dict.fromkeys(words_of("can could able possible may might allowed permitted"), "may"),
    **dict.fromkeys(words_of("must should shall have need needs required ought obliged mandatory compulsory"), "must"),
    **dict.fromkeys(words_of("will would going"), "will"),
    **dict.fromkeys(words_of("was were did had used"), "past"),
}
PERSONS: Final = {
    **dict.fromkeys(words_of("i me my mine myself we us our ours"), "me"),
    **dict.fromkeys(words_of("you your yours yourself"), "you"),
    **dict.fromkeys(words_of("he him his himself"), "he"),
    **dict.fromkeys(words_of("she her hers herself"), "she"),
    **dict.fromkeys(words_of("they them their theirs someone somebody"), "they"),
}
AUXILIARIES: Final = words_of("is are was were do does did can could will would should must may might has have had am isn't")
AMOUNTS: Final = words_of("much many long often far old tall high big large fast quickly soon heavy late early deep wide hot")
_COUNTING: Final = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
)
NUMERALS: Final = {word: str(value) for value, word in enumerate(_COUNTING.split(), 2)} | {
    "thirty": "30",
    "forty": "40",
    "fifty": "50",
    "sixty": "60",
    "ninety": "90",
    "hundred": "100",
    "thousand": "1000",
    "twice": "2",
}
FRAME: Final = words_of(
    "way ways step steps method procedure process possible able explain describe tell know wonder wondering help "
    "please advice thing things something anything question info information best approach recommend want like need "
    "try trying get go let find happen happens work works mean exactly really actually someone anybody somebody "
    "person people guy hey hi thanks"
)
"""Words that carry the asking more than the question."""


class Reading:
    """What the features are made of."""

    __slots__ = (
        "bigrams", "content", "frame", "kind", "language", "low", "modals", "names", "negations",
        "num_tokens", "numbers", "objects", "particles", "persons", "quantifiers", "sense", "sequence", "size",
        "stems", "trigrams", "unknown", "vectors", "vocabulary", "weights", "written",
    )  # fmt: skip

    def __init__(self, prepared: Prepared) -> None:
        lexicon = words()
        tokens = prepared.tokens
        self.language = prepared.language
        self.written = [token.low for token in tokens]
        self.num_tokens = len(tokens)
        self.vocabulary = frozenset(self.written)
        listed = self.vocabulary & _LISTED
        self.negations = sum([self.written.count(word) for word in listed & NEGATIONS])
        self.particles = listed & PARTICLES
        self.quantifiers = listed & QUANTIFIERS
        self.modals = frozenset([MODALS[word] for word in listed if word in MODALS])
        self.persons = frozenset([PERSONS[word] for word in listed if word in PERSONS])
        self.kind = _kind(self.written)
        self.numbers = frozenset(_numbers(tokens))
        self.names = frozenset([token.low for token in tokens if token.text[:1].isupper() and _is_name(token)])
        # A list, not a set: order matters, and a word may come twice.
        self.content = [token for token in tokens if token.content and token.low not in QUANTIFIERS]
        self.low = [token.low for token in self.content]
        self.stems = [token.stem for token in self.content]
        known = [_known(token.low, token.stem, token.kind) for token in self.content]
        self.sequence: list[int | str] = [word.same for word in known]
        self.frame = [word.frame for word in known]
        self.unknown = [word.unknown for word in known]
        self.weights = [word.weight for word in known]
        found = [word.number for word in known]
        self.vectors: npt.NDArray[np.float32] = lexicon.vectors(found) if found else np.zeros((1, 64), np.float32)
        self.sense = _unit(np.array(self.weights or [0.0], dtype=np.float32).dot(self.vectors))
        self.objects = _objects(tokens)
        self.bigrams = frozenset(pairwise(self.written))
        joined = " ".join(self.written)
        self.trigrams = frozenset(zip(joined, joined[1:], joined[2:], strict=False))
        self.size = len(prepared.text)


class _Known(NamedTuple):
    """What is to be known of a word with content, wherever it stands."""

    number: int
    """In the lexicon."""
    same: int | str
    """Two forms of one word are one; what the lexicon does not know is told apart by its stem."""
    frame: bool
    unknown: bool
    weight: float


@lru_cache(maxsize=16384)
def _known(low: str, stem: str, kind: Kind) -> _Known:
    lexicon = words()
    number = lexicon.find(low)
    lemma = lexicon.lemma(number)
    frame = low in FRAME
    weight = 0.15 if frame else (1.0 if kind == "number" else lexicon.weight(lemma))
    return _Known(number, stem if lemma == UNKNOWN else lemma, frame, lemma == UNKNOWN, weight)


_LISTED: Final = NEGATIONS | PARTICLES | QUANTIFIERS | MODALS.keys() | PERSONS.keys()


@lru_cache(maxsize=32)
def read(prepared: Prepared) -> Reading:
    """Of the latest texts remembered."""
    return Reading(prepared)


def _unit(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return vector / np.float32(float(np.float32(math.sqrt(vector.dot(vector)))) + 1e-6)


def _is_name(token: Token) -> bool:
    """Of one with a capital letter."""
    return token.kind == "word" and (not token.opens or token.text[1:2].isupper()) and token.low != "i"


def _numbers(tokens: tuple[Token, ...]) -> list[str]:
    found = []
    for token in tokens:
        if token.kind == "number":
            digits = token.low.replace(",", "").rstrip("%°$€£¥₽ ").lstrip("$€£¥₽+")
            found.append(digits.removesuffix("st").removesuffix("nd").removesuffix("rd").removesuffix("th"))
        elif (value := NUMERALS.get(token.low)) is not None:
            found.append(value)
        elif token.kind == "word" and not token.low.isalpha() and any(map(str.isdigit, token.low)):
            found.append(token.low)
    return found


def _kind(written: list[str]) -> str:
    """What is asked for: a yes or no, a reason, an amount, ... Empty where nothing is asked."""
    for place, word in enumerate(written[:8]):
        after = written[place + 1] if place + 1 < len(written) else ""
        if word == "how":
            return after if after in AMOUNTS else ("much" if after in ("cheap", "expensive") else "how")
        if word in ("what", "which", "whats"):
            rest = written[place + 1 : place + 5]
            for kind, signs in _SIGNS:
                if not signs.isdisjoint(rest):
                    return kind
            return "what"
        if word in ("when", "where", "why", "who", "whom", "whose"):
            return "who" if word in ("whom", "whose") else word
        if word in AUXILIARIES and place == 0 and after not in ("not",):
            return (
                ""
                if after in ("you",) and len(written) > place + 2 and written[place + 2] in ("explain", "tell")
                else "whether"
            )
    return ""


_SIGNS: Final = (
    ("when", words_of("time date day hour year month deadline")),
    ("why", words_of("reason cause causes makes")),
    ("much", words_of("cost price fee fees amount charge fare")),
    ("long", words_of("duration length period")),
    ("how", words_of("way steps method procedure process command")),
    ("where", words_of("place location folder")),
    ("who", words_of("person author")),
)


def _objects(tokens: tuple[Token, ...]) -> tuple[tuple[str, str], ...]:
    """(`from`, `york`) where that is what follows."""
    found = []
    waiting = ""
    for token in tokens:
        if token.low in PARTICLES:
            waiting = token.low
        elif token.content and waiting:
            found.append((waiting, token.stem))
            waiting = ""
    return tuple(dict.fromkeys(found))
