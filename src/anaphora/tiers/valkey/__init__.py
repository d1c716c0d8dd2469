"""A Valkey or Redis server that machines share: `tier` decides, `scripts` run on the server, `servers` talks to it."""

from anaphora.tiers.valkey.tier import ValkeyOptions, ValkeyTier

__all__ = ["ValkeyOptions", "ValkeyTier"]
