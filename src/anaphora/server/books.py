"""The lasting ledger of one gateway process, as configured: who writes it, who is held to limits by it, who reads it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from anaphora.clock import Clock
from anaphora.config import Config, ledger_path
from anaphora.errors import ConfigError
from anaphora.events import Emit
from anaphora.ledger.allowance import Allowance, used_before
from anaphora.ledger.book import Book
from anaphora.ledger.entry import Entry
from anaphora.ledger.limits import Counts
from anaphora.ledger.prices import Prices, load
from anaphora.ledger.query import Group, Query
from anaphora.ledger.recorder import Recorder
from anaphora.ledger.shared import Cells, Shared
from anaphora.ledger.tallies import Tallies

_ANSWER_S = 1.0
"""How long a request waits for the server that limits are shared on, before it goes on without."""
_KEEP_S = 32 * 86_400
"""Longer than any month: then nothing of it is left."""


class Books:
    """`tell` is told, on another thread, what goes wrong. `shared` is the file of what the tenants of a server with several
    workers have used. Raises ConfigError."""

    def __init__(self, config: Config, clock: Clock, *, tell: Emit, shared: Path | None = None) -> None:
        settings = config.ledger
        self._path = ledger_path(config)
        own = load(Path(settings.prices)) if settings.prices else ()
        addresses = {upstream.name: upstream.base_url for upstream in config.gateway.upstreams}
        prices = Prices(own, addresses=addresses, emulates=config.engine.kind == "echo")
        self.allowance: Allowance | None = None
        if settings.limits:
            tallies = Tallies(shared, first=lambda: self._used_before(clock.now_s()))
            together = self._together(config, tallies, clock, tell) if settings.share_limits else None
            self.allowance = Allowance(settings.limits, tallies, prices, clock, shared=together)
        notes = None
        if settings.otel:
            from anaphora.ledger.telemetry import from_environment

            notes = from_environment()
        self.recorder = Recorder(
            self._path, prices, clock, tell=tell, settles=self.allowance, notes=notes, keep_days=settings.keep_days
        )

    def _used_before(self, now_s: float) -> Mapping[str, Counts]:
        with Book(self._path) as book:
            return used_before(book, now_s)

    def _together(self, config: Config, tallies: Tallies, clock: Clock, tell: Emit) -> Shared:
        cells = _cells(config)
        with Book(self._path, writes=True) as book:
            server = book.identity()
        return Shared(cells, server=server, process=secrets.randbits(63), own=tallies.read, clock=clock, report=tell)

    def groups(self, by: Sequence[str], query: Query) -> list[Group]:
        """Reads the file: call it on a thread of its own. Raises BookProblem."""
        with Book(self._path) as book:
            return book.groups(by, query)

    def rows(self, query: Query, after: int, limit: int) -> list[tuple[int, Entry]]:
        with Book(self._path) as book:
            return book.rows(query, after=after, limit=limit)

    async def aclose(self) -> None:
        """Write what is left, and tell it to whoever shares the limits."""
        await asyncio.to_thread(self.recorder.close)
        if self.allowance is not None:
            await self.allowance.aclose()


def _cells(config: Config) -> Cells:
    """Raises ConfigError."""
    try:
        from anaphora.tiers.valkey.cells import Cells as ValkeyCells
        from anaphora.tiers.valkey.servers import Access
    except ImportError:
        raise ConfigError("ledger.share_limits: no client for Valkey is installed; pip install 'anaphora[redis]'") from None
    access = Access(config.cache.shared, config.cache.shared_ca_file, timeout_s=_ANSWER_S, connect_timeout_s=_ANSWER_S)
    try:
        return ValkeyCells(access, f"{config.cache.shared_prefix}limits:", keep_s=_KEEP_S)
    except ConfigError as error:
        raise ConfigError(f"cache.shared: {error}") from error


def check_books(config: Config) -> None:
    """Raises ConfigError for what would keep `Books` from being opened."""
    if config.ledger.prices:
        load(Path(config.ledger.prices))
    if config.ledger.share_limits:
        _cells(config)
    if config.ledger.otel and find_spec("opentelemetry.sdk") is None:
        raise ConfigError("ledger.otel: OpenTelemetry is not installed; pip install 'anaphora[otel]'")
