"""`anaphora semantic report|teach|feedback`: what is known of answers in other words, and saying what is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anaphora.cli.parsing import Commands, add_command, add_json_flag, add_server_flags
from anaphora.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

REPORT_EXAMPLES = """\
  anaphora semantic report
  anaphora semantic report --examples 10
  anaphora semantic report --json --url http://127.0.0.1:9000

What the columns mean: docs/semantic.md.
"""
TEACH_EXAMPLES = """\
  anaphora semantic teach pairs.jsonl --model smollm2
  head -500 labelled.jsonl | anaphora semantic teach - --model gpt-5.5

One JSON object a line: {"question": "...", "other": "...", "same": true}. The pairs must look like your traffic: take them from
it, near pairs first of all, and label every one you took, whatever the answer.
"""
FEEDBACK_EXAMPLES = """\
  anaphora semantic feedback chatcmpl-3f1c0a5d8e9b47c2a1d0e6f7 --wrong
  anaphora semantic feedback req_3f1c0a5d8e9b47c2a1d0e6f7 --right
"""
_BATCH = 1000
_OUTCOMES = {
    "served": "given",
    "audited": "audited: computed to be compared",
    "shadow": "not given for want of evidence, computed and compared",
    "refused": "refused by a step before",
    "right": "found right",
    "wrong": "found wrong",
    "doubted": "asked again in other words",
}


def register(commands: Commands) -> None:
    parent = commands.add_parser(
        "semantic",
        help="show how often answers in other words are right",
        description="Answers to questions asked before in other words: what is known of them.",
    )
    parent.set_defaults(run=None, usage=parent)
    actions = parent.add_subparsers(title="commands", metavar="COMMAND")
    report = add_command(
        actions, "report", run_report, summary="print what was given and refused, and the evidence", examples=REPORT_EXAMPLES
    )
    report.add_argument("--examples", type=int, default=3, metavar="N", help="pairs of each outcome (default: %(default)s)")
    report.add_argument("--limit", type=int, default=1000, metavar="N", help="latest decisions to count (default: %(default)s)")
    add_server_flags(report)
    add_json_flag(report)
    teach = add_command(actions, "teach", run_teach, summary="add pairs of one's own as evidence", examples=TEACH_EXAMPLES)
    teach.add_argument("file", metavar="FILE", help="JSON lines; - is standard input")
    teach.add_argument("--model", required=True, metavar="NAME", help="whose answers they are about")
    add_server_flags(teach)
    add_json_flag(teach)
    feedback = add_command(
        actions, "feedback", run_feedback, summary="say whether an answer was right", examples=FEEDBACK_EXAMPLES
    )
    feedback.add_argument("id", metavar="ID", help="of the answer or the request")
    word = feedback.add_mutually_exclusive_group(required=True)
    word.add_argument("--right", dest="correct", action="store_true")
    word.add_argument("--wrong", dest="correct", action="store_false")
    add_server_flags(feedback)


def run_report(args: argparse.Namespace) -> int:
    from anaphora.cli.connection import check, connect

    with connect(args) as client:
        response = client.get(f"/anaphora/semantic?limit={args.limit}")
        check(response)
        found = response.json()
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0

    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False)
    for line in _summary(found):
        console.print(line)
    for model, rungs in sorted(found["evidence"].items()):
        console.print(_table(model, rungs, found["risk"]))
    for line in _examples(found["decisions"], args.examples):
        console.print(line)
    return 0


def _summary(found: dict[str, Any]) -> Iterator[str]:
    outcomes = found["outcomes"]
    num = sum(outcomes.get(name, 0) for name in ("served", "audited", "shadow", "refused"))
    yield f"mode {found['mode']}: at most {found['risk']:.1%} wrong, with {found['confidence']:.0%} confidence"
    yield f"{found['questions']['num_entries']:,} questions remembered; of the latest {num:,} that had a neighbour"
    for name, text in _OUTCOMES.items():
        if outcomes.get(name):
            share = f" ({outcomes[name] / num:.1%})" if num and name in ("served", "audited", "shadow", "refused") else ""
            yield f"    {outcomes[name]:>7,}{share} {text}"


def _table(model: str, rungs: list[dict[str, Any]], risk: float) -> Table:
    from rich.table import Table

    table = Table(title=f"evidence of {model}", title_justify="left")
    for name in ("score from", "compared", "wrong", f"bound (risk {risk:.1%})", "given"):
        table.add_column(name, justify="left" if name == "given" else "right")
    for rung in rungs:
        given = "yes" if rung["served"] else f"after {rung['missing']:,} more, none wrong"
        numbers = (f"{rung['threshold']:g}", f"{rung['num_audits']:,}", f"{rung['num_wrong']:,}", f"{rung['bound']:.2%}")
        table.add_row(*numbers, given + (" (a burst of errors)" if rung["burst"] else ""))
    return table


def _examples(decisions: list[dict[str, Any]], limit: int) -> Iterator[str]:
    for name, text in _OUTCOMES.items():
        chosen = [decision for decision in decisions if decision["outcome"] == name][: max(0, limit)]
        if chosen:
            yield f"{name}: {text}"
        for one in chosen:
            yield f"    “{one['text']}” ← “{one['other_text']}” (score {one['score']:.2f}, decided by {one['step']})"


def run_teach(args: argparse.Namespace) -> int:
    from anaphora.cli.connection import check, connect

    pairs = list(_pairs(args.file))
    num = 0
    with connect(args) as client:
        for start in range(0, len(pairs), _BATCH):
            body = {"model": args.model, "pairs": pairs[start : start + _BATCH]}
            response = client.post("/anaphora/semantic/evidence", json=body, timeout=600)
            check(response)
            num += response.json()["counted"]
    if args.json:
        print(json.dumps({"pairs": len(pairs), "counted": num}))
    else:
        print(f"{num:,} of {len(pairs):,} pairs count; to the others some step says no already")
    return 0


def _pairs(file: str) -> Iterator[dict[str, Any]]:
    import sys

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            yield {"question": str(pair["question"]), "other": str(pair["other"]), "same": bool(pair["same"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{file}, line {number}: expected {{"question", "other", "same"}}: {error!r}') from error


def run_feedback(args: argparse.Namespace) -> int:
    from anaphora.cli.connection import check, connect

    with connect(args) as client:
        check(client.post("/anaphora/feedback", json={"id": args.id, "correct": args.correct}))
    print("noted")
    return 0
