"""Where the prefix of one request stops being the prefix of the next, and why.

Pure: two layouts in, causes out. Precision goes before recall. Only what was most likely not meant is a cause: an appended
conversation, another question over the same start, a compaction and another agent's request are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

import msgspec

from anaphora.lint import texts
from anaphora.lint.layout import Layout, Piece
from anaphora.lint.sessions import common, converses, shared_tokens, start_of
from anaphora.lint.values import Json, Place, as_text, compact, difference, mapping, parsed, string
from anaphora.prompt import Section

COMPACTED = 0.7
"""A request this much shorter than the one before was cut on purpose."""

DELIBERATE = frozenset({"system-changed", "tool-set-changed", "tool-schema-drift"})
"""Between two conversations these are no drift but two applications, or two versions of one."""


class Cause(msgspec.Struct, frozen=True):
    code: str
    place: Place
    offset: int | None
    before: str
    after: str
    lost_tokens: int
    """What both requests have behind the break, and could have shared."""


def prefix_breaks(before: Layout, after: Layout) -> list[Cause]:
    """Every cause by which `after` cannot use the prefix of `before`, each code once; none for ordinary traffic."""
    same_conversation = converses(before, after)
    found = [*_tools(before, after, same_conversation), *_system(before, after, same_conversation)]
    if same_conversation:
        found += _messages(before, after)
    causes: dict[str, Cause] = {}
    for cause in found:
        if same_conversation or cause.code not in DELIBERATE:
            causes.setdefault(cause.code, cause)
    return list(causes.values())


def chain_breaks(before: Layout, after: Layout, stored: int) -> list[Cause]:
    """Why `after`, which continues the stored answer to `before`, cannot use its prefix: tools and instructions come anew with
    every body, and stand in front of the history that is stored. `stored`: tokens of `before` and of all that it continues."""
    found = [*_tools(before, after, True), *_system(before, after, True)]
    one, other = _section(before, "system"), _section(after, "system")
    if one and not other:
        found.append(Cause("instructions-dropped", ("instructions",), None, _shown(one[0]), "", 0))
    same_instructions = [piece.content for piece in one] == [piece.content for piece in other]
    if same_instructions and _section(before, "tools") and not _section(after, "tools"):
        found.append(Cause("tool-set-changed", ("tools",), None, "with tools", "without", 0))
    if before.model != after.model:
        found = [Cause("model-changed", ("model",), None, before.model, after.model, 0)]
    causes: dict[str, Cause] = {}
    for cause in found:
        causes.setdefault(cause.code, msgspec.structs.replace(cause, lost_tokens=stored))
    return list(causes.values())


def _section(layout: Layout, section: Section) -> tuple[Piece, ...]:
    return tuple(piece for piece in layout.pieces if piece.section == section)


def _tools(before: Layout, after: Layout, same_conversation: bool) -> Iterator[Cause]:
    one, other = _section(before, "tools"), _section(after, "tools")
    if [piece.content for piece in one] == [piece.content for piece in other]:
        return
    start = _first_difference(one, other)
    lost = shared_tokens(before.pieces[start:], after.pieces[start:])
    names, others = [_name(piece) for piece in one], [_name(piece) for piece in other]
    if Counter(names) != Counter(others):
        # Another agent of the same program has other tools and another system prompt; that is no drift.
        kept = Counter(names) & Counter(others)
        systems = [[piece.content for piece in _section(layout, "system")] for layout in (before, after)]
        if same_conversation and 2 * sum(kept.values()) >= max(len(names), len(others)) and systems[0] == systems[1]:
            gone, new = Counter(names) - kept, Counter(others) - kept
            yield Cause("tool-set-changed", ("tools",), None, _listed(gone, "without"), _listed(new, "with"), lost)
        return
    if names != others and len(set(names)) == len(names):
        index = next(index for index, (name, name_2) in enumerate(zip(names, others, strict=True)) if name != name_2)
        yield Cause("tool-order", ("tools", index), None, ", ".join(names[index:][:4]), ", ".join(others[index:][:4]), lost)
    by_name = dict(zip(names, one, strict=True))
    for piece in other:
        known = by_name[_name(piece)]
        if known.content != piece.content:
            yield from _piece(known, piece, "tool-schema-drift", lost + _common_part(known, piece))


def _system(before: Layout, after: Layout, same_conversation: bool) -> Iterator[Cause]:
    one, other = _section(before, "system"), _section(after, "system")
    if [piece.content for piece in one] == [piece.content for piece in other] or not one or not other:
        return
    first = _first_difference(one, other)
    start, start_2 = start_of(before, "system") + first, start_of(after, "system") + first
    behind = shared_tokens(before.pieces[start:], after.pieces[start_2:])
    if len(one) != len(other):
        if same_conversation and texts.similar(*("\n".join(piece.text or "" for piece in pieces) for pieces in (one, other))):
            yield _edit("system-changed", one[first:], other[first:], after, behind)
        return
    if len(one) > 1 and Counter(piece.content for piece in one) == Counter(piece.content for piece in other):
        yield _edit("few-shot-shuffle", one[first:], other[first:], after, behind)
        return
    for piece, piece_2 in zip(one, other, strict=True):
        if piece.content != piece_2.content:
            yield from _piece(piece, piece_2, "system-changed", behind + _common_part(piece, piece_2))


def _messages(before: Layout, after: Layout) -> Iterator[Cause]:
    one, other = _section(before, "messages"), _section(after, "messages")
    first = _first_difference(one, other)
    one, other = one[first:], other[first:]
    if not one or not other or after.total < COMPACTED * before.total:
        return
    if len(one) == 1 and one[0].content == other[-1].content:
        return  # a standing last message, and the history grows in front of it
    shuffled = _shuffled(one, other)
    if shuffled:
        lost = sum(piece.tokens for piece in one[:shuffled]) + shared_tokens(one[shuffled:], other[shuffled:])
        yield _edit("few-shot-shuffle", one, other, after, lost)
        return
    # Interned, because comparing long contents again and again is what would be slow.
    numbers: dict[bytes, int] = {}
    ids, ids_2 = ([numbers.setdefault(piece.content, len(numbers)) for piece in pieces] for pieces in (one, other))
    steps = SequenceMatcher(None, ids, ids_2, autojunk=False).get_opcodes()
    kept = sum(sum(piece.tokens for piece in one[i1:i2]) for tag, i1, i2, _, _ in steps if tag == "equal")
    if not kept:
        # Only the last message differs: another question, unless it is the same one with another time or id in it.
        if one[0].role == other[0].role and not _is_extended(one[0], other[0]):
            yield from _piece(one[0], other[0], None, _common_part(one[0], other[0]))
        return
    if 2 * kept < sum(piece.tokens for piece in one if piece.kind != "image"):
        return
    last_equal = max(index for index, step in enumerate(steps) if step[0] == "equal")
    for tag, i1, i2, j1, j2 in steps[:last_equal]:
        lost = sum(piece.tokens for kind, k1, k2, _, _ in steps if kind == "equal" and k1 >= i1 for piece in one[k1:k2])
        if tag == "delete":
            # Earlier thinking may be left out; the API takes it out itself for many models.
            if any(piece.kind != "thinking" for piece in one[i1:i2]):
                yield _edit("history-dropped", one[i1:i2], other[j1:], after, lost)
        elif tag == "insert":
            yield _edit("history-edited", one[i1:], other[j1:j2], after, lost)
        elif tag == "replace" and i2 - i1 == j2 - j1:
            for piece, piece_2 in zip(one[i1:i2], other[j1:j2], strict=True):
                if piece.kind == piece_2.kind == "image":
                    yield _edit("image-reencoded", (piece,), (piece_2,), after, lost + piece.tokens)
                else:
                    yield from _piece(piece, piece_2, "history-edited", lost + _common_part(piece, piece_2))
        elif tag == "replace":
            yield _edit("history-edited", one[i1:i2], other[j1:j2], after, lost)


def extended(before: Layout, after: Layout) -> Cause | None:
    """The last user message of `before` stands in `after` with more behind it (P7)."""
    num = common(before, after)
    if not before.pieces or before.pieces[-1].role != "user" or num < len(before.pieces) - 1 or num >= len(after.pieces):
        return None
    last, new = before.pieces[-1], after.pieces[num]
    if num == len(before.pieces) - 1 and _is_extended(last, new) and last.message == new.message:
        text = new.text or ""
        offset = len(last.text or "")
        return Cause(
            "same-message-extended", new.text_place, offset, "(end of the message)", texts.excerpt(text, offset), before.total
        )
    if num == len(before.pieces) and new.message == last.message and new.role == last.role:
        return Cause("same-message-extended", new.place, None, "(end of the message)", _shown(new), before.total)
    return None


def _piece(one: Piece, other: Piece, otherwise: str | None, lost: int) -> Iterator[Cause]:
    """Causes for one piece in two versions; `otherwise` names an edit that nothing explains, if that is worth a word."""
    if one.text is not None and other.text is not None:
        place: Place = other.text_place
        before: Json = one.text
        after: Json = other.text
        order_only = False
    else:
        found = difference(one.value, other.value)
        if found is None:
            return
        place, before, after, order_only = (*other.place, *found.place), found.before, found.after, found.order_only
    if order_only or _order_of_keys_in_text(before, after):
        yield _cause("json-key-order", place, as_text(before), as_text(after), lost)
        return
    codes: tuple[str, ...] = ()
    if isinstance(before, str) and isinstance(after, str):
        codes = texts.causes(before, after)
    elif isinstance(before, int | float) and isinstance(after, int | float):
        codes = texts.causes(str(before), str(after))
    for code in codes:
        yield _cause(code, place, as_text(before), as_text(after), lost)
    edited = isinstance(before, str) and isinstance(after, str) and not texts.similar(before, after)
    if not codes and otherwise is not None and not (edited and otherwise == "system-changed"):
        yield _cause(otherwise, place, as_text(before), as_text(after), lost)


def _order_of_keys_in_text(before: Json, after: Json) -> bool:
    """A string that is JSON (arguments of a call, a tool's result) with the same members in another order."""
    if not isinstance(before, str) or not isinstance(after, str):
        return False
    one, other = parsed(before), parsed(after)
    return one is not None and one == other and compact(one) != compact(other)


def _cause(code: str, place: Place, before: str, after: str, lost: int) -> Cause:
    offset = texts.first_offset(before, after)
    return Cause(code, place, offset, texts.excerpt(before, offset), texts.excerpt(after, offset), lost)


def _edit(code: str, one: Sequence[Piece], other: Sequence[Piece], after: Layout, lost: int) -> Cause:
    place = other[0].place if other else after.pieces[-1].place
    return Cause(code, place, None, _shown(one[0]) if one else "", _shown(other[0]) if other else "", lost)


def _shown(piece: Piece) -> str:
    return texts.excerpt(piece.text if piece.text is not None else compact(piece.value), 0, 80)


def _common_part(one: Piece, other: Piece) -> int:
    """Tokens of a changed piece behind its first difference."""
    text, text_2 = (piece.text if piece.text is not None else compact(piece.value) for piece in (one, other))
    if not text or not text_2:
        return 0
    offset = texts.first_offset(text, text_2)
    end = 0
    shortest = min(len(text), len(text_2)) - offset
    while end < shortest and text[-1 - end] == text_2[-1 - end]:
        end += 1
    return other.tokens * max(end, _same_words(text[offset:], text_2[offset:])) // len(text_2)


def _same_words(one: str, other: str) -> int:
    """Characters of the lines that both have, in any order: what is left when the volatile one has gone elsewhere."""
    shared = Counter(one.splitlines()) & Counter(other.splitlines())
    return min(len(other), sum((len(line) + 1) * num for line, num in shared.items()))


def _first_difference(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (piece, piece_2) in pairs if piece.content != piece_2.content), min(len(one), len(other)))


def _shuffled(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    """Length of the run of pieces that is the same in another order; 0 if there is none."""
    balance: Counter[bytes] = Counter()
    for num, (piece, piece_2) in enumerate(zip(one, other, strict=False), 1):
        balance[piece.content] += 1
        balance[piece_2.content] -= 1
        if not any(balance.values()):
            return num if num > 1 else 0
    return 0


def _is_extended(one: Piece, other: Piece) -> bool:
    return bool(one.text) and (other.text or "").startswith(one.text or "") and one.role == other.role


def _name(piece: Piece) -> str:
    value = mapping(piece.value)
    return string(value.get("name")) or string(mapping(value.get("function")).get("name")) or string(value.get("type"))


def _listed(names: Counter[str], word: str) -> str:
    return f"{word} {', '.join(sorted(names.elements()))}" if names else ""
