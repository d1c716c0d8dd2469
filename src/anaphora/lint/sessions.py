"""Which recorded requests belong together, and which earlier one a request continues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from anaphora.lint import texts
from anaphora.lint.layout import Layout, Piece
from anaphora.prompt import Section

LOOK_BACK = 24
"""Earlier requests (or sessions) a request is compared with."""

OPEN = 100
"""Conversations of one file that a request without a session id may belong to: the latest."""


class Session(msgspec.Struct, frozen=True):
    name: str
    layouts: tuple[Layout, ...]
    """In order of time where every request has one, else of appearance."""


def group(layouts: Iterable[Layout]) -> list[Session]:
    """By the session that was recorded; else every file by conversation: requests that share a message."""
    named: dict[tuple[str, str], list[Layout]] = {}
    unnamed: dict[tuple[str, str], list[Layout]] = {}
    for layout in layouts:
        recorded = layout.recorded
        if recorded.session is not None:
            named.setdefault((recorded.tenant, recorded.session), []).append(layout)
        else:
            unnamed.setdefault((recorded.tenant, recorded.file), []).append(layout)
    sessions = [Session(name, tuple(in_time(members))) for (_, name), members in named.items()]
    for (_, file), members in unnamed.items():
        conversations = _conversations(in_time(members))
        for number, conversation in enumerate(conversations, 1):
            sessions.append(Session(f"{file}#{number}" if len(conversations) > 1 else file, tuple(conversation)))
    return sessions


def in_time(layouts: Sequence[Layout]) -> list[Layout]:
    """By time where all have one; equal times keep their order."""
    if any(layout.recorded.time_s is None for layout in layouts):
        return list(layouts)
    return sorted(layouts, key=lambda layout: layout.recorded.time_s or 0.0)


def common(before: Layout, after: Layout) -> int:
    """How many leading pieces are the same."""
    num = 0
    for one, other in zip(before.pieces, after.pieces, strict=False):
        if one.content != other.content:
            break
        num += 1
    return num


def start_of(layout: Layout, section: Section) -> int:
    """Index of the first piece of a section, or where it would stand."""
    order = ("tools", "system", "messages")
    return sum(order.index(piece.section) < order.index(section) for piece in layout.pieces)


def converses(before: Layout, after: Layout) -> bool:
    """The later request goes on with the earlier one's conversation: it begins like it, or keeps most of it and its end."""
    # Without images: one that was encoded anew must not hide that the words are the same.
    one, other = (
        [piece for piece in layout.pieces if piece.section == "messages" and piece.kind != "image"]
        for layout in (before, after)
    )
    if not one or not other:
        return False
    if _begins_like(one[0], other[0]):
        return True
    # Its end, and more behind it: two conversations about one thing may well have the same long document in them.
    ends = [index for index, piece in enumerate(other) if piece.content == one[-1].content]
    return bool(ends) and ends[-1] < len(other) - 1 and 2 * shared_tokens(one, other) >= sum(piece.tokens for piece in one)


def _begins_like(one: Piece, other: Piece) -> bool:
    """The same first message, or the same with more in it, or with another time or id in it."""
    if one.content == other.content:
        return True
    first, then = one.text, other.text
    if not first or not then or one.role != other.role:
        return False
    if then.startswith(first):
        return True
    near = abs(len(first) - len(then)) <= 64 and (first[:24] == then[:24] or first[-24:] == then[-24:])
    return near and bool(texts.causes(first, then))


def shared_tokens(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    """Tokens of the pieces that both have, in whatever order."""
    rest = Counter(piece.content for piece in one)
    tokens = 0
    for piece in other:
        if rest[piece.content] > 0:
            rest[piece.content] -= 1
            tokens += piece.tokens
    return tokens


def predecessor(earlier: Sequence[Layout], layout: Layout) -> Layout | None:
    """The latest of those that share most with it, in order or not; None if none shares anything."""
    best, best_score = None, 0
    for candidate in reversed(earlier[-LOOK_BACK:]):
        score = affinity(candidate, layout)
        if score > best_score:
            best, best_score = candidate, score
    return best


def continued(earlier: Sequence[Layout], layout: Layout) -> Layout | None:
    """The request whose stored answer `layout` continues: by the answer's id where answers were recorded too, else the one
    before it in the session."""
    name = layout.recorded.body.get("previous_response_id")
    by_id = {answer: one for one in earlier if (answer := one.recorded.answer_id)}
    if isinstance(name, str) and by_id:
        return by_id.get(name)
    return earlier[-1] if earlier else None


def affinity(before: Layout, after: Layout) -> int:
    """Tokens of the common prefix, and of the pieces behind it that both have."""
    num = common(before, after)
    return after.end(num) + shared_tokens(before.pieces[num:], after.pieces[num:])


def kinship(before: Layout, after: Layout) -> int:
    """Characters of the lines that two tools and system parts share: whether they are the same application's."""
    one, other = (
        Counter(line for piece in layout.pieces if piece.section != "messages" for line in _lines(piece.text, piece.content))
        for layout in (before, after)
    )
    return sum(len(line) * num for line, num in (one & other).items())


def _lines(text: str | None, content: bytes) -> list[str]:
    return text.splitlines() if text is not None else [content.decode("utf-8", "replace")]


def _conversations(layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Each request goes to the conversation it shares most with, of those it goes on with; else it begins one."""
    found: list[list[Layout]] = []
    for layout in layouts:
        best, best_score = None, (-1, -1)
        for conversation in reversed(found[-OPEN:]):
            # Not only the last one: an answer may have been asked for again, or from an earlier point.
            for one in reversed(conversation[-4:]):
                if converses(one, layout):
                    score = common(one, layout) - start_of(layout, "messages"), affinity(one, layout)
                    if score > best_score:
                        best, best_score = conversation, score
        if best is None:
            best = []
            found.append(best)
        best.append(layout)
    return found
