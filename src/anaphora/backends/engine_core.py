"""The engine without a process around it: a model, its KV cache and its scheduler, driven by `step`.

The engine process (`engine_child`) runs one; benchmarks and tests run one in their own process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path

import msgspec
import torch

from anaphora.backends import engine_lengths
from anaphora.backends.engine import EngineOptions
from anaphora.backends.engine_kernels import prepare as prepare_kernels
from anaphora.backends.engine_model import (
    Model,
    choose_device,
    choose_dtype,
    fingerprint,
    materialise,
    resolve,
    unreadable_is_refused,
)
from anaphora.backends.engine_offload import SlowerTiers
from anaphora.backends.engine_output import Output
from anaphora.backends.engine_sampling import SampledRow, model_defaults, plan_for
from anaphora.backends.engine_scheduler import Scheduler, SchedulerOptions
from anaphora.backends.engine_sequences import Generation, Job
from anaphora.backends.engine_template import Template, Tokenised
from anaphora.backends.engine_text import Detokenizer, StopStrings, ToolCallParser
from anaphora.clock import Clock, SystemClock
from anaphora.codecs.base import Codec
from anaphora.codecs.raw import Raw
from anaphora.errors import BackendFailed, ConfigError, ContextTooLong, InvalidRequest, QueueFull, ServiceError
from anaphora.events import Forgotten
from anaphora.keys import kv_namespace
from anaphora.kv.arena import Arena
from anaphora.kv.cache import KVCache
from anaphora.kv.ends import PromptEnds
from anaphora.kv.offload import Offload
from anaphora.kv.pool import KVPool
from anaphora.policies.base import Policy
from anaphora.prompt import Lengths, Prompt
from anaphora.store import Store
from anaphora.types import BlockHash, Delta, ModelInfo, Request, Scope, TextDelta

_UNSUPPORTED = ("response_format", "logit_bias", "modalities", "audio", "grammar", "guided_json", "guided_regex")
"""Fields that would change the answer and that this engine cannot honour: refused, never ignored."""

_MIN_CONTEXT = 256
_NUM_RECENT = 32
"""Tokenised requests that are remembered: about as many as may be on their way from being measured to being run."""

_FORGET_S = 120.0
"""How long who waits for a forget waits."""
_ENDS_SHARE = 32
"""Beside the KV, one part in so many of its memory keeps how whole prompts end."""


class Forgetting(msgspec.Struct, frozen=True):
    """A forget that is under way."""

    scope: Scope
    num_in_pool: int
    erasing: Future[Forgotten] | None
    """From the slower tiers, of which there may be none."""


class MemoryPlan(msgspec.Struct, frozen=True):
    arena_tokens: int
    num_blocks: int


def plan_memory(kv_memory: int, bytes_per_token: int, context: int, max_num_seqs: int, block_size: int) -> MemoryPlan:
    """Divide `kv_memory` bytes: a third for running sequences (at least one whole context if half of it suffices for that,
    never more than all sequences can use), the rest for cached blocks."""
    total = kv_memory // bytes_per_token
    arena = min(max(total // 3, min(context, total // 2)), max_num_seqs * context)
    if arena < _MIN_CONTEXT:
        needed = 2 * _MIN_CONTEXT * bytes_per_token
        raise ConfigError(f"kv_memory of {kv_memory} bytes is too small for this model: give at least {needed} bytes")
    return MemoryPlan(arena, (total - arena) // block_size)


class EngineCore:
    """Load with the constructor (seconds), then `submit` and call `step` until it returns False. One thread."""

    def __init__(
        self,
        options: EngineOptions,
        policy: Policy[BlockHash],
        *,
        store: Store | None = None,
        codec: Codec | None = None,
        readable: Mapping[str, Codec] | None = None,
        progress: Callable[[str], None] = lambda stage: None,
        clock: Clock | None = None,
    ) -> None:
        """`store` is where KV blocks outlive the pool, encoded by `codec` (default: as they are), or by any
        of `readable` before. It becomes this engine's."""
        from transformers import AutoTokenizer

        started_s = time.monotonic()
        self._clock = clock or SystemClock()
        self._options = options
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        if options.threads:
            torch.set_num_threads(options.threads)
        source = resolve(options.model)
        models_dir = Path(options.models_dir).expanduser()
        prepare_kernels(models_dir.parent / "kernels")
        folder = materialise(source, models_dir, progress)
        weights = str(dtype).removeprefix("torch.") if options.quantization == "none" else options.quantization
        progress(f"loading weights ({weights})")
        self.model = Model(folder, dtype=dtype, device=device, quantization=options.quantization)
        shape = self.model.kv_shape
        plan = plan_memory(
            options.kv_memory, shape.bytes_per_token, self.model.context, options.max_num_seqs, options.block_size
        )
        pool = KVPool(
            shape, arena_tokens=plan.arena_tokens, num_blocks=plan.num_blocks, block_size=options.block_size, device=device
        )
        self.model.attach(pool)
        self.pool = pool
        self.context = min(self.model.context, plan.arena_tokens)
        progress("loading the tokenizer")
        with unreadable_is_refused(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        self._tokenizer = tokenizer
        self._template = Template(tokenizer, vocab_size=self.model.vocab_size)
        self._defaults = model_defaults(self.model.generation_defaults)
        self._fingerprint = fingerprint(folder, dtype, options.block_size, models_dir, quantization=options.quantization)
        self._cache = KVCache(
            plan.num_blocks,
            options.block_size,
            policy,
            block_bytes=options.block_size * shape.bytes_per_token,
            pin_quota=options.pin_quota,
        )
        self.info = ModelInfo(
            id=options.served_name or source.name,
            created_s=int((folder / "config.json").stat().st_mtime),
            max_input_tokens=self.context,
            fingerprint=self._fingerprint,
        )
        self._offload: Offload | None = None
        if store is not None:
            self._offload = Offload(
                store,
                codec or Raw(),
                pool,
                model=self.info.id,
                max_saving_blocks=plan.num_blocks // 2,
                readable=readable,
            )
        self._lossy = store is not None and codec is not None and codec.lossy
        """Whether blocks may have been through a codec with a loss."""
        self._tiers = SlowerTiers(self._offload, self._cache)
        self._scheduler = Scheduler(
            self.model,
            pool,
            Arena(plan.arena_tokens),
            self._cache,
            SchedulerOptions(options.max_num_seqs, options.prefill_chunk, options.mixed_chunk, options.prefix_caching),
            ends=PromptEnds(options.kv_memory // _ENDS_SHARE),
            tiers=self._tiers,
            clock=self._clock,
        )
        self._plan = plan
        # Requests on their way from the thread that prepares to the one that steps; each thread writes one of the two.
        self._num_prepared = 0
        self._num_submitted = 0
        self._recent: deque[tuple[Request, list[Tokenised]]] = deque(maxlen=_NUM_RECENT)
        """Requests that were measured, and will be run in a moment."""
        self.load_s = time.monotonic() - started_s

    # -- requests ----------------------------------------------------------------------------------------------------

    def prepare(
        self, id: object, request: Request, emit: Callable[[list[Delta]], None], fail: Callable[[ServiceError], None]
    ) -> Job:
        """Check and tokenise a request; the caller owes a `submit`. Raises ServiceErrors that say what is wrong.

        May run on another thread than `step`, always the same.
        """
        for field in _UNSUPPORTED:
            if request.extra.get(field) is not None:
                raise InvalidRequest(
                    f"{field} is not supported by the embedded engine", param=field, code="unsupported_parameter"
                )
        num_waiting = self._scheduler.num_waiting + self._num_prepared - self._num_submitted
        if num_waiting >= self._options.max_queue:
            message = f"{num_waiting} requests are waiting already; retry later"
            raise QueueFull(message, retry_after_s=self._retry_after_s(num_waiting))
        prompts = [tokenised.ids for tokenised in self._tokenise(request)]
        left = self.context - max(len(prompt) for prompt in prompts)
        if left < 1:
            longest = self.context - left
            raise ContextTooLong(
                f"prompt is too long: {longest} tokens > {self.context - 1} maximum",
                param="messages",
                code="context_length_exceeded",
            )
        # Blocks that came back from a codec with a loss lie in the pool like any others: only another namespace avoids them.
        apart = request.exact_kv and self._lossy
        namespace = kv_namespace(request.tenant, self._fingerprint, request.cache_salt, apart=apart)
        n = request.sampling.n
        generations = [
            Generation(
                p * n + i,
                prompt,
                namespace,
                SampledRow(plan_for(request.sampling, self._defaults, i)),
                self._output(request, p * n + i),
            )
            for p, prompt in enumerate(prompts)
            for i in range(n)
        ]
        generations[0].keep = self._kept(request, len(prompts[0]))
        self._num_prepared += len(generations)
        return Job(
            id,
            model=self.info.id,
            tenant=request.tenant,
            max_tokens=left if request.max_tokens is None else min(request.max_tokens, left),
            num_choices=n,
            # vLLM's extension, which load tests send: go on to max_tokens whatever the model says.
            eos_ids=frozenset() if request.extra.get("ignore_eos") is True else self.model.eos_ids,
            prompt_tokens=sum(map(len, prompts)),
            generations=generations,
            preface=self._echoed(request, prompts),
            emit=emit,
            fail=fail,
            submitted_s=self._clock.monotonic_s(),
            pool_only=apart,
        )

    def count_tokens(self, request: Request) -> int:
        return sum(len(tokenised.ids) for tokenised in self._tokenise(request))

    def measure(self, request: Request, prompt: Prompt) -> Lengths | None:
        """As `backends.base.Measuring` says; on the thread of `prepare`. Of several raw prompts nothing can be told."""
        if len(request.prompts) > 1:
            return None
        (tokenised,) = self._tokenise(request)
        return engine_lengths.lengths(self._template, request, prompt, tokenised)

    def submit(self, job: Job) -> None:
        self._scheduler.submit(job)
        self._num_submitted += len(job.generations)

    def cancel(self, id: object) -> None:
        self._scheduler.cancel(id)

    def fail_all(self, error: ServiceError) -> None:
        self._scheduler.fail_all(error)

    def step(self) -> bool:
        """One forward pass over what is running. False where there is nothing to do."""
        return self._scheduler.step()

    def forget(self, scope: Scope) -> int:
        """`start_forget`, wait, `end_forget`: for whoever has nothing else to do meanwhile."""
        forgetting = self.start_forget(scope)
        if forgetting.erasing is not None:
            wait((forgetting.erasing,), timeout=_FORGET_S)
        return self.end_forget(forgetting)

    def start_forget(self, scope: Scope) -> Forgetting:
        """Nothing of `scope` is found in the pool from here on, and the slower tiers are being cleared behind."""
        self._template.forget()
        return Forgetting(scope, self._forget_in_pool(scope), self._tiers.forget(scope))

    def end_forget(self, forgetting: Forgetting) -> int:
        """How many blocks went, from the pool and the slower tiers. Raises BackendFailed where a tier may still have some."""
        if forgetting.erasing is None:
            return forgetting.num_in_pool
        self._tiers.settle()
        # Again: a request may have found in a tier what had not gone yet, and brought it back.
        count = forgetting.num_in_pool + self._forget_in_pool(forgetting.scope)
        if not forgetting.erasing.done():
            raise BackendFailed(f"KV blocks were not forgotten within {_FORGET_S:.0f} s; try again")
        receipt = forgetting.erasing.result()
        left = sorted({*receipt.failed, *(tier for tier, num in receipt.remaining.items() if num)})
        if left:
            raise BackendFailed(f"KV blocks could not be forgotten in: {', '.join(left)}; try again when it can be reached")
        return count + sum(receipt.removed.values())

    def _forget_in_pool(self, scope: Scope) -> int:
        return self._scheduler.forget(scope) if scope.tag is None and scope.model in (None, self.info.id) else 0

    def flush(self, timeout_s: float) -> None:
        """Wait until what was computed is in the slower tiers too, at most for so long."""
        if self._offload is not None:
            self._offload.flush(timeout_s)

    def close(self) -> None:
        """Let go of the slower tiers, when all that is to be written there is written."""
        if self._offload is not None:
            self._offload.close()

    def stats(self) -> dict[str, int | float | str]:
        """Flat gauges and totals; names as in vLLM's metrics where vLLM has one."""
        cache = self._cache.stats()
        return {
            **vars(self._scheduler.counters),
            **(self._offload.stats() if self._offload is not None else {}),
            "num_requests_running": self._scheduler.num_running,
            "num_requests_waiting": self._scheduler.num_waiting,
            "kv_cache_usage_perc": 1.0 - cache.num_free / cache.num_blocks if cache.num_blocks else 0.0,
            "kv_blocks": cache.num_blocks,
            "kv_blocks_cached": cache.num_cached,
            "kv_blocks_evicted": cache.evicted_blocks,
            "kv_blocks_forgotten": cache.forgotten_blocks,
            "kv_blocks_pinned": cache.num_held,
            "kv_pins": cache.num_pins,
            "kv_pins_dropped": cache.dropped_pins,
            "kv_block_size": self._options.block_size,
            "kv_bytes_per_token": self.model.kv_shape.bytes_per_token,
            "kv_arena_tokens": self._plan.arena_tokens,
            "context_tokens": self.context,
            "load_seconds": round(self.load_s, 3),
            "resident_bytes": _resident_bytes(),
            "model": self.info.id,
            "dtype": str(self.model.kv_shape.dtype).removeprefix("torch."),
            "quantization": self._options.quantization,
            "device": str(self.model.device),
        }

    def _tokenise(self, request: Request) -> list[Tokenised]:
        """Of what was asked a moment ago (to be measured, and then to be run) the same, without doing it again."""
        if request.keep:
            request = msgspec.structs.replace(request, keep=())
        for asked, prompts in reversed(tuple(self._recent)):
            if asked == request:
                return prompts
        if request.prompts:
            prompts = [Tokenised(self._template.encode_prompt(prompt)) for prompt in request.prompts]
        else:
            prompts = [self._template.tokenise(request)]
        if not all(tokenised.ids for tokenised in prompts):
            raise InvalidRequest("the prompt is empty", param="prompt")
        self._recent.append((request, prompts))
        return prompts

    def _kept(self, request: Request, num_tokens: int) -> list[tuple[int, float]]:
        """(number of blocks, until when) of what is promised, shortest first. The last token's block is never reused."""
        now_s, size = self._clock.now_s(), self._options.block_size
        kept = ((min(keep.num_tokens, num_tokens - 1) // size, now_s + keep.for_s) for keep in request.keep)
        return sorted((num_blocks, until_s) for num_blocks, until_s in kept if num_blocks)

    def _output(self, request: Request, choice: int) -> Output:
        tools = ToolCallParser(request.tools, choice=choice) if request.tools and request.tool_choice.mode != "none" else None
        stops = StopStrings(request.sampling.stop)
        one_call = not request.tool_choice.parallel
        return Output(choice, Detokenizer(self._tokenizer), stops, tools, self._token_text, one_call=one_call)

    def _token_text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _echoed(self, request: Request, prompts: list[list[int]]) -> list[Delta]:
        if not request.echo:
            return []
        n = request.sampling.n
        texts = [str(self._tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts]
        return [TextDelta(p * n + i, text) for p, text in enumerate(texts) for i in range(n)]

    def _retry_after_s(self, num_waiting: int) -> float:
        """How long the waiting requests will keep the engine busy, going by the pace so far."""
        counters = self._scheduler.counters
        pace_s = counters.forward_seconds / max(1, counters.request_success)
        return min(60.0, max(1.0, pace_s * num_waiting / 2))


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
