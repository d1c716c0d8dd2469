"""`anaphora testing upstream`: a provider that fails on demand, for tests of what stands in front of providers."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from anaphora.cli.parsing import Commands, add_command
from anaphora.config import is_loopback
from anaphora.errors import ConfigError

if TYPE_CHECKING:
    from anaphora.testing.upstream.script import Fault

EXAMPLES = """\
  anaphora testing upstream                                    Anthropic and OpenAI on http://127.0.0.1:9100
  anaphora testing upstream --prefill-tokens-per-s 5000 --decode-tokens-per-s 80 --base-latency 0.2
  anaphora testing upstream --port 9101 --name second --model gpt-5.6-sol
  anaphora testing upstream --fault 429=0.02 --fault cut=0.01 --fault '{"kind": "stall", "share": 0.01, "wait_s": 5}'

faults: a status from 400 to 599, slow, stall, cut, reset, malformed-sse, malformed-json, error
The next request alone fails with: curl -d '{"kind": "529"}' http://127.0.0.1:9100/testing/faults
What arrived is told by:           curl http://127.0.0.1:9100/testing/requests
Guide: docs/testing-upstream.md.
"""


def register(commands: Commands) -> None:
    parent = commands.add_parser(
        "testing",
        help="servers to test against",
        description="Servers to test against. Nothing they answer is computed by a model.",
    )
    parent.set_defaults(run=None, usage=parent)
    kinds = parent.add_subparsers(title="commands", metavar="COMMAND")
    parser = add_command(
        kinds,
        "upstream",
        run,
        summary="a provider of both dialects that echoes, caches, takes its time, and fails on demand",
        examples=EXAMPLES,
    )
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=9100, metavar="PORT", help="0: any free one (default: %(default)s)")
    parser.add_argument("--name", default="upstream", help="told in the header x-testing-upstream (default: %(default)s)")
    parser.add_argument(
        "--model", action="append", default=[], metavar="MODEL", help="that it has; may be given again (default: all it knows)"
    )
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="that it knows; may be given again (default: any)"
    )
    parser.add_argument("--base-latency", type=float, default=0.0, metavar="S", help="seconds before every first token")
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, default=0.0, metavar="N", help="of what is not cached; 0: no time (default)"
    )
    parser.add_argument("--decode-tokens-per-s", type=float, default=0.0, metavar="N", help="0: no time (default)")
    parser.add_argument("--kv-tokens", type=int, default=0, metavar="N", help="prompt tokens it can hold; 0: all (default)")
    parser.add_argument("--virtual-clock", action="store_true", help="lifetimes follow a clock that POST /anaphora/clock moves")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="KIND=SHARE", help="let that share of questions fail so; or JSON"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides which questions those are")
    parser.add_argument("--keep", type=int, default=10_000, metavar="N", help="requests it remembers (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Returns when it was told to stop. Raises ConfigError."""
    if not is_loopback(args.host):
        raise ConfigError(f"--host: anybody could tell it what to do, so only a loopback address will do, not {args.host}")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port: {args.port} is not from 0 to 65535")
    if min(args.base_latency, args.prefill_tokens_per_s, args.decode_tokens_per_s, args.kv_tokens, args.keep) < 0:
        raise ConfigError("latency, rates and numbers of tokens and requests are not negative")

    from anaphora.testing.upstream.app import Options
    from anaphora.testing.upstream.backend import Pace
    from anaphora.testing.upstream.serving import serve

    options = Options(
        name=args.name,
        models=tuple(args.model),
        keys=tuple(args.api_key),
        pace=Pace(args.base_latency, args.prefill_tokens_per_s, args.decode_tokens_per_s),
        faults=tuple(map(_fault, args.fault)),
        seed=args.seed,
        keep=args.keep,
        kv_tokens=args.kv_tokens,
        virtual_clock=args.virtual_clock,
    )
    serve(options, args.host, args.port, lambda url: print(f"anaphora: listening on {url}", file=sys.stderr, flush=True))
    return 0


def _fault(text: str) -> Fault:
    import msgspec

    from anaphora.testing.upstream.script import Fault

    try:
        if text.startswith("{"):
            return msgspec.json.decode(text, type=Fault)
        kind, equals, share = text.partition("=")
        return Fault(kind, count=None, share=float(share) if equals else 1.0)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"--fault {text}: {error}") from error
