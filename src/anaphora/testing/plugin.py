"""A plug-in of pytest, there as soon as Anaphora is installed: does a prompt cache in production as it should?

```python
def test_the_second_turn_is_cached(anaphora_emulator):
    client = anthropic.Anthropic(base_url=anaphora_emulator.anthropic_base_url, api_key="any")
    ...
    anaphora_emulator.advance(299)
    assert_cached(client.messages.create(...), min_tokens=2000)
```

The emulator is one process for the whole test session. Every API key is an organisation of its own there: a test that uses a
key of its own (`anaphora_emulator.new_key()`) starts without a cache. Nothing is imported before the fixture is used.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

_LISTENING = "listening on "


class Emulator:
    """A running `anaphora serve --engine echo --virtual-clock`."""

    def __init__(self, url: str) -> None:
        self.anthropic_base_url = url
        self.openai_base_url = f"{url}/v1"
        self._keys = itertools.count(1)

    def new_key(self) -> str:
        """An API key that nobody has used yet."""
        return f"emulated-{next(self._keys)}"

    def advance(self, seconds: float) -> None:
        """Let time pass, for every key at once. ValueError: it does not go back."""
        if seconds < 0:
            raise ValueError("time does not go back")
        body = json.dumps({"advance_s": seconds}).encode()
        with urllib.request.urlopen(f"{self.anthropic_base_url}/anaphora/clock", body, timeout=30) as response:
            response.read()


@pytest.fixture(scope="session")
def anaphora_emulator() -> Iterator[Emulator]:
    """Caches, charges, expires and refuses as the providers do, for every model of theirs; computes nothing."""
    command = [sys.executable, "-m", "anaphora", "serve", "--engine", "echo", "--virtual-clock", "--port", "0"]
    command += ["--config", os.devnull]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            if _LISTENING not in line:
                raise RuntimeError(f"the emulator did not start: {line}{process.stderr.read()}")
            yield Emulator(line.partition(_LISTENING)[2].strip())
        finally:
            process.terminate()
            process.stderr.read()


def assert_cached(response: Any, min_tokens: int = 1) -> None:
    """Fails unless at least `min_tokens` of the prompt were read from the cache.

    `response`: a message, a chat completion or a response of the official SDKs. TypeError: it carries no usage.
    """
    read, prompt = cached_tokens(response)
    if read < min_tokens:
        raise AssertionError(f"{read} of {prompt} prompt tokens were read from the cache, fewer than {min_tokens}")


def cached_tokens(response: Any) -> tuple[int, int]:
    """(tokens read from the cache, all tokens of the prompt). TypeError: `response` carries no usage."""
    usage = getattr(response, "usage", None)
    if usage is None:
        raise TypeError(f"{type(response).__name__} carries no usage")
    if hasattr(usage, "cache_read_input_tokens"):
        read = usage.cache_read_input_tokens or 0
        return read, read + usage.input_tokens + (usage.cache_creation_input_tokens or 0)
    if hasattr(usage, "prompt_tokens"):
        details = usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0, usage.prompt_tokens
    return usage.input_tokens_details.cached_tokens, usage.input_tokens
