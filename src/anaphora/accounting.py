"""What a request costs by its provider's rules: a `Bill` is opened when it starts and written into its answer's usage.

Between the gateway, which computes answers, and the books of `promises`, which know nothing of answers. Only for backends that
can measure a prompt; with any other, usage stays what the backend itself says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from anaphora.backends.base import Measuring
from anaphora.errors import InvalidRequest
from anaphora.events import Billed, Emit, ignore
from anaphora.profiles import find
from anaphora.promises import Books, Charge, Stats
from anaphora.prompt import Prompt
from anaphora.types import Begin, Delta, End, Request, Scope, Usage


class Asked(msgspec.Struct, frozen=True):
    """What accounting needs to know of a question beside its `Request`."""

    prompt: Callable[[], Prompt]
    """Called only where an answer is computed: reading a prompt off a body takes time."""
    answer_id: str
    """By which the client will know the answer, and may ask for a comparison with it."""
    workspace: str = ""
    model: str = ""
    """As the client named it."""
    request_id: str = ""
    tag: str = ""
    """The client's own label, for the ledger."""


NOBODY = Asked(lambda: Prompt("openai", "", ()), "")
"""Whoever asks without a server in between."""


class Bill:
    """One client's account of one answer. Every client has its own, also where several share a computation."""

    def __init__(self, books: Books, charge: Charge, answer_id: str, *, block_size: int | None, emit: Emit = ignore) -> None:
        self.charge = charge
        self._emit = emit
        self._books = books
        self._answer_id = answer_id
        self._block_size = block_size
        self._readable = False

    def keeping(self, request: Request) -> Request:
        """`request` with what is promised of its prompt, for the engine to keep."""
        return msgspec.structs.replace(request, keep=request.keep + self.charge.keep) if self.charge.keep else request

    def enter(self, burst: Sequence[Delta]) -> list[Delta]:
        """`burst` with the usage of this bill. With the first piece of an answer what it wrote becomes readable (S4): an engine
        says `Begin` before it has computed the prompt."""
        return [self._delta(delta) for delta in burst]

    def _delta(self, delta: Delta) -> Delta:
        if isinstance(delta, Begin):
            if self._block_size is not None:
                self.charge = self._books.settle(self.charge, delta.usage.kv_reused_tokens, self._block_size)
            self._books.name(self.charge, self._answer_id)
            self._emit(_billed(self.charge))
            return msgspec.structs.replace(delta, usage=self.usage(delta.usage))
        if not self._readable:
            self._readable = True
            self._books.visible(self.charge)
        if isinstance(delta, End):
            return msgspec.structs.replace(delta, usage=self.usage(delta.usage))
        return delta

    def usage(self, computed: Usage) -> Usage:
        """What was computed, as this bill accounts for it."""
        billed = self.charge.usage
        return Usage(
            input_tokens=billed.plain,
            output_tokens=computed.output_tokens,
            cache_read_input_tokens=billed.read,
            cache_creation_input_tokens=sum(billed.written.values()),
            written={str(ttl): tokens for ttl, tokens in billed.written.items()},
            kv_reused_tokens=computed.kv_reused_tokens,
        )


def _billed(charge: Charge) -> Billed:
    usage, miss = charge.usage, charge.miss
    written = sum(usage.written.values())
    return Billed(charge.tenant, charge.sketch.model, usage.read, written, usage.plain, "" if miss is None else miss.reason)


class Accounting:
    """Opens bills. `block_size` is that of the backend's KV cache; None: it has none to lose, so every promise is kept."""

    def __init__(
        self,
        backend: Measuring,
        books: Books,
        *,
        like: str | Sequence[str] | None = None,
        block_size: int | None = None,
        hosted: bool = False,
        emit: Emit = ignore,
    ) -> None:
        """`hosted`: the models stand for the provider's own, and refuse what those refuse. One of our own that is accounted for
        like them keeps its sampling."""
        self._backend = backend
        self._books = books
        self._like = like
        self._block_size = block_size
        self._hosted = hosted
        self._emit = emit

    async def open(self, request: Request, asked: Asked, started_s: float) -> Bill | None:
        """The bill of a request that arrived at `started_s` (Unix time). None: the backend cannot tell its prompt's length.

        InvalidRequest: the model that is accounted for does not have a field of the body.
        """
        prompt = asked.prompt()
        profile = find(prompt.model, prompt.dialect, self._like)
        refusal = profile.refusal(prompt)
        if refusal is None and self._hosted:
            refusal = profile.refused_sampling(request.sampling)
        if refusal is not None:
            raise InvalidRequest(refusal.message, param=refusal.param, code=refusal.code)
        lengths = await self._backend.measure(request, prompt)
        if lengths is None:
            return None
        charge = self._books.charge(request.tenant, prompt, profile, lengths, started_s, workspace=asked.workspace)
        return Bill(self._books, charge, asked.answer_id, block_size=self._block_size, emit=self._emit)

    async def count(self, request: Request, prompt: Prompt) -> int | None:
        """All tokens of the prompt, whatever is cached."""
        lengths = await self._backend.measure(request, prompt)
        return None if lengths is None else lengths.total

    def forget(self, scope: Scope) -> int:
        """How many promises went."""
        return self._books.forget(scope)

    @property
    def stats(self) -> Stats:
        return self._books.stats
