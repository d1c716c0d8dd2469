"""What is computed in the engine: a request, and its choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from anaphora.backends.engine_output import Output
from anaphora.backends.engine_sampling import SampledRow
from anaphora.errors import ServiceError
from anaphora.kv.cache import Lease
from anaphora.types import BlockHash, Delta, Tenant, Usage

if TYPE_CHECKING:
    import torch

    from anaphora.kv.offload import Fetch, NewBlock


class Generation:
    """One choice being computed. `tokens` is the prompt and what was sampled; KV exists for the first `num_computed`."""

    def __init__(self, choice: int, prompt: Sequence[int], namespace: bytes, row: SampledRow, output: Output) -> None:
        self.choice = choice
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.namespace = namespace
        self.row = row
        self.output = output
        self.hashes: list[BlockHash] = []
        self.awaited: BlockHash | None = None
        """While it waits: the last block that somebody else is just computing for it."""
        self.num_computed = 0
        self.num_committed = 0
        """Blocks of this sequence that the cache holds, or that it found there."""
        self.lease: Lease | None = None
        self.extent: tuple[int, int] | None = None
        self.reused: int | None = None
        """Prompt tokens found in the cache when it was first admitted."""
        self.keep: list[tuple[int, float]] = []
        """Blocks of the prompt that are to be pinned as soon as they are committed, shortest first, and until when."""
        self.lasting = (0, 0.0)
        """How many of its first blocks are to be kept in the slower tiers as well, and until when."""
        self.known: torch.Tensor | None = None
        """The last position's hidden state, where all its tokens were known already: nothing is left to run."""
        self.sought = False
        """Whether its blocks were looked for in the slower tiers."""
        self.fetch: Fetch | None = None
        """While it waits: what is brought back for it."""
        self.new_blocks: list[NewBlock] = []
        """Blocks that were computed for it and are not written behind yet."""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens without KV: 1 while decoding, more while prefilling, 0 where the next one is only to be sampled."""
        return len(self.tokens) - self.num_computed


class Job:
    """One request: its sequences, and where its deltas go."""

    def __init__(
        self,
        id: object,
        *,
        model: str,
        tenant: Tenant,
        max_tokens: int,
        num_choices: int,
        eos_ids: frozenset[int],
        prompt_tokens: int,
        generations: list[Generation],
        preface: list[Delta],
        emit: Callable[[list[Delta]], None],
        fail: Callable[[ServiceError], None],
        submitted_s: float,
        pool_only: bool = False,
    ) -> None:
        self.id = id
        self.model = model
        self.tenant = tenant
        self.max_tokens = max_tokens
        self.eos_ids = eos_ids
        self.num_choices = num_choices
        """Choices per prompt."""
        self.prompt_tokens = prompt_tokens
        """Over all prompts, each counted once however many choices it has."""
        self.generations = generations
        self.preface = preface
        """Deltas that come right after Begin (`echo` of a raw prompt)."""
        self.emit = emit
        self.fail = fail
        self.submitted_s = submitted_s
        self.pool_only = pool_only
        """Its blocks are neither written to slower tiers nor sought there."""
        self.num_unfinished = len(generations)
        self.begun = False
        self.forgotten = False
        """Its tenant was forgotten while it was in the engine: it still gets its answer, and leaves nothing behind."""
        self.output_tokens = 0
        self.reused: dict[int, int] = {}

    def usage(self) -> Usage:
        reused = sum(self.reused.values())
        return Usage(
            input_tokens=self.prompt_tokens - reused,
            cache_read_input_tokens=reused,
            output_tokens=self.output_tokens,
            kv_reused_tokens=reused,
        )
