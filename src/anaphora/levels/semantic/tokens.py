"""A text as words, numbers and pieces of code. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import msgspec

from anaphora.levels.semantic.lexicon import FOLDED, Language, Lexicon, Mark, lexicon

Kind = Literal["word", "number", "code"]
Named = Literal["", "capital", "digits"]
"""With a capital letter where words have none, or with digits among its letters."""


class Token(msgspec.Struct, frozen=True, gc=False):
    """A word, a number or a piece of code. Marks are not kept, but for what they say of the words between them."""

    text: str
    """As written."""
    low: str
    """In lower case, contractions taken apart."""
    stem: str
    kind: Kind
    content: bool
    """A word with a meaning of its own."""
    opens: bool
    """The first of a sentence, where a capital letter says nothing."""
    marks: tuple[Mark, ...]
    """What the lexicon says of it."""
    after: str
    """The punctuation between this and the next token, without spaces."""
    named: Named = ""
    """Whether it is written as a name."""


_TOKEN = re.compile(
    r"""
    (?P<plain>[A-Za-zА-Яа-яЁё]?[a-zа-яё]+(?=[\s,;?!]|\.?(?:\s|$)))  # most words, found at once
    |(?P<short>(?<![\w.])(?:[^\W\d_]\.){2,}(?:[^\W\d_](?!\w))? | [ap]\.m\b)
    |(?P<code>```.*?```|`[^`\n]+`
        |(?:https?|ftp)://[^\s<>"]*[^\s<>".,;:!?)\]'] | www\.[^\s<>"]*[^\s<>".,;:!?)\]']
        |(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+
        |(?<![\w-])(?:--[A-Za-z][\w-]*|-[A-Za-z])(?==|\s|$|[,.;?!])
        |(?<![\w/])\w[\w.-]*(?:/[\w.-]+)*/[\w-]+\.[A-Za-z]\w*
        |(?<!\w)(?:~|\.{1,2})?(?:/[\w.-]*[\w-])+/?(?!\w) | [A-Za-z]:\\[^\s]+
        |[^\W\d]\w*\([^()\s]*\)
        |(?<!\w)(?=\w*[^\W_]_\w)\w+ | __\w+__
        |[a-z]+[A-Z]\w*(?:\.\w+)* | [^\W\d_]\w*(?:\.(?![A-Z][a-z']*(?:\s|$))[a-zA-Z_]\w*)+
        |(?<![\w.])\.[A-Za-z]\w*
        |[A-Za-z][+#]{1,2}(?!\w) | [A-Za-z]{1,10}(?:\+\+|\#)(?!\w))
    |(?P<number>[+-]?(?<![\w])[$€£¥₽]?\d+(?:[ \u202f]\d{3}(?!\d)|[.,:/-]\d+)*
        (?:\s?[%°$€£¥₽]|(?:st|nd|rd|th|º|ª|-?(?:й|я|е|го|му|ая|ое|ый|ой))\b)?)
    |(?P<word>[^\W_]+(?:['-][^\W_]+)*)
    """,
    re.VERBOSE | re.DOTALL,
)


Piece = tuple[Kind, str, bool, str]
"""As a text is cut: kind, as written, whether it opens a sentence, the punctuation after it."""


def tokenised(text: str, words: Lexicon) -> tuple[Token, ...]:
    return tokens_of(pieces_of(text), words.language)


_PLAIN_WORD = r"[A-Za-zА-Яа-яЁё][a-zа-яё]*(?:['-][a-zа-яё]+)*"
_PLAIN = re.compile(rf"(?:{_PLAIN_WORD}[,;]? )*{_PLAIN_WORD}[.?!]?")
"""Words with single spaces, no capitals inside, hardly a mark: most questions."""


def pieces_of(text: str) -> list[Piece]:
    if _PLAIN.fullmatch(text) is None:
        return _cut(text)
    pieces: list[Piece] = [
        ("word", word[:-1], False, word[-1]) if word[-1] in ",;.?!" else ("word", word, False, "") for word in text.split(" ")
    ]
    pieces[0] = ("word", pieces[0][1], True, pieces[0][3])
    return pieces


def _cut(text: str) -> list[Piece]:
    found = list(_TOKEN.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    pieces: list[Piece] = []
    opens = True
    for match, until in zip(found, ends, strict=False):
        between = text[match.end() : until]
        after = "" if between == " " else "".join(between.split())
        written, kind = match.group(), match.lastgroup or "word"
        if kind == "short" or (kind == "code" and written.lower() in FOLDED):
            kind, written = "word", written.replace(".", "")
        pieces.append(("number" if kind == "number" else "code" if kind == "code" else "word", written, opens, after))
        opens = between != " " and ("\n" in between or any(mark in ".?!:" for mark in after))
    return pieces


def tokens_of(pieces: Iterable[Piece | str], language: Language) -> tuple[Token, ...]:
    """A word alone opens no sentence, and no mark comes after it."""
    tokens: list[Token] = []
    for piece in pieces:
        if isinstance(piece, str):
            tokens += _word(piece, False, "", language)
            continue
        kind, written, opens, after = piece
        if kind == "word":
            tokens += _word(written, opens, after, language)
        elif kind == "number":
            tokens.append(Token(written, written.lower(), written.lower(), "number", True, opens, (), after))
        else:
            marks = lexicon(language).marks(written.lower())
            tokens.append(Token(written, written, written, "code", True, opens, marks, after))
    return tuple(tokens)


@lru_cache(maxsize=16384)
def _word(written: str, opens: bool, after: str, language: Language) -> tuple[Token, ...]:
    """Shared by all texts it stands in."""
    parts = _parts_of(written.lower(), language)
    last = len(parts) - 1
    return tuple(
        Token(
            written if place == 0 else part,
            part,
            stem,
            "word",
            content,
            opens and place == 0,
            marks,
            after if place == last else "",
            _named(written if place == 0 else part, part, content, opens and place == 0, lexicon(language)),
        )
        for place, (part, stem, content, marks) in enumerate(parts)
    )


def _named(text: str, low: str, content: bool, opens: bool, words: Lexicon) -> Named:
    if text == low and text.isalpha():
        return ""
    if any(map(str.isdigit, low)):
        return "digits"
    if text.isupper() and len(text) > 1 and (content or low in words.doubtful):
        return "capital"
    return "capital" if content and not opens and text[:1].isupper() else ""


def _parts_of(low: str, language: Language) -> tuple[tuple[str, str, bool, tuple[Mark, ...]], ...]:
    words = lexicon(language)
    if (long := words.contractions.get(low)) is not None:
        parts = long
    elif low.endswith("n't"):
        parts = (low[:-3], "not")
    else:
        head, mark, tail = low.rpartition("'")
        short = {"re": "are", "ve": "have", "ll": "will", "d": "would", "m": "am"}.get(tail) if mark else None
        parts = (head, short) if short else (low.removesuffix("'s"),)
    return tuple((part, words.stem(part), part not in words.function, words.marks(part)) for part in parts)
