"""Which KV blocks should leave first? Policies over real traces of prompts, in the engine's pool and in a tier behind it.

The pool is `kv.cache.KVCache` itself (a tree: only leaves without a lease go), the tier is `tiers.ram.RamTier` filled and used
as `kv.offload` does it. Nothing is computed: traces have no texts, but ids of blocks that stand for a whole prefix.

    ANAPHORA_DATA=DIR python benchmarks/eviction.py [--capacities 0.01,0.05,0.2] [--policies lru,gdsf] [--json]

DIR holds `mooncake/conversation_first6015.jsonl.gz` (requests to a chat service, 512 tokens a block) and
`kv-cache-tester/claude_code_traces_mod8_1.tar.gz` (sessions of a coding agent, 64 tokens a block; each is a tenant, and they
begin one after the other, so that many are open at a time). A capacity is a share of all blocks that are ever asked for.

Reported: the share of prompt tokens that was found, and the share of prefill time that this saves if a token's cost is
1 + position / 8000, which is about what a 135M model shows on a CPU (attention grows with what stands before).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from anaphora.clock import ManualClock
from anaphora.kv.cache import KVCache
from anaphora.policies.base import Policy
from anaphora.registry import POLICIES
from anaphora.tiers.base import ENTRY_OVERHEAD, Entry
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import BlockHash, Key, Tenant

_TWICE_AT = 8000
"""The position where a token costs twice what the first one does."""


class Asked(msgspec.Struct, frozen=True):
    """A prompt: its tokens, and the names of its blocks (the last one may not be full)."""

    tenant: Tenant
    num_tokens: int
    blocks: tuple[BlockHash, ...]


class Trace(msgspec.Struct, frozen=True):
    name: str
    block_size: int
    requests: list[Asked]

    @property
    def num_blocks(self) -> int:
        return len({block for request in self.requests for block in request.blocks})


class Found(msgspec.Struct, frozen=True):
    tokens_share: float
    time_share: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacities", default="0.01,0.05,0.2,1")
    parser.add_argument("--policies", default="lru,gdsf")
    parser.add_argument("--requests", type=int, default=0, help="of each trace, only so many")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not (data := os.environ.get("ANAPHORA_DATA")):
        print("skipped: ANAPHORA_DATA is not set to the folder with the traces", file=sys.stderr)
        return 0
    rows: list[dict[str, Any]] = []
    for trace in (mooncake(Path(data)), claude_code(Path(data))):
        trace = Trace(trace.name, trace.block_size, trace.requests[: args.requests or None])
        for share in map(float, args.capacities.split(",")):
            capacity = max(1, round(share * trace.num_blocks))
            for place, replay in (("pool", in_pool), ("tier", in_tier)):
                for name in args.policies.split(","):
                    started_s = time.perf_counter()
                    found = replay(trace, POLICIES.load(name)(), capacity)
                    row = {"trace": trace.name, "capacity": share, "blocks": capacity, "place": place, "policy": name}
                    rows.append({**row, **msgspec.structs.asdict(found)})
                    print(f"{rows[-1]} in {time.perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return 0


def in_pool(trace: Trace, policy: Policy[BlockHash], capacity: int) -> Found:
    cache = KVCache(capacity, trace.block_size, policy)
    meter = Meter(trace.block_size)
    for request in trace.requests:
        lease = cache.match(request.blocks, request.num_tokens, tenant=request.tenant)
        meter.found(request, lease.num_matched_blocks)
        full = request.blocks[: request.num_tokens // trace.block_size]
        for number in range(lease.num_matched_blocks, len(full)):
            if not cache.allocate(lease, full[number : number + 1]).block_ids:
                break
            cache.commit(lease, 1, meter.cost(number))
        cache.release(lease)
    return meter.result()


def in_tier(trace: Trace, policy: Policy[Key], capacity: int) -> Found:
    tier = RamTier(RamOptions(capacity * ENTRY_OVERHEAD), policy=policy, clock=ManualClock())
    meter = Meter(trace.block_size)
    for request in trace.requests:
        full = [Key(block) for block in request.blocks[: request.num_tokens // trace.block_size]]
        usable = full[: (request.num_tokens - 1) // trace.block_size]
        present = next((number for number, key in enumerate(usable) if tier.get_now(key) is None), len(usable))
        meter.found(request, present)
        for key in full[present:]:
            tier.put_now(key, Entry(b"", 0.0, cost_s=1.0, tenant=request.tenant))
        tier.touch(reversed(full))
    return meter.result()


class Meter:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tokens = self._found_tokens = 0
        self._cost = self._found_cost = 0.0

    def cost(self, number: int) -> float:
        """Of the block with this number in its prompt."""
        size = self._block_size
        return _cost_up_to((number + 1) * size) - _cost_up_to(number * size)

    def found(self, request: Asked, num_blocks: int) -> None:
        self._tokens += request.num_tokens
        self._cost += _cost_up_to(request.num_tokens)
        self._found_tokens += num_blocks * self._block_size
        self._found_cost += _cost_up_to(num_blocks * self._block_size)

    def result(self) -> Found:
        return Found(round(self._found_tokens / self._tokens, 4), round(self._found_cost / self._cost, 4))


def _cost_up_to(num_tokens: int) -> float:
    return num_tokens + num_tokens * num_tokens / (2 * _TWICE_AT)


def mooncake(data: Path) -> Trace:
    with gzip.open(data / "mooncake" / "conversation_first6015.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    return Trace("mooncake", 512, [Asked(Tenant("all"), row["input_length"], _names("", row["hash_ids"])) for row in rows])


def claude_code(data: Path, seconds_apart: float = 120.0) -> Trace:
    timed: list[tuple[float, Asked]] = []
    with tarfile.open(data / "kv-cache-tester" / "claude_code_traces_mod8_1.tar.gz") as archive:
        for member in sorted((m for m in archive.getmembers() if m.name.endswith(".json")), key=lambda m: m.name):
            file = archive.extractfile(member)
            assert file is not None
            session = json.load(file)
            begin_s = seconds_apart * (len({asked.tenant for _, asked in timed}))
            for row in _all_requests(session["requests"]):
                ids = row["hash_ids"][: -(-row["in"] // 64)]
                asked = Asked(Tenant(session["id"]), min(row["in"], 64 * len(ids)), _names(session["id"], ids))
                if asked.blocks:
                    timed.append((begin_s + float(row["t"]), asked))
    return Trace("claude-code", 64, [asked for _, asked in sorted(timed, key=lambda item: item[0])])


def _all_requests(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if "requests" in row:
            yield from _all_requests(row["requests"])
        elif "hash_ids" in row:
            yield row


def _names(space: str, ids: Sequence[object]) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(f"{space}/{id}".encode()) for id in ids)


def where(row: dict[str, Any]) -> tuple[str, str, float]:
    return row["trace"], row["place"], row["capacity"]


def table(rows: list[dict[str, Any]]) -> str:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [
        "| trace | place | capacity | " + " | ".join(f"{name}: tokens, time" for name in policies) + " |",
        "|---" * (3 + len(policies)) + "|",
    ]
    for trace, place, capacity in dict.fromkeys(where(row) for row in rows):
        found = {row["policy"]: row for row in rows if where(row) == (trace, place, capacity)}
        cells = [f"{found[name]['tokens_share']:.1%}, {found[name]['time_share']:.1%}" for name in policies]
        lines.append(f"| {trace} | {place} | {capacity:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
