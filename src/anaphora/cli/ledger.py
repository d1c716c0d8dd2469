"""`anaphora ledger show|export`: what was spent and saved, from the ledger's file or from a running server."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from anaphora.cli.parsing import Commands, add_command, add_config_flag, add_json_flag
from anaphora.errors import ConfigError

if TYPE_CHECKING:
    from anaphora.ledger.query import Query

SHOW_EXAMPLES = """\
  anaphora ledger show
  anaphora ledger show --by tenant,model --since 7d
  anaphora ledger show --by day --from 2026-11-01 --to 2026-11-30 --json
  anaphora ledger show --by tag --url http://127.0.0.1:8080 --api-key KEY

Dimensions: tenant, workspace, tag, asked, model, upstream, level, outcome, priced, month, day, hour.
What the columns mean: docs/ledger.md.
"""
EXPORT_EXAMPLES = """\
  anaphora ledger export > requests.csv
  anaphora ledger export --format parquet --output requests.parquet --since 4w
  anaphora ledger export --by day,tenant --format json

Without --by, one row for each request.
"""
_PAGE = 10_000


def register(commands: Commands) -> None:
    parent = commands.add_parser(
        "ledger", help="show what was spent and saved", description="Show or export what was spent and saved."
    )
    parent.set_defaults(run=None, usage=parent)
    actions = parent.add_subparsers(title="commands", metavar="COMMAND")
    show = add_command(
        actions, "show", run_show, summary="print sums by tenant, model, day and other dimensions", examples=SHOW_EXAMPLES
    )
    _add_flags(show, by="model")
    add_json_flag(show)
    export = add_command(actions, "export", run_export, summary="write requests or sums to a file", examples=EXPORT_EXAMPLES)
    _add_flags(export, by="")
    export.add_argument("--format", choices=("csv", "json", "parquet"), default="csv", help="default: %(default)s")
    export.add_argument("--output", metavar="FILE", help="where to write (default: standard output)")


def _add_flags(parser: argparse.ArgumentParser, *, by: str) -> None:
    text = "what to sum by, several with commas" + (" (default: %(default)s)" if by else "")
    parser.add_argument("--by", metavar="DIMENSIONS", default=by, help=text)
    parser.add_argument("--since", metavar="SPAN", help="only what is younger: 90m, 24h, 7d, 4w")
    parser.add_argument("--from", dest="start", metavar="DATE", help="only from this date or time (UTC) on")
    parser.add_argument("--to", dest="end", metavar="DATE", help="only up to the end of this date, or up to this time (UTC)")
    parser.add_argument("--tenant", metavar="NAME", help="only this tenant's (a server shows its caller's own in any case)")
    parser.add_argument("--file", metavar="FILE", help="the ledger (default: that of the configuration)")
    add_config_flag(parser)
    parser.add_argument("--url", help="ask the server there instead of reading the file")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("ANAPHORA_API_KEY", ""),
        metavar="KEY",
        help="API key, where the server asks for one (default: ANAPHORA_API_KEY)",
    )


def run_show(args: argparse.Namespace) -> int:
    groups = _groups(args)
    if args.json:
        import json

        print(json.dumps(groups, indent=2))
        return 0

    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False)
    if not groups:
        console.print("no requests in this period")
        return 0
    from anaphora.cli.ledger_table import notes, table

    by = [name for name in args.by.split(",") if name]
    console.print(table(groups, [name.strip() for name in by]))
    for note in notes(groups):
        console.print(note)
    return 0


def run_export(args: argparse.Namespace) -> int:
    from anaphora.ledger.export import text

    written = text(_groups(args) if args.by else list(_requests(args)), args.format)
    if args.output is None:
        sys.stdout.buffer.write(written)
        return 0
    try:
        Path(args.output).write_bytes(written)
    except OSError as error:
        raise ConfigError(f"--output: {args.output} cannot be written: {error.strerror or error}") from error
    return 0


def _groups(args: argparse.Namespace) -> list[dict[str, Any]]:
    from anaphora.ledger.query import dimensions, plain

    by = dimensions(args.by)
    if args.url:
        return list(_ask(args)["groups"])
    from anaphora.ledger.book import Book

    with Book(_file(args)) as book:
        return [plain(group) for group in book.groups(by, _query(args))]


def _requests(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    after = 0
    if args.url:
        while page := _ask(args, rows="true", after=after, limit=_PAGE)["requests"]:
            yield from page
            after = page[-1]["number"]
        return
    from anaphora.ledger.book import Book
    from anaphora.ledger.export import row

    with Book(_file(args)) as book:
        for number, entry in book.rows(_query(args)):
            yield {"number": number, **row(entry)}


def _query(args: argparse.Namespace) -> Query:
    from anaphora.ledger.query import Query, period

    return Query(*period(args.since, args.start, args.end, time.time()), args.tenant)


def _file(args: argparse.Namespace) -> Path:
    from anaphora.config import ledger_path, load

    path = Path(args.file).expanduser() if args.file else ledger_path(load(args.config).config)
    if not path.is_file():
        raise ConfigError(f"there is no ledger at {path}; a server writes it (ledger.path), or name another with --file")
    return path


def _ask(args: argparse.Namespace, **more: object) -> dict[str, Any]:
    from anaphora.cli.connection import check, connect

    given = {"by": args.by, "since": args.since, "from": args.start, "to": args.end, **more}
    with connect(args) as client:
        response = client.get(
            f"/anaphora/ledger?{urlencode({name: value for name, value in given.items() if value is not None})}"
        )
        check(response)
        found: dict[str, Any] = response.json()
        return found
