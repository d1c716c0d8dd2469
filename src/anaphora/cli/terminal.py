"""A server's voice on a terminal: a spinner while its engine loads, lines for what stays."""

from __future__ import annotations

from rich.console import Console

from anaphora.cli.waiting import Waiting


class Terminal:
    """A `server.voice.Voice`, by default on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._waiting: Waiting | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def stage(self, text: str) -> None:
        if self._waiting is None:
            self._waiting = Waiting(self._console, text).__enter__()
        self._waiting.stage(text)

    def settled(self, text: str) -> None:
        self._stop()
        self.say(text)

    def _stop(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None
