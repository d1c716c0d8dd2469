"""Which KV block lies where: a pure index over a pool of physical blocks. No tensors, no clock, no lock.

One loop owns it (the engine's), and goes through these verbs for every request:

    lease = cache.match(hashes, num_tokens, tenant=t)     what is there already, leased so that it stays
    new = cache.allocate(lease, hashes[lease.num_blocks:][:n])   room for the next n blocks that were computed
    pool.save(new.block_ids, ...)                         the caller copies the KV into them
    cache.commit(lease, len(new.block_ids), cost_s)       from here on others find them
    cache.release(lease)                                  always, also after an error; what was committed stays
    cache.pin(hash, until_s)                              a prefix that was promised to somebody stays until then
    cache.forget(scope)                                   nothing of a tenant is found, or kept, from here on

Blocks are named by `keys.block_hashes`: a hash covers its parent's hash, its tokens and its namespace, so that equal names
mean equal content. What holds at all times (`check` asserts most of it):

- A hash has at most one physical block, and a physical block at most one hash.
- Only committed blocks are matched, from the root on without a gap, and only by the tenant who committed them.
- `match` leaves at least one token to compute: logits of the last token are needed, and a KV block does not hold them.
- A leased block never leaves its physical block, nor does an ancestor of any block: only leaves without a lease are evicted.
- A pinned block is not evicted either, and neither is what it stands on. What pins hold stays within a quota for each tenant
  and one for all together: beyond it the pin that was used longest ago is dropped, and counted.
- Free, pending, cached and forgotten-but-still-leased blocks add up to the pool.

Caching is best effort: where there is no room, `allocate` gives fewer blocks or none, and the request goes on without them.

The order of leaving is the policy's. It holds all cached blocks, and the first victim that is a leaf without a lease goes.
A victim that may not go yet is *parked*: taken out of the policy, so that no later walk meets it again, which keeps an
eviction O(1) amortised whatever the policy and the shape of the tree. To the policy, a parked block has left. If it is used
again it comes back as if it had been computed anew; when its last child is evicted before that, or its pin ends, it is overdue
and goes next; when its last lease ends, its use ended just now, and it comes back too.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Sequence
from enum import Enum

import msgspec

from anaphora.policies.base import Policy
from anaphora.types import BlockHash, Scope, Tenant

PINNED_SHARE = 0.75
"""Of the pool, at most so much is held by the pins of all tenants together: the rest is there for whoever comes."""


class Allocation(msgspec.Struct, frozen=True):
    """Answer to `allocate(lease, hashes)`: the first `num_adopted` hashes need no copy, the next `len(block_ids)` do.

    The rest got no room.
    """

    num_adopted: int
    """Blocks that somebody else had committed meanwhile: the lease holds those now."""
    block_ids: list[int]
    """Physical blocks to be filled, in order of the hashes after the adopted ones."""


class KVCacheStats(msgspec.Struct, frozen=True):
    """Gauges count blocks as they are now; counters count since the start."""

    num_blocks: int
    num_free: int
    num_cached: int
    num_leased: int
    """Of the cached ones, those under at least one lease."""
    num_pending: int
    num_forgotten: int
    """Forgotten, but still under a lease: nobody finds them, and they are free when it ends."""
    num_leases: int
    query_tokens: int
    hit_tokens: int
    committed_blocks: int
    evicted_blocks: int
    forgotten_blocks: int
    num_pins: int = 0
    num_held: int = 0
    """Blocks that pins keep from being evicted."""
    dropped_pins: int = 0
    """Pins that ended before their time because a quota was full."""


class _State(Enum):
    PENDING = "pending"
    COMMITTED = "committed"
    FORGOTTEN = "forgotten"


class _Block:
    """One physical block that is not free."""

    __slots__ = (
        "cost_s",
        "hash",
        "id",
        "num_children",
        "num_holds",
        "num_leases",
        "parent",
        "parked",
        "pinned_until_s",
        "state",
        "tenant",
    )

    def __init__(self, block_id: int, block_hash: BlockHash, parent: _Block | None, tenant: Tenant) -> None:
        self.id = block_id
        self.hash = block_hash
        self.parent = parent
        self.tenant = tenant
        self.state = _State.PENDING
        self.cost_s = 0.0
        self.num_leases = 0
        self.num_children = 0
        """Pending and committed blocks right behind this one."""
        self.parked = False
        self.pinned_until_s: float | None = None
        """None: not pinned itself."""
        self.num_holds = 0
        """Its own pin, and the blocks right behind it that are held: 0 exactly if no pin stands on it."""


def _evictable(block: _Block) -> bool:
    return block.num_leases == 0 and block.num_children == 0 and block.pinned_until_s is None


def _covers(scope: Scope, tenant: Tenant) -> bool:
    return scope.tag is None and scope.tenant in (None, tenant)


class Lease:
    """The chain of blocks one request stands on, from the root on. `match` makes it, `release` ends it."""

    __slots__ = ("_announced", "_blocks", "_forgotten", "_pending", "_released", "num_matched_blocks", "tenant")

    def __init__(self, tenant: Tenant, blocks: list[_Block]) -> None:
        self.tenant = tenant
        self.num_matched_blocks = len(blocks)
        """Blocks that were there when the lease was taken. What is adopted or committed later does not count."""
        self._blocks = blocks
        self._pending: list[_Block] = []
        self._announced: frozenset[BlockHash] = frozenset()
        self._forgotten = False
        self._released = False

    @property
    def num_blocks(self) -> int:
        """Blocks of the chain, pending ones included: the next hash to allocate is `hashes[num_blocks]`."""
        return len(self._blocks) + len(self._pending)

    @property
    def block_ids(self) -> list[int]:
        """Physical blocks of the chain that hold their content (matched, adopted, committed), in order. None after release."""
        return [block.id for block in self._blocks]


class KVCache:
    """See the module. `block_size` is in tokens, `block_bytes` is what the policy is told as each block's size. `pin_quota` is
    the share of the pool that pins of one tenant may hold."""

    def __init__(
        self, num_blocks: int, block_size: int, policy: Policy[BlockHash], *, block_bytes: int = 1, pin_quota: float = 0.25
    ) -> None:
        if num_blocks < 0 or block_size < 1:
            raise ValueError(f"no cache has {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._block_bytes = block_bytes
        self._policy = policy
        # A stack: low ids go first, and a chain that was evicted tail first is handed out again in ascending order, so that the
        # pool copies few and long runs.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._index: dict[BlockHash, _Block] = {}
        """Pending and committed blocks."""
        self._leases: set[Lease] = set()
        self._announced: dict[BlockHash, int] = {}
        """By how many leases a block is announced."""
        self._overdue: dict[_Block, None] = {}
        """Parked blocks that may be evicted: they go before any other, in this order."""
        self._pins: OrderedDict[_Block, None] = OrderedDict()
        """Pinned blocks, least recently used first; of each tenant likewise:"""
        self._pins_of: dict[Tenant, OrderedDict[_Block, None]] = {}
        self._held_of: Counter[Tenant] = Counter()
        """Blocks that pins hold, by tenant."""
        self._num_held = 0
        self._pin_ends: list[tuple[float, int, _Block]] = []
        """A heap. What was pinned again meanwhile, or is pinned no more, is passed over when its turn comes."""
        self._quota = int(num_blocks * pin_quota)
        self._quota_of_all = int(num_blocks * PINNED_SHARE)
        self._num_pending = 0
        self._num_idle = 0
        """Committed blocks without a lease. If there are any, one of them is a leaf: leases cover whole chains."""
        self._num_forgotten = 0
        self._query_tokens = 0
        self._hit_tokens = 0
        self._committed_blocks = 0
        self._evicted_blocks = 0
        self._forgotten_blocks = 0
        self._dropped_pins = 0
        self._num_pinnings = 0

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[BlockHash], num_tokens: int, *, tenant: Tenant) -> Lease:
        """Lease the longest cached prefix of a prompt of `num_tokens` tokens, whose full blocks are `hashes`.

        At least one token is left to compute. The blocks are touched tail first, so that the head, which more requests share,
        is the freshest. The caller owes a `release`. O(number of blocks).
        """
        blocks = self._cached_prefix(hashes, num_tokens, tenant)
        lease = Lease(tenant, blocks)
        self._leases.add(lease)
        for block in reversed(blocks):
            self._use(block)
        self._query_tokens += num_tokens
        self._hit_tokens += len(blocks) * self.block_size
        return lease

    def allocate(self, lease: Lease, hashes: Sequence[BlockHash]) -> Allocation:
        """Reserve physical blocks for `hashes`, which follow the lease's chain, evicting others where none are free.

        What somebody else committed meanwhile is adopted into the lease, not stored twice. Where the next block is somebody
        else's and still pending, or there is no more room, the allocation ends there: asking again later is fine. Blocks
        announced by the lease from there on are no longer announced, so that nobody waits for what may never come. The new
        blocks are pending, which means that nobody finds them, until `commit`.
        """
        self._expect_live(lease)
        if lease._forgotten:
            return Allocation(0, [])
        num_adopted = self._adopt(lease, hashes)
        missing = self._absent(hashes, num_adopted)
        while len(self._free) < missing and self._evict():
            pass
        room = min(missing, len(self._free))
        block_ids = [self._reserve(lease, block_hash) for block_hash in hashes[num_adopted : num_adopted + room]]
        if num_adopted + room < len(hashes):
            self._withdraw(lease)
        return Allocation(num_adopted, block_ids)

    def commit(self, lease: Lease, num_blocks: int, cost_s: float) -> None:
        """The lease's first `num_blocks` pending blocks hold their content now: from here on they are found.

        `cost_s` is what computing one of them took, in seconds. They stay under the lease until its release. If the lease's
        tenant was forgotten since `match`, the blocks are freed instead: they stem from before.
        """
        self._expect_live(lease)
        if not 0 <= num_blocks <= len(lease._pending):
            raise ValueError(f"{num_blocks} blocks cannot be committed, {len(lease._pending)} are pending")
        blocks, lease._pending = lease._pending[:num_blocks], lease._pending[num_blocks:]
        if lease._forgotten:
            self._drop_pending(blocks)
            return
        for block in reversed(blocks):  # tail first, as in `match`
            block.state = _State.COMMITTED
            block.cost_s = cost_s
            block.num_leases = 1
            self._insert(block)
        lease._blocks += blocks
        self._num_pending -= num_blocks
        self._committed_blocks += num_blocks

    def release(self, lease: Lease) -> None:
        """End the lease. Its pending blocks are freed, its committed ones may be evicted once no other lease holds them.

        A second release of the same lease is a ValueError: it would take away somebody else's.
        """
        self._expect_live(lease)
        lease._released = True
        self._leases.remove(lease)
        self._withdraw(lease)
        self._drop_pending(lease._pending)
        for block in reversed(lease._blocks):
            self._unuse(block)
        lease._pending, lease._blocks = [], []

    def forget(self, scope: Scope) -> int:
        """Drop all blocks of `scope.tenant` (None: of everybody), and return how many. `count(scope)` says what is left.

        Leased blocks are not found any more, and are freed when their last lease ends. A lease taken before can add nothing
        any more. Blocks carry no tags: a scope with a tag has no blocks. `scope.model` is not looked at: a cache holds blocks
        of one model, and its owner asks only where that one is meant. O(number of blocks in use).
        """
        blocks = [block for block in self._index.values() if _covers(scope, block.tenant)]
        for block in blocks:
            self._forget(block)
        for lease in self._leases:
            if _covers(scope, lease.tenant):
                lease._forgotten = True
                self._withdraw(lease)
        self._forgotten_blocks += len(blocks)
        return len(blocks)

    # -- pins ----------------------------------------------------------------------------------------------------------

    def pin(self, block_hash: BlockHash, until_s: float) -> None:
        """Keep the committed block `block_hash`, and everything before it, from being evicted until `expire(until_s)`.

        Pinning it again is a use of the pin, and never shortens it. Where a quota is full the pins that were used longest ago
        are dropped, this one too if it alone is more than the quota. Nothing happens where the block is not there.
        """
        block = self._index.get(block_hash)
        if block is None or block.state is not _State.COMMITTED:
            return
        pins = self._pins_of.setdefault(block.tenant, OrderedDict())
        if block.pinned_until_s is None:
            self._overdue.pop(block, None)
            block.pinned_until_s = until_s
            self._hold(block)
        block.pinned_until_s = max(block.pinned_until_s, until_s)
        for order in (self._pins, pins):
            order[block] = None
            order.move_to_end(block)
        self._num_pinnings += 1  # so that the heap never compares blocks
        heapq.heappush(self._pin_ends, (block.pinned_until_s, self._num_pinnings, block))
        if len(self._pin_ends) > 2 * len(self._pins) + 64:
            ends = ((b.pinned_until_s or 0.0, number, b) for number, b in enumerate(self._pins))
            self._pin_ends = sorted(ends, key=lambda end: end[:2])
        while self._held_of[block.tenant] > self._quota:
            self._drop_pin(next(iter(pins)))
        while self._num_held > self._quota_of_all:
            self._drop_pin(next(iter(self._pins)))

    def expire(self, now_s: float) -> None:
        """End the pins whose time is over. The caller says what time it is: seconds, as in `pin`."""
        while self._pin_ends and self._pin_ends[0][0] <= now_s:
            _, _, block = heapq.heappop(self._pin_ends)
            if block.pinned_until_s is not None and block.pinned_until_s <= now_s:
                self._unpin(block)

    # -- sharing what is being computed --------------------------------------------------------------------------------

    def announce(self, lease: Lease, hashes: Sequence[BlockHash]) -> None:
        """Say that this lease's request is about to compute `hashes`; replaces what it announced before, () takes it back.

        An announcement ends with the lease, or as soon as there is no room for one of its blocks. So whoever waits for a block
        (`awaited`) finds it committed in the end, or is free to compute it.
        """
        self._expect_live(lease)
        self._withdraw(lease)
        if lease._forgotten:
            return
        lease._announced = frozenset(hashes)
        for block_hash in lease._announced:
            self._announced[block_hash] = self._announced.get(block_hash, 0) + 1

    def num_cached(self, hashes: Sequence[BlockHash], num_tokens: int, *, tenant: Tenant) -> int:
        """How many blocks `match` would find now. Changes nothing, and counts as no use. O(number of blocks)."""
        return len(self._cached_prefix(hashes, num_tokens, tenant))

    def find(self, block_hash: BlockHash, *, tenant: Tenant) -> int | None:
        """The physical block of the committed block `block_hash`; None: it is not there. Changes nothing, and counts as no use:
        it may be evicted as soon as anything else is asked of the cache."""
        block = self._index.get(block_hash)
        committed = block is not None and block.state is _State.COMMITTED and block.tenant == tenant
        return block.id if block is not None and committed else None

    def awaited(self, hashes: Sequence[BlockHash], num_tokens: int, *, tenant: Tenant) -> BlockHash | None:
        """Of the blocks right behind what `match` would find now, the last one that is being computed by somebody, and all
        before it too; None: the first one is not. Changes nothing. O(number of blocks).

        A request is better off waiting for it, or it would compute the same blocks at the same time. As long as it `is_coming`
        there is no need to look again.
        """
        last: BlockHash | None = None
        for block_hash in hashes[len(self._cached_prefix(hashes, num_tokens, tenant)) : self._usable(hashes, num_tokens)]:
            if not self.is_coming(block_hash):
                break
            last = block_hash
        return last

    def is_coming(self, block_hash: BlockHash) -> bool:
        """Whether somebody is computing the block now, or is about to. O(1)."""
        block = self._index.get(block_hash)
        return block_hash in self._announced if block is None else block.state is _State.PENDING

    # -- looking at it -------------------------------------------------------------------------------------------------

    def count(self, scope: Scope) -> int:
        """Blocks of `scope` that hold or may hold content: 0 proves a `forget`. Pending and forgotten leased ones count."""
        held = set(self._index.values())
        for lease in self._leases:
            held.update(lease._blocks, lease._pending)
        return sum(_covers(scope, block.tenant) for block in held)

    def stats(self) -> KVCacheStats:
        num_cached = len(self._index) - self._num_pending
        return KVCacheStats(
            num_blocks=self.num_blocks,
            num_free=len(self._free),
            num_cached=num_cached,
            num_leased=num_cached - self._num_idle,
            num_pending=self._num_pending,
            num_forgotten=self._num_forgotten,
            num_leases=len(self._leases),
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            committed_blocks=self._committed_blocks,
            evicted_blocks=self._evicted_blocks,
            forgotten_blocks=self._forgotten_blocks,
            num_pins=len(self._pins),
            num_held=self._num_held,
            dropped_pins=self._dropped_pins,
        )

    def check(self) -> None:
        """AssertionError where index, leases, policy and pool contradict each other. For tests: O(everything)."""
        indexed = list(self._index.values())
        pending = [block for lease in self._leases for block in lease._pending]
        leased = [block for lease in self._leases for block in lease._blocks]
        forgotten = {block for block in pending + leased if block.state is _State.FORGOTTEN}
        committed = [block for block in indexed if block.state is _State.COMMITTED]

        ids = [*self._free, *(block.id for block in indexed), *(block.id for block in forgotten)]
        assert sorted(ids) == list(range(self.num_blocks)), "a physical block is lost, or in two places"
        assert all(block.hash == block_hash for block_hash, block in self._index.items())
        assert self._num_pending == len(indexed) - len(committed)
        assert self._num_forgotten == len(forgotten)
        assert self._num_idle == sum(block.num_leases == 0 for block in committed)
        assert {b for b in indexed if b.state is _State.PENDING} == set(pending) - forgotten, "a pending block has no owner"
        assert len(pending) == len(set(pending)), "a pending block has two owners"

        leases_of, children_of = Counter(leased), Counter(block.parent for block in indexed)
        for block in indexed:
            assert block.state is not _State.FORGOTTEN
            assert block.num_leases == leases_of[block]
            assert block.num_children == children_of[block]
            parent = block.parent
            assert parent is None or self._index.get(parent.hash) is parent, "a block outlived its parent"
            assert parent is None or parent.tenant == block.tenant
            assert parent is None or block.state is _State.PENDING or parent.state is _State.COMMITTED
            assert parent is None or parent.num_leases >= min(block.num_leases, 1)
            assert not block.parked or not _evictable(block) or block in self._overdue
        assert all(block.parked and _evictable(block) for block in self._overdue)
        assert len(self._policy) == sum(not block.parked for block in committed)
        assert all(block.hash in self._policy for block in committed if not block.parked)

        held = Counter(block.parent for block in indexed if block.num_holds)
        assert all(block.num_holds == held[block] + (block.pinned_until_s is not None) for block in indexed)
        assert set(self._pins) == {block for block in indexed if block.pinned_until_s is not None}
        assert {(tenant, block) for tenant, pins in self._pins_of.items() for block in pins} == {
            (block.tenant, block) for block in self._pins
        }
        assert +self._held_of == Counter(block.tenant for block in indexed if block.num_holds)
        assert self._num_held == self._held_of.total() <= self._quota_of_all
        assert all(count <= self._quota for count in self._held_of.values())
        assert self._announced == Counter(block_hash for lease in self._leases for block_hash in lease._announced)

    # -- reading the index ---------------------------------------------------------------------------------------------

    def _usable(self, hashes: Sequence[BlockHash], num_tokens: int) -> int:
        """How many blocks of a prompt may come from the cache: its last token has to be computed."""
        if num_tokens < 1:
            raise ValueError("a prompt has at least one token")
        return min(len(hashes), (num_tokens - 1) // self.block_size)

    def _cached_prefix(self, hashes: Sequence[BlockHash], num_tokens: int, tenant: Tenant) -> list[_Block]:
        blocks: list[_Block] = []
        for block_hash in hashes[: self._usable(hashes, num_tokens)]:
            block = self._child(blocks[-1] if blocks else None, block_hash, tenant)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _child(self, parent: _Block | None, block_hash: BlockHash, tenant: Tenant) -> _Block | None:
        """The committed block `block_hash` right behind `parent`.

        The hash covers tenant and parent, so the last two conditions only fail for a caller who mixes up chains. He gets a
        miss, not somebody's KV at the wrong place.
        """
        block = self._index.get(block_hash)
        if block is None or block.state is not _State.COMMITTED or block.tenant != tenant or block.parent is not parent:
            return None
        return block

    def _absent(self, hashes: Sequence[BlockHash], start: int) -> int:
        """How many hashes from `start` on have no block at all. A block that is there, but was not adopted, ends the chain."""
        seen: set[BlockHash] = set()
        for block_hash in hashes[start:]:
            if block_hash in self._index or block_hash in seen:
                break
            seen.add(block_hash)
        return len(seen)

    # -- changing it ---------------------------------------------------------------------------------------------------

    def _expect_live(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise ValueError("the lease was released before" if lease._released else "the lease is of another cache")

    def _adopt(self, lease: Lease, hashes: Sequence[BlockHash]) -> int:
        if lease._pending:
            return 0
        for count, block_hash in enumerate(hashes):
            block = self._child(lease._blocks[-1] if lease._blocks else None, block_hash, lease.tenant)
            if block is None:
                return count
            self._use(block)
            lease._blocks.append(block)
        return len(hashes)

    def _reserve(self, lease: Lease, block_hash: BlockHash) -> int:
        chain = lease._pending or lease._blocks
        block = _Block(self._free.pop(), block_hash, chain[-1] if chain else None, lease.tenant)
        if block.parent is not None:
            block.parent.num_children += 1
        self._index[block_hash] = block
        self._num_pending += 1
        lease._pending.append(block)
        return block.id

    def _use(self, block: _Block) -> None:
        """One more lease on a committed block: it was used, and it stays."""
        if block.num_leases == 0:
            self._num_idle -= 1
        block.num_leases += 1
        if block.parked:
            self._insert(block)
        else:
            self._policy.touch(block.hash)

    def _unuse(self, block: _Block) -> None:
        block.num_leases -= 1
        if block.num_leases:
            return
        if block.state is _State.FORGOTTEN:
            self._num_forgotten -= 1
            self._free.append(block.id)
            return
        self._num_idle += 1
        if block.parked:
            self._insert(block)

    def _insert(self, block: _Block) -> None:
        self._policy.insert(block.hash, self._block_bytes, block.cost_s)
        block.parked = False
        self._overdue.pop(block, None)

    def _evict(self) -> bool:
        """Free one block: the first in the policy's order that is a leaf without lease and pin. False if there is none."""
        victim = next(iter(self._overdue), None) or self._next_victim()
        if victim is None:
            return False
        self._overdue.pop(victim, None)
        self._discard(victim)
        self._num_idle -= 1
        self._free.append(victim.id)
        self._evicted_blocks += 1
        if victim.parent is not None:
            self._look_again(victim.parent)
        return True

    def _look_again(self, block: _Block) -> None:
        """At a block that may have become evictable: if it was parked, its turn is over."""
        if block.parked and _evictable(block):
            self._overdue[block] = None

    def _next_victim(self) -> _Block | None:
        if not self._num_idle:
            return None
        while (block_hash := next(self._policy.victims(), None)) is not None:
            block = self._index[block_hash]
            if _evictable(block):
                return block
            self._policy.remove(block_hash)
            block.parked = True
        return None

    def _discard(self, block: _Block) -> None:
        """Out of index and policy; the physical block is the caller's."""
        del self._index[block.hash]
        if block.parent is not None:
            block.parent.num_children -= 1
        if block.state is _State.COMMITTED and not block.parked:
            self._policy.remove(block.hash)

    def _drop_pending(self, blocks: list[_Block]) -> None:
        for block in reversed(blocks):
            if block.state is _State.FORGOTTEN:
                self._num_forgotten -= 1
            else:
                self._discard(block)
                self._num_pending -= 1
            self._free.append(block.id)

    def _forget(self, block: _Block) -> None:
        if block.pinned_until_s is not None:
            self._unpin(block)
        self._discard(block)
        self._overdue.pop(block, None)
        if block.state is _State.PENDING:
            self._num_pending -= 1
        elif block.num_leases == 0:
            self._num_idle -= 1
            self._free.append(block.id)
            return
        block.state = _State.FORGOTTEN
        self._num_forgotten += 1

    def _withdraw(self, lease: Lease) -> None:
        for block_hash in lease._announced:
            self._announced[block_hash] -= 1
            if not self._announced[block_hash]:
                del self._announced[block_hash]
        lease._announced = frozenset()

    def _hold(self, block: _Block | None) -> None:
        while block is not None:
            block.num_holds += 1
            if block.num_holds > 1:  # and so is everything before it, already
                return
            self._held_of[block.tenant] += 1
            self._num_held += 1
            block = block.parent

    def _unpin(self, block: _Block) -> None:
        block.pinned_until_s = None
        del self._pins[block], self._pins_of[block.tenant][block]
        if not self._pins_of[block.tenant]:
            del self._pins_of[block.tenant]
        freed: _Block | None = block
        while freed is not None:
            freed.num_holds -= 1
            if freed.num_holds:
                break
            self._held_of[freed.tenant] -= 1
            self._num_held -= 1
            freed = freed.parent
        self._look_again(block)

    def _drop_pin(self, block: _Block) -> None:
        self._unpin(block)
        self._dropped_pins += 1
