"""What makes two requests the same, and two KV blocks the same.

Digests are SHA-256 over length-framed bytes: every field goes in as its length (8 bytes, little-endian) and its bytes, so
that no two different field lists ever give the same input. `KEY_SCHEMA` is the first field of all of them: raise it when the
meaning of a key changes, and old entries are simply never found again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from anaphora.types import BlockHash, Tenant

KEY_SCHEMA = 1


def digest(fields: Iterable[bytes]) -> bytes:
    """SHA-256 over the length-framed `fields`, behind the key schema. 32 bytes."""
    h = hashlib.sha256(b"anaphora-key" + KEY_SCHEMA.to_bytes(4, "little"))
    for field in fields:
        h.update(len(field).to_bytes(8, "little"))
        h.update(field)
    return h.digest()


def kv_namespace(tenant: Tenant, fingerprint: str, salt: str | None = None) -> bytes:
    """The seed of every chain of block hashes (invariant 2): blocks of two namespaces never meet.

    `fingerprint` covers weights, tokenizer, template, dtype and block layout; `salt` is the request's own `cache_salt`.
    """
    marker = b"unsalted" if salt is None else b"salted"
    return digest((b"kv", tenant.encode(), fingerprint.encode(), marker, (salt or "").encode()))


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
