"""What prefix reuse and batching save, measured on this machine against transformers' own generation.

Both sides hold the same weights in the same process and take turns, so that a machine's other work falls on both. Every
figure that is claimed is a ratio of two medians of one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from anaphora.backends.engine import EngineOptions
from anaphora.backends.engine_attention import Segment
from anaphora.backends.engine_core import EngineCore
from anaphora.backends.engine_model import choose_device, choose_dtype, materialise, resolve
from anaphora.errors import ServiceError
from anaphora.policies.lru import LRU
from anaphora.types import Begin, Delta, End, Request, Sampling

Progress = Callable[[str], None]


class BenchOptions(msgspec.Struct, frozen=True):
    engine: EngineOptions
    context: int = 7000
    """Length of the long prompt, in tokens."""
    new_tokens: int = 32
    """Tokens of the warm request that are not cached."""
    decode_tokens: int = 16
    rounds: int = 5
    streams: int = 4


class Timed(msgspec.Struct):
    """One request through the engine. Seconds from its submission."""

    first_s: float = 0.0
    end_s: float = 0.0
    reused: int = 0
    num_tokens: int = 0


def run(options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """All measurements, as plain values ready for JSON. Takes minutes."""
    started_s = time.perf_counter()
    core = EngineCore(options.engine, LRU(), progress=progress)
    ready_s = time.perf_counter() - started_s
    resident = core.stats()["resident_bytes"]
    progress("loading transformers' side")
    peer = _Peer(options.engine)
    bench = _Bench(core, peer, options, progress)
    short, long = 512, min(options.context, core.context - options.new_tokens - options.decode_tokens - 1)
    lengths = [n for n in (short, 2048) if n < long] + [long]
    cold = {str(n): bench.cold(n) for n in lengths}
    return {
        "model": core.info.id,
        "dtype": core.stats()["dtype"],
        "device": core.stats()["device"],
        "threads": torch.get_num_threads(),
        "cold_prefill": cold,
        "warm_ttft": bench.warm(long),
        "decode": {str(n): bench.decode(n) for n in (short, long)},
        "streams": bench.streams(),
        "startup_s": ready_s,
        "resident_bytes": resident,
        "kv_bytes_per_token": core.model.kv_shape.bytes_per_token,
    }


class _Peer:
    """transformers as a user would run it: `generate`, DynamicCache, its default attention."""

    def __init__(self, options: EngineOptions) -> None:
        from transformers import AutoModelForCausalLM

        device = choose_device(options.device)
        folder = materialise(resolve(options.model), Path(options.models_dir), lambda stage: None)
        net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=choose_dtype(options.dtype, device))
        self._net = net.to(device).eval()
        self._device = device

    def prefill(self, tokens: Sequence[int]) -> tuple[float, Any]:
        """Seconds to the first token of a cold prompt, and the cache it left."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._net.config)
        with torch.inference_mode():
            started_s = time.perf_counter()
            logits = self._net(torch.tensor([tokens], device=self._device), past_key_values=cache, logits_to_keep=1).logits
            logits.argmax().item()
            return time.perf_counter() - started_s, cache

    def decode(self, tokens: Sequence[int], cache: Any, count: int) -> float:
        """Seconds per token of `generate` going on from a cache that holds all but the last of `tokens`."""
        with torch.inference_mode():
            started_s = time.perf_counter()
            self._net.generate(
                torch.tensor([tokens], device=self._device),
                past_key_values=cache,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
            elapsed_s = time.perf_counter() - started_s
        cache.crop(len(tokens) - 1 - cache.get_seq_length())
        return elapsed_s / count


class _Bench:
    def __init__(self, core: EngineCore, peer: _Peer, options: BenchOptions, progress: Progress) -> None:
        self._core = core
        self._peer = peer
        self._options = options
        self._progress = progress
        self._generator = torch.Generator().manual_seed(0)

    def cold(self, length: int) -> dict[str, float]:
        rounds = 3 if length <= 2048 else 1
        ours, theirs = [], []
        for i in range(rounds):
            self._progress(f"cold prefill of {length} tokens ({i + 1}/{rounds})")
            ours.append(self._ask(self._tokens(length), 1).first_s)
            theirs.append(self._peer.prefill(self._tokens(length))[0])
        return _ratio("cold_s", ours, "transformers_s", theirs, "speedup")

    def warm(self, length: int) -> dict[str, float]:
        """Cold, then warm with new last tokens, and the bound: copy of the reused KV + one forward of the new tokens."""
        options = self._options
        prompt = self._tokens(length)
        self._progress(f"warm requests over {length} cached tokens")
        cold = self._ask(prompt, 1)
        warm, copy, forward = [], [], []
        for _ in range(options.rounds):
            timed = self._ask([*prompt[: -options.new_tokens], *self._tokens(options.new_tokens)], 1)
            warm.append(timed.first_s)
            copy_s, forward_s = self._bound(length, length - timed.reused)
            copy.append(copy_s)
            forward.append(forward_s)
        bound_s = statistics.median(copy) + statistics.median(forward)
        warm_s = statistics.median(warm)
        return {
            "tokens": length,
            "new_tokens": options.new_tokens,
            "reused_tokens": timed.reused,
            "cold_s": cold.first_s,
            "warm_s": warm_s,
            "warm_of_cold": warm_s / cold.first_s,
            "bound_s": bound_s,
            "warm_of_bound": warm_s / bound_s,
        }

    def decode(self, length: int) -> dict[str, float]:
        options = self._options
        self._progress(f"decode at {length} tokens")
        prompt = self._tokens(length)
        self._ask(prompt, 1)
        _, cache = self._peer.prefill(prompt[:-1])
        ours, theirs = [], []
        for _ in range(options.rounds):
            timed = self._ask(prompt, options.decode_tokens + 1)
            ours.append((timed.end_s - timed.first_s) / (timed.num_tokens - 1))
            theirs.append(self._peer.decode(prompt, cache, options.decode_tokens))
        return _ratio("token_s", ours, "transformers_token_s", theirs, "speedup")

    def streams(self) -> dict[str, float]:
        """Tokens per second of several streams at once against one after the other."""
        options = self._options
        together, alone = [], []
        for i in range(options.rounds):
            self._progress(f"{options.streams} streams together and in sequence ({i + 1}/{options.rounds})")
            prompts = [self._tokens(128) for _ in range(options.streams)]
            together.append(self._together(prompts, 48))
            prompts = [self._tokens(128) for _ in range(options.streams)]
            alone.append(sum(self._together([prompt], 48) for prompt in prompts))
        return {"streams": options.streams, **_ratio("together_s", together, "in_sequence_s", alone, "speedup")}

    def _ask(self, tokens: list[int], max_tokens: int) -> Timed:
        timed = Timed()
        self._submit(tokens, max_tokens, timed, time.perf_counter())
        while self._core.step():
            pass
        return timed

    def _together(self, prompts: list[list[int]], max_tokens: int) -> float:
        started_s = time.perf_counter()
        for prompt in prompts:
            self._submit(prompt, max_tokens, Timed(), started_s)
        while self._core.step():
            pass
        return time.perf_counter() - started_s

    def _submit(self, tokens: list[int], max_tokens: int, timed: Timed, started_s: float) -> None:
        def emit(deltas: list[Delta]) -> None:
            now_s = time.perf_counter() - started_s
            for delta in deltas:
                if isinstance(delta, Begin):
                    timed.reused = delta.usage.kv_reused_tokens
                elif isinstance(delta, End):
                    timed.end_s, timed.num_tokens = now_s, delta.usage.output_tokens
                elif not timed.first_s:
                    timed.first_s = now_s

        def fail(error: ServiceError) -> None:
            raise error

        # Log-probabilities are asked for because every token then gives a delta, whether its text is final or not.
        request = Request(
            model=self._core.info.id,
            prompts=(tuple(tokens),),
            sampling=Sampling(temperature=0.0, logprobs=0),
            max_tokens=max_tokens,
            extra={"ignore_eos": True},
        )
        self._core.submit(self._core.prepare(object(), request, emit, fail))

    def _bound(self, length: int, num_new: int) -> tuple[float, float]:
        """Seconds to copy the KV of all but the new tokens, and seconds of one forward of the new ones behind it."""
        model, pool, options = self._core.model, self._core.pool, self._options.engine
        blocks = range((length - num_new) // options.block_size)
        started_s = time.perf_counter()
        pool.load(blocks, 0)
        copied_s = time.perf_counter()
        past = length - num_new
        hidden = model.forward(self._tokens(num_new), range(past, length), (Segment(0, num_new, 0, past),), [num_new - 1])
        model.logits(hidden).argmax().item()
        return copied_s - started_s, time.perf_counter() - copied_s

    def _tokens(self, count: int) -> list[int]:
        """Random ids, never seen before: nothing of them is cached. Low ids may be control tokens and are left out."""
        tokens = torch.randint(100, self._core.model.vocab_size, (count,), generator=self._generator)
        return [int(token) for token in tokens]


def _ratio(name: str, ours: list[float], other: str, theirs: list[float], ratio: str) -> dict[str, float]:
    a, b = statistics.median(ours), statistics.median(theirs)
    return {name: a, other: b, ratio: b / a}
