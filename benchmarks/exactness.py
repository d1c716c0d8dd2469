"""How far an answer over reused KV is from one computed anew: per data type, over real prompts. Prints JSON.

Each prompt is asked four ways through the engine: alone with nothing cached, again with its prefix cached, in small chunks,
and in a batch with all the others. Compared are the distributions of the next token after the prompt: Kullback-Leibler
divergence from the first way, in nats, and whether the most likely token is the same.

    python benchmarks/exactness.py [--model smollm2] [--prompts 12] [--dtypes float32,bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from anaphora.backends import engine_scheduler
from anaphora.backends.engine import EngineOptions
from anaphora.backends.engine_core import EngineCore
from anaphora.backends.engine_sampling import Sampled, SampledRow, sample
from anaphora.config import default_cache_dir
from anaphora.registry import POLICIES
from anaphora.testing.engines import Driver
from anaphora.types import Message, Request, Sampling, Scope, TextPart

ROOT = Path(__file__).parent.parent
TEXTS = (ROOT / "tests" / "data" / "prompts.txt").read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    results = {dtype: measure(args.model, dtype, args.prompts) for dtype in args.dtypes.split(",")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"commit": commit.stdout.strip(), "machine": machine, "model": args.model, "dtypes": results}, indent=2))


def requests(count: int) -> list[Request]:
    """Prompts of several questions each, so that there are blocks to reuse."""
    texts = ["\n".join(TEXTS[(5 * i + k) % len(TEXTS)] for k in range(3)) for i in range(count)]
    sampling = Sampling(temperature=0.0)
    return [Request("m", messages=(Message("user", (TextPart(text),)),), max_tokens=1, sampling=sampling) for text in texts]


class Recorder:
    """An engine of which the logits are kept that each answer's token was drawn from."""

    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        settings = msgspec.convert(
            {"model": model, "dtype": dtype, "kv_memory": 2**30, "models_dir": f"{default_cache_dir()}/models", **options},
            EngineOptions,
        )
        self.driver = Driver(EngineCore(settings, POLICIES.load(settings.policy)()))

    def ask(self, together: Sequence[Request]) -> list[torch.Tensor]:
        """Log-probabilities of the token after each prompt, all prompts being under way at once."""
        kept: dict[int, torch.Tensor] = {}

        def keep(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[Sampled]:
            for row, line in zip(rows, logits, strict=True):
                kept[id(row)] = torch.log_softmax(line.double().cpu(), -1)
            return sample(logits, rows)

        vars(engine_scheduler)["sample"] = keep
        try:
            asked = self.driver.ask_together(together)
        finally:
            vars(engine_scheduler)["sample"] = sample
        return [kept[id(one.job.generations[0].row)] for one in asked if one.job is not None]


def measure(model: str, dtype: str, count: int) -> dict[str, Any]:
    started_s = time.monotonic()
    asked = requests(count)
    whole = Recorder(model, dtype, prefill_chunk=4096)
    cold = [whole.ask([request])[0] for request in asked]
    before = whole.driver.core.stats()
    warm = [whole.ask([request])[0] for request in asked]
    after = whole.driver.core.stats()
    reused = int(after["prefix_cache_hits"]) - int(before["prefix_cache_hits"])
    whole.driver.core.forget(Scope())
    batched = whole.ask(asked)
    small = Recorder(model, dtype, prefill_chunk=48)
    chunked = [small.ask([request])[0] for request in asked]
    return {
        "prompts": count,
        "mean_prompt_tokens": round((int(after["prompt_tokens"]) - int(before["prompt_tokens"])) / count, 1),
        "mean_reused_tokens": round(reused / count, 1),
        "cached": compared(cold, warm),
        "chunked": compared(cold, chunked),
        "batched": compared(cold, batched),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def compared(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, float]:
    kl = [float((p.exp() * (p - q)).sum().clamp(min=0.0)) for p, q in zip(expected, found, strict=True)]
    agree = [bool(p.argmax() == q.argmax()) for p, q in zip(expected, found, strict=True)]
    return {"mean_kl": sum(kl) / len(kl), "max_kl": max(kl), "greedy_agreement": sum(agree) / len(agree)}


if __name__ == "__main__":
    main()
