"""Recorded requests from JSON Lines: the bare body, or the body in an envelope that also tells when and in which session."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Literal

import msgspec

from anaphora.errors import ConfigError
from anaphora.lint.values import Json, Object, Place, at, mapping, objects, string

Dialect = Literal["anthropic", "openai-chat", "openai-responses"]

ENVELOPES: tuple[Place, ...] = (("request", "body"), ("request",), ("body",), ("params",), ("kwargs",))
TIMES = ("timestamp", "time", "ts", "started_at", "created_at")
SESSIONS = ("session", "session_id", "conversation", "conversation_id", "thread_id")
TENANTS = ("tenant", "workspace", "organization", "api_key_id")


class BadInput(ConfigError):
    """A line that is no request. The message begins with file:line."""


class Recorded(msgspec.Struct, frozen=True):
    """One request as it was sent."""

    file: str
    line: int
    body: Object
    dialect: Dialect
    time_s: float | None = None
    """Start of the request, in seconds since 1970 (or since any fixed instant)."""
    session: str | None = None
    tenant: str = ""
    envelope: Object | None = None
    """The whole line, where the body was not all of it."""
    place: Place = ()
    """Of the body inside the envelope."""
    encoded: bool = False
    """The envelope holds the body as a string of JSON."""

    @property
    def answer_id(self) -> str:
        """Of the answer, where it was recorded beside the request: `response_id`, or `id` in `response`; else empty."""
        holder = self.envelope or {}
        answer = mapping(holder.get("response"))
        return string(holder.get("response_id")) or string(answer.get("id")) or string(mapping(answer.get("body")).get("id"))


def read(file: str, lines: Iterable[str]) -> Iterator[Recorded]:
    """The requests of one file, in its order; empty lines are skipped. Raises `BadInput`."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _record(file, number, line)


def _record(file: str, number: int, line: str) -> Recorded:
    try:
        value: Json = json.loads(line)
    except ValueError as error:
        column = error.colno if isinstance(error, json.JSONDecodeError) else 1
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadInput(f"{file}:{number}:{column}: not JSON: {reason}") from None
    except RecursionError:
        raise BadInput(f"{file}:{number}: not JSON that can be read: nested too deeply") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}:{number}: not a request: a JSON object was expected")
    body, place, encoded = _body(value)
    if body is None:
        raise BadInput(
            f"{file}:{number}: not a request: neither `messages` nor `input`, at the top or under `request` or `body`"
        )
    return Recorded(
        file=file,
        line=number,
        body=body,
        dialect=_dialect(value, body),
        time_s=_time(value) if place else None,
        session=_named(value, SESSIONS) or _header(value, "x-session-id") or None if place else None,
        tenant=_named(value, TENANTS) if place else "",
        envelope=value if place else None,
        place=place,
        encoded=encoded,
    )


def _body(value: Object) -> tuple[Object | None, Place, bool]:
    if _is_body(value):
        return value, (), False
    for place in ENVELOPES:
        inner = at(value, place)
        encoded = isinstance(inner, str)
        if isinstance(inner, str):
            try:
                inner = json.loads(inner)
            except ValueError:
                continue
        if isinstance(inner, dict) and _is_body(inner):
            return inner, place, encoded
    return None, (), False


def _is_body(value: Object) -> bool:
    return isinstance(value.get("messages"), list) or ("input" in value and ("model" in value or "instructions" in value))


def _dialect(envelope: Object, body: Object) -> Dialect:
    """By the address or a header where they were recorded, else by fields that only one dialect has."""
    url = string(envelope.get("url")) or string(at(envelope, ("request", "url"))) or string(envelope.get("path"))
    if "messages" not in body:
        return "openai-responses"
    if "/chat/completions" in url:
        return "openai-chat"
    if "/messages" in url or _header(envelope, "anthropic-version"):
        return "anthropic"
    if string(body.get("model")).rpartition("/")[2].startswith(("claude", "anthropic.")):
        return "anthropic"
    if "system" in body or "cache_control" in body or any("input_schema" in tool for tool in objects(body.get("tools"))):
        return "anthropic"
    kinds = {string(block.get("type")) for message in objects(body["messages"]) for block in objects(message.get("content"))}
    return "anthropic" if kinds & {"tool_use", "tool_result", "thinking", "image"} else "openai-chat"


def _named(value: Object, names: tuple[str, ...]) -> str:
    """The first of these fields that holds a name, in the envelope or its `metadata`."""
    for holder in (value, mapping(value.get("request")), mapping(value.get("metadata"))):
        for name in names:
            found = holder.get(name)
            if isinstance(found, str | int) and not isinstance(found, bool) and found != "":
                return str(found)
    return ""


def _header(envelope: Object, name: str) -> str:
    for holder in (envelope, mapping(envelope.get("request"))):
        for key, value in mapping(holder.get("headers")).items():
            if key.lower() == name:
                return string(value)
    return ""


def _time(value: Object) -> float | None:
    for holder in (value, mapping(value.get("request"))):
        for name in TIMES:
            found = holder.get(name)
            if isinstance(found, bool) or found is None:
                continue
            if isinstance(found, int | float):
                return _seconds(float(found))
            if isinstance(found, str):
                return _iso(found)
    return None


def _seconds(number: float) -> float:
    """Seconds, milliseconds, microseconds or nanoseconds since 1970, told apart by size; small numbers are seconds."""
    for limit, unit in ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3)):
        if number > limit:
            return number / unit
    return number


def _iso(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return _seconds(float(text))
        except ValueError:
            return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
