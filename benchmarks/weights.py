"""What `engine.quantization = "int8"` saves, and what it does to a real model's answers. Prints a table, or JSON with --json.

Effect: each of the two models reads documents over KV of its own, as a server would have it. After 1,024 and 4,096 tokens their
distributions of the next token are compared at 64 positions: documents and measures are those of `codecs.py`.

Speed: both models in one process, taking turns, in milliseconds: one new token behind so many others, and prompts. Memory: what
is resident in a process of its own when the model is loaded and has computed a prompt and a token, without memory for KV.

    ANAPHORA_DATA=/path/to/data python benchmarks/weights.py [--rounds 15] [--json]

Without ANAPHORA_DATA the effect is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the engine process has it; must be set before torch starts

import torch
from divergence import Effect, documents

from anaphora.backends.engine import Quantization
from anaphora.backends.engine_attention import Segment
from anaphora.backends.engine_kernels import prepare
from anaphora.backends.engine_model import Model, choose_dtype, materialise, resolve
from anaphora.config import default_cache_dir
from anaphora.kv.pool import KVPool

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
KINDS: tuple[Quantization, ...] = ("none", "int8")
CONTEXTS = (1024, 4096)
POSITIONS = 64
CHUNK = 512
DECODE = (512, 7000)
PROMPTS = ((32, 6968), (512, 0), (2048, 0))
"""(new tokens, tokens before them)."""
ARENA = 7168


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--resident", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        print(resident(Reader(args.model, args.dtype, args.resident)))
        return 0
    memory = {kind: int(subprocess.run(own_command(kind), capture_output=True, check=True).stdout) for kind in KINDS}
    readers = {kind: Reader(args.model, args.dtype, kind) for kind in KINDS}
    report = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "busy": round(os.getloadavg()[0], 1),
        "model": args.model,
        "dtype": str(readers["none"].dtype).removeprefix("torch."),
        "resident_bytes": memory,
        "ms": speed(readers, args.rounds),
    }
    if root := os.environ.get("ANAPHORA_DATA"):
        report["effect"] = effect(readers, Path(root)).summary()
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def own_command(kind: str) -> list[str]:
    """This program again, to say what is resident with weights of this kind."""
    return [sys.executable, *sys.argv, "--resident", kind]


class Reader:
    """One model with an arena for one document."""

    def __init__(self, model: str, dtype: str, kind: Quantization) -> None:
        cache = Path(default_cache_dir())
        self.folder = materialise(resolve(model), cache / "models", lambda stage: None)
        prepare(cache / "kernels")
        self.dtype = choose_dtype(dtype, CPU)
        self._model = Model(self.folder, dtype=self.dtype, device=CPU, quantization=kind)
        self._pool = KVPool(self._model.kv_shape, arena_tokens=ARENA, num_blocks=0, block_size=16, device=CPU)
        self._model.attach(self._pool)

    def read(self, tokens: list[int], start: int) -> torch.Tensor:
        """Logits after each of the tokens, which follow `start` others."""
        n = len(tokens)
        return self._model.logits(self._model.forward(tokens, range(start, start + n), (Segment(0, n, 0, start),), range(n)))

    def prefill(self, tokens: list[int], start: int) -> None:
        for first in range(0, len(tokens), CHUNK):
            chunk = tokens[first : first + CHUNK]
            n, past = len(chunk), start + first
            self._model.forward(chunk, range(past, past + n), (Segment(0, n, 0, past),), [n - 1])


def speed(readers: dict[Quantization, Reader], rounds: int) -> dict[str, dict[str, float]]:
    """What is before the new tokens is not computed: an arena's content does not change how long it takes."""
    found = {}
    for past in DECODE:
        found[f"a token behind {past}"] = turns(readers, lambda reader, past=past: reader.read([5], past), rounds)
    for new, past in PROMPTS:
        tokens = [100 + i for i in range(new)]
        name = f"a prompt of {new} behind {past}" if past else f"a prompt of {new}"
        found[name] = turns(readers, lambda reader, t=tokens, p=past: reader.prefill(t, p), max(1, rounds // 5))
    return found


def turns(readers: dict[Quantization, Reader], do: Callable[[Reader], object], rounds: int) -> dict[str, float]:
    took: dict[str, list[float]] = {kind: [] for kind in readers}
    for number in range(rounds + 1):
        for kind, reader in sorted(readers.items(), reverse=number % 2 == 0):
            started_s = time.perf_counter()
            do(reader)
            if number:  # the first one warms up
                took[kind].append((time.perf_counter() - started_s) * 1e3)
    medians = {kind: statistics.median(times) for kind, times in took.items()}
    best = {f"{kind}_best": min(times) for kind, times in took.items()}
    return {**medians, "ratio": medians["int8"] / medians["none"], **best}


def effect(readers: dict[Quantization, Reader], root: Path) -> Effect:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(readers["none"].folder)
    found = Effect()
    for _, text in documents(root):
        tokens: list[int] = tokenizer(text)["input_ids"][: max(CONTEXTS) + POSITIONS]
        log_probabilities: dict[tuple[str, int], torch.Tensor] = {}
        for kind, reader in readers.items():
            done = 0
            for context in CONTEXTS:
                reader.prefill(tokens[done:context], done)
                logits = reader.read(tokens[context : context + POSITIONS], context)
                log_probabilities[kind, context] = torch.log_softmax(logits.double(), -1)
                done = context
        for context in CONTEXTS:
            found.add(context, log_probabilities["none", context], log_probabilities["int8", context])
    return found


def resident(reader: Reader) -> int:
    import psutil

    reader.prefill([100 + i for i in range(CHUNK)], 0)
    reader.read([5], CHUNK)
    return int(psutil.Process().memory_info().rss) - reader._pool.arena[:, :, :, : CHUNK + 1].nbytes


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['model']}, {report['dtype']}, {report['machine']['threads']} threads", ""]
    lines += ["| | none | int8 | int8 : none |", "|---|---|---|---|"]
    for name, row in report["ms"].items():
        lines.append(f"| {name} | {row['none']:.1f} ms | {row['int8']:.1f} ms | {row['ratio']:.2f} |")
    none, int8 = (report["resident_bytes"][kind] for kind in KINDS)
    lines.append(f"| resident memory | {none / 1e6:.0f} MB | {int8 / 1e6:.0f} MB | {int8 / none:.2f} |")
    if found := report.get("effect"):
        lines += ["", f"mean divergence {found['mean_kl']:.1e}, largest {found['max_kl']:.1e}, the same most likely token "]
        lines[-1] += f"{found['greedy_agreement']:.1%} of {found['positions']} positions"
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
