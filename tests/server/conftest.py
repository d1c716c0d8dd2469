"""A real server process for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

Serve = Callable[..., AbstractContextManager[tuple[str, "subprocess.Popen[str]"]]]

MARK = "listening on "


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`with serve(toml) as (url, process)`: `anaphora serve` with the echo engine on a free port. Answers are remembered
    unless `remember` is False."""

    @contextmanager
    def serving(
        toml: str = "", *flags: str, folder: Path | None = None, remember: bool = True
    ) -> Iterator[tuple[str, subprocess.Popen[str]]]:
        folder = folder or tmp_path_factory.mktemp("serve")
        config = folder / "anaphora.toml"
        config.write_text(toml)
        command = [sys.executable, "-m", "anaphora", "serve", "--config", str(config), "--engine", "echo", "--port", "0"]
        command += ["--cache-dir", str(folder / "cache"), *flags]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
        if remember:
            environ["ANAPHORA_CACHE_ENABLED"] = "true"
        if "[ledger]" not in toml:
            environ["ANAPHORA_LEDGER_ENABLED"] = "true"  # the echo engine alone keeps none
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert MARK in line, line + process.stderr.read()
            yield line.partition(MARK)[2].strip(), process
        finally:
            process.terminate()
            process.stderr.read()
            process.wait()
            process.stderr.close()

    return serving
