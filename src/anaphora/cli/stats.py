"""`anaphora stats`: what a running server has computed, and what it did not have to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from anaphora.cli.parsing import Commands, add_command, add_json_flag, add_server_flags

EXAMPLES = """\
  anaphora stats
  anaphora stats --url http://127.0.0.1:9000 --json
"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "stats", run, summary="print the counters of a running server", examples=EXAMPLES)
    add_server_flags(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    from anaphora.cli.connection import check, connect

    with connect(args) as client:
        response = client.get("/anaphora/stats")
        check(response)
        stats = response.json()
    if args.json:
        print(json.dumps(stats, indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table("counter", "value", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in flattened(stats):
        table.add_row(name, _text(value))
    Console(soft_wrap=True, markup=False, highlight=False).print(table)
    return 0


def _text(value: object) -> str:
    """Numbers as people read them: thousands apart, and no more of a fraction than says something."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{round(value, 4):,}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"kv": {"hits": 3}}` → `("kv.hits", 3)`, in the server's order."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
