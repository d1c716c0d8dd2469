"""Texts per second over HTTP: our server against the same encoder behind a bare one, taking turns. Prints JSON.

Texts are drawn by Zipf's law, so that a given share of them (60 %) has come before. The bare server is a Starlette application
under uvicorn: it encodes the texts of a request in a thread, one request at a time, sorted by length in pieces of 32, and
answers with the vectors as base64. Ours begins each phase with nothing remembered. Both are one process with one processor
thread for the model; encoder and wire format are the same. "cpu_ratio" compares the processor time that the two servers took
for the same texts, which depends less on what else the machine does than "ratio", of the times on the clock, to which the
client adds its own. A third server is the bare one without an encoder: from what HTTP alone takes there follows "cpu_bound",
which "cpu_ratio" would be if texts that came before cost nothing but that.

    [ANAPHORA_DATA=...] python benchmarks/embeddings_http.py [--models minilm,static] [--rounds 2] [--repeats 0.6]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent))

from embeddings_texts import about, drawn, texts

CONCURRENCIES = (1, 8, 32)
BATCHES = (1, 16, 128)
LEAST_TEXTS = {"minilm": 768, "static": 6144, "e5": 256}
"""Of a phase. There are more where some client would have no request to make."""
PIECE = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,static")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=float, default=0.6, help="share of the texts that came before")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--bare", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        serve_bare(args.bare)
        return 0
    pool = texts()
    rows = []
    for model in args.models.split(","):
        with sides(model) as (ours, bare, http):
            for batch in args.batch:
                for concurrency in args.concurrency:
                    row = compared(ours, bare, http, model, batch, concurrency, pool, args)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    rows.append(row)
    print(json.dumps({**about(), "repeats": args.repeats, "rounds": args.rounds, "http": rows}, indent=1))
    return 0


class Side:
    """A server, and what a phase on it took."""

    def __init__(self, url: str, process: subprocess.Popen[str], *, remembers: bool) -> None:
        self.url = url
        self._process = process
        self._remembers = remembers

    async def phase(self, model: str, requests: list[bytes], concurrency: int) -> tuple[float, float]:
        """Seconds on the clock and of the server's processor time, for all of `requests`."""
        async with aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=concurrency)) as client:
            if self._remembers:
                async with client.post("/anaphora/forget", json={}) as answer:
                    answer.raise_for_status()
            waiting = iter(requests)

            async def ask() -> None:
                for body in waiting:  # shared by all of them
                    async with client.post("/v1/embeddings", data=body, headers=JSON) as answer:
                        answer.raise_for_status()
                        await answer.read()

            before_s, started_s = self._used_s(), time.perf_counter()
            await asyncio.gather(*(ask() for _ in range(concurrency)))
            return time.perf_counter() - started_s, self._used_s() - before_s

    def _used_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


JSON = {"content-type": "application/json"}


def compared(
    ours: Side, bare: Side, http: Side, model: str, batch: int, concurrency: int, pool: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    num_texts = max(LEAST_TEXTS[model], batch * concurrency)
    clock: dict[Side, list[float]] = {ours: [], bare: [], http: []}
    processor: dict[Side, list[float]] = {ours: [], bare: [], http: []}
    repeated = []
    for number in range(args.rounds):
        asked = drawn(num_texts, args.repeats, pool, random.Random(number))
        repeated.append(1 - len(set(asked)) / num_texts)
        bodies = [
            json.dumps({"model": model, "input": asked[start : start + batch], "encoding_format": "base64"}).encode()
            for start in range(0, num_texts, batch)
        ]
        for side in (ours, bare, http) if number % 2 else (http, bare, ours):
            elapsed_s, used_s = asyncio.run(side.phase(model, bodies, concurrency))
            clock[side].append(elapsed_s)
            processor[side].append(used_s)
    computing_s = sum(processor[bare]) - sum(processor[http])
    new = 1 - statistics.mean(repeated)
    return {
        "model": model,
        "batch": batch,
        "concurrency": concurrency,
        "repeats": round(statistics.mean(repeated), 3),
        "ours_texts_per_s": round(num_texts * args.rounds / sum(clock[ours])),
        "bare_texts_per_s": round(num_texts * args.rounds / sum(clock[bare])),
        "ratio": round(sum(clock[bare]) / sum(clock[ours]), 2),
        "ours_cpu_ms_per_text": round(sum(processor[ours]) / num_texts / args.rounds * 1000, 3),
        "bare_cpu_ms_per_text": round(sum(processor[bare]) / num_texts / args.rounds * 1000, 3),
        "cpu_ratio": round(sum(processor[bare]) / sum(processor[ours]), 2),
        "cpu_bound": round(sum(processor[bare]) / (sum(processor[http]) + new * max(0.0, computing_s)), 2),
    }


# -- the two servers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sides(model: str) -> Iterator[tuple[Side, Side, Side]]:
    """Ours and the bare one, both with the model loaded, and the bare one without a model."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="anaphora-embeddings-") as folder, contextlib.ExitStack() as stack:
        serve = ["-m", "anaphora", "serve", "--engine", "echo", "--embeddings", model, "--port", "0", "--cache-dir", folder]
        found = []
        for command in (serve, [__file__, "--bare", model], [__file__, "--bare", f"{model} unloaded"]):
            url, process = stack.enter_context(listening([sys.executable, *command], environ))
            side = Side(url, process, remembers=command is serve)
            body = json.dumps({"model": model, "input": ["warm"], "encoding_format": "base64"}).encode()
            asyncio.run(side.phase(model, [body], 1))
            found.append(side)
        yield found[0], found[1], found[2]


@contextlib.contextmanager
def listening(command: list[str], environ: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environ)
    assert process.stderr is not None
    try:
        line = ""
        while "http://" not in line:
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or it would stop where nobody reads its log
        yield "http://" + line.partition("http://")[2].split()[0], process
    finally:
        process.terminate()
        process.wait()


def serve_bare(model: str) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from anaphora.registry import ENCODERS

    kind = ENCODERS.load(model.removesuffix(" unloaded"))
    encoder = None if model.endswith(" unloaded") else kind(threads=1)
    turn = asyncio.Lock()

    def encoded(asked: list[str]) -> tuple[list[str], int]:
        import numpy as np

        if encoder is None:
            nothing = b64encode(bytes(4 * kind.dimensions)).decode()
            return [nothing] * len(asked), 0
        vectors = np.zeros((len(asked), encoder.dimensions), np.float32)
        order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
        for start in range(0, len(order), PIECE):
            piece = order[start : start + PIECE]
            vectors[piece] = encoder.encode([asked[place] for place in piece])
        return [b64encode(row.tobytes()).decode() for row in vectors], sum(map(encoder.num_tokens, asked))

    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        async with turn:
            rows, num_tokens = await run_in_threadpool(encoded, body["input"])
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    application = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])
    uvicorn.run(application, host="127.0.0.1", port=0, access_log=False)


if __name__ == "__main__":
    sys.exit(main())
