"""`anaphora demo`: a long document, cold and warm, an answer from cache, and all of it after a restart.

The demo is also a check: where the server does not do what a step says, the step says so and the status is 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from anaphora.cli.parsing import Commands, add_command, add_json_flag
from anaphora.config import Config, api_keys, load
from anaphora.errors import ConfigError

EXAMPLES = """\
  anaphora demo                      about two minutes; the first time the model is converted, which takes another
  anaphora demo --tokens 1500        a shorter document: quicker, and less to save
  anaphora demo --json > demo.json   figures for machines; the story goes to standard error
"""

DOCUMENT = Path(__file__).parent / "data" / "war-and-peace.txt"
DEFAULT_TOKENS = 5000


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "demo", run, summary="show on a long document what is computed once and reused", examples=EXAMPLES
    )
    parser.add_argument("--model", metavar="MODEL", help="as for `anaphora serve` (default: its default)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where converted models are kept (default: as for `anaphora serve`)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="length of the document, about (200 to 6500; default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the demo's folder with its cached answers")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Status 0 if every step did what it says, else 1. Raises ConfigError and ServerProblem."""
    flags = {"engine.model": args.model, "cache.dir": args.cache_dir}
    config = load(None, {setting: value for setting, value in flags.items() if value is not None}).config

    from rich.console import Console

    from anaphora.cli.walkthrough import MIN_TOKENS, Walkthrough

    if args.tokens < MIN_TOKENS:
        raise ConfigError(f"--tokens: at least {MIN_TOKENS}, else there is nothing to see")
    console = Console(stderr=args.json, highlight=False, markup=False)
    with _terminated_as_interrupted(), _folder(config, keep=args.keep) as folder:
        server_flags = ["--workers", "1", "--cache-dir", str(folder)]
        if args.model is not None:
            server_flags += ["--model", args.model]
        text = DOCUMENT.read_text(encoding="utf-8")
        walkthrough = Walkthrough(console, server_flags, text, args.tokens, api_key=next(iter(api_keys(config)), ""))
        report = walkthrough.walk()
    if args.json:
        print(json.dumps(report.figures(), indent=2))
    if args.keep:
        console.print(f"The answers are kept: anaphora serve --cache-dir {folder}")
    return 0 if report.ok else 1


@contextmanager
def _folder(config: Config, *, keep: bool) -> Iterator[Path]:
    """A cache folder of the demo's own, so that its first question is new; converted models are those of everyday use."""
    models = Path(config.cache.dir).expanduser().absolute() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="anaphora-demo-"))
    (folder / "models").symlink_to(models, target_is_directory=True)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)  # removes the link, not what it leads to


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: with its server stopped and its folder removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
