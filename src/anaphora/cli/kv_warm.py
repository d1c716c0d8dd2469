"""`anaphora kv warm` and `pin`: have a running server compute the KV of prompts before anybody asks, and keep it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anaphora.cli.kv_places import counted, progress
from anaphora.cli.parsing import Commands, add_command, add_json_flag, add_server_flags
from anaphora.errors import ConfigError

if TYPE_CHECKING:
    import httpx2

    from anaphora.lint import Recorded

WARM_EXAMPLES = """\
  anaphora kv warm prompts.jsonl
  anaphora kv warm prompts.jsonl --model smollm2 --url http://127.0.0.1:9000
FILE has one request a line, as for `anaphora lint`: a body in OpenAI's or Anthropic's format, or an envelope around it. Each is
sent as a pre-warm (no token is generated); what it computes is then in the engine's memory, and goes from there to disk.
"""
PIN_EXAMPLES = """\
  anaphora kv pin system-prompt.jsonl --for 8h
  anaphora kv pin prompts.jsonl --for 45m --model smollm2
Like warm, and the engine does not evict these prompts' KV from its memory for so long, or until the server ends. Pins of one
tenant hold at most engine.pin_quota of that memory: beyond it those that were used longest ago are dropped. Pins of an hour or
more hold on disk and on a shared server too, within the same share of each, whether the server runs or not.
"""
_PATHS = {
    "anthropic": "/v1/messages",
    "openai-chat": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
}
_LIMITS = {
    "anthropic": "max_tokens",
    "openai-chat": "max_tokens",
    "openai-responses": "max_output_tokens",
}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def register(actions: Commands) -> None:
    warm = add_command(
        actions, "warm", run_warm, summary="compute the KV of prompts before they are asked", examples=WARM_EXAMPLES
    )
    pin = add_command(actions, "pin", run_pin, summary="keep the KV of prompts in the engine's memory", examples=PIN_EXAMPLES)
    pin.add_argument(
        "--for", dest="for_s", type=_seconds, default=3600, metavar="TIME", help="such as 90s, 45m, 8h (default: 1h)"
    )
    for parser in (warm, pin):
        parser.add_argument("files", nargs="+", metavar="FILE", help="JSON Lines of requests, a directory of them, or -")
        parser.add_argument("--model", metavar="NAME", help="ask this model, whatever the requests name")
        add_server_flags(parser)
        add_json_flag(parser)


def run_warm(args: argparse.Namespace) -> int:
    return _run(args, {})


def run_pin(args: argparse.Namespace) -> int:
    return _run(args, {"x-anaphora-kv-keep": str(args.for_s)})


def _run(args: argparse.Namespace, headers: Mapping[str, str]) -> int:
    """Status 1 where the server refused one of the requests, or not all pins hold."""
    from anaphora.cli.connection import connect
    from anaphora.cli.lint import recorded

    requests = list(recorded(args.files))
    if not requests:
        raise ConfigError(f"no requests in {', '.join(args.files)}")
    totals = {"requests": 0, "computed_tokens": 0, "reused_tokens": 0, "refused": 0}
    with connect(args) as client:
        before = _pins(client) if headers else {}
        with progress("prompts", len(requests)) as seen:
            for one in requests:
                _warm(client, one, args.model, headers, totals)
                seen(1)
        after = _pins(client) if headers else {}
    pins: dict[str, int] = {name: count for name, count in after.items() if name != "pins_dropped"}
    if after:
        pins["pins_dropped"] = after.get("pins_dropped", 0) - before.get("pins_dropped", 0)
    if args.json:
        print(json.dumps({**totals, **pins}, indent=2))
    else:
        tokens = f"{totals['computed_tokens']:,} tokens computed, {totals['reused_tokens']:,} reused"
        refused = f"; {totals['refused']:,} refused" if totals["refused"] else ""
        print(f"{counted(totals['requests'], 'prompt')}: {tokens}{refused}")
        if after:
            print(f"the engine holds {counted(pins['pins'], 'pin')} on {counted(pins['pinned_blocks'], 'block')}")
        if dropped := pins.get("pins_dropped"):
            print(f"{counted(dropped, 'pin')} dropped: more of the engine's memory than engine.pin_quota allows")
    return 1 if totals["refused"] or pins.get("pins_dropped") else 0


def _warm(client: httpx2.Client, one: Recorded, model: str | None, headers: Mapping[str, str], totals: dict[str, int]) -> None:
    from anaphora.cli.connection import ServerProblem, check

    response = client.post(
        _PATHS[one.dialect], json=prewarm(one, model), headers={"anthropic-version": "2023-06-01", **headers}
    )
    try:
        check(response)
    except ServerProblem as problem:
        if response.status_code != 400 and response.status_code != 404:
            raise
        print(f"{one.file}:{one.line}: {problem}", file=sys.stderr)
        totals["refused"] += 1
        return
    reused = int(response.headers.get("x-anaphora-kv-reused-tokens", 0))
    totals["requests"] += 1
    totals["reused_tokens"] += reused
    totals["computed_tokens"] += _prompt_tokens(response.json()["usage"]) - reused


def prewarm(one: Recorded, model: str | None) -> dict[str, Any]:
    """The body of a recorded request, asking for no answer. What could only matter for one, and is refused without, goes."""
    dropped = {"stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens"}
    body = {name: value for name, value in one.body.items() if name not in dropped}
    if one.dialect == "anthropic":
        thinking, choice = body.get("thinking"), body.get("tool_choice")
        if isinstance(thinking, dict) and thinking.get("type") == "enabled":
            del body["thinking"]
        if isinstance(choice, dict) and choice.get("type") in ("any", "tool"):
            del body["tool_choice"]
    return {**body, **({"model": model} if model else {}), _LIMITS[one.dialect]: 0}


def _prompt_tokens(usage: Mapping[str, Any]) -> int:
    if "prompt_tokens" in usage:
        return int(usage["prompt_tokens"])
    counts = ["input_tokens"]
    if "input_tokens_details" not in usage:  # Anthropic's counts exclude each other, OpenAI's Responses' is the whole
        counts += ["cache_read_input_tokens", "cache_creation_input_tokens"]
    return sum(int(usage.get(name) or 0) for name in counts)


def _pins(client: httpx2.Client) -> dict[str, int]:
    from anaphora.cli.connection import check

    response = client.get("/anaphora/stats")
    check(response)
    backend = response.json()["backend"]
    names = {"pins": "kv_pins", "pinned_blocks": "kv_blocks_pinned", "pins_dropped": "kv_pins_dropped"}
    return {name: int(backend[counter]) for name, counter in names.items() if counter in backend}


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)([smhd]?)", text)
    if match is None or not 0 < int(match[1]) * _UNITS.get(match[2], 1) <= 86400:
        raise argparse.ArgumentTypeError(f"expected a time of at most a day, such as 90s, 45m or 8h, got {text!r}")
    return int(match[1]) * _UNITS.get(match[2], 1)
