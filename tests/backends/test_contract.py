"""The contract of backends over the kinds that need no model."""

from __future__ import annotations

from anaphora.backends.base import Backend
from anaphora.backends.echo import EchoBackend, Options
from anaphora.testing.backends import BackendContract


class TestEcho(BackendContract):
    model = "echo"

    def make(self) -> Backend:
        return EchoBackend(Options(max_input_tokens=64))
