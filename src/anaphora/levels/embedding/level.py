"""The same text again: its vector. Each text of a batch by itself, so that only those that are new are computed.

What a request is given is what would be remembered of it: a text's vector is the same, bit for bit, whether it was computed
now or long ago, in this batch or another.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import msgspec

from anaphora.clock import Clock
from anaphora.errors import BackendFailed, NotCached
from anaphora.events import Emit, Failed, Forgotten, ignore
from anaphora.keys import digest, digests
from anaphora.levels.embedding.recent import Known, Recent, Uses, known
from anaphora.levels.embedding.rows import Storage, Vectors, read, readable, written
from anaphora.store import Mark, Store
from anaphora.tiers.base import Entry, ImmediateTier, TierStats
from anaphora.types import CacheControl, Key, Scope, Tenant

log = logging.getLogger(__name__)

NO_WISHES = CacheControl()


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
    text_s: float | None = None
    """What computing a text takes, where time here is all that it costs. None: more than that, money perhaps."""


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
    ttl_s: float | None = None
    """Seconds a vector lives. None: until it is evicted. The store has no say in that."""
    disk_from_s: float = 0.0
    """A text that takes less than that to compute, and costs nothing else, is kept in this process's memory only."""
    recent_bytes: int = 16 << 20
    """For those that were asked for lately, in memory beside the store's."""


class EmbeddingLevel:
    """Texts to vectors, over `store`, which it owns. For one event loop.

    `memory` is the first tier of `store`, if that has one in memory, for what is to be kept nowhere else.
    """

    name = "embedding"

    def __init__(
        self,
        options: EmbeddingOptions,
        *,
        store: Store,
        memory: ImmediateTier | None = None,
        clock: Clock,
        emit: Emit = ignore,
    ) -> None:
        self._options = options
        self._store = store
        self._memory = memory
        self._clock = clock
        self._emit = emit
        self._recent = Recent(options.recent_bytes)
        self._uses = Uses()
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
        call = _Call(space, space.seed(), compute, control, self._store.mark())
        lately = [None] * len(texts) if control.no_cache else self._asked_lately(texts, call)
        at_once = [one for one in lately if one is not None]
        if len(at_once) == len(texts) == len(set(texts)):
            return self._embedded([one.row for one in at_once], at_once)
        hits = {text: one for text, one in zip(texts, lately, strict=True) if one is not None}
        wanted = list(dict.fromkeys(texts))
        if len(hits) < len(wanted) and not control.no_cache:
            hits |= await self._recalled([text for text in wanted if text not in hits], call)
        rows = {text: hit.row for text, hit in hits.items()}
        missing = [text for text in wanted if text not in hits]
        if missing and control.only_if_cached:
            raise NotCached("Not all of these texts are cached, and the request asks for cached vectors only.")
        own: set[str] = set()
        if missing:
            rows |= await self._computed(missing, call, own)
        places = {text: place for place, text in enumerate(texts)}
        return self._embedded([rows[text] for text in texts], hits.values(), [places[text] for text in own])

    def _embedded(self, rows: Sequence[bytes], hits: Collection[Known], own: Sequence[int] = ()) -> Embedded:
        """`own`: places of those that were computed for this request."""
        vectors, num_tokens = read(rows)
        now_s = self._clock.now_s()
        first_s = min([one.expires_at_s for one in hits], default=math.inf)
        return Embedded(
            vectors=vectors,
            num_tokens=num_tokens,
            num_hits=len(hits),
            num_computed=len(own),
            num_shared=len(rows) - len(hits) - len(own),
            computed_tokens=sum([num_tokens[place] for place in own]),
            saved_s=sum([one.cost_s for one in hits]),
            age_s=now_s - min([one.stored_at_s for one in hits]) if hits else None,
            ttl_s=None if first_s == math.inf else first_s - now_s,
        )

    def lasts(self, text_s: float | None) -> bool:
        """Whether a vector that takes so long to compute is kept elsewhere than in memory. None: it costs more than time."""
        return text_s is None or text_s >= self._options.disk_from_s or self._memory is None

    def mark(self) -> Mark:
        return self._store.mark()

    async def forget(self, scope: Scope) -> Forgotten:
        try:
            return await self._store.forget(scope)
        finally:
            self._recent.clear()

    def drop(self, scope: Scope) -> None:
        """Another gateway process of this server is forgetting `scope`: drop what only this one has of it. Immediate."""
        self._store.drop(scope)
        self._recent.clear()

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
        self._recent.clear()
        self._tell_uses()
        await self._store.aclose()

    # -- what is known -------------------------------------------------------------------------------------------------

    def _asked_lately(self, texts: Sequence[str], call: _Call) -> Sequence[Known | None]:
        """Of each text what is known without asking the store."""
        found = self._recent.get(call.seed, texts, call.mark)
        now_s, max_age_s = self._clock.now_s(), call.control.max_age_s
        if max_age_s is not None or self._recent.expires_from_s <= now_s:  # the store sees to what is too old
            oldest_s = self._oldest_s(call.control)
            found = [one if one and one.stored_at_s >= oldest_s and one.expires_at_s > now_s else None for one in found]
        self._uses.note(found)
        return found

    def _tell_uses(self) -> None:
        """The store, before it may evict."""
        used = self._uses.take()
        self._store.touch([one.key for one in used if one.lasting])
        if self._memory is not None:
            for one in used:
                if not one.lasting:  # a slower tier would note the use, and write down, of what it never had
                    self._memory.get_now(one.key)

    async def _recalled(self, wanted: Sequence[str], call: _Call) -> dict[str, Known]:
        """Those that the store has."""
        keys = call.keys(wanted)
        try:
            self._tell_uses()
            found = await self._store.get_many(keys)
            if len(found) < len(keys):  # another request's may have been learned while a slower tier was asked
                found |= {key: entry for key in keys if key not in found and (entry := self._store.get_now(key)) is not None}
            same = self._store.mark() == call.mark
        except Exception as error:  # whatever breaks there, the request goes on (invariant 8)
            self._failed("recall", error)
            return {}
        oldest_s = self._oldest_s(call.control)
        hits: dict[str, Known] = {}
        for text, key in zip(wanted, keys, strict=True):
            entry = found.get(key)
            if entry is None or entry.stored_at_s < oldest_s or not readable(entry.value):
                continue
            hits[text] = hit = known(key, entry)
            if same:
                self._recent.put(call.seed, text, hit, call.mark)
        return hits

    def _oldest_s(self, control: CacheControl) -> float:
        return -math.inf if control.max_age_s is None else self._clock.now_s() - control.max_age_s

    # -- what is not ---------------------------------------------------------------------------------------------------

    async def _computed(self, missing: Sequence[str], call: _Call, own: set[str]) -> dict[str, bytes]:
        """What is to be remembered of each text; `own` receives those that were computed for this request."""
        places = {text: (call.mark, key) for text, key in zip(missing, call.keys(missing), strict=True)}
        joined: dict[str, _Flight] = {}
        if call.shares:
            joined = {text: flight for text, place in places.items() if (flight := self._flights.get(place)) is not None}
        flights = dict(joined)
        begun = {text: place for text, place in places.items() if text not in joined}
        own.update(begun)
        if begun:
            flights |= dict.fromkeys(begun, self._begin(begun, call))
        # Waited for, not awaited: whoever leaves must not end what others are waiting for.
        await asyncio.wait(set(flights.values()))
        again = {text: places[text] for text, flight in joined.items() if flight.cancelled() or flight.exception() is not None}
        if again:  # it failed for a reason of that request perhaps: another text of its batch, its key
            own.update(again)
            flight = self._begin(again, call)
            flights |= dict.fromkeys(again, flight)
            await asyncio.wait({flight})
        return {text: _landed(flight)[text] for text, flight in flights.items()}

    def _begin(self, places: Mapping[str, _Place], call: _Call) -> _Flight:
        flight = asyncio.create_task(self._fly(places, call), name="anaphora-embed")
        self._aloft.add(flight)
        shared = list(places.values()) if call.shares else []
        self._flights.update(dict.fromkeys(shared, flight))

        def landed(flight: _Flight) -> None:
            self._aloft.discard(flight)
            for place in shared:
                if self._flights.get(place) is flight:
                    del self._flights[place]
            if not flight.cancelled():
                flight.exception()  # seen, even where everybody has left

        flight.add_done_callback(landed)
        return flight

    async def _fly(self, places: Mapping[str, _Place], call: _Call) -> dict[str, bytes]:
        started_s = self._clock.monotonic_s()
        encoded = await call.compute(list(places))
        if len(encoded.vectors) != len(places) or len(encoded.num_tokens) != len(places):
            raise BackendFailed(f"There are {len(places)} texts, and {len(encoded.vectors)} vectors were computed.")
        cost_s = (self._clock.monotonic_s() - started_s) / len(places)
        rows = dict(zip(places, written(encoded.vectors, encoded.num_tokens, self._options.storage), strict=True))
        if not call.control.no_store:
            self._learn(rows, places, call, cost_s, lasting=self.lasts(encoded.text_s))
        return rows

    def _learn(
        self, rows: Mapping[str, bytes], places: Mapping[str, _Place], call: _Call, cost_s: float, *, lasting: bool
    ) -> None:
        space, ttl_s, now_s = call.space, self._options.ttl_s, self._clock.now_s()
        expires_at_s = None if ttl_s is None else now_s + ttl_s
        try:
            self._tell_uses()
            for text, row in rows.items():
                _, key = places[text]
                entry = Entry(row, now_s, expires_at_s, cost_s, space.tenant, space.model)
                if lasting or self._memory is None:
                    stored = self._store.put(
                        key, row, cost_s=cost_s, tenant=space.tenant, model=space.model, ttl_s=ttl_s, since=call.mark
                    )
                else:
                    stored = self._store.mark() == call.mark and self._memory.put_now(key, entry)
                if stored:
                    self._recent.put(call.seed, text, known(key, entry, lasting=lasting), call.mark)
        except Exception as error:  # the vectors are there all the same
            self._failed("learn", error)

    def _failed(self, operation: str, error: Exception) -> None:
        log.warning("the cache of embeddings failed to %s; the request goes on without it", operation, exc_info=error)
        self._emit(Failed(self.name, operation, repr(error)))


_Place = tuple[Mark, Key]
"""Of a text that is being computed."""

_Flight = asyncio.Task[dict[str, bytes]]
"""Texts that are being computed: what is to be remembered of each."""


class _Call(msgspec.Struct, frozen=True):
    """One request, as far as computing is concerned."""

    space: Space
    seed: bytes
    compute: Compute
    control: CacheControl
    mark: Mark

    @property
    def shares(self) -> bool:
        """Whether it may be given what another request is having computed, and the other way round."""
        return not self.control.no_cache and not self.control.no_store

    def keys(self, texts: Sequence[str]) -> list[Key]:
        return [Key(key) for key in digests(self.seed, map(str.encode, texts))]


def _landed(flight: _Flight) -> dict[str, bytes]:
    if flight.cancelled():
        raise BackendFailed("The computation was cancelled.")
    return flight.result()
