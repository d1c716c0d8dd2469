"""What the subcommands' flags have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEFAULT_URL = "http://127.0.0.1:8080"


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand whose help ends with `examples`, as written."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, usage=parser)
    return parser


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Which running server to talk to. ANAPHORA_URL and ANAPHORA_API_KEY are the defaults."""
    parser.add_argument(
        "--url",
        default=os.environ.get("ANAPHORA_URL") or DEFAULT_URL,
        help="address of the server (default: ANAPHORA_URL, else %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("ANAPHORA_API_KEY", ""),
        metavar="KEY",
        help="API key, where the server asks for one (default: ANAPHORA_API_KEY)",
    )


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file (default: ANAPHORA_CONFIG, else ./anaphora.toml if there is one)"
    )


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
