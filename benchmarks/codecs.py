"""What each KV codec costs and what it does to a real model's answers. Prints a table, or JSON with --json.

Effect: documents are prefilled; the KV of their first 1,024 and 4,096 tokens goes through the codec and back into the arena;
then the model reads the next 64 tokens over it (teacher-forced). Compared with reading them over the exact KV: the
Kullback-Leibler divergence of the next-token distributions, in nats, over all positions of all documents, and how often the
most likely token is the same. The row `bfloat16` is for comparison: what rounding the KV to that type does.

Cost: bits a value as measured on this KV, and bytes of KV (as in the pool) encoded and decoded per second of one core's time,
best of some rounds, all codecs taking turns.

Texts come from $ANAPHORA_DATA (folders `war-and-peace`, `nltk-texts`, `lmcache-agent-trace`); they are not part of the package.

    ANAPHORA_DATA=/path/to/data python benchmarks/codecs.py [--codecs int8,int4] [--record]

--record writes what was found to src/anaphora/codecs/effects.toml, by which codecs are refused as a default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from divergence import Effect, documents

from anaphora.backends.engine_attention import Segment
from anaphora.backends.engine_kernels import prepare
from anaphora.backends.engine_model import Model, choose_dtype, materialise, resolve
from anaphora.codecs.base import Codec
from anaphora.config import default_cache_dir
from anaphora.kv.pool import KVPool
from anaphora.registry import CODECS

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "src" / "anaphora" / "codecs" / "effects.toml"
CONTEXTS = (1024, 4096)
POSITIONS = 64
BLOCK = 16
CHUNK = 512
ROUNDS = 15
TIMED_BLOCKS = 32
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", help="of the model and its KV")
    parser.add_argument("--codecs", default=",".join(CODECS.names()))
    parser.add_argument("--only-costs", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    root = os.environ.get("ANAPHORA_DATA")
    if root is None:
        print("set ANAPHORA_DATA to the folder of the data sets", file=sys.stderr)
        return 2
    codecs: list[Codec] = [CODECS.load(name)() for name in args.codecs.split(",")]
    bench = Bench(args.model, args.dtype)
    started_s = time.monotonic()
    texts = {name: bench.tokens(text) for name, text in documents(Path(root))}
    first = next(iter(texts.values()))
    effects = {} if args.only_costs else bench.effects(codecs, texts.values())
    costs = bench.costs(codecs, bench.prefill(first, TIMED_BLOCKS * BLOCK))
    report = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": {"processor": platform.machine(), "torch": torch.__version__},
        "model": args.model,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "documents": sorted(texts),
        "costs": costs,
        "effects": {name: effect.summary() for name, effect in effects.items()},
        "seconds": round(time.monotonic() - started_s, 1),
    }
    print(json.dumps(report, indent=2) if args.json else table(report))
    if args.record:
        RECORD.write_text(record(report))
    return 0


class Bench:
    """One model with an arena for one document."""

    def __init__(self, model: str, dtype: str) -> None:
        from transformers import AutoTokenizer

        cache = Path(default_cache_dir())
        folder = materialise(resolve(model), cache / "models", lambda stage: None)
        prepare(cache / "kernels")
        self.dtype = choose_dtype(dtype, CPU)
        self._model = Model(folder, dtype=self.dtype, device=CPU)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        length = max(CONTEXTS) + POSITIONS
        self._pool = KVPool(self._model.kv_shape, arena_tokens=length, num_blocks=0, block_size=BLOCK, device=CPU)
        self._model.attach(self._pool)

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text)["input_ids"][: max(CONTEXTS) + POSITIONS]
        assert len(tokens) == max(CONTEXTS) + POSITIONS, "the document is too short"
        return tokens

    def effects(self, codecs: Sequence[Codec], documents: Iterable[Sequence[int]]) -> dict[str, Effect]:
        found = {name: Effect() for name in ("bfloat16", *(codec.name for codec in codecs))}
        for tokens in documents:
            whole = self.prefill(tokens, max(CONTEXTS))
            for context in CONTEXTS:
                exact = whole[:, :, :, :context]
                expected = self.read(tokens, exact)
                found["bfloat16"].add(context, expected, self.read(tokens, exact.bfloat16()))
                for codec in codecs:
                    decoded = through(codec, exact)
                    same = torch.equal(decoded.view(torch.uint8), exact.view(torch.uint8))
                    assert same or codec.lossy, codec.name
                    found[codec.name].add(context, expected, expected if same else self.read(tokens, decoded))
        return found

    def prefill(self, tokens: Sequence[int], length: int) -> torch.Tensor:
        """The KV [layers, 2, kv_heads, tokens, head_dim] of the first `length` tokens."""
        for start in range(0, length, CHUNK):
            self._model.forward(tokens[start : start + CHUNK], range(start, start + CHUNK), (Segment(0, CHUNK, 0, start),), ())
        return self._pool.arena[:, :, :, :length].clone()

    def read(self, tokens: Sequence[int], kv: torch.Tensor) -> torch.Tensor:
        """Log-probabilities after each of the tokens that follow those of `kv`."""
        start = kv.shape[3]
        self._pool.arena[:, :, :, :start].copy_(kv)
        positions = range(start, start + POSITIONS)
        segments = (Segment(0, POSITIONS, 0, start),)
        hidden = self._model.forward(tokens[start : start + POSITIONS], positions, segments, range(POSITIONS))
        return torch.log_softmax(self._model.logits(hidden).double(), -1)

    def costs(self, codecs: Sequence[Codec], kv: torch.Tensor) -> dict[str, Any]:
        torch.set_num_threads(1)
        found: dict[str, Any] = {}
        of_types = [blocks_of(kv).to(dtype).contiguous() for dtype in (torch.float32, torch.bfloat16)]
        seconds: dict[tuple[str, torch.dtype, str], float] = {}
        for _ in range(ROUNDS):
            for blocks in of_types:
                out = torch.empty_like(blocks)
                for codec in codecs:
                    started_s = time.process_time()
                    payloads = codec.encode(blocks)
                    encoded_s = time.process_time()
                    codec.decode(payloads, out)
                    decoded_s = time.process_time()
                    bits = 8 * sum(map(len, payloads)) / blocks.numel()
                    name = str(blocks.dtype).removeprefix("torch.")
                    found.setdefault(codec.name, {}).setdefault(name, {})["bits_per_value"] = round(bits, 2)
                    for verb, took_s in (("encode", encoded_s - started_s), ("decode", decoded_s - encoded_s)):
                        key = (codec.name, blocks.dtype, verb)
                        seconds[key] = min(took_s, seconds.get(key, took_s))
                        found[codec.name][name][f"{verb}_gb_per_s"] = round(blocks.nbytes / seconds[key] / 1e9, 2)
        return found


def blocks_of(kv: torch.Tensor) -> torch.Tensor:
    """[layers, 2, kv_heads, tokens, head_dim] as blocks."""
    return kv.unflatten(3, (-1, BLOCK)).permute(3, 0, 1, 2, 4, 5)


def through(codec: Codec, kv: torch.Tensor) -> torch.Tensor:
    decoded = torch.empty_like(kv)
    for source, target in zip(blocks_of(kv).split(TIMED_BLOCKS), blocks_of(decoded).split(TIMED_BLOCKS), strict=True):
        out = torch.empty(source.shape, dtype=source.dtype)
        codec.decode(codec.encode(source), out)
        target.copy_(out)
    return decoded


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['dtype']}; {', '.join(report['documents'])}",
        f"{'':10}{'float32 KV':^30}{'bfloat16 KV':^30}",
        f"{'codec':10}" + 2 * f"{'bits':>8}{'enc GB/s':>11}{'dec GB/s':>11}" + f"{'mean KL':>10}{'max KL':>10}{'greedy':>9}",
    ]
    for name in dict.fromkeys((*report["costs"], *report["effects"])):
        line = f"{name:10}"
        for dtype in ("float32", "bfloat16"):
            cost = report["costs"].get(name, {}).get(dtype)
            keys = ("bits_per_value", "encode_gb_per_s", "decode_gb_per_s")
            line += (
                "".join(f"{cost[key]:>{width}.2f}" for key, width in zip(keys, (8, 11, 11), strict=True)) if cost else " " * 30
            )
        if effect := report["effects"].get(name):
            line += f"{effect['mean_kl']:>10.1e}{effect['max_kl']:>10.1e}{effect['greedy_agreement']:>9.2%}"
        lines.append(line)
    return "\n".join(lines)


def record(report: dict[str, Any]) -> str:
    lines = ["# What codecs do to SmolLM2's next-token distributions. Written by `benchmarks/codecs.py --record`."]
    lines += [f"# {report['dtype']}, {', '.join(report['documents'])}; read over {' and '.join(map(str, CONTEXTS))} tokens."]
    for name, effect in report["effects"].items():
        if name in report["costs"]:
            lines += ["", f"[{name}]", f"bits_per_value = {report['costs'][name]['float32']['bits_per_value']}"]
            lines += [f"{key} = {effect[key]}" for key in ("mean_kl", "max_kl", "greedy_agreement", "positions")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
