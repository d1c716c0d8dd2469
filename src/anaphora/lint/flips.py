"""Settings beside the prompt that make a provider compute it again: model, tier, tool_choice, thinking, effort, format, key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from anaphora.lint.breaks import Cause
from anaphora.lint.layout import Layout
from anaphora.lint.sessions import LOOK_BACK, common, converses, start_of
from anaphora.lint.values import Json, Place
from anaphora.profiles import Profile

_PLACES: dict[str, tuple[Place, ...]] = {
    "tool-choice-changed": (("tool_choice",),),
    "parallel-calls-changed": (("tool_choice", "disable_parallel_tool_use"), ("parallel_tool_calls",)),
    "thinking-changed": (("thinking",),),
    "effort-changed": (("output_config", "effort"), ("reasoning_effort",), ("reasoning", "effort")),
    "format-changed": (("response_format",), ("text", "format"), ("verbosity",), ("text", "verbosity")),
    "tier-changed": (("speed",), ("service_tier",)),
    "server-tools-changed": (("tools",),),
    "image-presence": (("messages",),),
}
"""Where a setting stands in the bodies of the dialects; the first that is there is named."""


def flips(earlier: Sequence[Layout], before: Layout, after: Layout, profile: Profile) -> Iterator[Cause]:
    """Settings in which `after` differs from `before`, the request it goes on with.

    What is lost is what no request of `earlier` with the new setting has left in the cache.
    """
    if not converses(before, after):
        return
    recent = earlier[-LOOK_BACK:]
    if before.model != after.model:
        kept = max((after.end(common(one, after)) for one in recent if one.model == after.model), default=0)
        lost = after.end(common(before, after)) - kept
        yield Cause("model-changed", ("model",), None, before.model, after.model, lost)
        return
    if before.cache_key != after.cache_key and profile.accounting == "openai-breakpoints":
        lost = _lost(recent, before, after, 0, lambda one: one.cache_key)
        yield Cause("cache-key-changed", ("prompt_cache_key",), None, before.cache_key or "", after.cache_key or "", lost)
    system, messages = start_of(after, "system"), start_of(after, "messages")
    ahead = {"thinking-changed", "effort-changed"} if profile.thinking_ahead else set()
    for name, value in after.system_salts.items():
        if before.system_salts.get(name) != value:
            lost = _lost(recent, before, after, system, _setting(name))
            yield _cause(name, before.system_salts.get(name, ""), value, after, lost)
    for name, value in after.message_salts.items():
        if before.message_salts.get(name) != value:
            start = messages if after.anthropic and name not in ahead else 0
            lost = _lost(recent, before, after, start, _setting(name))
            yield _cause(name, before.message_salts.get(name, ""), value, after, lost)


def _lost(recent: Sequence[Layout], before: Layout, after: Layout, start: int, setting: Callable[[Layout], str | None]) -> int:
    """Tokens from piece `start` on that only the old setting has in the cache."""
    kept = max((after.end(common(one, after)) for one in recent if setting(one) == setting(after)), default=0)
    return after.end(common(before, after)) - max(kept, after.end(start))


def _setting(name: str) -> Callable[[Layout], str | None]:
    return lambda layout: layout.system_salts.get(name, layout.message_salts.get(name))


def _cause(code: str, old: str, new: str, after: Layout, lost: int) -> Cause:
    return Cause(code, _place(code, after), None, old, new, lost)


def _place(code: str, layout: Layout) -> Place:
    """Of the setting, or where it would stand; of the first image where images came in."""
    if code == "image-presence":
        image = next(
            (piece.place for piece in layout.pieces if piece.kind in ("image", "tool_result") and _shows(piece.value)), None
        )
        return image or ("messages",)
    places = _PLACES[code]
    return next((place for place in places if place[0] in layout.recorded.body), places[0])


def _shows(value: Json) -> bool:
    if isinstance(value, dict):
        return value.get("type") in ("image", "image_url", "input_image") or _shows(value.get("content"))
    return isinstance(value, list) and any(_shows(item) for item in value)
