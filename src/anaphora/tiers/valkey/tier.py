"""The Valkey tier: entries on a server that processes of several machines share.

What leaves first, what counts, and what was erased is known to the server alone (`scripts`); a process keeps nothing but
the latest epoch it has heard of. Entries lie in buckets, each with an index of its own: one on a single server, several in
a cluster, where the keys of a bucket share a slot and thus a node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence

import msgspec

from anaphora.clock import Clock
from anaphora.errors import ConfigError, TierFailed
from anaphora.events import Damaged, Emit, Evicted, ignore
from anaphora.tiers.base import ALL_KEPT_SHARE, EVERYTHING, Entry, Erasure, Eviction, TierStats, left_of
from anaphora.tiers.pieces import Uses, batches
from anaphora.tiers.valkey import scripts
from anaphora.tiers.valkey.batches import each, on_a_thread, pieces
from anaphora.tiers.valkey.framing import packed, restored, unpacked
from anaphora.tiers.valkey.servers import Access, Command, Reply, Servers, Unreachable
from anaphora.types import Key, Scope

_CLUSTER_BUCKETS = 16
_READ_ENTRIES = 16
_ENTRIES = 500
"""Of one command that carries no values."""
_MAX_USES = 1 << 14
_FORBIDDEN = frozenset("{}*?[]\\")


class ValkeyOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    """`redis://[USER:PASSWORD@]HOST:PORT/DB`, `rediss://` (TLS), `unix://PATH`, `redis+cluster://`, `rediss+cluster://`."""
    capacity_bytes: int = 4 << 30
    """Of all entries under `prefix`, whoever put them. Processes that share a server should agree on it."""
    prefix: str = "anaphora:"
    """What every key on the server begins with."""
    ca_file: str = ""
    """Of the authority that signed the server's certificate. Empty: those the system trusts."""
    timeout_s: float = 2.0
    """How long to wait for one reply."""
    connect_timeout_s: float = 1.0
    max_connections: int = 8
    poll_s: float = 0.5
    """How often a process that asks nothing looks for erasures by others: for so long it may use copies of its own."""
    rest_s: float = 1.0
    """For how long a server that could not be reached is left alone, except by those looks."""
    eviction: Eviction = Eviction()
    """Processes that share a server should agree on it, too: `ValkeyTier` tells what happens if they do not. In a cluster
    shares are of each bucket."""


class ValkeyTier:
    """For one event loop.

    The epoch is the server's, as last heard: with every reply, and by looking every `poll_s`. So copies in this process
    outlive an erasure by another one for at most that long and a reply's way; while the server cannot be reached they stay
    in use, and the first reply afterwards ends that.

    The order of leaving is the server's too: that of whoever was the last to put something for the first time. Where it
    differs from the one before, everything is ranked anew, which takes the server up to half a minute for a million entries;
    processes that had another order follow. Shares are each process's own, and so is the capacity: the smallest one wins.
    Once a process limits what a tenant may fill, the server keeps an order of each tenant's entries until it is empty.

    Uses are told with the next put, or within `poll_s`: several of one entry before that count as one.
    """

    name = "valkey"

    def __init__(self, options: ValkeyOptions, *, clock: Clock, emit: Emit = ignore) -> None:
        if not options.prefix or _FORBIDDEN & set(options.prefix):
            raise ConfigError(f"a key prefix may not be empty or hold any of {' '.join(sorted(_FORBIDDEN))}")
        access = Access(options.url, options.ca_file, options.timeout_s, options.connect_timeout_s, options.max_connections)
        self._options = options
        self._clock = clock
        self._emit = emit
        self._servers = Servers(access)
        self._tags = [f"{number:02x}" for number in range(_CLUSTER_BUCKETS if access.cluster else 1)]
        self._bucket_keys = [_keys_of(options.prefix, tag) for tag in self._tags]
        self._uses = Uses(_MAX_USES)
        self._since_s = clock.monotonic_s()
        self._met = False
        self._agreed: set[int] = set()
        """Buckets that have been told this process's order of leaving."""
        self._epoch = 0
        self._first_epoch = 0
        """Of the server when this process first heard from it, if nothing had been erased since this tier was made."""
        self._listener: asyncio.Task[None] | None = None
        self._rest_until_s = float("-inf")
        self._problem = ""
        self._num_evicted = 0
        self._num_damaged = 0
        self._closed = False

    @property
    def capacity_bytes(self) -> int:
        return self._options.capacity_bytes

    @property
    def _bucket_bytes(self) -> int:
        return self._options.capacity_bytes // len(self._tags)

    # -- entries -------------------------------------------------------------------------------------------------------

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        found: dict[Key, Entry] = {}
        reads = [(bucket, some) for bucket, all_keys in self._by_bucket(keys) for some in pieces(all_keys, _READ_ENTRIES)]
        async for entries in each(reads, lambda batch: self._get(*batch)):
            found.update(entries)
        self.touch(found)
        return found

    async def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        now_s = self._clock.now_s()
        found: dict[Key, int] = {}
        for bucket, all_keys in self._by_bucket(keys):
            index = self._bucket_keys[bucket][0]
            for some in pieces(all_keys, _ENTRIES):
                [replies] = await self._ask(bucket, [("HMGET", index, *some)])
                for key, data in zip(some, replies, strict=True):
                    about = None if data is None else unpacked(data)
                    if about is not None and not 0 < about.expires_at_s <= now_s:
                        found[key] = about.size
        return found

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        stored = await self._put_all(entries, epoch)
        for _ in range(2):  # an erasure changes the epoch twice
            if epoch is None or (epoch or self._first_epoch) == self._epoch:
                break
            epoch, erasures = await self.erasures(epoch or self._first_epoch)
            refused = {key: entry for key, entry in entries.items() if key not in stored}
            stored |= await self._put_all(left_of(refused, erasures), epoch)
        return stored

    async def _put_all(self, entries: Mapping[Key, Entry], epoch: int | None) -> frozenset[Key]:
        """What is stored of `entries`; nothing if the epoch is no longer `epoch`."""
        stored: set[Key] = set()
        writes = [
            (bucket, some) for bucket, keys in self._by_bucket(entries) for some in batches({key: entries[key] for key in keys})
        ]
        async for keys in each(writes, lambda batch: self._put(*batch, epoch)):
            stored |= keys
        return frozenset(stored)

    async def delete_many(self, keys: Collection[Key]) -> int:
        count = 0
        async with self._erasing(Erasure(keys=tuple(keys))):
            for bucket, all_keys in self._by_bucket(keys):
                for some in pieces(all_keys, _ENTRIES):
                    count += await self._run(bucket, scripts.DELETE, *some)
        return count

    async def forget(self, scope: Scope) -> int:
        count = 0
        async with self._erasing(Erasure(scope)):
            for bucket in range(len(self._tags)):
                async for keys in self._matching(bucket, scope, "remove"):
                    count += len(keys)
            await self._remove_strays()
        return count

    async def keys(self, scope: Scope = EVERYTHING) -> list[Key]:
        found: dict[Key, None] = {}  # a scan may tell one twice
        for bucket in range(len(self._tags)):
            async for keys in self._matching(bucket, scope, "tell"):
                found.update(dict.fromkeys(keys))
        return list(found)

    def touch(self, keys: Iterable[Key]) -> None:
        self._uses.note(keys)

    async def keep(self, keys: Collection[Key], until_s: float) -> int:
        shares = [int(share * self._bucket_bytes) for share in (self._options.eviction.keep_share, ALL_KEPT_SHARE)]
        count = 0
        for bucket, all_keys in self._by_bucket(keys):
            for some in pieces(all_keys, _ENTRIES):
                count += await self._run(bucket, scripts.KEEP, repr(until_s), *shares, *some)
        return count

    def epoch(self) -> int:
        return 0 if self._epoch == self._first_epoch else self._epoch

    async def erasures(self, since: int) -> tuple[int, tuple[Erasure, ...]]:
        log, state = self._bucket_keys[0][4], self._bucket_keys[0][3]
        told, fields = await self._ask(0, [("LRANGE", log, 0, -1), ("HMGET", state, "epoch", "forgotten_until")])
        epoch, forgotten_until = (int(field or 0) for field in fields)
        self._heard(epoch)
        if since < forgotten_until:
            return epoch, (Erasure(EVERYTHING),)
        found: list[Erasure] = []
        for line in told:
            number, _, text = line.partition(b" ")
            if int(number) > since:
                found.append(_decode_erasure(text))
        return epoch, tuple(found)

    async def stats(self) -> TierStats:
        num_entries = used_bytes = kept_bytes = 0
        for bucket in range(len(self._tags)):
            num, used, kept = await self._run(bucket, scripts.TOTALS)
            num_entries += num
            used_bytes += used
            kept_bytes += kept
        return TierStats(num_entries, used_bytes, self.capacity_bytes, kept_bytes, self._num_evicted, self._num_damaged)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
        if self._met and self._uses:
            with contextlib.suppress(TierFailed):  # only the order of use is lost
                await self._tell_uses()
        await self._servers.aclose()

    # -- one batch -----------------------------------------------------------------------------------------------------

    async def _get(self, bucket: int, keys: list[Key]) -> dict[Key, Entry]:
        index, _, _, state, *_, place = self._bucket_keys[bucket]
        metadata, values, epoch = await self._ask(
            bucket, [("HMGET", index, *keys), ("MGET", *[place + key for key in keys]), ("HGET", state, "epoch")]
        )
        self._heard(int(epoch or 0))
        now_s = self._clock.now_s()
        found: dict[Key, Entry] = {}
        damaged: list[bytes] = []

        def sort() -> None:
            for key, about, value in zip(keys, metadata, values, strict=True):
                if about is None:
                    continue
                entry = restored(key, about, value, now_s)
                if entry is None:
                    damaged.extend((key, about))
                elif not entry.expired(now_s):
                    found[key] = entry

        await on_a_thread(sum(len(value or b"") for value in values), sort)
        if damaged:
            await self._discard(bucket, damaged)
        return found

    async def _put(self, bucket: int, entries: dict[Key, Entry], epoch: int | None) -> set[Key]:
        await self._meet()
        if epoch is not None and epoch == 0:
            epoch = self._first_epoch
        capacity = self._bucket_bytes
        place = self._bucket_keys[bucket][-1]
        now_s = self._clock.now_s()
        framed = await on_a_thread(
            sum(len(entry.value) for entry in entries.values()),
            lambda: [packed(key, entry) for key, entry in entries.items()],
        )
        sets: list[Command] = []
        words: list[bytes | str | int | float] = []
        for (key, entry), data in zip(entries.items(), framed, strict=True):
            size = entry.size
            if size > capacity or entry.expired(now_s):
                size = capacity + 1  # says to remove what is there
            elif entry.expires_at_s is None:
                sets.append(("SET", place + key, entry.value))
            else:
                left_ms = max(1, round((entry.expires_at_s - now_s) * 1000))
                sets.append(("SET", place + key, entry.value, "PX", left_ms))
            words += (key, size, "" if entry.expires_at_s is None else repr(entry.expires_at_s), data)
        used = [key for key in self._uses if self._bucket(key) == bucket][:_ENTRIES]
        self._uses.take_of(used)
        eviction = self._options.eviction
        script = self._script(
            bucket,
            scripts.PUT,
            capacity,
            int(eviction.tenant_share * capacity),
            int(ALL_KEPT_SHARE * capacity),
            eviction.order,
            "" if bucket in self._agreed else "1",
            "" if epoch is None else epoch,
            len(entries),
            *words,
            *used,
        )
        *_, (heard, num_evicted, evicted_bytes, *stored) = await self._ask(bucket, [*sets, script])
        self._agreed.add(bucket)
        self._heard(heard)
        if num_evicted:
            self._num_evicted += num_evicted
            self._emit(Evicted(self.name, num_evicted, evicted_bytes))
        return {key for key, there in zip(entries, stored, strict=True) if there}

    async def _discard(self, bucket: int, damaged: list[bytes]) -> None:
        """Remove what is damaged, counting it. What was replaced or removed in the meantime is neither."""
        try:
            count = await self._run(bucket, scripts.DISCARD, *damaged)
        except TierFailed:
            count = len(damaged) // 2
        if count:
            self._num_damaged += count
            self._emit(Damaged(self.name, count))

    # -- erasing -------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _erasing(self, erasure: Erasure) -> AsyncIterator[None]:
        """A new epoch before, so that nothing prepared earlier is stored any more, and one after: somebody may have read the
        old state in between."""
        note = _encode_erasure(erasure)
        self._heard(await self._run(0, scripts.ERASE, self._epoch, note))
        for bucket in range(1, len(self._tags)):
            await self._run(bucket, scripts.RAISE, self._epoch)
        yield
        self._heard(await self._run(0, scripts.ERASE, self._epoch, note))

    async def _matching(self, bucket: int, scope: Scope, verb: str) -> AsyncIterator[list[Key]]:
        wanted = ["" if field is None else f"={field}" for field in (scope.tenant, scope.model, scope.tag)]
        cursor: Reply = b"0"
        while True:
            cursor, keys = await self._run(bucket, scripts.MATCH, cursor, *wanted, verb)
            yield keys
            if int(cursor) == 0:
                return

    async def _remove_strays(self) -> None:
        """Values that no index knows: the server evicted parts of an index, or somebody removed them."""
        async for names in self._servers.scan(f"{self._options.prefix}{{*}}:v:*".encode()):
            for bucket, keys in enumerate(self._bucket_keys):
                place = keys[-1]
                seen = [name[len(place) :] for name in names if name.startswith(place)]
                for some in pieces(seen, _ENTRIES):
                    await self._ask(bucket, [("EVAL", scripts.STRAYS, len(keys), *keys, *some)])

    # -- asking --------------------------------------------------------------------------------------------------------

    async def _run(self, bucket: int, script: str, *words: bytes | str | float) -> Reply:
        [reply] = await self._ask(bucket, [self._script(bucket, script, *words)])
        return reply

    def _script(self, bucket: int, script: str, *words: bytes | str | float) -> Command:
        # In full: a server that was started again knows no digests, and in a transaction there is no second try.
        keys = self._bucket_keys[bucket]
        return ("EVAL", script, len(keys), *keys, repr(self._clock.now_s()), *words)

    async def _ask(self, bucket: int, commands: Sequence[Command]) -> list[Reply]:
        await self._meet()
        return await self._transact(bucket, commands)

    async def _transact(self, bucket: int, commands: Sequence[Command]) -> list[Reply]:
        if self._clock.monotonic_s() < self._rest_until_s:
            raise TierFailed(self._problem)
        try:
            return await self._servers.transact(self._tags[bucket], commands)
        except Unreachable as error:
            self._rest_until_s = self._clock.monotonic_s() + self._options.rest_s
            self._problem = str(error)
            raise
        except TierFailed as error:
            if "WRONGTYPE" in str(error):  # somebody else wrote to a key of ours
                keys = self._bucket_keys[bucket]
                await self._servers.transact(self._tags[bucket], [("EVAL", scripts.RESET, len(keys), *keys)])
            raise

    async def _meet(self) -> None:
        if self._closed:
            raise TierFailed("the shared cache is closed")
        if self._listener is None:
            self._listener = asyncio.get_running_loop().create_task(self._listen())
        if self._met:
            return
        epoch, (seconds, microseconds) = await self._transact(0, [("HGET", self._bucket_keys[0][3], "epoch"), ("TIME",)])
        if self._met:
            return
        self._met = True
        # An epoch is a time of the server's (`scripts.ERASE`): had anything been erased since this tier was made?
        made_at = int(seconds) * 1_000_000 + int(microseconds) - (self._clock.monotonic_s() - self._since_s) * 1_000_000
        if int(epoch or 0) < made_at:
            self._first_epoch = int(epoch or 0)
        self._heard(int(epoch or 0))

    def _heard(self, epoch: int) -> None:
        """Replies may overtake one another, and a server may lose its memory: epochs only grow."""
        self._epoch = max(self._epoch, epoch)

    async def _listen(self) -> None:
        while True:
            await asyncio.sleep(self._options.poll_s)
            with contextlib.suppress(TierFailed):
                [epoch] = await self._servers.transact(self._tags[0], [("HGET", self._bucket_keys[0][3], "epoch")])
                self._rest_until_s = float("-inf")
                self._heard(int(epoch or 0))
                await self._tell_uses()

    async def _tell_uses(self) -> None:
        for bucket, keys in self._by_bucket(self._uses.take()):
            for some in pieces(keys, _ENTRIES):
                await self._transact(bucket, [self._script(bucket, scripts.TOUCH, *some)])

    # -- buckets -------------------------------------------------------------------------------------------------------

    def _bucket(self, key: Key) -> int:
        return key[-1] % len(self._tags)

    def _by_bucket(self, keys: Iterable[Key]) -> list[tuple[int, list[Key]]]:
        found: dict[int, list[Key]] = {}
        for key in dict.fromkeys(keys):
            found.setdefault(self._bucket(key), []).append(key)
        return list(found.items())


_encode_erasure = msgspec.msgpack.Encoder().encode
_decode_erasure = msgspec.msgpack.Decoder(Erasure).decode


def _keys_of(prefix: str, tag: str) -> tuple[bytes, ...]:
    """The keys of a bucket, in the order of the scripts' KEYS; the last one is what the values' keys begin with."""
    names = ("index", "order", "expiry", "state", "log", "ranks", "turns", "kept", "uses", "tenants", "v:")
    return tuple([f"{prefix}{{{tag}}}:{name}".encode() for name in names])
