"""What of a client's request an upstream is to see beside its meaning. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from anaphora.types import Native, Request

SEEN = ("anthropic-", "openai-", "idempotency-key", "x-client-request-id", "x-session-id", "x-grok-conv-id")
"""Headers, or what they begin with, that are the provider's business."""

_VARIANTS = ("anthropic-beta", "openai-beta")
"""Those that change what is answered."""

_KEYS = (b"x-api-key", b"authorization")


class _Stored(msgspec.Struct, frozen=True):
    store: bool | None = None


def is_stored(dialect: str, body: bytes) -> bool:
    """Whether the provider keeps the answer under its id, for later requests to refer to. One that is remembered here would
    have another id, which the provider does not know."""
    if dialect not in ("openai_responses", "openai_chat"):
        return False
    try:
        store = msgspec.json.decode(body, type=_Stored).store
    except msgspec.MsgspecError:
        return False
    return store is True or (store is None and dialect == "openai_responses")


def with_native(
    request: Request,
    dialect: str,
    body: bytes,
    head: Mapping[bytes, bytes],
    *,
    own_keys: bool,
    unread: str = "",
    request_id: str = "",
) -> Request:
    """`request` with the body it was read from, or could not be (`unread` says why)."""
    found = native(dialect, body, head, own_keys=own_keys, unread=unread, request_id=request_id)
    variant = "\n".join(f"{name}: {value}" for name, value in found.headers if name in _VARIANTS)
    return msgspec.structs.replace(request, native=found, variant=variant)


def native(
    dialect: str,
    body: bytes,
    head: Mapping[bytes, bytes],
    *,
    own_keys: bool,
    unread: str = "",
    further: tuple[str, ...] = (),
    request_id: str = "",
) -> Native:
    """The body with those headers that are the provider's business, and `further` ones. `own_keys`: the key that the client
    sent is one of this server's, and nobody else's business."""
    seen = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.items()}
    headers = tuple(sorted((name, value) for name, value in seen.items() if name.startswith(SEEN) or name in further))
    key = None if own_keys else next((name for name in _KEYS if name in head), None)
    credential = None if key is None else (key.decode(), head[key].decode("latin-1"))
    return Native(dialect, body, headers, credential, request_id, unread, b'"include_usage"' in body)
