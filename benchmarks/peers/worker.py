"""One engine in a process of its own, asked by lines of JSON on standard input, answering by lines on standard output.

    PYTHON worker.py anaphora|vllm|llamacpp

    {"do": "load", "model": ..., "context": 7168, "threads": 2, "dtype": "auto", "compile": false}
    → {"version": ..., "dtype": ..., "threads": ...}

    {"do": "prefill", "tokens": [...], "new": 33}
    → {"first_s": ..., "next_s": ..., "cached": ...}

`prefill` reads a prompt and generates `new` tokens greedily, the model's end of text ignored: seconds until the first of them,
seconds for each further one (null for one token), and how many tokens of the prompt were cached. What fails is answered by
{"error": ...}. It runs in the engine's own virtual environment, so it imports nothing of the others'. Whatever libraries
write on standard output goes to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

KV_BYTES = 2 << 30
"""What each engine that is told a size may use for KV."""

_PR_SET_PDEATHSIG = 1


class Engine(Protocol):
    def load(self, asked: dict[str, Any]) -> dict[str, Any]: ...

    def prefill(self, tokens: list[int], new: int) -> dict[str, Any]: ...


class Anaphora:
    """The embedded engine over its own entrance, as in the engine process."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        from anaphora import __version__
        from anaphora.backends.engine import EngineOptions
        from anaphora.backends.engine_core import EngineCore
        from anaphora.backends.engine_model import materialise, resolve
        from anaphora.config import default_cache_dir
        from anaphora.policies.lru import LRU
        from anaphora.testing.engines import Driver

        models_dir = Path(default_cache_dir()) / "models"
        core = EngineCore(
            EngineOptions(
                model=asked["model"],
                dtype=asked["dtype"],
                device="cpu",
                threads=asked["threads"],
                kv_memory=KV_BYTES,
                models_dir=str(models_dir),
            ),
            LRU(),
        )
        self._driver = Driver(core)
        source = resolve(asked["model"])
        is_gguf = source.path is not None and source.path.suffix == ".gguf"
        return {
            "version": __version__,
            "dtype": core.stats()["dtype"],
            "threads": importlib.import_module("torch").get_num_threads(),
            "folder": str(materialise(source, models_dir, lambda stage: None)),
            "gguf": str(source.path) if is_gguf else None,
            "vocab_size": core.model.vocab_size,
        }

    def prefill(self, tokens: list[int], new: int) -> dict[str, Any]:
        from anaphora.types import Request, Sampling

        request = Request(
            "m",
            prompts=(tuple(tokens),),
            max_tokens=new,
            sampling=Sampling(temperature=0.0),
            extra={"ignore_eos": True},
        )
        watch = Stopwatch()
        asked = self._driver.submit(request)
        more = True
        while more:
            more = self._driver.core.step()
            watch.seen(len(asked.tokens[0]))
        return watch.reading(new, asked.completion.usage.kv_reused_tokens)


class Vllm:
    """vLLM in this process: its own entrance, automatic prefix caching on, no text made of the tokens."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        vllm: Any = importlib.import_module("vllm")
        engine: Any = importlib.import_module("vllm.v1.engine.llm_engine")
        self._sampling: Any = vllm.SamplingParams
        self._engine = engine.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=asked["model"],
                dtype=asked["dtype"],
                max_model_len=asked["context"],
                enforce_eager=not asked["compile"],
                enable_prefix_caching=True,
                kv_cache_memory_bytes=KV_BYTES,
                disable_log_stats=True,
            )
        )
        self._num_asked = 0
        dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        return {"version": vllm.__version__, "dtype": dtype, "threads": importlib.import_module("torch").get_num_threads()}

    def prefill(self, tokens: list[int], new: int) -> dict[str, Any]:
        self._num_asked += 1
        params = self._sampling(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
        cached = None
        watch = Stopwatch()
        self._engine.add_request(str(self._num_asked), {"prompt_token_ids": tokens}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                watch.seen(len(output.outputs[0].token_ids))
                cached = output.num_cached_tokens
        return watch.reading(new, cached)


class LlamaCpp:
    """llama.cpp's server without HTTP, one slot, `cache_prompt`."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        xllamacpp: Any = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = asked["model"]
        params.n_ctx = asked["context"]
        params.n_parallel = 1
        params.cpuparams.n_threads = asked["threads"]
        params.cpuparams_batch.n_threads = asked["threads"]
        self._server = xllamacpp.Server(params)
        dtype = Path(asked["model"]).stem.rpartition(".")[2]
        return {"version": xllamacpp.__version__, "dtype": dtype, "threads": params.cpuparams.n_threads}

    def prefill(self, tokens: list[int], new: int) -> dict[str, Any]:
        question = {"prompt": tokens, "n_predict": new, "cache_prompt": True, "ignore_eos": True, "temperature": 0.0}
        started_s = time.perf_counter()
        answer = self._server.handle_completions(question)
        whole_s = time.perf_counter() - started_s
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp answered {answer}")
        # Streamed, a token that ends within a character would be held back. Its own clock says when each was there.
        timings = answer["timings"]
        after_first_s = timings["predicted_ms"] / 1000
        if timings["predicted_n"] != new:
            raise RuntimeError(f"asked for {new} tokens, llama.cpp generated {timings['predicted_n']}")
        next_s = after_first_s / (new - 1) if new > 1 else None
        return {"first_s": whole_s - after_first_s, "next_s": next_s, "cached": timings["cache_n"]}


class Stopwatch:
    """When the first and the last token of one request were seen; it runs from its making."""

    def __init__(self) -> None:
        self._first_s = self._last_s = 0.0
        self._num_tokens = 0
        self._started_s = time.perf_counter()

    def seen(self, num_tokens: int) -> None:
        if num_tokens == self._num_tokens:
            return
        now_s = time.perf_counter() - self._started_s
        if not self._num_tokens:
            self._first_s = now_s
        self._num_tokens, self._last_s = num_tokens, now_s

    def reading(self, new: int, cached: int | None) -> dict[str, Any]:
        if self._num_tokens != new:
            raise RuntimeError(f"asked for {new} tokens, saw {self._num_tokens}")
        next_s = (self._last_s - self._first_s) / (new - 1) if new > 1 else None
        return {"first_s": self._first_s, "next_s": next_s, "cached": cached}


ENGINES: dict[str, Callable[[], Engine]] = {"anaphora": Anaphora, "vllm": Vllm, "llamacpp": LlamaCpp}


def main() -> int:
    if sys.platform == "linux":  # stopped between its turns, it would otherwise outlive whoever asks it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = engine.load(asked) if asked["do"] == "load" else engine.prefill(asked["tokens"], asked["new"])
        except Exception as error:  # whatever an engine raises: it is the reason why this side is left out
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
