"""What a question is compared with: only with questions that differ from it in the words of the last message. Pure.

Everything else of a request is its *space*: tenant, model and its fingerprint, system prompt, tools, response format, sampling,
media, and the whole conversation before the last message. Two questions of different spaces never meet, so a question that
follows another one is compared only with what was asked at the same point of the same conversation.
"""

from __future__ import annotations

import msgspec

from anaphora.keys import digest, request_key
from anaphora.types import MediaPart, Request, Tenant, TextPart

_SHARED = Tenant("")
"""Nobody's name: a tenant's is never empty."""


class Asked(msgspec.Struct, frozen=True):
    """The part of a request that other words may stand for, and where they must come from."""

    space: bytes
    """32 bytes: what must be the same."""
    text: str


def asked(request: Request, *, fingerprint: str, max_chars: int, shared: bool = False) -> Asked | None:
    """None where words cannot be compared: the last message is not a user's text (and perhaps pictures or sounds beside it),
    or it is longer than `max_chars`, more than an encoder reads; several answers are wanted; or there is no conversation.

    `shared`: the space of all tenants, for entries that were audited.
    """
    if not request.messages or request.sampling.n != 1 or request.max_tokens == 0 or request.sampling.logprobs is not None:
        return None
    last = request.messages[-1]
    if last.role != "user" or not all(isinstance(part, TextPart | MediaPart) for part in last.content):
        return None
    texts = [part.text for part in last.content if isinstance(part, TextPart)]
    text = "\n".join(texts).strip()
    if not text or len(text) > max_chars:
        return None
    # The text goes, its place among the pictures stays.
    blank = tuple([TextPart("") if isinstance(part, TextPart) else part for part in last.content])
    rest = msgspec.structs.replace(
        request,
        tenant=_SHARED if shared else request.tenant,
        messages=(*request.messages[:-1], msgspec.structs.replace(last, content=blank)),
    )
    return Asked(digest((b"semantic", request_key(rest, fingerprint=fingerprint))), text)
