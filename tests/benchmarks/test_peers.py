"""The comparison with other engines, with shell scripts in the engines' place."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(scope="module")
def compare(script: Callable[[str], Any]) -> Any:
    return script("peers/compare.py")


@pytest.fixture
def side(compare: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes an engine of a shell script."""
    with contextlib.ExitStack() as stack:

        def make(script: str, *, timeout_s: float = 60.0) -> Any:
            program = tmp_path / "python"
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            made = compare.Side("vllm", program, dict(os.environ), log, timeout_s=timeout_s)
            stack.callback(made.close)
            return made

        yield make


def test_an_engine_answers_in_its_turn_and_is_stopped_after_it(side: Callable[..., Any]) -> None:
    asked = side("while read line; do echo '{\"first_s\": 1.5}'; done")
    assert asked.ask(do="prefill", tokens=[1], new=1) == {"first_s": 1.5}
    _, status = os.waitpid(asked._process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert asked.ask(do="prefill", tokens=[1], new=1) == {"first_s": 1.5}


def test_an_engine_that_dies_is_left_out_with_its_signal_and_last_words(compare: Any, side: Callable[..., Any]) -> None:
    with pytest.raises(compare.LeftOut, match="killed by SIGILL; its last words: no such instruction"):
        side("read line; echo 'no such instruction' >&2; kill -ILL $$").ask(do="load")


def test_an_engine_that_fails_is_left_out_with_its_error(compare: Any, side: Callable[..., Any]) -> None:
    with pytest.raises(compare.LeftOut, match="RuntimeError: no kernel"):
        side('read line; echo \'{"error": "RuntimeError: no kernel"}\'; read line').ask(do="load")


def test_an_engine_that_does_not_answer_in_time_is_left_out(compare: Any, side: Callable[..., Any]) -> None:
    with pytest.raises(compare.LeftOut, match="no answer within 0 s"):
        side("read line; read line", timeout_s=0.05).ask(do="load")


def test_a_missing_engine_is_left_out_with_what_setup_said(compare: Any, tmp_path: Path) -> None:
    with pytest.raises(compare.LeftOut, match=r"not installed in .*: run .*setup\.sh .* vllm"):
        compare.installed("vllm", tmp_path)
    (tmp_path / "vllm.failed").write_text("ERROR: no wheel\n")
    with pytest.raises(compare.LeftOut, match=r"could not install it: ERROR: no wheel"):
        compare.installed("vllm", tmp_path)


def test_figures_are_medians_beside_how_many_times_ours_they_are(compare: Any) -> None:
    samples = [
        {"side": name, "case": "cold", "round": i, "s": seconds, "cached": None if name == "vllm" else i}
        for name, many in (("anaphora", (1.0, 2.0, 9.0)), ("vllm", (4.0, 4.0, 5.0)))
        for i, seconds in enumerate(many)
    ]
    (row,) = compare.summarised(samples, ["anaphora", "vllm", "llamacpp"])
    assert row["anaphora"] == {"s": 2.0, "min_s": 1.0, "max_s": 9.0, "of_ours": 1.0, "cached": 0}
    assert row["vllm"] == {"s": 4.0, "min_s": 4.0, "max_s": 5.0, "of_ours": 2.0, "cached": None}
    assert "llamacpp" not in row
