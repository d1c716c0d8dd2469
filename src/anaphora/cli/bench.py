"""`anaphora bench`: the benchmarks, and `prefix`, what the caches save on this machine, as ratios of one run."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anaphora.cli import bench_routing, bench_semantic
from anaphora.cli.measuring import machine, progress
from anaphora.cli.parsing import Commands, add_command, add_config_flag, add_json_flag
from anaphora.config import load
from anaphora.errors import ConfigError

FLAGS = (
    ("engine.model", "--model", "MODEL", "smollm2, a local folder, a GGUF file, or a Hugging Face id"),
    ("engine.dtype", "--dtype", "TYPE", "auto, bfloat16 or float32"),
    ("engine.kv_memory", "--kv-memory", "SIZE", "memory for KV; must hold the context twice"),
    ("cache.dir", "--cache-dir", "DIR", "where converted models are kept"),
)

EXAMPLES = """\
  anaphora bench prefix                              about five minutes on two cores
  anaphora bench prefix --context 2000 --rounds 3    quicker, with a shorter prompt
  anaphora bench prefix --json > figures.json
"""


def register(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="measure this machine", description="Measure this machine.")
    bench.set_defaults(run=None, usage=bench)
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="COMMAND")
    bench_routing.register(benchmarks)
    bench_semantic.register(benchmarks)
    parser = add_command(
        benchmarks,
        "prefix",
        run,
        summary="measure prefix reuse, decoding and batching against transformers, and cached answers over HTTP",
        examples=EXAMPLES,
    )
    add_config_flag(parser)
    for setting, flag, placeholder, text in FLAGS:
        parser.add_argument(flag, dest=setting, metavar=placeholder, help=text)
    parser.add_argument(
        "--context", type=int, default=7000, metavar="N", help="tokens of the long prompt (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions of each figure (default: %(default)s)")
    parser.add_argument("--no-http", action="store_true", help="leave out the part over HTTP (it needs wrk)")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to FILE")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError where the engine is not installed or cannot run as configured."""
    if find_spec("torch") is None:
        raise ConfigError("bench prefix needs the engine: pip install 'anaphora[local]', or make setup")
    given = vars(args)
    loaded = load(args.config, {setting: given[setting] for setting, *_ in FLAGS if given[setting] is not None})
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the engine process has it; must be set before torch starts
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    from anaphora.backends import engine_bench
    from anaphora.build import engine_options

    with progress() as step:
        options = engine_bench.BenchOptions(engine_options(loaded.config), context=args.context, rounds=args.rounds)
        figures = {**machine(), **engine_bench.run(options, step)}
        if not args.no_http:
            from anaphora.cli import bench_http

            figures["http"] = bench_http.run(loaded.config, step)
    text = json.dumps(figures, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n")
    print(text) if args.json else _table(figures)
    return 0


def _table(figures: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "Anaphora", "against", "ratio")
    for length, row in figures["cold_prefill"].items():
        table.add_row(f"cold prefill, {length} tokens", _s(row["cold_s"]), f"transformers {_s(row['transformers_s'])}", _x(row))
    warm = figures["warm_ttft"]
    what = f"first token, {warm['reused_tokens']} of {warm['tokens']} tokens cached"
    table.add_row(what, _s(warm["warm_s"]), f"cold {_s(warm['cold_s'])}", f"{warm['warm_of_cold']:.1%}")
    table.add_row("", "", f"copy + one forward {_s(warm['bound_s'])}", f"{warm['warm_of_bound']:.2f}×")
    for length, row in figures["decode"].items():
        theirs = f"transformers {_s(row['transformers_token_s'])}"
        table.add_row(f"a token at {length} tokens of context", _s(row["token_s"]), theirs, _x(row))
    streams = figures["streams"]
    table.add_row(
        f"{streams['streams']} streams at once",
        _s(streams["together_s"]),
        f"in sequence {_s(streams['in_sequence_s'])}",
        _x(streams),
    )
    console = Console()
    console.print(table)
    for name, text in _facts(figures):
        console.print(f"{name}: {text}", highlight=False)


def _facts(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", f"{figures['model']}, {figures['dtype']} on {figures['device']}, {figures['threads']} threads"
    yield "machine", f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores"
    yield "start-up to ready", _s(figures["startup_s"])
    yield "memory resident after start-up", f"{figures['resident_bytes'] / 2**20:.0f} MiB"
    yield "KV", f"{figures['kv_bytes_per_token']} bytes per token"
    for name, value in figures.get("http", {}).items():
        yield f"http {name}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _x(row: Mapping[str, float]) -> str:
    return f"{row['speedup']:.2f}×"
