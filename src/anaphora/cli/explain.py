"""`anaphora explain`: why a request to a running server was answered as it was, and what to change."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from anaphora.cli.parsing import Commands, add_command, add_json_flag, add_server_flags

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """\
  anaphora explain
  anaphora explain msg_3f1c0a5d8e9b47c2a1d0e6f7
  anaphora explain req_3f1c0a5d8e9b47c2a1d0e6f7 --url http://127.0.0.1:9000 --json

An id is that of the answer (msg_..., chatcmpl-..., resp_...; the upstream's own does, too), or of the header
`request-id` or `x-request-id`.
What the explanations mean: docs/prompt-caching.md.
"""


_TRIES = 12


def register(commands: Commands) -> None:
    parser = add_command(commands, "explain", run, summary="tell why a request missed its caches", examples=EXAMPLES)
    parser.add_argument("id", nargs="?", metavar="REQUEST-ID", help="the request to explain (default: list the latest)")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="list so many requests (default: %(default)s)")
    add_server_flags(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    from anaphora.cli.connection import check, connect

    path = f"/anaphora/explain/{quote(args.id, safe='')}" if args.id else f"/anaphora/explain?limit={args.limit}"
    with connect(args) as client:
        # Each of several workers knows what it answered itself, and each connection goes to one of them.
        for _ in range(_TRIES):
            response = client.get(path, headers={"connection": "close"})
            if response.status_code != 404:
                break
        check(response)
        found = response.json()
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0

    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False)
    if args.id:
        for line in lines(found):
            console.print(line)
    elif found["requests"]:
        console.print(_table(found["requests"]))
    else:
        console.print("no requests yet")
    return 0


def lines(found: dict[str, Any]) -> Iterator[str]:
    """One explanation in words, a line each."""
    yield f"{found['answer_id']} ({found['request_id']}), {found['model'] or 'no model'}: {_outcome(found)}"
    for level in found["levels"]:
        yield f"    {level['level']:<9} {level['reason']}: {level['meaning']}"
    if found["semantic"] is not None:
        yield from _compared(found["semantic"])
    caching = found["prompt_cache"]
    if caching is not None:
        yield f"    prompt  {_counts(caching)}, by the rules of {caching['profile']}"
    if found["kv_reused_tokens"] is not None and not found["upstreams"] and found["optimiser"] is None:
        yield f"    engine  {found['kv_reused_tokens']:,} prompt tokens were really taken from its cache"
    if caching is not None and caching["miss"] is not None:
        yield from _miss(caching["miss"])
    for upstream in found["upstreams"]:
        yield f"    asked   {_asked(upstream)}"
    if found["upstream_answer_id"]:
        yield f"    known   there as {found['upstream_answer_id']}"
    if found["optimiser"] is not None:
        yield from _advice(found["optimiser"])


def _asked(upstream: dict[str, Any]) -> str:
    if upstream["error"]:
        return f"{upstream['name']}, without an answer: {upstream['error']}"
    if upstream["expected_s"] is None:
        return str(upstream["name"])
    expected = f"expected in {upstream['expected_s']:.2f} s with {upstream['cached_tokens']:,} tokens of the prompt cached"
    return f"{upstream['name']}, {expected}"


def _advice(advice: dict[str, Any]) -> Iterator[str]:
    done = "added" if advice["mode"] == "on" else "would add"
    marks = ", ".join(advice["marks"]) or "no breakpoint"
    yield f"    prompt  the optimiser {done}: {marks}"
    for reason in advice["reasons"]:
        at = f" at {reason['path']}" if reason.get("path") else ""
        saves = f" ({reason['tokens']:+,} tokens)" if reason.get("tokens") else ""
        yield f"            {reason['code']}{at}: {reason['text']}{saves}"


def _miss(miss: dict[str, Any]) -> Iterator[str]:
    code = f" ({miss['code']})" if miss["code"] else ""
    yield f"    missed  {miss['reason']}{code}: {miss['meaning']}"
    if miss["names"]:
        yield f"    names   {', '.join(miss['names'])}"
    if miss["earlier_ago_s"] is not None:
        shared = f"{miss['common_tokens']:,} tokens in whole blocks are the same"
        yield f"    nearest {miss['earlier_id'] or 'not answered'}, {miss['earlier_ago_s']:,.1f} s before; {shared}"
    if miss["path"]:
        token = f", about token {miss['differs_at'] + 1:,}" if miss["differs_at"] is not None else ""
        offset = f", character {miss['offset']}" if miss["offset"] is not None else ""
        yield f"    at      {miss['path']}{offset}{token}"
    if miss["before"] or miss["after"]:
        yield f"    before  {miss['before'] or '(not kept)'}"
        yield f"    after   {miss['after']}"
    if miss["lost_tokens"]:
        money = f", ${miss['lost_usd']:.4f}" if miss["lost_usd"] is not None else ", price of the model not known"
        yield f"    lost    {miss['lost_tokens']:,} tokens{money}"
    yield f"    fix     {miss['fix']}"


def _outcome(found: dict[str, Any]) -> str:
    if found["error"]:
        return f"failed: {found['error']}"
    if not found["answered_by"]:
        return str(found["outcome"])
    if found["answered_by"] != "backend":
        return f"answered by the level `{found['answered_by']}`, {found['age_s']:,.0f} s old"
    computed = "joined a computation that was running" if found["shared"] else "computed"
    return computed if found["outcome"] == "finished" else f"{computed}, {found['outcome']}"


def _compared(found: dict[str, Any]) -> Iterator[str]:
    """What the semantic level found, and which of its steps decided."""
    if found["nearest"]:
        figures = [f"{name} {found[name]:.3f}" for name in ("similarity", "score") if found[name] is not None]
        yield f"    nearest “{found['nearest']}”" + (f" ({', '.join(figures)})" if figures else "")
    yield f"    words   {found['outcome']}, decided by {found['step']}: {found['why']}"


def _counts(caching: dict[str, Any]) -> str:
    read, written, plain = (f"{caching[f'{name}_tokens']:,}" for name in ("read", "written", "plain"))
    return f"{caching['prompt_tokens']:,} tokens: {read} read, {written} written, {plain} plain"


def _table(requests: list[dict[str, Any]]) -> Table:
    from datetime import datetime

    from rich.table import Table

    table = Table("time", "answer", "model", "answered", "read", "prompt", "why not more", box=None, pad_edge=False)
    table.columns[1].min_width = max(len(found["answer_id"]) for found in requests)  # to be copied
    for number in (4, 5):
        table.columns[number].justify = "right"
    for found in requests:
        caching = found["prompt_cache"]
        miss = caching["miss"] if caching is not None else None
        table.add_row(
            datetime.fromtimestamp(found["arrived_s"]).strftime("%H:%M:%S"),
            found["answer_id"],
            found["model"],
            _short(found),
            f"{caching['read_tokens']:,}" if caching is not None else "",
            f"{caching['prompt_tokens']:,}" if caching is not None else "",
            (miss["code"] or miss["reason"]) if miss is not None else "",
        )
    return table


def _short(found: dict[str, Any]) -> str:
    if found["outcome"] != "finished":
        return str(found["outcome"])
    return "joined" if found["shared"] else str(found["answered_by"])
