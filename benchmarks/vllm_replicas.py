"""Real vLLM replicas behind the gateway: what their events tell the router, and how much each strategy finds cached.

    benchmarks/peers/setup.sh ~/.cache/anaphora/peers vllm      # once: vLLM for CPUs, in a virtual environment of its own
    python benchmarks/vllm_replicas.py [--sessions 5] [--turns 3] [--cases expected+events,expected,prefix,round-robin] [--json]

Two vLLM with SmolLM2-135M, one thread each, with few blocks of KV, so that they evict. Several conversations run at the same
time; behind each one's first turn somebody else fills the first replica's cache, past the gateway. Every case has conversations
of its own and begins with empty caches. Reported of each: the share of prompt tokens that vLLM says it had, batches of events
that came and that were missed, and how many pieces of prompts the router was told to be stored and to be dropped.

Where vLLM is not installed it says so and does nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from replicas import served

ROOT = Path(__file__).parent.parent
WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()
MODEL = "smollm2"
BLOCK = 32
CONTEXT = 2048
ANSWER_TOKENS = 12
FILLERS = 3
"""Prompts of nearly the whole context each, which together are more than a replica has room for."""
START_S = 600.0


class Replica(NamedTuple):
    url: str
    events: str
    replay: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=96, help=f"of {BLOCK} tokens, in each replica's cache")
    parser.add_argument("--sessions", type=int, default=5, help="a number that the replicas do not divide")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--words", type=int, default=250, help="of a conversation's first message; later ones have a sixth")
    parser.add_argument("--cases", default="expected+events,expected,prefix,round-robin")
    parser.add_argument("--peers-dir", type=Path, default=Path("~/.cache/anaphora/peers"), help="what setup.sh was given")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    python = args.peers_dir.expanduser() / "vllm" / "bin" / "python"
    if not python.exists():
        print(f"skipped: vLLM is not installed in {python.parent.parent}: run benchmarks/peers/setup.sh", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        replicas = [stack.enter_context(vllm(python, args.blocks, Path(folder) / f"{n}.log")) for n in range(args.replicas)]
        version = asyncio.run(ready(replicas))
        for case in args.cases.split(","):
            asyncio.run(emptied(replicas))
            with gateway(case, replicas, args.blocks) as url:
                row = asyncio.run(conversations(url, replicas, args, case))
            rows.append(row)
            print(f"{case}: {row}", file=sys.stderr, flush=True)
    report = {"vllm": version, "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


# -- servers ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def vllm(python: Path, num_blocks: int, log: Path) -> Iterator[Replica]:
    """Its server as a module: the command `vllm` asks for the metadata of another package than the build for CPUs."""
    port, events, replay = free_ports(3)
    config = {"enable_kv_cache_events": True, "publisher": "zmq"}
    config |= {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"}
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", weights(), "--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(CONTEXT), "--dtype", "float32"]
    command += ["--enforce-eager", "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(num_blocks)]
    command += ["--max-num-seqs", "8", "--enable-prompt-tokens-details", "--kv-events-config", json.dumps(config)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": "1",  # which has a way to empty its cache
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("PYTHONPATH", None)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        yield Replica(f"http://127.0.0.1:{port}", f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}")
    finally:
        # All of it: its engine outlives a server that is killed alone, and keeps its ports.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def weights() -> str:
    """The model as vLLM reads it, made of the file that Anaphora's engine runs."""
    from anaphora.backends.engine_model import materialise, resolve
    from anaphora.config import default_cache_dir

    return str(materialise(resolve(MODEL), Path(default_cache_dir()) / "models", lambda stage: None))


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


async def ready(replicas: list[Replica]) -> str:
    """Returns their version when all of them answer."""
    until_s = time.monotonic() + START_S
    async with httpx2.AsyncClient(timeout=5.0) as client:
        for replica in replicas:
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if (await client.get(f"{replica.url}/health")).status_code == 200:
                        break
                if time.monotonic() > until_s:
                    raise SystemExit(f"vLLM did not start within {START_S:.0f} s")
                await asyncio.sleep(1.0)
        return str((await client.get(f"{replicas[0].url}/version")).json()["version"])


async def emptied(replicas: list[Replica]) -> None:
    async with httpx2.AsyncClient(timeout=60.0) as client:
        for replica in replicas:
            (await client.post(f"{replica.url}/reset_prefix_cache")).raise_for_status()


@contextlib.contextmanager
def gateway(case: str, replicas: list[Replica], num_blocks: int) -> Iterator[str]:
    strategy, _, events = case.partition("+")
    toml = f'[gateway]\nstrategy = "{strategy}"\n[cache]\nenabled = false\n[ledger]\nenabled = false\n'
    for number, replica in enumerate(replicas):
        toml += f'[[gateway.upstreams]]\nname = "replica-{number}"\nbase_url = "{replica.url}/v1"\nmodels = ["{MODEL}"]\n'
        toml += f'pool = "cpu"\nkv_tokens = {num_blocks * BLOCK}\nmetrics = "/metrics"\n'
        if events:
            toml += f'kv_events = "{replica.events}"\nkv_events_replay = "{replica.replay}"\n'
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), toml, "--cache-dir", folder) as url:
        yield url


# -- conversations ----------------------------------------------------------------------------------------------------------


async def conversations(url: str, replicas: list[Replica], args: argparse.Namespace, case: str) -> dict[str, Any]:
    seconds: list[float] = []
    prompt_tokens = cached_tokens = 0
    async with httpx2.AsyncClient(timeout=600.0) as client:

        async def turn(number: int, messages: list[dict[str, str]]) -> str:
            nonlocal prompt_tokens, cached_tokens
            own = random.Random(f"{case} {number} {len(messages)}")
            words = own.choices(WORDS, k=args.words if not messages else max(1, args.words // 6))
            messages.append({"role": "user", "content": f"{case} {number}: " + " ".join(words)})
            body = {"model": MODEL, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            started_s = time.perf_counter()
            response = await client.post(f"{url}/v1/chat/completions", json=body)
            response.raise_for_status()
            seconds.append(time.perf_counter() - started_s)
            answer = response.json()
            prompt_tokens += answer["usage"]["prompt_tokens"]
            cached_tokens += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            return str(response.headers["x-anaphora-upstream"])

        async def fill() -> None:
            for number in range(FILLERS):
                text = f"{case} {number} " + "something that somebody else asks for " * 230
                body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
                (await client.post(f"{replicas[0].url}/v1/chat/completions", json=body)).raise_for_status()

        said: list[list[dict[str, str]]] = [[] for _ in range(args.sessions)]
        where: list[list[str]] = []
        for number in range(args.turns):
            where.append(await asyncio.gather(*(turn(one, messages) for one, messages in enumerate(said))))
            if number == 0:
                await fill()
        moves = [move for turns in zip(*where, strict=True) for move in pairwise(turns)]
        stats = (await client.get(f"{url}/anaphora/stats")).json()["backend"]
    heard = {
        name: sum(value for key, value in stats.items() if key.endswith(f"_num_{name}"))
        for name in ("event_batches", "event_batches_missed", "pieces_stored", "pieces_dropped")
    }
    return {
        "case": case,
        "cached": cached_tokens / prompt_tokens,
        "stayed": sum(before == after for before, after in moves) / max(1, len(moves)),
        "median_s": statistics.median(seconds),
        **heard,
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"vLLM {report['vllm']}, {report['cores']} cores, load {report['load']:.1f}", ""]
    lines.append(
        "| case | prompt tokens from the cache | turns that stayed | median | batches, missed | pieces stored, dropped |"
    )
    lines.append("|---|---|---|---|---|---|")
    for row in report["rows"]:
        batches = f"{row['event_batches']}, {row['event_batches_missed']}"
        pieces = f"{row['pieces_stored']}, {row['pieces_dropped']}"
        shares = f"{row['cached']:.0%} | {row['stayed']:.0%} | {row['median_s']:.1f} s"
        lines.append(f"| `{row['case']}` | {shares} | {batches} | {pieces} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
