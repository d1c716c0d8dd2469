"""Whether a value is what a type of an SDK's says: fields that it does not have are wrong, too."""

from __future__ import annotations

import collections.abc
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typing_extensions

_WRAPPERS = (Annotated, typing.Required, typing.NotRequired, typing_extensions.Required, typing_extensions.NotRequired)
_ARRAYS = (list, collections.abc.Iterable, collections.abc.Sequence)


@cache
def _fields(shape: Any) -> dict[str, Any]:
    return typing_extensions.get_type_hints(shape, include_extras=True)


def misfits(value: object, shape: Any, path: str = "$") -> list[str]:
    """Where `value` is not what `shape` says; nothing where it is."""
    origin, inner = get_origin(shape), get_args(shape)
    if origin in _WRAPPERS:
        return misfits(value, inner[0], path)
    if origin in (Union, types.UnionType):
        found = [misfits(value, one, path) for one in inner]
        return min(found, key=lambda places: (len(places), -max((len(place) for place in places), default=0)))
    if shape is Any or shape is object:
        return []
    if origin is Literal:
        return [] if value in inner else [f"{path} is {value!r}, none of {inner}"]
    if typing_extensions.is_typeddict(shape):
        return _misfits_of_object(value, shape, path)
    if origin is dict or origin is collections.abc.Mapping:
        if not isinstance(value, dict):
            return [f"{path} is no object"]
        return [place for key, item in value.items() for place in misfits(item, inner[1], f"{path}.{key}")]
    if origin in _ARRAYS or getattr(origin, "__name__", "") == "SequenceNotStr":
        if not isinstance(value, list):
            return [f"{path} is no array"]
        return [place for index, item in enumerate(value) for place in misfits(item, inner[0], f"{path}[{index}]")]
    if shape is None or shape is type(None):
        return [] if value is None else [f"{path} is not null"]
    if shape is float:
        return [] if isinstance(value, int | float) and not isinstance(value, bool) else [f"{path} is no number"]
    # Files and paths, which the SDKs take as well, are no types at run time; JSON has none of them.
    fits = isinstance(shape, type) and isinstance(value, shape) and isinstance(value, bool) == (shape is bool)
    return [] if fits else [f"{path} is no {shape}"]


def _misfits_of_object(value: object, shape: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path} is no object"]
    fields = _fields(shape)
    open_ended = (getattr(shape, "__pydantic_config__", None) or {}).get("extra") == "allow"
    places = [f"{path}.{key} is missing" for key in shape.__required_keys__ if key not in value]
    for key, item in value.items():
        if key in fields:
            places += misfits(item, fields[key], f"{path}.{key}")
        elif not open_ended:
            places.append(f"{path}.{key} is unknown to {shape.__name__}")
    return places
