"""Real engines behind the gateway: the same conversations over several replicas of one model, with one strategy after another.

Every replica is an `anaphora serve` of its own with a real model; the gateway in front of them has them as upstreams of one
model. Several conversations run at the same time; each turn repeats what was said before, so it pays to go where that lies.
Reported for each strategy: the share of prompt tokens that the engines took from their caches, and the time to the first token.
Every strategy gets conversations of its own, so none finds what another one left.

    python benchmarks/replicas.py [--replicas 3] [--sessions 8] [--turns 4] [--strategies expected,round-robin] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parent.parent
WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()
ANSWER_TOKENS = 12
MODEL = "smollm2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=400, help="of a conversation's first message; later ones have a tenth")
    parser.add_argument("--strategies", default="expected,round-robin,least-busy")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(engine(number)) for number in range(args.replicas)]
        asyncio.run(ready(engines))
        for strategy in args.strategies.split(","):
            with gateway(strategy, engines) as url:
                row = asyncio.run(conversations(url, args, strategy))
            rows.append(row)
            print(f"{strategy}: {row}", file=sys.stderr, flush=True)
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        print(json.dumps({"commit": commit, "cores": os.cpu_count(), **vars(args), "rows": rows}, indent=2))
        return 0
    print("| strategy | from the cache | first token, median | 90 of 100 within | requests by replica |\n|---|---|---|---|---|")
    for row in rows:
        spread = ", ".join(map(str, row["by_replica"]))
        print(f"| `{row['strategy']}` | {row['cached']:.0%} | {row['p50_s']:.2f} s | {row['p90_s']:.2f} s | {spread} |")
    return 0


@contextlib.contextmanager
def engine(number: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        toml = '[engine]\nkv_memory = "512MiB"\nthreads = 1\nkv_disk = 0\n[cache]\nenabled = false\n[ledger]\nenabled = false\n'
        flags = ["--cache-dir", str(Path("~/.cache/anaphora").expanduser())]
        with served(Path(folder), toml, *flags) as url:
            yield url


@contextlib.contextmanager
def gateway(strategy: str, engines: list[str]) -> Iterator[str]:
    toml = f'[gateway]\nstrategy = "{strategy}"\n[cache]\nenabled = false\n[ledger]\nenabled = false\n'
    for number, url in enumerate(engines):
        toml += (
            f'[[gateway.upstreams]]\nname = "replica-{number}"\nbase_url = "{url}"\nmodels = ["{MODEL}*", "*"]\npool = "cpu"\n'
        )
        toml += 'metrics = "/metrics"\n'
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), toml, "--cache-dir", folder) as url:
        yield url


@contextlib.contextmanager
def served(folder: Path, toml: str, *flags: str) -> Iterator[str]:
    config = folder / "anaphora.toml"
    config.write_text(toml)
    command = [sys.executable, "-m", "anaphora", "serve", "--config", str(config), "--port", "0", *flags]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while (found := re.search(r"listening on (\S+)", (folder / "log").read_text())) is None:
                if process.poll() is not None:
                    raise SystemExit(f"a server did not start: {(folder / 'log').read_text()}")
                time.sleep(0.05)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


async def ready(engines: list[str]) -> None:
    async with httpx2.AsyncClient() as client:
        for url in engines:
            while (await client.get(f"{url}/ready")).status_code != 200:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.2)


async def conversations(url: str, args: argparse.Namespace, strategy: str) -> dict[str, Any]:
    chance = random.Random(strategy)
    first_s: list[float] = []
    prompt_tokens = cached_tokens = 0
    by_replica: dict[str, int] = {}

    async with httpx2.AsyncClient(base_url=url, timeout=600.0) as client:

        async def conversation(number: int) -> None:
            nonlocal prompt_tokens, cached_tokens
            own = random.Random(f"{strategy} {number}")
            await asyncio.sleep(own.random() * 2)
            messages: list[dict[str, str]] = []
            for turn in range(args.turns):
                words = args.words if turn == 0 else max(1, args.words // 10)
                text = f"{strategy} {number} {turn}: " + " ".join(own.choices(WORDS, k=words))
                messages.append({"role": "user", "content": text})
                body = {
                    "model": MODEL,
                    "messages": messages,
                    "max_tokens": ANSWER_TOKENS,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                started_s = time.perf_counter()
                answer, first = "", None
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    response.raise_for_status()
                    replica = response.headers["x-anaphora-upstream"]
                    reused = int(response.headers["x-anaphora-kv-reused-tokens"])
                    by_replica[replica] = by_replica.get(replica, 0) + 1
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        chunk = json.loads(line.removeprefix("data: "))
                        if chunk["choices"] and (said := chunk["choices"][0]["delta"].get("content")):
                            first = first or time.perf_counter() - started_s
                            answer += said
                        if usage := chunk.get("usage"):
                            prompt_tokens += usage["prompt_tokens"]
                            cached_tokens += reused
                first_s.append(first or time.perf_counter() - started_s)
                messages.append({"role": "assistant", "content": answer})
                await asyncio.sleep(own.random())

        order = list(range(args.sessions))
        chance.shuffle(order)
        await asyncio.gather(*map(conversation, order))
    return {
        "strategy": strategy,
        "cached": cached_tokens / prompt_tokens,
        "p50_s": statistics.median(first_s),
        "p90_s": statistics.quantiles(first_s, n=10, method="inclusive")[8],
        "by_replica": [by_replica[name] for name in sorted(by_replica)],
    }


if __name__ == "__main__":
    sys.exit(main())
