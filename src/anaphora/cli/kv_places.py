"""Where `anaphora kv` finds KV blocks: the folder below `cache.dir`, and the server at `cache.shared`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from anaphora.cli.parsing import add_config_flag
from anaphora.config import Config, load
from anaphora.errors import ConfigError

if TYPE_CHECKING:
    from anaphora.tiers.base import Tier
    from anaphora.tiers.disk import DiskTier
    from anaphora.tiers.valkey import ValkeyTier

T = TypeVar("T")

UNLIMITED = sys.maxsize
"""The capacity of a tier that is only looked into. With a smaller one than the server's it would be cut to that on opening."""


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flag(parser)
    parser.add_argument("--cache-dir", metavar="DIR", help="where the server keeps its caches (default: cache.dir)")


def add_tier_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tier",
        choices=("disk", "shared"),
        default="disk",
        help="disk: of this machine; shared: the server at cache.shared, read whole over the network (default: %(default)s)",
    )


def configured(args: argparse.Namespace) -> Config:
    loaded = load(args.config, {"cache.dir": args.cache_dir} if args.cache_dir else {})
    for warning in loaded.warnings:
        print(f"anaphora: warning: {warning}", file=sys.stderr)
    return loaded.config


def folder(config: Config) -> Path:
    return Path(config.cache.dir).expanduser() / "kv"


def described(config: Config) -> str:
    return f"{folder(config)} and the server at cache.shared" if config.cache.shared else str(folder(config))


@asynccontextmanager
async def disk(config: Config, *, capacity_bytes: int = UNLIMITED) -> AsyncIterator[DiskTier]:
    from anaphora.build import kv_eviction
    from anaphora.clock import SystemClock
    from anaphora.tiers.disk import DiskOptions, DiskTier

    options = DiskOptions(str(folder(config)), capacity_bytes, eviction=kv_eviction(config.engine))
    tier = DiskTier(options, clock=SystemClock())
    try:
        yield tier
    finally:
        await tier.aclose()


@asynccontextmanager
async def opened(config: Config, name: str) -> AsyncIterator[Tier]:
    """The tier that a command's `--tier` names. Raises ConfigError where there is none."""
    if name == "shared":
        async with _shared(config) as tier:
            yield tier
        return
    if not (folder(config) / "index.db").is_file():
        raise ConfigError(
            f"no KV blocks lie in {folder(config)}; name the server's cache folder with --cache-dir, "
            "or have it keep some (engine.kv_disk)"
        )
    async with disk(config) as tier:
        yield tier


@asynccontextmanager
async def all_places(config: Config) -> AsyncIterator[list[Tier]]:
    """Every tier there is, the fastest first."""
    async with AsyncExitStack() as stack:
        tiers: list[Tier] = []
        if (folder(config) / "index.db").is_file() or not config.cache.shared:
            tiers.append(await stack.enter_async_context(opened(config, "disk")))
        if config.cache.shared:
            tiers.append(await stack.enter_async_context(_shared(config)))
        yield tiers


@asynccontextmanager
async def _shared(config: Config) -> AsyncIterator[ValkeyTier]:
    from anaphora.build import kv_eviction, shared_tier
    from anaphora.clock import SystemClock
    from anaphora.events import ignore

    if not config.cache.shared:
        raise ConfigError("cache.shared is not set: name the server with ANAPHORA_SHARED=redis://host:6379/0, or in the file")
    leaving = kv_eviction(config.engine)
    tier = shared_tier(config.cache, "kv", config.cache.shared_size, leaving, clock=SystemClock(), emit=ignore)
    try:
        yield tier
    finally:
        await tier.aclose()


def run(work: Coroutine[object, object, T]) -> T:
    import asyncio

    return asyncio.run(work)


def counted(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


@contextmanager
def progress(text: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, nothing elsewhere. What it yields is told how much more is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)
