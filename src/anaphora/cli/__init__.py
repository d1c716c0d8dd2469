"""The `anaphora` command. One module per subcommand, each with `register` (its flags) and a `run` that returns an exit status.

Nothing heavy is imported before a subcommand runs: `anaphora version` and every `--help` answer at once. Exit statuses:
0 done, 1 the thing asked about is not so (a failed check, an unreachable server), 2 wrong configuration or command line,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from anaphora.cli import bench, chat, config, demo, explain, kv, ledger, lint, semantic, serve, stats, testing, version
from anaphora.errors import AnaphoraError, ConfigError

COMMANDS = (serve, demo, chat, bench, stats, explain, ledger, semantic, lint, kv, testing, config, version)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; never a traceback for what a user can cause."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.run is None:
        args.usage.print_help(sys.stderr)
        return 2
    try:
        status = int(args.run(args))
        sys.stdout.flush()  # here, where a closed pipe is understood; not at the interpreter's exit
        return status
    except ConfigError as error:
        return _failed(error, 2)
    except AnaphoraError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`head`, `less`) went away; stop quietly, and keep Python from flushing into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, for `main` and for tests that walk every command."""
    parser = argparse.ArgumentParser(
        prog="anaphora",
        description="Compute once, reuse everywhere: a caching server for language models, OpenAI- and Anthropic-compatible.",
        epilog="Settings: docs/configuration.md. Every setting can also stand in anaphora.toml or in an ANAPHORA_* variable.",
    )
    parser.set_defaults(run=None, usage=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return parser


def _failed(error: AnaphoraError, status: int) -> int:
    print(f"anaphora: error: {error}", file=sys.stderr)
    return status
