"""What a command is waiting for: a spinner with the elapsed time on a terminal, a line per stage elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Waiting:
    """`with Waiting(console, "starting") as waiting: waiting.stage("loading weights")`. `stop` may be called early, and again.

    Where no terminal is, `text` itself is not worth a line: only what `stage` says is printed.
    """

    def __init__(self, console: Console, text: str) -> None:
        self._console = console
        self._text = text
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._progress.add_task(text, total=None) if self._progress is not None else None

    def __enter__(self) -> Waiting:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stage(self, text: str) -> None:
        """From any thread."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        elif text != self._text:
            self._console.out(text, highlight=False)
        self._text = text

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
