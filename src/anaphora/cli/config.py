"""`anaphora config show|check`: which settings hold, where each came from, and whether a file can be used."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from anaphora.cli.parsing import Commands, add_command, add_config_flag, add_json_flag
from anaphora.config import Size, format_size, load, settings, shown
from anaphora.errors import ConfigError

SHOW_EXAMPLES = """\
  anaphora config show
  ANAPHORA_PORT=9000 anaphora config show --json
"""
CHECK_EXAMPLES = """\
  anaphora config check anaphora.toml
"""


def register(commands: Commands) -> None:
    parent = commands.add_parser(
        "config", help="show or check the configuration", description="Show or check the configuration."
    )
    parent.set_defaults(run=None, usage=parent)
    actions = parent.add_subparsers(title="commands", metavar="COMMAND")
    show = add_command(actions, "show", run_show, summary="print every setting and where it came from", examples=SHOW_EXAMPLES)
    add_config_flag(show)
    add_json_flag(show)
    check = add_command(
        actions, "check", run_check, summary="check a configuration file without using it", examples=CHECK_EXAMPLES
    )
    check.add_argument("file", metavar="FILE")


def run_show(args: argparse.Namespace) -> int:
    loaded = load(args.config)
    for warning in loaded.warnings:
        print(f"anaphora: warning: {warning}", file=sys.stderr)
    rows = shown(loaded)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "source", box=None, pad_edge=False)
    sizes = {setting.path for setting in settings() if setting.type == Size}
    for path, row in rows.items():
        text = format_size(row["value"]) if path in sizes else _text(row["value"])
        table.add_row(path, text, row["source"])
    Console(soft_wrap=True, markup=False, highlight=False).print(table)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Status 1 and one line for a file that cannot be used. Settings in the environment take no part; `key_env` secrets do."""
    overriding = {name for setting in settings() for name in setting.variables}
    environ = {name: value for name, value in os.environ.items() if name not in overriding}
    try:
        load(args.file, environ=environ)
    except ConfigError as error:
        print(f"anaphora: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.file}: ok")
    return 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
