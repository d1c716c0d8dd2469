"""The lasting ledger of one gateway process, as configured: who writes it, who is held to limits by it, who reads it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from anaphora.clock import Clock
from anaphora.config import Config, ledger_path
from anaphora.errors import ConfigError
from anaphora.events import Emit
from anaphora.ledger.allowance import Allowance, used_before
from anaphora.ledger.book import Book
from anaphora.ledger.entry import Entry
from anaphora.ledger.prices import Prices, load
from anaphora.ledger.query import Group, Query
from anaphora.ledger.recorder import Recorder
from anaphora.ledger.tallies import Tallies


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
            tallies = Tallies(shared, first=lambda: used_before(Book(self._path), clock.now_s()))
            self.allowance = Allowance(settings.limits, tallies, prices, clock)
        notes = None
        if settings.otel:
            from anaphora.ledger.telemetry import from_environment

            notes = from_environment()
        self.recorder = Recorder(
            self._path, prices, clock, tell=tell, settles=self.allowance, notes=notes, keep_days=settings.keep_days
        )

    def groups(self, by: Sequence[str], query: Query) -> list[Group]:
        """Reads the file: call it on a thread of its own. Raises BookProblem."""
        book = Book(self._path)
        try:
            return book.groups(by, query)
        finally:
            book.close()

    def rows(self, query: Query, after: int, limit: int) -> list[tuple[int, Entry]]:
        book = Book(self._path)
        try:
            return book.rows(query, after=after, limit=limit)
        finally:
            book.close()

    def close(self) -> None:
        """Write what is left. Waits for it."""
        self.recorder.close()
        if self.allowance is not None:
            self.allowance.close()


def check_books(config: Config) -> None:
    """Raises ConfigError for what would keep `Books` from being opened."""
    if config.ledger.prices:
        load(Path(config.ledger.prices))
    if config.ledger.otel and find_spec("opentelemetry.sdk") is None:
        raise ConfigError("ledger.otel: OpenTelemetry is not installed; pip install 'anaphora[otel]'")
