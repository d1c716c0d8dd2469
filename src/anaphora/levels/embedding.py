"""The same text again: its vector. Each text of a batch by itself, so that only those that are new are computed.

What a request is given is what would be remembered of it: a text's vector is the same, bit for bit, whether it was computed
now or long ago, in this batch or another.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from anaphora.clock import Clock
from anaphora.errors import BackendFailed, NotCached
from anaphora.events import Emit, Failed, Forgotten, ignore
from anaphora.keys import digest, digests
from anaphora.store import Mark, Store
from anaphora.tiers.base import Entry, TierStats
from anaphora.types import CacheControl, Key, Scope, Tenant

log = logging.getLogger(__name__)

NO_WISHES = CacheControl()

Vectors = NDArray[np.float32]
"""One row for each text."""

Storage = Literal["float16", "int8", "float32"]
_DTYPES: dict[Storage, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "float32": np.dtype("<f4"),
}
_MOST_FLOAT16 = 65504.0
_SIGN_AND_REST = np.int32(-0x70002000)
"""0x8fffe000: of a float16 that was widened as an integer with its sign, and moved left by 13 bits."""
_EXPONENTS_APART = np.float32(2.0**112)
"""Exponents of float32 are counted from 127, those of float16 from 15."""
_HEAD = struct.Struct("<BIf")
"""Of a stored vector: how it is stored, the tokens of its text, and what its numbers are multiplied by."""
_STORAGES: tuple[Storage, ...] = ("float16", "int8", "float32")


class Space(msgspec.Struct, frozen=True):
    """Whose texts, and which of their vectors. Texts of two spaces never meet."""

    tenant: Tenant
    model: str
    """By this name it is forgotten."""
    fingerprint: str
    """Covers whatever makes the model's vectors others: weights, tokenizer, pooling."""
    dimensions: int = 0
    """0: as many as the model has."""
    kind: str = ""
    """What the texts are for ("query", "passage"), where the model tells that apart."""
    normalised: bool = True

    def seed(self) -> bytes:
        """What the keys of its texts begin with."""
        how = f"{self.dimensions} {self.normalised}"
        return digest(
            (b"embedding", *(field.encode() for field in (self.tenant, self.model, self.fingerprint, self.kind, how)))
        )


class Encoded(msgspec.Struct, frozen=True):
    """What computing some texts gave, in their order."""

    vectors: Vectors
    num_tokens: Sequence[int]


Compute = Callable[[list[str]], Awaitable[Encoded]]


class Embedded(msgspec.Struct, frozen=True):
    """The vectors of some texts, in their order, and where they came from."""

    vectors: Vectors
    num_tokens: Sequence[int]
    """Of each text."""
    num_hits: int
    """Texts whose vector was remembered. This and the next two add up to all."""
    num_computed: int
    num_shared: int
    """Texts that came twice, or that another request was having computed already."""
    computed_tokens: int = 0
    """Of the texts that were computed for this request."""
    saved_s: float = 0.0
    """What computing the remembered ones had taken."""
    age_s: float | None = None
    """Of the oldest that was remembered."""
    ttl_s: float | None = None
    """What is left to live of the first of them to go. None: no limit, or none was remembered."""


class EmbeddingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    storage: Storage = "float16"
    """How vectors are kept. int8 takes half of float16, which takes half of what models give."""


class EmbeddingLevel:
    """Texts to vectors, over `store`, which it owns. For one event loop."""

    name = "embedding"

    def __init__(self, options: EmbeddingOptions, *, store: Store, clock: Clock, emit: Emit = ignore) -> None:
        self._options = options
        self._store = store
        self._clock = clock
        self._emit = emit
        self._flights: dict[tuple[Mark, Key], _Flight] = {}
        """By what had been forgotten when it began: who asks after a forget gets nothing from before it."""
        self._aloft: set[_Flight] = set()

    async def embed(
        self, texts: Sequence[str], *, space: Space, compute: Compute, control: CacheControl = NO_WISHES
    ) -> Embedded:
        """The vectors of `texts`, which may be any number, and the same ones too.

        `compute` is called with texts that are all different: those that are not known, and, where another request was having
        some of them computed and failed, with those. Raises NotCached, and what `compute` raises. Does not suspend where
        everything is in this process's memory.
        """
        keys = [Key(key) for key in digests(space.seed(), map(str.encode, texts))]
        wanted = dict(zip(keys, texts, strict=True))
        mark = self._store.mark()
        entries = {} if control.no_cache else await self._recalled(wanted, control)
        values = {key: entry.value for key, entry in entries.items()}
        missing = {key: text for key, text in wanted.items() if key not in entries}
        if missing and control.only_if_cached:
            raise NotCached("Not all of these texts are cached, and the request asks for cached vectors only.")
        own: set[Key] = set()
        if missing:
            values |= await self._computed(missing, _Call(space, compute, control, mark), own)
        rows = [values[key] for key in keys]
        now_s = self._clock.now_s()
        lives = [entry.expires_at_s - now_s for entry in entries.values() if entry.expires_at_s is not None]
        return Embedded(
            vectors=_vectors(rows),
            num_tokens=[_num_tokens(row) for row in rows],
            num_hits=len(entries),
            num_computed=len(own),
            num_shared=len(rows) - len(entries) - len(own),
            computed_tokens=sum(_num_tokens(values[key]) for key in own),
            saved_s=sum(entry.cost_s for entry in entries.values()),
            age_s=max((now_s - entry.stored_at_s for entry in entries.values()), default=None),
            ttl_s=min(lives, default=None),
        )

    def mark(self) -> Mark:
        return self._store.mark()

    async def forget(self, scope: Scope) -> Forgotten:
        return await self._store.forget(scope)

    def drop(self, scope: Scope) -> None:
        """Another gateway process of this server is forgetting `scope`: drop what only this one has of it. Immediate."""
        self._store.drop(scope)

    async def stats(self) -> dict[str, TierStats]:
        return await self._store.stats()

    async def flush(self) -> None:
        """Return when what was learned so far is in every tier."""
        await self._store.flush()

    async def aclose(self) -> None:
        """Cut what is being computed, and let go of every tier."""
        for flight in self._aloft:
            flight.cancel()
        await asyncio.gather(*self._aloft, return_exceptions=True)
        await self._store.aclose()

    # -- what is known -------------------------------------------------------------------------------------------------

    async def _recalled(self, wanted: Collection[Key], control: CacheControl) -> dict[Key, Entry]:
        try:
            found = await self._store.get_many(wanted)
            if len(found) < len(wanted):  # another request's may have been learned while a slower tier was asked
                found |= {key: entry for key in wanted if key not in found and (entry := self._store.get_now(key)) is not None}
        except Exception as error:  # whatever breaks there, the request goes on (invariant 8)
            self._failed("recall", error)
            return {}
        oldest_s = -math.inf if control.max_age_s is None else self._clock.now_s() - control.max_age_s
        return {key: entry for key, entry in found.items() if entry.stored_at_s >= oldest_s and _readable(entry.value)}

    # -- what is not ---------------------------------------------------------------------------------------------------

    async def _computed(self, missing: Mapping[Key, str], call: _Call, own: set[Key]) -> dict[Key, bytes]:
        """What is to be remembered of each text; `own` receives those that were computed for this request."""
        joined: dict[Key, _Flight] = {}
        if call.shares:
            joined = {key: flight for key in missing if (flight := self._flights.get((call.mark, key))) is not None}
        flights = dict(joined)
        begun = {key: text for key, text in missing.items() if key not in joined}
        own.update(begun)
        if begun:
            flights |= dict.fromkeys(begun, self._begin(begun, call))
        # Waited for, not awaited: whoever leaves must not end what others are waiting for.
        await asyncio.wait(set(flights.values()))
        again = {key: missing[key] for key, flight in joined.items() if flight.cancelled() or flight.exception() is not None}
        if again:  # it failed for a reason of that request perhaps: another text of its batch, its key
            own.update(again)
            flight = self._begin(again, call)
            flights |= dict.fromkeys(again, flight)
            await asyncio.wait({flight})
        return {key: _landed(flight)[key] for key, flight in flights.items()}

    def _begin(self, texts: Mapping[Key, str], call: _Call) -> _Flight:
        flight = asyncio.create_task(self._fly(texts, call), name="anaphora-embed")
        self._aloft.add(flight)
        places = [(call.mark, key) for key in texts] if call.shares else []
        self._flights.update(dict.fromkeys(places, flight))

        def landed(flight: _Flight) -> None:
            self._aloft.discard(flight)
            for place in places:
                if self._flights.get(place) is flight:
                    del self._flights[place]
            if not flight.cancelled():
                flight.exception()  # seen, even where everybody has left

        flight.add_done_callback(landed)
        return flight

    async def _fly(self, texts: Mapping[Key, str], call: _Call) -> dict[Key, bytes]:
        started_s = self._clock.monotonic_s()
        encoded = await call.compute(list(texts.values()))
        if len(encoded.vectors) != len(texts) or len(encoded.num_tokens) != len(texts):
            raise BackendFailed(f"There are {len(texts)} texts, and {len(encoded.vectors)} vectors were computed.")
        cost_s = (self._clock.monotonic_s() - started_s) / len(texts)
        rows = _rows(encoded, self._options.storage)
        values = dict(zip(texts, rows, strict=True))
        if not call.control.no_store:
            self._learn(values, call, cost_s)
        return values

    def _learn(self, values: Mapping[Key, bytes], call: _Call, cost_s: float) -> None:
        space = call.space
        try:
            for key, value in values.items():
                self._store.put(key, value, cost_s=cost_s, tenant=space.tenant, model=space.model, since=call.mark)
        except Exception as error:  # the vectors are there all the same
            self._failed("learn", error)

    def _failed(self, operation: str, error: Exception) -> None:
        log.warning("the cache of embeddings failed to %s; the request goes on without it", operation, exc_info=error)
        self._emit(Failed(self.name, operation, repr(error)))


_Flight = asyncio.Task[dict[Key, bytes]]
"""Texts that are being computed: what is to be remembered of each, by key."""


class _Call(msgspec.Struct, frozen=True):
    """One request, as far as computing is concerned."""

    space: Space
    compute: Compute
    control: CacheControl
    mark: Mark

    @property
    def shares(self) -> bool:
        """Whether it may be given what another request is having computed, and the other way round."""
        return not self.control.no_cache and not self.control.no_store


def _landed(flight: _Flight) -> dict[Key, bytes]:
    if flight.cancelled():
        raise BackendFailed("The computation was cancelled.")
    return flight.result()


# -- vectors as bytes --------------------------------------------------------------------------------------------------


def _rows(encoded: Encoded, storage: Storage) -> list[bytes]:
    """What is remembered of each text."""
    return [_row(vector, num, storage) for vector, num in zip(encoded.vectors, encoded.num_tokens, strict=True)]


def _row(vector: Vectors, num_tokens: int, storage: Storage) -> bytes:
    most = float(np.abs(vector).max(initial=0.0))
    if storage == "float16" and not most <= _MOST_FLOAT16:
        storage = "float32"
    scale = most / 127 if storage == "int8" and most > 0 else 1.0
    numbers = np.rint(vector / scale) if storage == "int8" else vector
    return _HEAD.pack(_STORAGES.index(storage), num_tokens, scale) + numbers.astype(_DTYPES[storage]).tobytes()


def _num_tokens(row: bytes) -> int:
    return int(_HEAD.unpack_from(row)[1])


def _readable(row: bytes) -> bool:
    """Whether it is of this version."""
    return len(row) >= _HEAD.size and row[0] < len(_STORAGES)


def _vectors(rows: Sequence[bytes]) -> Vectors:
    """Those of one space, nearly always stored in one way."""
    kinds = {row[0] for row in rows}
    if len(kinds) == 1:
        return _alike(rows, _STORAGES[rows[0][0]])
    return np.concatenate([_alike((row,), _STORAGES[row[0]]) for row in rows]) if rows else np.zeros((0, 0), np.float32)


def _alike(rows: Sequence[bytes], storage: Storage) -> Vectors:
    numbers = np.frombuffer(b"".join([row[_HEAD.size :] for row in rows]), _DTYPES[storage])
    if storage == "float16":
        return _widened(numbers).reshape(len(rows), -1)
    vectors: Vectors = numbers.reshape(len(rows), -1).astype(np.float32)
    if storage == "int8":
        vectors *= np.array([_HEAD.unpack_from(row)[2] for row in rows], np.float32)[:, None]
    return vectors


def _widened(halves: NDArray[np.float16]) -> Vectors:
    """The same numbers, all finite, by moving sign and rest to where float32 has them: five times as fast as NumPy does it
    one by one. Powers of two are exact, so that the multiplication only mends the exponent."""
    bits = halves.view("<i2").astype(np.int32)
    bits <<= 13
    bits &= _SIGN_AND_REST
    vectors: Vectors = bits.view(np.float32)
    vectors *= _EXPONENTS_APART
    return vectors
