"""JSON values as a client sent them: how to read one without knowing its shape, and where two of them first differ.

Order of keys is kept everywhere: a provider hashes what it was sent (spec S2), so two objects that differ only in it are two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Object: TypeAlias = dict[str, Json]
Place: TypeAlias = tuple[str | int, ...]
"""Steps from a body's root to one value."""


class Difference(msgspec.Struct, frozen=True):
    """The first place, in order of writing, at which two values are not the same."""

    place: Place
    before: Json
    after: Json
    order_only: bool = False
    """Equal as JSON; only the order of an object's keys differs."""


def objects(value: Json) -> list[Object]:
    """The objects of a list; nothing for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def mapping(value: Json) -> Object:
    return value if isinstance(value, dict) else {}


def string(value: Json) -> str:
    return value if isinstance(value, str) else ""


def compact(value: Json) -> str:
    """JSON without spaces, keys in the order they came."""
    return msgspec.json.encode(value).decode("utf-8", "surrogatepass")


def same(before: Json, after: Json) -> bool:
    """The same as sent, order of keys included."""
    return before == after and compact(before) == compact(after)


def parsed(text: str) -> Json:
    """The object or list that `text` is as JSON; None when it is none."""
    if text[:1] not in ("{", "["):
        return None
    try:
        value: Json = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value


def difference(before: Json, after: Json, place: Place = ()) -> Difference | None:
    """None where both are the same as sent. Differences of value go before those of order."""
    if before == after:
        return None if same(before, after) else _order(before, after, place)
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() == after.keys():
            first = next(key for key in before if before[key] != after[key])
            return difference(before[first], after[first], (*place, first))
        return Difference(place, before, after)
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            if one != other:
                return difference(one, other, (*place, index))
    return Difference(place, before, after)


def _order(before: Json, after: Json, place: Place) -> Difference:
    """The object whose keys stand in another order; the outermost of several."""
    if isinstance(before, dict) and isinstance(after, dict):
        if list(before) != list(after):
            return Difference(place, before, after, order_only=True)
        for key in before:
            if not same(before[key], after[key]):
                return _order(before[key], after[key], (*place, key))
    if isinstance(before, list) and isinstance(after, list):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            if not same(one, other):
                return _order(one, other, (*place, index))
    return Difference(place, before, after, order_only=True)


def at(value: Json, place: Place) -> Json:
    """The value at a place; None where there is none."""
    for step in place:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def dotted(place: Place, *, brackets: bool) -> str:
    """`messages.0.content`, as Anthropic's errors name it, or `messages[0].content`, as OpenAI's do."""
    if not brackets:
        return ".".join(str(step) for step in place)
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


def without(value: Json, keys: frozenset[str]) -> Json:
    """A copy without these keys, at any depth of blocks (not inside schemas: callers pass blocks)."""
    if isinstance(value, Mapping):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [without(item, keys) for item in value]
    return value


def as_text(value: Json) -> str:
    """What an excerpt of a value is cut from: a string itself, else compact JSON."""
    return value if isinstance(value, str) else compact(value)
