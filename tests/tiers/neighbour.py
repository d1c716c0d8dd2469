"""Another process on the same folder. Run as a script: `neighbour.py FOLDER CAPACITY VERB ...`; answers are lines on stdout."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

from anaphora.clock import SystemClock
from anaphora.errors import TierFailed
from anaphora.policies.lru import LRU
from anaphora.store import Store
from anaphora.testing.tiers import make_key
from anaphora.tiers.base import Entry, Eviction
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Scope, Tenant

INLINE_BYTES = 2000


def start(folder: Path, capacity: int, *verb: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(folder), str(capacity), *map(str, verb)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    return process.stdout.readline().strip()


def open_tier(folder: Path | str, capacity: int, eviction: Eviction | None = None) -> DiskTier:
    options = DiskOptions(str(folder), capacity, inline_bytes=INLINE_BYTES, eviction=eviction or Eviction())
    return DiskTier(options, clock=SystemClock())


def value_of(name: str) -> bytes:
    """What every process agrees to keep under `name`: inside the index, in a small file, or in one of several pages."""
    draw = random.Random(name)
    return draw.randbytes(draw.choice((10, 500, 1999, 2000, 9000, 70_000)))


def entry_of(name: str) -> Entry:
    return Entry(value_of(name), 1.0, tenant=Tenant(f"tenant-{hash_of(name)}"))


def hash_of(name: str) -> int:
    return sum(name.encode()) % 3


async def write(tier: DiskTier, prefix: str, count: int) -> None:
    """Put entry after entry, saying the name of each once it is acknowledged."""
    for number in range(count):
        name = f"{prefix}{number}"
        await tier.put_many({make_key(name): entry_of(name)})
        print(name, flush=True)


async def churn(tier: DiskTier, seed: str) -> None:
    """Put, read, delete and forget for ever."""
    draw = random.Random(seed)
    while True:
        names = [str(draw.randrange(60)) for _ in range(3)]
        match draw.randrange(8):
            case 0:
                await tier.forget(Scope(tenant=Tenant(f"tenant-{draw.randrange(3)}")))
            case 1:
                await tier.delete_many([make_key(name) for name in names])
            case 2:
                await tier.get_many([make_key(name) for name in names])
            case _:
                await tier.put_many({make_key(name): entry_of(name) for name in names})
        print("", flush=True)


async def fill(tier: DiskTier) -> None:
    """Put until the medium is full, go on reading, and say how it went."""
    stored: list[str] = []
    failures = 0
    for number in range(200):
        name = str(number)
        try:
            await tier.put_many({make_key(name): entry_of(name)})
            stored.append(name)
        except TierFailed:
            failures += 1
    found = await tier.get_many([make_key(name) for name in stored])
    intact = sum(found.get(make_key(name)) == entry_of(name) for name in stored)
    print(len(stored), failures, intact, flush=True)


async def serve(tier: DiskTier) -> None:
    """A store with memory in front. `get NAME` and `ram NAME` (memory only) say the value's size or `-`; `put NAME`."""
    clock = SystemClock()
    store = Store([RamTier(RamOptions(), policy=LRU(), clock=clock), tier], clock=clock)
    for line in sys.stdin:
        verb, name = line.split()
        key = make_key(name)
        if verb == "put":
            store.put(key, value_of(name), tenant=Tenant("a"))
            await store.flush()
            print("ok", flush=True)
        else:
            entry = await store.get(key) if verb == "get" else store.get_now(key)
            print("-" if entry is None else len(entry.value), flush=True)
    await store.aclose()


async def main() -> None:
    folder, capacity, verb, *rest = sys.argv[1:]
    if verb == "fill" and rest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest[0]), int(rest[0])))  # Python ignores SIGXFSZ: writes get EFBIG
    tier = open_tier(folder, int(capacity))
    match verb:
        case "write":
            await write(tier, rest[0], int(rest[1]))
        case "churn":
            await churn(tier, rest[0])
        case "fill":
            await fill(tier)
        case "serve":
            await serve(tier)
    await tier.aclose()


if __name__ == "__main__":
    # A test's own timeout must not leave a process behind.
    assert os.getppid() != 1
    asyncio.run(main())
