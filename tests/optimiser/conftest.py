"""The emulator, also where the package was installed before it had a plug-in of pytest."""

from __future__ import annotations

from anaphora.testing.plugin import anaphora_emulator

__all__ = ["anaphora_emulator"]
