"""What the head of an upstream's answer says, and its pieces: whom it is for, when to ask again. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from anaphora.errors import ServiceError
from anaphora.types import Begin, Delta, End, Raw
from anaphora.wire.fields import Json
from anaphora.wire.upstream import Reader

PASSED_ON = ("anthropic-ratelimit-", "x-ratelimit-", "openai-", "anthropic-organization-id", "retry-after")
"""Headers of an answer, or what they begin with, that are the client's business."""

OF_THE_CONNECTION = frozenset(
    {
        "connection",
        "content-length",
        "keep-alive",
        "proxy-authenticate",
        "set-cookie",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers of an answer that are not for the client (RFC 9110 §7.6.1), or belong to somebody else."""


_EFFECTS = ("background", "conversation", "container", "mcp_servers")


def meant(reader: Reader, chunk: bytes) -> tuple[list[Delta], ServiceError | None]:
    """What `chunk` means, and what is wrong with it: what came before that is good."""
    try:
        return reader.feed(chunk), None
    except ServiceError as error:
        return reader.deltas, error


def is_repeatable(body: Json) -> bool:
    """Whether answering `body` twice does no harm: nothing is kept by it, and none of the provider's own tools act for it."""
    if any(body.get(field) for field in _EFFECTS) or body.get("store") is True:
        return False
    tools = body.get("tools")
    if not isinstance(tools, list):
        return True
    return all(isinstance(tool, dict) and tool.get("type", "custom") in ("custom", "function") for tool in tools)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """A date is taken as: not said. Both providers' SDKs know the exact form, too."""
    for name, per_s in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / per_s)
        except (KeyError, ValueError):
            continue
    return None


def kv_reused_tokens(headers: Mapping[str, str]) -> int:
    """Of an upstream that is an Anaphora itself: prompt tokens that its engine really had, whatever the accounting says."""
    text = headers.get("x-anaphora-kv-reused-tokens", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def client_headers(headers: Mapping[str, str], name: str) -> tuple[tuple[str, str], ...]:
    passed = [(key, value) for key, value in headers.items() if key.startswith(PASSED_ON)]
    theirs = headers.get("request-id") or headers.get("x-request-id")
    if theirs:
        passed.append(("x-anaphora-upstream-request-id", theirs))
    return (*passed, ("x-anaphora-upstream", name))


def with_reused(delta: Delta, reused: int) -> Delta:
    if not isinstance(delta, Begin | End):
        return delta
    return msgspec.structs.replace(delta, usage=msgspec.structs.replace(delta.usage, kv_reused_tokens=reused))


def with_headers(delta: Delta, headers: tuple[tuple[str, str], ...]) -> Delta:
    return msgspec.structs.replace(delta, headers=headers) if headers and isinstance(delta, Raw) else delta
