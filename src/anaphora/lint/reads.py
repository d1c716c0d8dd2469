"""Why a prefix that earlier requests share was not in the cache: what was marked, how long ago, how far away, how many at once.

Only asked where the prefix itself did not break.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import msgspec

from anaphora.breakpoints import Plan, plan, positions
from anaphora.lint.breaks import Cause, extended
from anaphora.lint.layout import Layout
from anaphora.lint.sessions import LOOK_BACK, common
from anaphora.lint.values import Place
from anaphora.profiles import Profile
from anaphora.prompt import TTL_S

PARALLEL_S = 1.0
"""Requests that start within this time of each other have not seen each other's first token."""

_CERTAINLY_SHORT = 0.8
"""Below this part of the minimum a prefix is too short whatever the tokenizer; in between the estimate cannot tell."""


class Placed(msgspec.Struct, frozen=True):
    """A request with what it writes and looks up."""

    layout: Layout
    plan: Plan
    positions: tuple[int, ...]

    @property
    def time_s(self) -> float | None:
        return self.layout.recorded.time_s


class Missed(msgspec.Struct, frozen=True):
    cause: Cause
    against: Layout


def place(layout: Layout, profile: Profile) -> Placed:
    prompt = layout.prompt()
    return Placed(layout, plan(prompt, layout.lengths(), profile), positions(prompt, profile))


def missed_read(earlier: Sequence[Placed], request: Placed, profile: Profile) -> Missed | None:
    """The reason why less was read than the same tenant's earlier requests have in common with this one; None if all was."""
    if profile.accounting == "openai-classic":
        return None
    layout = request.layout
    comparable = [one for one in earlier[-LOOK_BACK:] if _comparable(one.layout, layout)]
    shared = {id(one): common(one.layout, layout) for one in comparable}
    alive = [one for one in comparable if _age(one, request) <= max(TTL_S[ttl] for ttl in profile.ttls)]
    for one in reversed(alive):
        cause = extended(one.layout, layout) if one.plan.writes else None
        if cause is not None and not any(point.block < shared[id(one)] for point in one.plan.writes):
            return Missed(cause, one.layout)
    alive = [one for one in alive if layout.end(shared[id(one)]) >= profile.minimum]
    if not alive:
        return None
    nearest = max(reversed(alive), key=lambda one: shared[id(one)])
    potential = layout.end(shared[id(nearest)])
    if not request.plan.marked and (layout.anthropic or layout.mode == "explicit"):
        if layout.mode == "explicit" and nearest.plan.writes:
            return Missed(
                _bare("implicit-to-explicit", ("prompt_cache_options", "mode"), "implicit", "explicit", potential),
                nearest.layout,
            )
        return Missed(_bare("no-breakpoint", _whole(layout), "", "", potential), nearest.layout)
    reasons: dict[int, tuple[str | None, Placed]] = {}
    for one in alive:
        for point in one.plan.writes:
            if point.block < shared[id(one)]:
                reason = _unreadable(one, point.block, TTL_S[point.ttl], request, alive, shared)
                if point.block not in reasons or reason is None:
                    reasons[point.block] = reason, one
    read = max((layout.ends[block] for block, (reason, _) in reasons.items() if reason is None), default=0)
    for block in sorted(reasons, reverse=True):
        reason, one = reasons[block]
        if reason is not None and layout.ends[block] > read:
            if reason == "gap-over-ttl":
                one = min((other for other in alive if shared[id(other)] > block), key=lambda other: _age(other, request))
            return Missed(_explained(reason, request, one, block, layout.ends[block] - read), one.layout)
    varying = next((point.block for point in nearest.plan.writes if point.block >= shared[id(nearest)]), None)
    if varying is None or not (_marked(nearest) and _marked(request)):
        return None
    # With other entries to read from, another last message is no fault; a marked block that the next turn leaves out is one.
    there = nearest.layout.pieces[varying]
    left_out = varying == shared[id(nearest)] and layout.pieces[-1].message > there.message >= 0
    if not left_out and (reasons or not _varies(alive, request, shared[id(nearest)])):
        return None
    here = layout.pieces[min(varying, len(layout.pieces) - 1)]
    cause = _bare("mark-on-varying-block", here.place, there.text or "", here.text or "", potential - read)
    return Missed(cause, nearest.layout)


def _varies(alive: Sequence[Placed], request: Placed, index: int) -> bool:
    """The piece came in three versions at least: two may be two releases of one prompt."""
    versions = {one.layout.pieces[index].content for one in [*alive, request] if index < len(one.layout.pieces)}
    return len(versions) > 2


def _unreadable(
    one: Placed, block: int, ttl_s: float, request: Placed, alive: Sequence[Placed], shared: dict[int, int]
) -> str | None:
    """Code of what keeps the request from reading what `one` wrote behind `block`; None if nothing does."""
    age = _age(one, request)
    dated = one.time_s is not None and request.time_s is not None
    if dated and 0 <= age < PARALLEL_S and shared[id(one)] < len(one.layout.pieces):
        return "parallel-cold-start"
    # Every request that has this prefix has used the entry, and so prolonged its life.
    last = min(_age(other, request) for other in alive if shared[id(other)] > block)
    if last > ttl_s:
        return "gap-over-ttl"
    if block in request.plan.lookups:
        return None
    if request.layout.anthropic:
        return "lookback-jump"
    return "implicit-to-explicit" if request.layout.mode == "explicit" and one.layout.mode != "explicit" else None


def _explained(code: str, request: Placed, one: Placed, block: int, lost: int) -> Cause:
    layout = request.layout
    if code == "lookback-jump":
        top = max(point.block for point in request.plan.writes)
        before = f"written at {one.layout.path(one.layout.pieces[block].place)}"
        jump = request.positions[top] - request.positions[block]
        return _bare(code, layout.pieces[top].place, before, f"{jump} positions later", lost)
    if code == "gap-over-ttl":
        return _bare(code, layout.pieces[block].place, "", f"{_age(one, request):.0f} s later", lost)
    if code == "implicit-to-explicit":
        return _bare(code, ("prompt_cache_options", "mode"), "implicit", "explicit", lost)
    return _bare(code, layout.pieces[block].place, "", f"{_age(one, request):.2f} s later", lost)


def marks(layout: Layout, profile: Profile) -> Iterator[Cause]:
    """What a provider refuses in one request's marks (R7, R13)."""
    if not layout.anthropic:
        return
    marked = [piece for piece in layout.pieces if piece.mark is not None]
    num = len(marked) + (layout.automatic is not None)
    if layout.automatic is not None and marked and marked[-1] is layout.pieces[-1] and marked[-1].mark == layout.automatic:
        num -= 1
    if num > profile.max_marks:
        surplus = marked[min(profile.max_marks, len(marked) - 1)]
        yield _bare("too-many-marks", surplus.place, f"{profile.max_marks} allowed", f"{num} found", 0)
    short = next((index for index, piece in enumerate(marked) if piece.mark == "5m"), None)
    late = next((piece for piece in marked[short:] if piece.mark == "1h"), None) if short is not None else None
    if late is not None and short is not None:
        yield _bare("ttl-order", late.place, f"5m at {layout.path(marked[short].place)}", "1h here", 0)


def too_short(session: Sequence[Layout], profile: Profile) -> Missed | None:
    """The session's marks, all of them behind too few tokens; None unless the same prefix was sent twice with its mark."""
    best: tuple[int, Layout, int] | None = None
    for layout in session:
        for index, piece in enumerate(layout.pieces):
            if piece.mark is not None and (best is None or layout.ends[index] > best[0]):
                best = layout.ends[index], layout, index
    if best is None or best[0] >= _CERTAINLY_SHORT * profile.minimum or any(layout.automatic for layout in session):
        return None
    tokens, layout, index = best
    same = [one for one in session if one is not layout and common(one, layout) > index]
    if not same:
        return None
    piece = layout.pieces[index]
    cause = _bare("prefix-too-short", piece.place, f"about {tokens} tokens", f"{profile.minimum} needed", 0)
    return Missed(cause, same[0])


def over_rate(requests: Sequence[tuple[str, Layout]], profile_of: dict[str, Profile]) -> Iterator[tuple[Layout, Cause, Layout]]:
    """The first request beyond the rate in every run of too many with one key and start, of several sessions (P12)."""
    windows: dict[tuple[str, str, str | None, bytes], deque[tuple[float, str, Layout]]] = defaultdict(deque)
    told: set[tuple[str, str, str | None, bytes]] = set()
    for session, layout in requests:
        profile, time_s = profile_of[layout.model], layout.recorded.time_s
        if layout.anthropic or profile.keys_per_minute is None or time_s is None or layout.total < profile.minimum:
            continue
        start = b"".join(piece.content for piece in layout.pieces[:2])[:1024]
        key = (layout.recorded.tenant, layout.model, layout.cache_key, start)
        window = windows[key]
        window.append((time_s, session, layout))
        while window[0][0] <= time_s - 60:
            window.popleft()
        if len(window) > profile.keys_per_minute and key not in told and len({name for _, name, _ in window}) > 1:
            told.add(key)
            shown = layout.cache_key if layout.cache_key is not None else "(no key)"
            cause = _bare("key-over-rate", ("prompt_cache_key",), shown, f"{len(window)} requests in 60 s", 0)
            yield layout, cause, window[0][2]


def _comparable(one: Layout, other: Layout) -> bool:
    settings = one.system_salts == other.system_salts and one.message_salts == other.message_salts
    return settings and one.cache_key == other.cache_key and not one.partial


def _age(one: Placed, request: Placed) -> float:
    """Seconds from `one` to `request`; 0 where times are not known, which no rule minds."""
    if one.time_s is None or request.time_s is None:
        return 0.0
    return request.time_s - one.time_s


def _marked(request: Placed) -> bool:
    """The client marked a block itself."""
    return any(piece.mark is not None for piece in request.layout.pieces) or request.layout.automatic is not None


def _whole(layout: Layout) -> Place:
    return ("cache_control",) if layout.anthropic else ("prompt_cache_options",)


def _bare(code: str, place: Place, before: str, after: str, lost: int) -> Cause:
    return Cause(code, place, None, before[:80], after[:80], lost)
