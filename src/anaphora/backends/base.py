"""The contract every backend keeps (`anaphora.testing.backends` checks it)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol, runtime_checkable

import msgspec

from anaphora.prompt import Lengths, Prompt
from anaphora.types import Delta, ModelInfo, Native, Request, Scope


class Foreign(msgspec.Struct, frozen=True):
    """A request for something of a provider's API that Anaphora does not know: files, batches, audio."""

    anthropic: bool
    """Whose API it is of; else OpenAI's."""
    method: str
    path: str
    """From `/v1/` on, with its query."""
    native: Native
    """`headers` has the content type, too."""
    model: str = ""
    """Where the body names one."""


class Forwarded(msgspec.Struct, frozen=True):
    """Its answer, as it came. Whoever has it must `aclose` it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    chunks: AsyncGenerator[bytes, None]


class Backend(Protocol):
    async def start(self) -> None:
        """Begin whatever runs behind it. Returns once requests may be sent (they may still wait for readiness)."""
        ...

    def ready(self) -> bool:
        """True while it can answer now (model loaded, process alive)."""
        ...

    async def models(self) -> tuple[ModelInfo, ...]: ...

    def run(self, request: Request) -> AsyncIterator[Delta]:
        """Compute one answer: deltas in the order `types.Delta` states.

        Closing the iterator (`aclose`) cancels the computation and frees its place at once. Raises a `ServiceError` before
        the first delta where the request cannot be taken, or between deltas where the computation is lost.
        """
        ...

    async def count_tokens(self, request: Request) -> int:
        """Prompt tokens of `request` as this backend would see them; independent of any cache's state."""
        ...

    async def forget(self, scope: Scope) -> int:
        """Drop cached state of `scope`; returns how many blocks or entries went."""
        ...

    async def stats(self) -> dict[str, Any]:
        """Counters and gauges by name (flat; numbers and strings only). Keys are documented in `docs/http-api.md`."""
        ...

    async def aclose(self) -> None: ...


@runtime_checkable
class Bursting(Protocol):
    """A backend that has several deltas at once now and then, and gives them out so."""

    def bursts(self, request: Request) -> AsyncIterator[list[Delta]]:
        """As `Backend.run`; no list is empty."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """A backend that can tell how long the parts of a prompt are: accounting for prompt caching needs it."""

    async def measure(self, request: Request, prompt: Prompt) -> Lengths | None:
        """The lengths of `prompt`, which is `request` as prompt caching sees it; None where they cannot be told."""
        ...


@runtime_checkable
class Hosting(Protocol):
    """A backend that has others answer: hosted APIs, and whoever speaks like them."""

    def hosts(self, model: str) -> bool:
        """Whether others answer for `model`, by their own rules and with their own usage."""
        ...

    async def forward(self, asked: Foreign) -> Forwarded:
        """Ask whoever has what Anaphora itself does not know. Raises NotFound where nobody may be asked for that."""
        ...

    async def loaded(self) -> None:
        """Returns when an engine of one's own, if there is one too, has said which models it has. `models` does not wait."""
        ...

    def passes_on(self, model: str, dialect: str) -> bool:
        """Whether a body of `dialect` (`wire.base.Dialect.name`) that asks for `model` may go out as it came in."""
        ...


@runtime_checkable
class StandsIn(Protocol):
    """A backend that may stand for the provider's own models, and take what only those can (`types.ProviderPart`)."""

    takes_provider_blocks: bool
