"""`anaphora version`: what is installed here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

from anaphora import __version__
from anaphora.cli.parsing import Commands, add_command, add_json_flag

EXAMPLES = """\
  anaphora version
  anaphora version --json
"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "version", run, summary="print the versions of Anaphora and of what it stands on", examples=EXAMPLES
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    versions = {
        "anaphora": __version__,
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "transformers": _installed("transformers"),
    }
    if args.json:
        print(json.dumps(versions))
    else:
        for name, version in versions.items():
            print(f"{name:<13}{version or 'not installed'}")
    return 0


def _installed(distribution: str) -> str | None:
    """From the package's metadata: importing torch would take seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
