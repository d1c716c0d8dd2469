"""What was computed of a remembered text, as some hundred bytes: read back in an eighth of the time it took. Pure.

Of what guards and verifier look at, a form keeps what takes long to find out; words are looked up again, in tables that all
texts share.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from typing import Final, Literal

import msgspec

from anaphora.levels.semantic.facts import Facts, order_of, wording_of
from anaphora.levels.semantic.lexicon import FOLDER, Language
from anaphora.levels.semantic.numbers import Number
from anaphora.levels.semantic.texts import Prepared, content_of, plainly, prepare
from anaphora.levels.semantic.tokens import Kind, Piece, pieces_of, tokens_of

FORM: Final = 1
"""Another number wherever texts are taken apart differently: forms of before are of no use then."""


class _Form(msgspec.Struct, frozen=True, gc=False, array_like=True):
    language: Language | Literal[""]
    normal: str
    pieces: tuple[str | tuple[Kind, str, bool, str], ...]
    """As `tokens_of` takes them."""
    marks: Mapping[str, tuple[str, ...]]
    turning: tuple[tuple[str, tuple[str, ...]], ...]
    numbers: tuple[Number, ...]
    names: frozenset[str]
    roles: Mapping[str, str]
    governed: frozenset[str]
    agents: frozenset[str]
    question: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Form)


def form_of(prepared: Prepared) -> bytes:
    """Empty for a text that was not taken apart."""
    if not prepared.tokens:
        return b""
    facts = prepared.facts
    form = _Form(
        prepared.language,
        prepared.normal,
        tuple(map(_bare, pieces_of(plainly(prepared.text)))),
        facts.marks,
        facts.turning,
        facts.numbers,
        facts.names,
        facts.roles,
        facts.governed,
        facts.agents,
        facts.question,
    )
    return version() + _encoder.encode(form)


def recalled(text: str, form: bytes) -> Prepared:
    """As `prepare` does, the quicker if `form` is the text's and of this version."""
    if not form.startswith(version()):
        return prepare(text)
    try:
        kept = _decoder.decode(memoryview(form)[_VERSION_BYTES:])
    except msgspec.MsgspecError:
        return prepare(text)
    tokens = tokens_of(kept.pieces, kept.language or "en")
    return Prepared(
        text=text,
        language=kept.language,
        normal=kept.normal,
        tokens=tokens,
        content=content_of(tokens),
        facts=Facts(
            kept.marks,
            kept.turning,
            kept.numbers,
            kept.names,
            kept.roles,
            kept.governed,
            order_of(kept.roles),
            kept.agents,
            kept.question,
            *wording_of(tokens),
        ),
    )


_VERSION_BYTES: Final = 4


@cache
def version() -> bytes:
    """Of what forms say: another one where the lexicon is another one, too."""
    lexicons = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.toml")))
    return blake2b(lexicons, digest_size=_VERSION_BYTES, person=b"form %d" % FORM).digest()


def _bare(piece: Piece) -> str | Piece:
    return piece[1] if piece == ("word", piece[1], False, "") else piece
