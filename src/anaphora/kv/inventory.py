"""What KV lies in a tier: which blocks, which prefixes they make up, and whether they are what they should be.

For those who look after a tier (`anaphora kv`); the engine needs none of it. Nothing here needs torch, or the model.

A prefix is a chain of blocks, from one that stands at a prompt's beginning to one that no other block stands on, its leaf. It
is named by the key of its leaf, in hexadecimal, or as much of its beginning as is unique.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence

import msgspec

from anaphora.codecs import frame
from anaphora.errors import DamagedBlock
from anaphora.kv.stored import identified, storage_key, unpack, verified
from anaphora.tiers.base import EVERYTHING, Entry, ExaminableTier, Examined, Tier
from anaphora.types import BlockHash, Key, Scope, Tenant

Seen = Callable[[int], None]
"""Told of every batch how many entries it was."""

ID_DIGITS = 12
_HEAD_BYTES = 8 << 10
"""Enough for a block's header and the beginning of its frame with up to 1,500 tokens a block."""
_BATCH_BYTES = 32 << 20
_BATCH_ENTRIES = 256


class Block(msgspec.Struct, frozen=True):
    """A stored block, without its content."""

    key: Key
    hash: BlockHash
    parent: bytes
    """Hash of the block before it, or its namespace."""
    parent_key: Key
    """Where the block before it would lie."""
    start: int
    """Tokens of the prompt before it."""
    num_tokens: int
    codec: str
    lossy: bool
    size: int
    tenant: Tenant
    model: str
    stored_at_s: float

    @property
    def end(self) -> int:
        """Tokens of the prompt up to its end."""
        return self.start + self.num_tokens


class Prefix(msgspec.Struct, frozen=True):
    """One chain, as people are shown it."""

    id: str
    tenant: Tenant
    model: str
    codec: str
    num_tokens: int
    """From the prompt's beginning to the leaf's end, also where blocks between them are missing."""
    num_blocks: int
    num_bytes: int
    """Of all its blocks, whoever shares them."""
    stored_at_s: float
    """The leaf."""
    complete: bool
    """Whether no block is missing between the prompt's beginning and the leaf: only then can it be used."""


class Group(msgspec.Struct, frozen=True):
    """Totals of one model, tenant and codec."""

    model: str
    tenant: Tenant
    codec: str
    num_blocks: int
    num_tokens: int
    num_bytes: int
    num_prefixes: int
    longest_tokens: int
    """Of its prefixes."""
    oldest_s: float
    newest_s: float


class Inventory:
    """The blocks that were found, by key. `unreadable`: entries that are no blocks, or damaged."""

    def __init__(self, blocks: Collection[Block], unreadable: Sequence[Key] = ()) -> None:
        self.blocks = {block.key: block for block in blocks}
        self.unreadable = tuple(unreadable)
        self._children: dict[Key, list[Block]] = {}
        for block in self.blocks.values():
            if block.parent_key in self.blocks:
                self._children.setdefault(block.parent_key, []).append(block)

    @property
    def orphans(self) -> list[Block]:
        """Blocks that stand on one that is not there: no damage, but of no use until it comes back."""
        return [block for block in self.blocks.values() if block.start and block.parent_key not in self.blocks]

    def leaves(self) -> list[Block]:
        return [block for key, block in self.blocks.items() if key not in self._children]

    def chain(self, block: Block) -> list[Block]:
        """The block and those it stands on, as far as they are there; the first one first."""
        chain = [block]
        while chain[-1].start and (parent := self.blocks.get(chain[-1].parent_key)) is not None:
            chain.append(parent)
        return chain[::-1]

    def prefixes(self) -> list[Prefix]:
        """All of them, the longest first."""
        found = [self._prefix(leaf) for leaf in self.leaves()]
        return sorted(found, key=lambda prefix: (-prefix.num_tokens, prefix.id))

    def groups(self) -> list[Group]:
        """By model, tenant and codec."""
        members: dict[tuple[str, Tenant, str], list[Block]] = {}
        for block in self.blocks.values():
            members.setdefault((block.model, block.tenant, block.codec), []).append(block)
        return [
            _group(model, tenant, codec, blocks, [block for block in blocks if block.key not in self._children])
            for (model, tenant, codec), blocks in sorted(members.items())
        ]

    def find(self, id: str) -> Block:
        """The block whose key begins with `id`. Raises KeyError where none does, or several do; it says which."""
        found = [block for key, block in self.blocks.items() if key.hex().startswith(id.lower())] if id else []
        if len(found) == 1:
            return found[0]
        raise KeyError(f"{len(found)} blocks have an id that begins with {id!r}" if found else f"no block has the id {id!r}")

    def only_for(self, block: Block) -> list[Block]:
        """`block`, all that stands on it, and what it stands on as far as nothing else does."""
        found: list[Block] = []
        waiting = [block]
        while waiting:
            found.append(waiting.pop())
            waiting += self._children.get(found[-1].key, ())
        child = block
        while child.start and (parent := self.blocks.get(child.parent_key)) is not None:
            if len(self._children[parent.key]) > 1:
                break
            found.append(parent)
            child = parent
        return found

    def _prefix(self, leaf: Block) -> Prefix:
        chain = self.chain(leaf)
        return Prefix(
            id=leaf.key.hex()[:ID_DIGITS],
            tenant=leaf.tenant,
            model=leaf.model,
            codec="+".join(sorted({block.codec for block in chain})),
            num_tokens=leaf.end,
            num_blocks=len(chain),
            num_bytes=sum(block.size for block in chain),
            stored_at_s=leaf.stored_at_s,
            complete=chain[0].start == 0,
        )


class Damage(msgspec.Struct, frozen=True):
    key: Key
    reason: str


class Checked(msgspec.Struct, frozen=True):
    """What came of reading every block of a tier."""

    num_blocks: int
    """Sound ones."""
    num_tokens: int
    num_bytes: int
    num_orphans: int
    damaged: tuple[Damage, ...]


async def take(tier: Tier, scope: Scope = EVERYTHING, seen: Seen = lambda count: None) -> Inventory:
    """An inventory by the beginnings of all values. A tier that cannot be examined is read as the engine reads it: whole, and
    as a use. Raises TierFailed."""
    blocks: list[Block] = []
    unreadable: list[Key] = []
    async for key, found in _each(tier, scope, seen, _HEAD_BYTES):
        try:
            blocks.append(block_of(key, _sound(found), found.size))
        except DamagedBlock:
            unreadable.append(key)
    return Inventory(blocks, unreadable)


async def check(tier: Tier, scope: Scope = EVERYTHING, seen: Seen = lambda count: None) -> Checked:
    """Read every block whole, and see whether it is what its key and its place say. Raises TierFailed."""
    blocks: list[Block] = []
    damaged: list[Damage] = []
    async for key, found in _each(tier, scope, seen, None):
        try:
            entry = _sound(found)
            verified(key, entry.value)
            blocks.append(block_of(key, entry, found.size))
        except DamagedBlock as error:
            damaged.append(Damage(key, str(error)))
    inventory = Inventory(blocks)
    misplaced = list(_misplaced(inventory))
    wrong = {damage.key for damage in misplaced}
    inventory = Inventory([block for block in blocks if block.key not in wrong])
    return Checked(
        num_blocks=len(inventory.blocks),
        num_tokens=sum(block.num_tokens for block in inventory.blocks.values()),
        num_bytes=sum(block.size for block in inventory.blocks.values()),
        num_orphans=len(inventory.orphans),
        damaged=(*damaged, *misplaced),
    )


def block_of(key: Key, entry: Entry, size: int) -> Block:
    """What an entry says it is, its value whole or cut. Raises DamagedBlock; that it is sound is another matter
    (`stored.verified`). `size` is that of the whole entry."""
    header, framed = unpack(entry.value)
    block_hash, lossy = identified(key, header)
    return Block(
        key=key,
        hash=block_hash,
        parent=header.parent,
        parent_key=storage_key(BlockHash(header.parent), lossy=lossy),
        start=header.start,
        num_tokens=len(header.tokens),
        codec=frame.codec_of(framed),
        lossy=lossy,
        size=size,
        tenant=entry.tenant,
        model=entry.model,
        stored_at_s=entry.stored_at_s,
    )


def _misplaced(inventory: Inventory) -> Iterator[Damage]:
    for block in inventory.blocks.values():
        parent = inventory.blocks.get(block.parent_key)
        if parent is not None and block.start != parent.end:
            yield Damage(block.key, f"it says it begins at token {block.start}, and the block before it ends at {parent.end}")


async def _each(tier: Tier, scope: Scope, seen: Seen, num_bytes: int | None) -> AsyncIterator[tuple[Key, Examined]]:
    for keys in _batches(await tier.sizes(await tier.keys(scope)), num_bytes):
        for key, found in (await _examined(tier, keys, num_bytes)).items():
            yield key, found
        seen(len(keys))


async def _examined(tier: Tier, keys: Sequence[Key], num_bytes: int | None) -> dict[Key, Examined]:
    if isinstance(tier, ExaminableTier):
        return await tier.examine(keys, num_bytes=num_bytes)
    damaged_before = (await tier.stats()).num_damaged
    entries = await tier.get_many(keys)
    found = {key: Examined(entry, entry.size) for key, entry in entries.items()}
    missing = [key for key in keys if key not in entries]
    if missing and (await tier.stats()).num_damaged > damaged_before:
        found.update((key, Examined(None, 0)) for key in missing)  # it removed them, as it does whenever somebody reads
    return found


def _batches(sizes: dict[Key, int], num_bytes: int | None) -> Iterator[list[Key]]:
    batch: list[Key] = []
    total = 0
    for key, size in sizes.items():
        batch.append(key)
        total += size if num_bytes is None else min(size, num_bytes)
        if total >= _BATCH_BYTES or len(batch) >= _BATCH_ENTRIES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _sound(found: Examined) -> Entry:
    if found.entry is None:
        raise DamagedBlock("its bytes are not what was written")
    return found.entry


def _group(model: str, tenant: Tenant, codec: str, blocks: Sequence[Block], leaves: Sequence[Block]) -> Group:
    return Group(
        model=model,
        tenant=tenant,
        codec=codec,
        num_blocks=len(blocks),
        num_tokens=sum(block.num_tokens for block in blocks),
        num_bytes=sum(block.size for block in blocks),
        num_prefixes=len(leaves),
        longest_tokens=max((leaf.end for leaf in leaves), default=0),
        oldest_s=min(block.stored_at_s for block in blocks),
        newest_s=max(block.stored_at_s for block in blocks),
    )
