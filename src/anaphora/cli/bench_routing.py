"""`anaphora bench routing`: strategies that choose among replicas, over recorded traffic and simulated replicas."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from anaphora.cli.measuring import machine, progress
from anaphora.cli.parsing import Commands, add_command, add_json_flag
from anaphora.errors import ConfigError
from anaphora.registry import ROUTING

TRACES = ("mooncake", "claude-code", "generated", "sessions")
LOADS = "0.3,0.5,0.7,0.9,1.1"
SPEEDS = (
    ("step_s", "--step-s", "seconds of a step that reads all weights"),
    ("token_s", "--token-s", "seconds to compute a token"),
    ("position_s", "--position-s", "seconds more for each token before it"),
    ("context_s", "--context-s", "seconds to read a token of context while decoding"),
    ("capacity_tokens", "--capacity", "tokens of KV a replica has room for"),
    ("chunk_tokens", "--chunk", "tokens a step may compute"),
)

EXAMPLES = """\
  ANAPHORA_DATA=DIR anaphora bench routing           both traces, five loads, every strategy: ten minutes
  anaphora bench routing --trace generated           a small generated load, which needs no data
  anaphora bench routing --trace mooncake --replicas 4 --loads 0.8 --strategies expected,prefix
  anaphora bench routing --trace generated --seeds 1,2,3,4,5,6 --strategies expected,prefix
  anaphora bench routing --trace sessions --replicas 3 --token-s 5e-3 --step-s 0.1 --seeds 1,2,3,4,5,6
                                                     a fleet that has just started, two conversations a replica
  anaphora bench routing --token-s 100e-6 --capacity 300000 --json > slower.json
"""


def register(benchmarks: Commands) -> None:
    parser = add_command(
        benchmarks,
        "routing",
        run,
        summary="compare strategies of routing over recorded traffic and simulated replicas",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--trace",
        action="append",
        choices=TRACES,
        help="what is replayed; may be given several times (default: mooncake and claude-code from the folder ANAPHORA_DATA, "
        "generated where that is not set)",
    )
    parser.add_argument("--replicas", type=_positive, default=8, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--loads",
        default=LOADS,
        metavar="SHARES",
        help="of the rate at which round-robin saturates; the turns of sessions come when the one before is answered, and have "
        "none (default: %(default)s)",
    )
    parser.add_argument(
        "--strategies",
        default=",".join((*ROUTING.builtin, "oracle")),
        metavar="NAMES",
        help="which ones, the first of them compared with each other one; oracle sees all caches and queues "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        metavar="NUMBERS",
        help="instead of what was recorded, one draw for each: claude-code's sessions in another order, another "
        "generated load, or other sessions",
    )
    parser.add_argument("--requests", type=_positive, metavar="N", help="only the first N of each trace")
    for _, flag, text in SPEEDS:
        parser.add_argument(flag, type=float, metavar="X", help=text)
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to FILE")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError where a strategy or a trace is not there."""
    from anaphora.routing import comparison

    speed = _speed(args)
    loads = _loads(args.loads)
    strategies = {name: _strategy(name) for name in args.strategies.split(",") if name}
    compared: list[comparison.Comparison] = []
    spreads: list[comparison.Spread] = []
    with progress() as step:
        for trace in _traces(args.trace):
            draws = []
            for seed in args.seeds or (None,):
                arrivals = _arrivals(trace, seed, args.replicas)[: args.requests]
                draws.append(
                    comparison.compare(
                        trace,
                        arrivals,
                        strategies,
                        loads=loads,
                        num_replicas=args.replicas,
                        speed=speed,
                        progress=step,
                        seed=seed,
                    )
                )
            compared += draws
            spreads += comparison.spreads(draws)
    figures = {**machine(), "traces": msgspec.to_builtins(compared), "spreads": msgspec.to_builtins(spreads)}
    text = json.dumps(figures, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n")
    print(text) if args.json else _tables(figures["traces"], figures["spreads"])
    return 0


def _traces(named: Sequence[str] | None) -> Sequence[str]:
    if named:
        return named
    if os.environ.get("ANAPHORA_DATA"):
        return ("mooncake", "claude-code")
    print("anaphora: skipped: mooncake and claude-code, since ANAPHORA_DATA does not name their folder", file=sys.stderr)
    return ("generated",)


def _arrivals(trace: str, seed: int | None, num_replicas: int) -> list[Any]:
    from anaphora.routing import traces

    if trace == "generated":
        return list(traces.generated(seed=1 if seed is None else seed))
    if trace == "sessions":
        return list(traces.sessions(2 * num_replicas, seed=1 if seed is None else seed))
    if trace == "mooncake" and seed is not None:
        raise ConfigError("--seeds: mooncake has no sessions that could come in another order; name another --trace")
    data = os.environ.get("ANAPHORA_DATA")
    if not data:
        raise ConfigError(f"--trace {trace}: set ANAPHORA_DATA to the folder with the traces")
    return list(traces.mooncake(Path(data)) if trace == "mooncake" else traces.claude_code(Path(data), seed))


def _strategy(name: str) -> Callable[[], Any]:
    if name == "oracle":
        from anaphora.routing.oracle import Oracle

        return Oracle
    found: Callable[[], Any] = ROUTING.load(name)
    return found


def _speed(args: argparse.Namespace) -> Any:
    from anaphora.routing.simulation import Speed

    given = {name: getattr(args, flag.removeprefix("--").replace("-", "_")) for name, flag, _ in SPEEDS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("capacity_tokens", "chunk_tokens"):
        if name in given:
            given[name] = int(given[name])
    if any(value <= 0 for value in given.values()):
        raise ConfigError("speeds, --capacity and --chunk must be positive")
    return Speed(**given)


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--loads: numbers such as 0.5,0.9, not {text!r}") from error
    if min(loads) <= 0:
        raise ConfigError("--loads: every one must be more than 0")
    return loads


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _tables(compared: Sequence[dict[str, Any]], spreads: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for one in compared:
        title = f"{one['trace']}: {one['num_requests']} requests, {one['num_replicas']} replicas"
        title += "" if one["saturation_per_s"] is None else f", saturation {one['saturation_per_s']:.2f}/s"
        title += "" if one["seed"] is None else f", seed {one['seed']}"
        share = f"{one['rows'][0]['strategy']}'s share"
        table = Table("load", "strategy", "hit rate", "first p50", "p90", share, "p99", "whole", "imbalance", title=title)
        for row in one["rows"]:
            table.add_row(
                _load(row["load"]),
                row["strategy"],
                f"{row['hit_rate']:.1%}",
                *(f"{row[name]:.2f} s" for name in ("first_p50_s", "first_p90_s")),
                _share(row["first_share"]),
                *(f"{row[name]:.2f} s" for name in ("first_p99_s", "whole_mean_s")),
                f"{row['imbalance']:.2f}",
            )
        console.print(table)
    if spreads:
        table = Table(
            "trace",
            "load",
            "strategy",
            "draws",
            "hit rate",
            "first p50",
            "p90",
            "above",
            f"{compared[0]['rows'][0]['strategy']}'s share",
            title="Over all draws",
        )
        for one in spreads:
            table.add_row(
                one["trace"],
                _load(one["load"]),
                one["strategy"],
                str(one["num_draws"]),
                f"{one['hit_rate']:.1%}",
                *(f"{one[name]:.2f} s" for name in ("first_p50_s", "first_p90_s")),
                "" if one["mean"] is None else str(one["num_above"]),
                _share(one["mean"]),
            )
        console.print(table)


def _load(load: float | None) -> str:
    return "" if load is None else f"{load:.0%}"


def _share(share: dict[str, float] | None) -> str:
    return "" if share is None else f"{share['share']:.2f} ({share['low']:.2f}–{share['high']:.2f})"
