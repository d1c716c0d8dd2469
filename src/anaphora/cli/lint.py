"""`anaphora lint`: where recorded prompts break their own cache, and what to change."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anaphora.cli.parsing import Commands, add_command
from anaphora.errors import ConfigError

if TYPE_CHECKING:
    from anaphora.lint import Finding, Options, Recorded, Report
    from anaphora.lint.repair import Gain

EXAMPLES = """\
  anaphora lint requests.jsonl
  anaphora lint logs/ --fail-on error
  zcat requests.jsonl.gz | anaphora lint -
  anaphora lint requests.jsonl --sarif > lint.sarif
  anaphora lint requests.jsonl --fix repaired.jsonl

Each line is one request, as it was sent (OpenAI Chat Completions or Responses, Anthropic Messages), or
{"request": {...}, "timestamp": ..., "session": "..."}; a line of an OpenAI batch file will do as well.
Findings and their codes: docs/linting.md. Exit status: 0 none, 1 findings, 2 unusable input.
"""
SUFFIXES = (".jsonl", ".ndjson")


def register(commands: Commands) -> None:
    parser = add_command(commands, "lint", run, summary="find what keeps recorded prompts from being cached", examples=EXAMPLES)
    parser.add_argument(
        "paths", nargs="+", metavar="FILE", help="JSON Lines of requests, a directory of such files, or - for standard input"
    )
    parser.add_argument(
        "--fail-on",
        choices=("warning", "error"),
        default="warning",
        help="exit with 1 from this severity on (default: %(default)s)",
    )
    parser.add_argument("--like", metavar="MODEL", help="treat models that no profile knows like this one")
    parser.add_argument(
        "--min-tokens",
        type=int,
        default=200,
        metavar="N",
        help="pass over breaks that lose less each time (default: %(default)s)",
    )
    parser.add_argument(
        "--fix", metavar="OUT", help="write a repaired copy (a file for one input file, else a directory), and what it gains"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--sarif", action="store_true", help="print SARIF 2.1.0 instead of a table")


def run(args: argparse.Namespace) -> int:
    from anaphora.lint import Options, lint

    requests = list(recorded(args.paths))
    options = Options(like=args.like, min_lost=args.min_tokens)
    report = lint(requests, options)
    gain = _fixed(requests, options, Path(args.fix)) if args.fix else None
    if args.sarif:
        _print_sarif(report)
    elif args.json:
        _print_json(report, gain)
    else:
        _print_table(report, gain)
    failing = {"error"} if args.fail_on == "error" else {"error", "warning"}
    return 1 if any(finding.severity in failing for finding in report.findings) else 0


def recorded(paths: Iterable[str]) -> Iterator[Recorded]:
    """Every request of every path. ConfigError names the file (and line) that cannot be used."""
    from anaphora.lint import read

    for path in paths:
        if path == "-":
            yield from read("<stdin>", sys.stdin)
            continue
        for file in _files(Path(path)):
            try:
                with file.open(encoding="utf-8") as lines:
                    yield from read(str(file), lines)
            except OSError as error:
                raise ConfigError(f"{file}: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise ConfigError(f"{file}: not UTF-8 at byte {error.start}") from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise ConfigError(f"{path}: no {' or '.join(SUFFIXES)} file in this directory")
    return found


def _fixed(recorded: Sequence[Recorded], options: Options, out: Path) -> Gain:
    """Writes the repaired copy: one file, or one in the directory `out` for each input file."""
    from anaphora.lint.repair import line_of, repair

    repaired, gain = repair(recorded, options)
    files = list(dict.fromkeys(one.file for one in repaired))
    target = {file: out / Path(file).name for file in files} if len(files) > 1 else dict.fromkeys(files, out)
    if len(set(target.values())) < len(files):
        raise ConfigError("--fix: two input files have the same name; repair them one after the other")
    for file, path in target.items():
        if path.exists() and Path(file).exists() and path.samefile(file):
            raise ConfigError(f"--fix: {path} is an input file; name another one for the repaired copy")
    try:
        for file, path in target.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (f"{line_of(one)}\n" for one in repaired if one.file == file)
            path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--fix: {error.filename}: {error.strerror}") from error
    return gain


def _print_sarif(report: Report) -> None:
    import json

    from anaphora.lint.sarif import sarif

    print(json.dumps(sarif(report), indent=2, ensure_ascii=False))


def _print_json(report: Report, gain: Gain | None) -> None:
    import json

    import msgspec

    shown = msgspec.to_builtins(report)
    # A default left out by the struct would be a field that comes and goes for those who read this.
    shown["findings"] = [{name: getattr(finding, name) for name in finding.__struct_fields__} for finding in report.findings]
    if gain is not None:
        shown["gain"] = msgspec.to_builtins(gain)
    print(json.dumps(shown, indent=2, ensure_ascii=False))


def _print_table(report: Report, gain: Gain | None) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False)
    for finding in report.findings:
        for line in _lines(finding):
            console.print(line)
        console.print()
    num = len(report.findings)
    counted = f"{_num(report.num_requests, 'request')} in {_num(report.num_sessions, 'session')}"
    console.print(
        f"{_num(num, 'finding') if num else 'no findings'} in {counted}. Tokens are estimates: {report.tokens_counted}."
    )
    if gain is not None:
        for line in gain.lines():
            console.print(line)


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.place}: {finding.severity}: {finding.code}: {finding.message}"
    where = f"{finding.path}, character {finding.offset}" if finding.offset is not None else finding.path
    against = f", compared with {_against(finding)}" if finding.against_line is not None else ""
    yield f"    at      {where}{against}"
    if finding.before or finding.after:
        yield f"    before  {finding.before}"
        yield f"    after   {finding.after}"
    if finding.lost_tokens:
        money = f", ${finding.lost_usd:.4f}" if finding.lost_usd is not None else ", price of the model not known"
        yield f"    lost    {finding.lost_tokens:,} tokens{money}{_times(finding)}"
    yield f"    fix     {finding.fix}"


def _against(finding: Finding) -> str:
    return (
        f"line {finding.against_line}"
        if finding.against_file == finding.file
        else f"{finding.against_file}:{finding.against_line}"
    )


def _times(finding: Finding) -> str:
    return f" in {finding.occurrences} requests" if finding.occurrences > 1 else ""


def _num(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"
