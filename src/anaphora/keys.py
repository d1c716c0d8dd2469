"""What makes two requests the same, and two KV blocks the same.

Digests are SHA-256 over length-framed bytes: every field goes in as its length (8 bytes, little-endian) and its bytes, so
that no two different field lists ever give the same input. `KEY_SCHEMA` is the first field of all of them: raise it when the
meaning of a key changes, and old entries are simply never found again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import msgspec

from anaphora.types import BlockHash, Key, Message, Part, Request, Tenant, ToolResultPart, ToolUsePart

KEY_SCHEMA = 1
_BEGINNING = b"anaphora-key" + KEY_SCHEMA.to_bytes(4, "little")


def digest(fields: Iterable[bytes]) -> bytes:
    """SHA-256 over the length-framed `fields`, behind the key schema. 32 bytes."""
    h = hashlib.sha256(_BEGINNING)
    for field in fields:
        h.update(len(field).to_bytes(8, "little"))
        h.update(field)
    return h.digest()


def digests(seed: bytes, contents: Iterable[bytes]) -> list[bytes]:
    """`digest((seed, content))` of each of `contents`, for those who have many."""
    sha256 = hashlib.sha256
    head = _BEGINNING + len(seed).to_bytes(8, "little") + seed
    return [sha256(head + len(content).to_bytes(8, "little") + content).digest() for content in contents]


def kv_namespace(tenant: Tenant, fingerprint: str, salt: str | None = None, *, apart: bool = False) -> bytes:
    """The seed of every chain of block hashes (invariant 2): blocks of two namespaces never meet.

    `fingerprint` covers weights, tokenizer, template, dtype and block layout; `salt` is the request's own `cache_salt`.
    `apart`: for requests that must not meet blocks which were stored with a loss, where an engine has such.
    """
    marker = b"unsalted" if salt is None else b"salted"
    fields = (b"kv", tenant.encode(), fingerprint.encode(), marker, (salt or "").encode())
    return digest((*fields, b"exact") if apart else fields)


def block_hashes(namespace: bytes, tokens: Sequence[int], block_size: int) -> list[BlockHash]:
    """One hash for every full block of `tokens`; each covers its parent's hash (the namespace for the first) and its tokens.

    A trailing partial block has no hash: it cannot be shared.
    """
    hashes: list[BlockHash] = []
    parent = namespace
    packed = array("q", tokens).tobytes()
    for end in range(block_size, len(tokens) + 1, block_size):
        parent = digest((parent, packed[(end - block_size) * 8 : end * 8]))
        hashes.append(BlockHash(parent))
    return hashes


# -- answers -----------------------------------------------------------------------------------------------------------

# MessagePack, not JSON: every value carries its type and length, so no two different bodies encode alike, and a number, a
# NaN and a null stay apart. "sorted" orders the keys of objects (and of structs); arrays keep their order.
_encode = msgspec.msgpack.Encoder(order="sorted").encode
_FLOAT_TAG = b"\xcb"


def request_key(request: Request, *, fingerprint: str) -> Key:
    """What makes two requests one question (invariant 1): the tenant, then the whole canonical request.

    Left out are only `stream`, and `max_tokens`, whose part in the question depends on how the answer ended (see
    `levels.exact`). Unknown fields (`extra`) count; the order of JSON keys does not; 1 and 1.0 are one number; strings are
    taken as they are. `fingerprint` is the model's (`ModelInfo.fingerprint`): changed weights are another question.

    Ids of tool calls are names and no content: they are replaced by their place in the conversation, so that the turn after a
    replayed answer, whose ids were made anew, is still the same question.

    A request that demands exact KV is a question of its own: the answer that is remembered may rest on KV stored with a loss.
    """
    # Sampling and tool choice go in field by field: a struct's encoding drops a default only where it is the very same
    # object, so 0.0 from a JSON body and the default 0.0 would part ways.
    s, choice = request.sampling, request.tool_choice
    view = (
        request.model,
        _calls_by_place(request.messages),
        request.prompts,
        request.echo,
        request.tools,
        (choice.mode, choice.name, choice.parallel),
        (s.top_k, s.seed, s.stop, s.n, s.logprobs),
        request.cache_salt,
        request.extra,
    )
    try:
        body = _encode(view)
    except OverflowError:  # an integer beyond 64 bits somewhere in a schema or in `extra`
        body = _encode_with_plain_numbers(view)
    else:
        # A float tag is rare in a body (text hardly ever holds this byte), and only floats need the slow way.
        if _FLOAT_TAG in body:
            body = _encode_with_plain_numbers(view)
    floats = (s.temperature, s.top_p, s.min_p, s.frequency_penalty, s.presence_penalty)
    sampling = _encode([None if x is None else float(x) + 0.0 for x in floats])  # + 0.0 makes -0.0 into 0.0
    fields = [b"answer", request.tenant.encode(), fingerprint.encode(), body, sampling]
    if request.variant:
        fields += [b"variant", request.variant.encode()]
    if request.exact_kv:
        fields.append(b"exact")
    return Key(digest(fields))


def derived_key(key: Key, name: str, number: int) -> Key:
    """One of several answers to the question `key`: the one called `name` `number` (a bucket, a token limit)."""
    return Key(digest((b"derived", key, name.encode(), str(number).encode())))


def _calls_by_place(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` with every tool call's id replaced by the number of its first mention, also where its result names it."""
    if not any(isinstance(part, (ToolUsePart, ToolResultPart)) for message in messages for part in message.content):
        return messages
    places: dict[str, str] = {}

    def renamed(part: Part) -> Part:
        if isinstance(part, ToolUsePart):
            return msgspec.structs.replace(part, id=places.setdefault(part.id, str(len(places))))
        if isinstance(part, ToolResultPart):
            return msgspec.structs.replace(part, tool_use_id=places.setdefault(part.tool_use_id, str(len(places))))
        return part

    return tuple(msgspec.structs.replace(message, content=tuple(map(renamed, message.content))) for message in messages)


def _encode_with_plain_numbers(view: object) -> bytes:
    return _encode(_plain_numbers(msgspec.to_builtins(view, builtin_types=(bytes,))))


def _plain_numbers(value: object) -> object:
    """`value` with every number in the one form that equal numbers share: 64-bit integer, else float, else its digits."""
    if isinstance(value, dict):
        return {name: _plain_numbers(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_numbers(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() and -(2.0**63) <= value < 2.0**64 else value
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        try:
            nearest = float(value)
        except OverflowError:
            nearest = 0.0
        return nearest if nearest == value else msgspec.msgpack.Ext(1, str(value).encode())
    return value
