"""Names of plug-ins, and how they become code: name → "module:attribute", imported only when asked for.

One registry per axis. Third parties add names through the entry-point group `anaphora.<axis>`; a name that Anaphora itself
uses cannot be taken over. A name that is unknown, defined twice, or does not import is a `ConfigError` that says which
setting's value to mend, never an ImportError from deep inside.

Only `build`, `testing` and the command line read a registry.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from anaphora.errors import ConfigError


class Registry:
    """The kinds of one axis. `installed` stands in for the environment's entry points in tests."""

    def __init__(self, axis: str, builtin: Mapping[str, str], installed: Iterable[EntryPoint] | None = None) -> None:
        self.axis = axis
        self.builtin: Mapping[str, str] = dict(builtin)
        self._installed = None if installed is None else tuple(installed)

    def names(self) -> tuple[str, ...]:
        """Every name that may be asked for, sorted. Says nothing about whether it imports."""
        return tuple(sorted({*self.builtin, *(entry.name for entry in self._third_party())}))

    def load(self, name: str) -> Any:
        """What stands behind `name` (a class or a factory). Raises ConfigError."""
        target = self.builtin.get(name) or self._third_party_target(name)
        module_name, _, attribute = target.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.axis} {name!r} cannot be loaded from {target}: {error}") from error
        return found

    def _third_party_target(self, name: str) -> str:
        targets = sorted({entry.value for entry in self._third_party() if entry.name == name})
        if len(targets) > 1:
            raise ConfigError(f"{self.axis} {name!r} is defined twice, by {' and by '.join(targets)}: uninstall one of them")
        if not targets:
            known = self.names()
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{self.axis} {name!r} is not known; {hint}")
        return targets[0]

    def _third_party(self) -> tuple[EntryPoint, ...]:
        if self._installed is None:
            self._installed = tuple(entry_points(group=f"anaphora.{self.axis}"))
        return self._installed


POLICIES = Registry("policies", {"lru": "anaphora.policies.lru:LRU", "gdsf": "anaphora.policies.gdsf:GDSF"})
TIERS = Registry(
    "tiers",
    {
        "ram": "anaphora.tiers.ram:RamTier",
        "disk": "anaphora.tiers.disk:DiskTier",
        "valkey": "anaphora.tiers.valkey:ValkeyTier",
    },
)
CODECS = Registry(
    "codecs",
    {
        "raw": "anaphora.codecs.raw:Raw",
        "zstd": "anaphora.codecs.zstd:Zstd",
        "int8": "anaphora.codecs.int8:Int8",
        "int4": "anaphora.codecs.stepped:Int4",
        "int3": "anaphora.codecs.stepped:Int3",
    },
)
LEVELS = Registry(
    "levels",
    {"exact": "anaphora.levels.exact:ExactLevel", "semantic": "anaphora.levels.semantic.level:SemanticLevel"},
)
BACKENDS = Registry(
    "backends", {"echo": "anaphora.backends.echo:EchoBackend", "transformers": "anaphora.backends.engine:Engine"}
)
ROUTING = Registry(
    "routing",
    {
        "expected": "anaphora.routing.expected:Expected",
        "prefix": "anaphora.routing.prefix:Prefix",
        "least-busy": "anaphora.routing.least_busy:LeastBusy",
        "usage": "anaphora.routing.usage:Usage",
        "latency": "anaphora.routing.latency:Latency",
        "round-robin": "anaphora.routing.round_robin:RoundRobin",
    },
)
ENCODERS = Registry(
    "encoders",
    {
        "minilm": "anaphora.backends.encoders.minilm:MiniLM",
        "e5": "anaphora.backends.encoders.e5:E5",
        "static": "anaphora.backends.encoders.static:Static",
    },
)
AXES: tuple[Registry, ...] = (POLICIES, TIERS, CODECS, LEVELS, BACKENDS, ROUTING, ENCODERS)
