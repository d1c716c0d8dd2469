"""`anaphora kv`: look into the KV blocks that outlive the engine's memory, check them, remove them, carry them elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from anaphora.cli import kv_warm
from anaphora.cli.kv_places import (
    add_place_flags,
    add_tier_flag,
    all_places,
    configured,
    counted,
    described,
    disk,
    folder,
    opened,
    progress,
    run,
)
from anaphora.cli.parsing import Commands, add_command, add_json_flag
from anaphora.config import Config
from anaphora.errors import ConfigError, DamagedBlock, TierFailed

if TYPE_CHECKING:
    from anaphora.events import Forgotten
    from anaphora.kv.inventory import Block, Checked, Group, Inventory, Prefix
    from anaphora.kv.portable import BroughtIn, Manifest

LS_EXAMPLES = """\
  anaphora kv ls                       blocks, tokens and bytes by model, tenant and codec
  anaphora kv ls --prefixes            every prefix, with the id that other commands take
  anaphora kv ls --tier shared         what lies on the server at cache.shared (reads all of it)
"""
VERIFY_EXAMPLES = """\
  anaphora kv verify                   read and check every block on disk
  anaphora kv verify --repair          and remove the damaged ones
Exit status: 0 all blocks are sound, 1 some are damaged.
"""
DROP_EXAMPLES = """\
  anaphora kv drop --prefix 3fa9c2     one prefix; what others share of it stays
  anaphora kv drop --tenant acme       all of a tenant
  anaphora kv drop --all --yes         everything, without asking
This removes from disk, and from the server at cache.shared. What a running engine holds in its own memory it keeps until it
evicts it: to be forgotten there too, ask the server (POST /anaphora/forget, docs/http-api.md#forget).
"""
EXPORT_EXAMPLES = """\
  anaphora kv ls --prefixes
  anaphora kv export 3fa9c2 manual.kv
"""
IMPORT_EXAMPLES = """\
  anaphora kv import manual.kv
  anaphora kv import manual.kv --cache-dir /srv/anaphora
It is used by engines with the same model, dtype, quantization and block size, for the same
tenant: docs/kv.md.
"""


def register(commands: Commands) -> None:
    parent = commands.add_parser(
        "kv",
        help="look after the KV blocks kept on disk or on a shared server",
        description="Look after the KV blocks that outlive the engine's memory. Guide: docs/kv.md.",
    )
    parent.set_defaults(run=None, usage=parent)
    actions = parent.add_subparsers(title="commands", metavar="COMMAND")

    ls = _add(actions, "ls", run_ls, summary="list what is stored", examples=LS_EXAMPLES)
    ls.add_argument("--prefixes", action="store_true", help="list every prefix instead of totals")
    add_tier_flag(ls)
    add_json_flag(ls)

    kv_warm.register(actions)

    drop = _add(actions, "drop", run_drop, summary="remove blocks, and see that they are gone", examples=DROP_EXAMPLES)
    what = drop.add_mutually_exclusive_group(required=True)
    what.add_argument("--prefix", metavar="ID", help="of one prefix, what no other one shares (ids: anaphora kv ls --prefixes)")
    what.add_argument("--tenant", metavar="NAME", help="of one tenant")
    what.add_argument("--model", metavar="NAME", help="of one model, as it is served")
    what.add_argument("--all", action="store_true", help="all of them")
    drop.add_argument("--yes", action="store_true", help="do not ask")
    add_json_flag(drop)

    verify = _add(actions, "verify", run_verify, summary="read and check every block", examples=VERIFY_EXAMPLES)
    verify.add_argument("--repair", action="store_true", help="remove what is damaged")
    add_tier_flag(verify)
    add_json_flag(verify)

    export = _add(actions, "export", run_export, summary="write one prefix to a file", examples=EXPORT_EXAMPLES)
    export.add_argument("id", metavar="ID", help="of the prefix: as much of its beginning as is unique")
    export.add_argument("file", metavar="FILE")
    export.add_argument("--force", action="store_true", help="overwrite FILE")
    add_tier_flag(export)

    bring = _add(
        actions, "import", run_import, summary="put an exported prefix on this machine's disk", examples=IMPORT_EXAMPLES
    )
    bring.add_argument("file", metavar="FILE")


def _add(
    actions: Commands, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, examples: str
) -> argparse.ArgumentParser:
    parser = add_command(actions, name, run, summary=summary, examples=examples)
    add_place_flags(parser)
    return parser


# -- commands ------------------------------------------------------------------------------------------------------------


def run_ls(args: argparse.Namespace) -> int:
    inventory = run(_inventory(configured(args), args.tier))
    if args.json:
        import msgspec

        shown = {
            "groups": msgspec.to_builtins(inventory.groups()),
            "unreadable": [key.hex() for key in inventory.unreadable],
            "orphans": len(inventory.orphans),
        }
        if args.prefixes:
            shown["prefixes"] = msgspec.to_builtins(inventory.prefixes())
        print(json.dumps(shown, indent=2))
        return 0
    if args.prefixes:
        _print_prefixes(inventory.prefixes())
    else:
        _print_groups(inventory.groups())
    if inventory.orphans:
        print(f"{counted(len(inventory.orphans), 'block')} without what they stand on: of no use until that is computed again")
    if inventory.unreadable:
        print(f"damaged, or no KV blocks: {len(inventory.unreadable):,} entries; see `anaphora kv verify`")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from anaphora.kv.inventory import check

    config = configured(args)

    async def work() -> tuple[Checked, int]:
        async with opened(config, args.tier) as tier:
            with progress("checking blocks", (await tier.stats()).num_entries) as seen:
                checked = await check(tier, seen=seen)
            removed = await tier.delete_many([damage.key for damage in checked.damaged]) if args.repair else 0
            return checked, removed

    checked, removed = run(work())
    if args.json:
        damaged = [{"key": damage.key.hex(), "reason": damage.reason} for damage in checked.damaged]
        shown = {name: getattr(checked, name) for name in ("num_blocks", "num_tokens", "num_bytes", "num_orphans")}
        print(json.dumps({**shown, "damaged": damaged, "removed": removed}, indent=2))
    else:
        for damage in checked.damaged:
            print(f"{damage.key.hex()[:12]}: {damage.reason}")
        orphans = f", {checked.num_orphans:,} of them without what they stand on" if checked.num_orphans else ""
        sound = f"{counted(checked.num_blocks, 'sound block')} ({_size(checked.num_bytes)})"
        print(f"{sound}{orphans}; {len(checked.damaged):,} damaged")
        if args.repair and checked.damaged:
            print(f"{removed:,} removed")
        elif checked.damaged:
            print("The engine never uses a damaged block; `anaphora kv verify --repair` removes them.")
    return 1 if checked.damaged else 0


def run_drop(args: argparse.Namespace) -> int:
    """Status 1 where nothing was found, where something is left, or where a tier could not be asked."""
    from anaphora.clock import SystemClock
    from anaphora.store import Store
    from anaphora.types import Scope, Tenant

    config = configured(args)
    if args.prefix is not None:
        return _drop_prefix(args, config)
    what = f"tenant {args.tenant}" if args.tenant else f"model {args.model}" if args.model else "every tenant and model"
    scope = Scope(tenant=Tenant(args.tenant) if args.tenant else None, model=args.model)

    async def work() -> Forgotten:
        async with all_places(config) as tiers:
            return await Store(tiers, clock=SystemClock()).forget(scope)

    if not _agreed(args, f"Remove all KV blocks of {what} from {described(config)}?"):
        return 1
    receipt = run(work())
    return _print_receipt(args, receipt.removed, receipt.remaining, receipt.failed)


def _drop_prefix(args: argparse.Namespace, config: Config) -> int:
    async def find() -> list[Block]:
        inventory = await _inventory(config, "disk")
        return inventory.only_for(_found(inventory, args.prefix))

    async def work(blocks: list[Block]) -> tuple[dict[str, int], dict[str, int], list[str]]:
        keys = [block.key for block in blocks]
        removed: dict[str, int] = {}
        remaining: dict[str, int] = {}
        failed: list[str] = []
        async with all_places(config) as tiers:
            for tier in tiers:
                try:
                    removed[tier.name] = await tier.delete_many(keys)
                    remaining[tier.name] = len(await tier.sizes(keys))
                except TierFailed as error:
                    print(f"anaphora: warning: {tier.name}: {error}", file=sys.stderr)
                    failed.append(tier.name)
        return removed, remaining, failed

    blocks = run(find())
    tokens = sum(block.num_tokens for block in blocks)
    if not _agreed(args, f"Remove {counted(len(blocks), 'KV block')} ({tokens:,} tokens) from {described(config)}?"):
        return 1
    return _print_receipt(args, *run(work(blocks)))


def run_export(args: argparse.Namespace) -> int:
    from anaphora import __version__
    from anaphora.kv.inventory import take
    from anaphora.kv.portable import carry_out

    config = configured(args)
    file = Path(args.file)
    if file.exists() and not args.force:
        raise ConfigError(f"{file} exists: name another file, or overwrite it with --force")

    async def work() -> tuple[list[Block], int]:
        async with opened(config, args.tier) as tier:
            inventory = await take(tier)
            chain = inventory.chain(_found(inventory, args.id))
            with progress("writing blocks", len(chain)) as seen:
                return chain, await carry_out(tier, chain, file, written_by=f"anaphora {__version__}", seen=seen)

    try:
        chain, size = run(work())
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    print(f"{file}: {chain[-1].end:,} tokens in {counted(len(chain), 'block')}, {_size(size)}")
    return 0


def run_import(args: argparse.Namespace) -> int:
    from anaphora.kv.portable import bring_in, inspect

    config = configured(args)
    if not config.engine.kv_disk:
        raise ConfigError("engine.kv_disk is 0: this configuration keeps no KV blocks on disk")
    file = Path(args.file)

    async def work(manifest: Manifest) -> BroughtIn:
        used = 0
        if folder(config).is_dir():
            async with disk(config) as tier:
                used = (await tier.stats()).used_bytes
        # A server may run with more than this configuration says: what it has is not driven out, apart from making room.
        async with disk(config, capacity_bytes=max(config.engine.kv_disk, used)) as tier:
            with progress("storing blocks", manifest.num_blocks) as seen:
                return await bring_in(tier, file, manifest, seen)

    try:
        with progress("checking blocks", None) as seen:
            manifest = inspect(file, seen)
        brought = run(work(manifest))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except DamagedBlock as error:
        raise DamagedBlock(f"{file} is not used: {error}") from error
    known = f", {brought.num_known:,} were there already" if brought.num_known else ""
    what = f"{manifest.num_tokens:,} tokens of {manifest.model} for tenant {manifest.tenant}"
    print(f"{what}: {counted(brought.num_new, 'new block')}{known}")
    return 0


async def _inventory(config: Config, tier_name: str) -> Inventory:
    from anaphora.kv.inventory import take

    async with opened(config, tier_name) as tier:
        with progress("reading", (await tier.stats()).num_entries) as seen:
            return await take(tier, seen=seen)


def _found(inventory: Inventory, id: str) -> Block:
    try:
        return inventory.find(id)
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}; `anaphora kv ls --prefixes` shows them") from error


# -- at the terminal -----------------------------------------------------------------------------------------------------


def _agreed(args: argparse.Namespace, question: str) -> bool:
    """Raises ConfigError where nobody can be asked."""
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to confirm it: say --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _print_receipt(
    args: argparse.Namespace, removed: Mapping[str, int], remaining: Mapping[str, int], failed: Sequence[str]
) -> int:
    if args.json:
        print(json.dumps({"removed": dict(removed), "remaining": dict(remaining), "failed": list(failed)}, indent=2))
    else:
        for tier in removed:
            print(f"{tier}: {counted(removed[tier], 'block')} removed; a sweep afterwards found {remaining.get(tier, 0):,}")
        for tier in failed:
            print(f"{tier}: could not be asked, and may still have them: try again when it can be reached")
    return 1 if failed or any(remaining.values()) else 0


def _print_groups(groups: Sequence[Group]) -> None:
    columns = ("model", "tenant", "codec", "blocks", "tokens", "size", "prefixes", "longest", "oldest", "newest")
    rows = [
        (
            group.model,
            group.tenant,
            group.codec,
            f"{group.num_blocks:,}",
            f"{group.num_tokens:,}",
            _size(group.num_bytes),
            f"{group.num_prefixes:,}",
            f"{group.longest_tokens:,}",
            _time(group.oldest_s),
            _time(group.newest_s),
        )
        for group in groups
    ]
    _print_table(columns, rows, right=("blocks", "tokens", "size", "prefixes", "longest"))


def _print_prefixes(prefixes: Sequence[Prefix]) -> None:
    columns = ("id", "tokens", "blocks", "size", "model", "tenant", "codec", "stored", "")
    rows = [
        (
            prefix.id,
            f"{prefix.num_tokens:,}",
            f"{prefix.num_blocks:,}",
            _size(prefix.num_bytes),
            prefix.model,
            prefix.tenant,
            prefix.codec,
            _time(prefix.stored_at_s),
            "" if prefix.complete else "beginning missing",
        )
        for prefix in prefixes
    ]
    _print_table(columns, rows, right=("tokens", "blocks", "size"))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]) -> None:
    """As wide as it must be: an id that was cut to fit a terminal would be of no use."""
    lines = [columns, *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    for line in lines:
        cells = zip(columns, line, widths, strict=True)
        aligned = (text.rjust(width) if column in right else text.ljust(width) for column, text, width in cells)
        print("  ".join(aligned).rstrip())


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).astimezone().isoformat(" ", "minutes")[:16]
