"""What benchmarks have in common: what they ran on, and their progress."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anaphora import __version__


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "version": __version__,
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
    }


def _commit() -> str | None:
    """The commit of the checkout this file lies in, if it does."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the present step on a terminal, a line per step elsewhere; on standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(f"anaphora: {text}", file=sys.stderr, flush=True)
        return
    with console.status("starting") as status:
        yield status.update
