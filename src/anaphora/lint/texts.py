"""Why two versions of one text differ: white space, a date, an id, a user's name, another order, or an edit."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher

from anaphora.lint.values import Json, parsed

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_DAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_CLOCK = (
    r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[AaPp]\.?[Mm]\b\.?)?(?: ?(?:Z|UTC|GMT|CES?T|[ECMP][SD]?T|[+-]\d{2}:?\d{2}))?"
)

# In this order: a later pattern sees only what the earlier ones left.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("uuid", re.compile(r"\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b")),
    ("timestamp", re.compile(rf"\b\d{{4}}-\d{{2}}-\d{{2}}(?:[T ,]+{_CLOCK})?")),
    ("timestamp", re.compile(rf"\b(?:{_DAY},? )?{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}(?:[, ]+(?:at )?{_CLOCK})?")),
    ("timestamp", re.compile(rf"\b(?:{_DAY},? )?\d{{1,2}} {_MONTH},? \d{{4}}(?:[, ]+(?:at )?{_CLOCK})?")),
    ("timestamp", re.compile(rf"\b\d{{1,4}}[/.]\d{{1,2}}[/.]\d{{2,4}}\b(?:[, ]+{_CLOCK})?")),
    ("timestamp", re.compile(rf"\b{_CLOCK}(?!\w)")),
    ("timestamp", re.compile(rf"\b{_DAY}\b(?=[,.]? |$)")),
    ("timestamp", re.compile(r"(?<![\w.])1[4-9]\d{8}(?:\d{3}|\.\d{1,9})?(?![\w.]*\d)")),
    ("user-field", re.compile(r"\b(?:user|usr|cust|customer|acct|account|sess|session|org|tenant)[-_][A-Za-z0-9]{4,}\b")),
    ("user-field", re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.]+\b")),
    (
        "request-id",
        re.compile(r"\b(?:req|request|trace|span|run|job|msg|call|toolu|chatcmpl|resp|fc|rs|corr)[-_][A-Za-z0-9]{6,}\b"),
    ),
    ("request-id", re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,64}\b|\b(?=[A-F]*\d)(?=\d*[A-F])[0-9A-F]{8,64}\b")),
    ("volatile-value", re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])")),
)
_USER_LINE = re.compile(
    r"^\W*(?:[\w ]*\b)?(?:user|customer|client|account|tenant|session|employee|member|visitor|username"
    r"|name|email|e-mail|user[ _-]?id|locale|timezone|organi[sz]ation)\b[\w ]*[:=]",
    re.IGNORECASE,
)
_USER_PHRASE = re.compile(
    r"\b(?:user|customer|client|talking to|speaking with|chatting with|assisting|helping|on behalf of)\b", re.IGNORECASE
)
_SPACES = re.compile(r"\s+")


def causes(before: str, after: str) -> tuple[str, ...]:
    """Codes that explain the whole difference; none where it is an edit."""
    if before == after:
        return ()
    if before.replace("\r\n", "\n") == after.replace("\r\n", "\n"):
        return ("line-endings",)
    if unicodedata.normalize("NFC", before) == unicodedata.normalize("NFC", after):
        return ("unicode-drift",)
    if _equal_as_json(parsed(before), parsed(after)):
        return ("json-key-order",) if _squeezed(before) != _squeezed(after) else ("whitespace-drift",)
    if _squeezed(before) == _squeezed(after):
        return ("whitespace-drift",)
    if reordered(before, after):
        return ("few-shot-shuffle",)
    return _volatile(before, after)


def reordered(before: str, after: str) -> bool:
    """The same parts (between blank lines, else lines) in another order; two parts at least that say something."""
    for separator in ("\n\n", "\n"):
        parts, others = ([part.strip() for part in text.split(separator)] for text in (before, after))
        if parts != others and len(parts) > 2 and Counter(parts) == Counter(others):
            return True
    # Lines that hold JSON objects may have been written with other keys first; that is for the JSON code to say.
    return False


def key_order_inside(before: str, after: str) -> bool:
    """The texts are equal but for lines or fences whose JSON has its keys in another order."""
    lines, others = before.split("\n"), after.split("\n")
    return len(lines) == len(others) and all(
        line == other or _equal_as_json(parsed(line.strip()), parsed(other.strip()))
        for line, other in zip(lines, others, strict=True)
    )


def first_offset(before: str, after: str) -> int:
    """The first character that differs."""
    return next(
        (index for index, (one, other) in enumerate(zip(before, after, strict=False)) if one != other),
        min(len(before), len(after)),
    )


def excerpt(text: str, offset: int, width: int = 60) -> str:
    """The text around an offset, on one line, white space made visible where it would not be seen."""
    start, stop = max(0, offset - width // 3), offset + width
    shown = text[start:stop].replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    return ("…" if start else "") + shown + ("…" if stop < len(text) else "")


def similar(before: str, after: str) -> bool:
    """An edit of the same text rather than another text: at least half of the lines (or words) are the same."""
    for split in (str.splitlines, str.split):
        parts, others = Counter(split(before)), Counter(split(after))
        shared = sum(len(part) * num for part, num in (parts & others).items())
        if 2 * shared >= max(len(before), len(after)):
            return True
    return False


def changed_lines(before: str, after: str) -> list[tuple[str, str]] | None:
    """Pairs of lines that were replaced one for one; None where lines were added or taken away."""
    lines, others = before.split("\n"), after.split("\n")
    if len(lines) == len(others):
        return [(line, other) for line, other in zip(lines, others, strict=True) if line != other]
    return None


def _volatile(before: str, after: str) -> tuple[str, ...]:
    if key_order_inside(before, after):
        return ("json-key-order",)
    pairs = changed_lines(before, after)
    if not pairs or len(pairs) > max(4, len(before.split("\n")) // 4):
        return ()
    found: list[str] = []
    for line, other in pairs:
        codes = _line_causes(line, other)
        if not codes:
            return ()
        found += [code for code in codes if code not in found]
    # A plain number beside a date or an id (a counter in the same line) is not worth a second finding.
    return tuple(found) if len(found) == 1 else tuple(code for code in found if code != "volatile-value")


def _line_causes(before: str, after: str) -> tuple[str, ...]:
    """Codes of the patterns whose matches differ when nothing else does; the label of a user's field; none for an edit."""
    masked, rest, other = _masked(before, after)
    explained = rest == other
    if _USER_LINE.match(before) and _USER_LINE.match(after) and _label(before) == _label(after):
        return masked if explained and masked and masked[0] == "timestamp" else ("user-field",)
    if explained:
        return masked
    return ("user-field",) if _names_a_user(rest, other) else ()


def _masked(before: str, after: str) -> tuple[tuple[str, ...], str, str]:
    """The codes of the patterns whose matches differ, and both texts without those matches."""
    found: list[str] = []
    for code, pattern in _PATTERNS:
        if before == after:
            break
        values, others = pattern.findall(before), pattern.findall(after)
        if not values or not others:
            continue
        if values != others and code not in found:
            found.append(code)
        before, after = pattern.sub("\0", before), pattern.sub("\0", after)
    return tuple(found), before, after


def _label(line: str) -> str:
    return re.split(r"[:=]", line, maxsplit=1)[0]


def _names_a_user(before: str, after: str) -> bool:
    """One short run of capitalised words differs, right behind words that speak of the user: "You are talking to Ada"."""
    words, others = before.split(), after.split()
    changes = [change for change in SequenceMatcher(None, words, others, autojunk=False).get_opcodes() if change[0] != "equal"]
    if len(changes) != 1 or changes[0][0] != "replace":
        return False
    _, start, stop, other_start, other_stop = changes[0]
    replaced = words[start:stop] + others[other_start:other_stop]
    if max(stop - start, other_stop - other_start) > 4 or not all(
        word[:1].isupper() or word[:1].isdigit() for word in replaced
    ):
        return False
    return bool(_USER_PHRASE.search(" ".join(words[max(0, start - 4) : start])))


def _squeezed(text: str) -> str:
    return _SPACES.sub("", text)


def _equal_as_json(before: Json, after: Json) -> bool:
    return before is not None and before == after and type(before) is type(after)
