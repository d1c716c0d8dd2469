"""A text taken apart once, for all that compare it: words, their stems, its language, and its normal form. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal

import msgspec

from anaphora.levels.semantic.facts import Facts, facts_of
from anaphora.levels.semantic.lexicon import FOLDED, FOREIGN, LANGUAGES, MEANINGFUL, Language, lexicon
from anaphora.levels.semantic.tokens import Token, tokenised

LONGEST: Final = 2_000
"""Characters of a text that is taken apart. What is longer is a document more than a question."""


class Prepared(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What is computed of a text once, and compared often. Equal where the texts are."""

    text: str
    language: Language | Literal[""]
    """Empty: not known, or not one of those that have a lexicon."""
    normal: str
    tokens: tuple[Token, ...]
    """In their order; none for a text that is too long."""
    content: tuple[str, ...]
    """Stems of the tokens with content, in their order."""
    facts: Facts
    """What guards compare."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prepared) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=256)
def prepare(text: str) -> Prepared:
    """About 0.1 ms for a question."""
    if len(text) > LONGEST:
        return Prepared(text=text, language="", normal=normal_form(text), tokens=(), content=(), facts=Facts())
    plain = plainly(text)
    language = language_of(text)
    words = lexicon(language or "en")
    tokens = tokenised(plain, words)
    return Prepared(
        text=text,
        language=language,
        normal=normal_form(text, plain),
        tokens=tokens,
        content=content_of(tokens),
        facts=facts_of(tokens, words),
    )


def content_of(tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple([token.stem for token in tokens if token.content])


# Characters ------------------------------------------------------------------------------------------------------------

_SAME = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼ`´′", "'"),
        **dict.fromkeys("“”„‟«»″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys(
            "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\v\f", " "
        ),
        **dict.fromkeys("\u200b\u2060\ufeff\u00ad", ""),
        **dict.fromkeys("\r\u2028\u2029\u0085", "\n"),
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
        "…": "...",
        "¿": "",
        "¡": "",
    }
)
"""Characters that differ in looks alone. NFKC would go too far: it makes 42 of 4²."""

_CODE_SPANS = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def plainly(text: str) -> str:
    """One way of writing each character, code between back quotes left as it is."""
    text = unicodedata.normalize("NFC", text)
    if "`" not in text:
        return text.translate(_SAME)
    pieces, end = [], 0
    for span in _CODE_SPANS.finditer(text):
        pieces += [text[end : span.start()].translate(_SAME), span.group()]
        end = span.end()
    return "".join([*pieces, text[end:].translate(_SAME)])


# Normal form -----------------------------------------------------------------------------------------------------------

_INDENTED = re.compile(r"```|\n(?: {2,}|\t)\S")
_SPACE = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n\s*")
_BEFORE_MARK = re.compile(r" (?:(?=[,;:?!](?:\s|$))|(?<=[\w\"'?!)] )(?=\.(?:\s|$)))")
"""Where spaces are single."""
_REPEATED = re.compile(r"([?!])(?:\s*[?!])+")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


def normal_form(text: str, plain: str | None = None) -> str:
    """Texts with equal normal forms say the same, whoever reads them: they differ in case, spaces, marks at the end and ways of
    writing a character. What may change the meaning stays: US and us, C++ and C, -5 and 5. `plain` is the text `plainly`, where
    that is known already."""
    if len(text) > 10 * LONGEST or (("\n" in text or "`" in text) and _INDENTED.search(text)):
        # A document, or code, of which spaces are part.
        return unicodedata.normalize("NFC", text).strip()
    plain = plainly(text) if plain is None else plain
    plain = _LINES.sub("\n", _SPACE.sub(" ", plain)).strip() if "\n" in plain else " ".join(plain.split())
    if " ." in plain or " ?" in plain or " ," in plain or " !" in plain or " :" in plain or " ;" in plain:
        plain = _BEFORE_MARK.sub("", plain)
    if plain.count("?") + plain.count("!") > 1:
        plain = _REPEATED.sub(r"\1", plain)
    if "`" in plain:
        return plain
    return _folded(_without_end(plain))


def _without_end(text: str) -> str:
    """Without the marks at the end, where the words say as much: `It works?` asks, `It works.` does not; 5! is 120."""
    bare = text.rstrip(".").rstrip()
    if (bare.endswith("!") and not bare[:-1].endswith(tuple("0123456789)]"))) or (bare.endswith("?") and _asks(bare)):
        bare = bare[:-1].rstrip()
    if not bare:
        return text
    return bare if bare == text else _without_end(bare)


def _asks(text: str) -> bool:
    if _STOP.search(text, 0, len(text) - 1):
        return False
    first = _WORD.match(text)
    return first is not None and first.group().lower() in _ASKING


_STOP = re.compile(r"[.?!;\n]")
_ASKING = frozenset().union(*(lexicon(language).asking for language in LANGUAGES))


def _folded(text: str) -> str:
    shouted = text.isupper() and len(_WORD.findall(text)) > 2
    # Most have no capitals.
    return " ".join(
        [
            part if part.islower() else _folded_part(part, opens=place == 0, shouted=shouted)
            for place, part in enumerate(text.split(" "))
        ]
    )


def _folded_part(text: str, *, opens: bool, shouted: bool) -> str:
    if text.isalpha():
        low = text.lower()
        return low if _may_fold(text, low, first=opens, shouted=shouted, beside="") else text
    pieces, end = [], 0
    for word in _WORD.finditer(text):
        written = word.group()
        low = written.lower()
        if written == low:
            continue
        first = opens and word.start() == 0
        if _may_fold(written, low, first=first, shouted=shouted, beside=text[word.end() : word.end() + 1]):
            pieces += [text[end : word.start()], low]
            end = word.end()
    return "".join([*pieces, text[end:]])


def _may_fold(written: str, low: str, *, first: bool, shouted: bool, beside: str) -> bool:
    if low in FOLDED:
        return True
    if beside and beside in "_\\/=(@#+0123456789":
        return False  # part of a name in code, an address, C++
    if len(written) == 1:
        return low == "i" or (first and low in "aoyeuаиоуявкс")
    if low in MEANINGFUL:
        return False
    if written.isupper():
        return shouted or len(written) > 5
    return written[1:].islower() or written[1:].replace("'", "").replace("-", "").islower()


# Language --------------------------------------------------------------------------------------------------------------

_LETTERS = re.compile(r"[^\W\d_]+")
_CYRILLIC = re.compile(r"[\u0400-\u04ff]")
_STRANGE = re.compile(
    r"[^\u0000-\u024f\u0400-\u04ff\u1e00-\u1eff\u2000-\u2bff\ufe00-\ufe0f\U0001f000-\U0001faff]|[іїєґўљњћђџј]"
)
"""Letters of other scripts, and those of Cyrillic that Russian does not have."""
_NOT_ENGLISH_OR_SPANISH = re.compile(r"[äößåæøœçãõàèìòùâêîôûëïýþðłżźśćęąňřšžčěůőűğışțșđ]")
_SPANISH_MARKS = re.compile(r"[ñ¿¡áéíóú]")


def language_of(text: str) -> Language | Literal[""]:
    """By its letters and its small words. Empty where another language is likelier than those with a lexicon."""
    low = unicodedata.normalize("NFC", text).lower()
    plain = low.isascii()
    if not plain and _STRANGE.search(low):
        return ""
    if not plain and _CYRILLIC.search(low):
        return "ru"
    words = _LETTERS.findall(low)
    english = sum(map(_ENGLISH.__contains__, words))
    spanish = sum(map(_SPANISH.__contains__, words))
    if not plain:
        spanish += len(_SPANISH_MARKS.findall(low))
    foreign = sum(map(FOREIGN.__contains__, words))
    # Many small words of French or Portuguese are Spanish as well.
    if max(1, english, spanish) <= 2 * foreign or (max(english, spanish) == 0 and _NOT_ENGLISH_OR_SPANISH.search(low)):
        return ""
    return "es" if spanish > english else "en"


_ENGLISH = lexicon("en").function | lexicon("en").contractions.keys()
_SPANISH = lexicon("es").function
