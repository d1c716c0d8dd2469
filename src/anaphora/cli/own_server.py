"""A server process of one's own: `anaphora serve` on a free port, started and stopped again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import httpx2

from anaphora.cli.connection import ServerProblem

STOP_S = 40.0
"""A server that was asked to stop and is still there after this is killed. (It lets answers finish for 30 seconds.)"""
_POLL_S = 0.1
_END_S = 5.0
_PREFIX = "anaphora: "
_LISTENING = "listening on "


class OwnServer:
    """`with OwnServer(flags, on_stage) as server`: serving on `server.url`, maybe still loading; stopped at the end.

    The process has this one's environment and working directory, so it reads the same settings; `flags` win. It gets the
    terminal's Ctrl-C like this process does. `on_stage` is told, in a thread of its own, what it says until it is ready.
    """

    def __init__(self, flags: Sequence[str], on_stage: Callable[[str], None]) -> None:
        self._command = [sys.executable, "-m", "anaphora", "serve", "--host", "127.0.0.1", "--port", "0", *flags]
        self._on_stage = on_stage
        self._listening = threading.Event()
        self._lines: list[str] = []
        self._ready = False
        self.url = ""

    def __enter__(self) -> OwnServer:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, errors="replace")
        self._reader = threading.Thread(target=self._read, name="server-stderr", daemon=True)
        self._reader.start()
        self._listening.wait()
        if not self.url:
            problem = ServerProblem(self._obituary())
            self.__exit__()
            raise problem
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, client: httpx2.Client) -> None:
        """Returns when questions would be answered. Raises ServerProblem if that will never be."""
        while True:
            try:
                response = client.get("/ready")
            except httpx2.TransportError as error:  # it is ending, or has ended
                raise ServerProblem(self._obituary()) from error
            if response.is_success:
                self._ready = True
                return
            if response.json().get("waiting_for") == "refused":
                raise ServerProblem(self._obituary())
            time.sleep(_POLL_S)

    def _read(self) -> None:
        """In a thread of its own: the pipe must never fill up."""
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                text = line.rstrip().removeprefix(_PREFIX)
                self._lines.append(text)
                if text.startswith(_LISTENING):
                    self.url = text.removeprefix(_LISTENING).split()[0]
                    self._listening.set()
                elif text.startswith("ready:"):
                    self._ready = True
                elif line.startswith(_PREFIX) and self.url and not self._ready:
                    self._on_stage(text)
        self._listening.set()  # or never will be

    def _obituary(self) -> str:
        """What it said last. Waits for its end, if that is near."""
        self._reader.join(timeout=_END_S)
        said = "\n  ".join(self._lines[-10:])
        return f"the server cannot serve; it said:\n  {said}"
