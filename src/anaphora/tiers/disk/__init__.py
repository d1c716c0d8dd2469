"""A folder that processes share and that survives them: `tier` is the asynchronous face, `index` says what lies on disk."""

from anaphora.tiers.disk.tier import DiskOptions, DiskTier

__all__ = ["DiskOptions", "DiskTier"]
