"""What people see while they wait: on a terminal, and where none is."""

from __future__ import annotations

import io

from rich.console import Console

from anaphora.cli.terminal import Terminal
from anaphora.cli.waiting import Waiting


def test_where_no_terminal_is_every_stage_is_a_line_of_its_own_once() -> None:
    console = Console(file=io.StringIO())
    with Waiting(console, "starting") as waiting:
        for stage in ("loading weights", "loading weights", "loading the tokenizer"):
            waiting.stage(stage)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "loading weights\nloading the tokenizer\n"


def test_a_terminal_shows_the_stage_while_it_lasts_and_keeps_only_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Terminal(console) as terminal:
        terminal.say("listening on http://127.0.0.1:8080")
        terminal.stage("loading weights")
        terminal.stage("loading the tokenizer")
        terminal.settled("ready: [tiny]")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    last_of_spinner = shown.rindex("loading the tokenizer")
    assert shown.index("listening") < last_of_spinner < shown.index("ready: [tiny]")
    assert "\x1b[?25h" in shown[last_of_spinner:]  # the cursor is back


def test_a_terminal_left_in_the_middle_of_a_stage_has_its_cursor_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Terminal(console) as terminal:
        terminal.stage("loading weights")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")
