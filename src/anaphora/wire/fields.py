"""Reading JSON fields by hand, so that every complaint names its field and nothing is dropped unseen.

Readers raise `FieldError` with a path relative to the object they were given; callers put the rest in front on the way up
(`FieldError.under`). It never leaves `wire`: each dialect words it in its own style and raises `InvalidRequest`.

An optional field that is null counts as absent: every documented optional of the dialects we speak is nullable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import msgspec

from anaphora.errors import InvalidRequest

T = TypeVar("T")

Json = dict[str, object]
Kind = Literal["missing", "type", "above", "below", "value", "unknown", "unsupported"]

_decode = msgspec.json.Decoder().decode


class FieldError(Exception):
    """One field is wrong. `kind` says how; `detail` is the expected type, the bound, or the sentence to print."""

    def __init__(self, kind: Kind, *path: str | int, detail: str = "", got: object = None) -> None:
        super().__init__(kind, path, detail)
        self.kind = kind
        self.path = path
        self.detail = detail
        self.got = got

    def under(self, *outer: str | int) -> None:
        """Put `outer` in front of the path."""
        self.path = (*outer, *self.path)


def decode_object(body: bytes) -> Json:
    """The JSON object in `body`; `InvalidRequest` with the position otherwise."""
    try:
        value = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_fault(body, error)}", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("The body is not usable JSON: it is nested too deeply", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type_name(value)}", code="invalid_json")
    return value


def _fault(body: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    if not body.strip():
        return "it is empty"
    text = str(error)
    return f"it ends too early (byte {len(body)})" if "truncated" in text else text.removeprefix("JSON is malformed: ")


def type_name(value: object) -> str:
    """The JSON name of a decoded value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {str: "a string", int: "an integer", float: "a decimal", list: "an array", dict: "an object"}
    return names.get(type(value), "an unknown value")


def wrong_type(expected: str, got: object, *path: str | int) -> FieldError:
    return FieldError("type", *path, detail=expected, got=got)


def bad_value(sentence: str, *path: str | int) -> FieldError:
    return FieldError("value", *path, detail=sentence)


def unsupported(sentence: str, *path: str | int) -> FieldError:
    return FieldError("unsupported", *path, detail=sentence)


def opt_string(owner: Json, key: str) -> str | None:
    value = owner.get(key)
    if value is None or isinstance(value, str):
        return value
    raise wrong_type("string", value, key)


def string(owner: Json, key: str) -> str:
    value = owner.get(key)
    if isinstance(value, str):
        return value
    raise _absent_or_wrong(owner, key, "string")


def named(owner: Json, key: str) -> str:
    """A required string that is not empty."""
    value = string(owner, key)
    if not value:
        raise bad_value("must not be empty", key)
    return value


def opt_bool(owner: Json, key: str, default: bool) -> bool:
    value = owner.get(key)
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    raise wrong_type("boolean", value, key)


def opt_int(owner: Json, key: str, low: int | None = None, high: int | None = None) -> int | None:
    value = owner.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("integer", value, key)
    _in_range(value, key, low, high)
    return value


def opt_number(owner: Json, key: str, low: float, high: float) -> float | None:
    """A float even where the body says 1: equal requests must not differ by how a number was spelled."""
    value = owner.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type("number", value, key)
    _in_range(value, key, low, high)
    return float(value) + 0.0  # -0.0 becomes 0.0


def _in_range(value: float, key: str, low: float | None, high: float | None) -> None:
    if high is not None and value > high:
        raise FieldError("above", key, detail=str(high), got=value)
    if low is not None and value < low:
        raise FieldError("below", key, detail=str(low), got=value)


def opt_object(owner: Json, key: str) -> Json | None:
    value = owner.get(key)
    if value is None or isinstance(value, dict):
        return value
    raise wrong_type("object", value, key)


def object_(owner: Json, key: str) -> Json:
    value = owner.get(key)
    if isinstance(value, dict):
        return value
    raise _absent_or_wrong(owner, key, "object")


def opt_list(owner: Json, key: str) -> list[object]:
    """The array under `key`; absent and null are the empty one."""
    value = owner.get(key)
    if value is None:
        return []
    if isinstance(value, list):
        return value
    raise wrong_type("array", value, key)


def list_(owner: Json, key: str) -> list[object]:
    value = owner.get(key)
    if isinstance(value, list):
        return value
    raise _absent_or_wrong(owner, key, "array")


def _absent_or_wrong(owner: Json, key: str, expected: str) -> FieldError:
    return wrong_type(expected, owner[key], key) if owner.get(key) is not None else FieldError("missing", key)


def each(items: Iterable[object], key: str, read: Callable[[Json], T]) -> list[T]:
    """`read` over the objects in `items`, which lie in the array `key`."""
    values: list[T] = []
    for index, item in enumerate(items):
        try:
            if not isinstance(item, dict):
                raise wrong_type("object", item)
            values.append(read(item))
        except FieldError as error:
            error.under(key, index)
            raise
    return values


def strings(items: Iterable[object], key: str) -> tuple[str, ...]:
    """All of `items`, which must be strings and not empty."""
    values: list[str] = []
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise wrong_type("string", item, key, index)
        if not item:
            raise bad_value("must not be empty", key, index)
        values.append(item)
    return tuple(values)


def only(owner: Json, known: frozenset[str]) -> None:
    """Refuse fields outside `known`. Null and empty ones pass: SDKs send back what they got, `"annotations": []` included."""
    for key, value in owner.items():
        if key not in known and value is not None and value != []:
            raise FieldError("unknown", key)
