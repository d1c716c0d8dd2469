"""`anaphora serve` in front of test upstreams, and both official SDKs in front of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import anthropic
import openai

from anaphora.testing.upstream import Control, Record
from anaphora.types import LOCAL_TENANT, Request
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, encode
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_responses import OpenAIResponses

MARK = "listening on "
CLAUDE, GPT = "claude-sonnet-5", "gpt-5.6-sol"
OUR_KEY = "the-gateways-own-key"
CLIENT_KEY = "the-clients-own-key"

_DIALECTS: dict[str, Dialect] = {
    "/v1/messages": Anthropic(provider_blocks=True),
    "/v1/chat/completions": OpenAIChat(),
    "/v1/responses": OpenAIResponses(),
}


class Gateway:
    """A server process, and clients for it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.lines: list[str] = []
        """What it wrote to its error stream."""
        self._wrote = threading.Condition()

    def read(self, stream: IO[str]) -> None:
        for line in stream:
            with self._wrote:
                self.lines.append(line)
                self._wrote.notify_all()

    def wait_for(self, words: str) -> None:
        """Returns when a line with these has been written."""
        with self._wrote:
            assert self._wrote.wait_for(lambda: any(words in line for line in self.lines), timeout=60)

    def claude(self, key: str = CLIENT_KEY, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=key, **{"max_retries": 0, **options})

    def gpt(self, key: str = CLIENT_KEY, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})


@contextmanager
def gateway(toml: str, folder: Path, *flags: str, variables: Mapping[str, str] | None = None) -> Iterator[Gateway]:
    """A gateway with this configuration, whose cache is in `folder`. `variables` are put into its environment."""
    config = folder / "anaphora.toml"
    config.write_text(toml)
    command = [sys.executable, "-m", "anaphora", "serve", "--config", str(config), "--port", "0"]
    command += ["--cache-dir", str(folder / "cache"), *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
    environ |= {"OUR_KEY": OUR_KEY, **(variables or {})}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    with process, process.stderr:
        try:
            line = process.stderr.readline()
            assert MARK in line, line + process.stderr.read()
            served = Gateway(process, line.partition(MARK)[2].strip())
            reader = threading.Thread(target=served.read, args=(process.stderr,), daemon=True)
            reader.start()
            try:
                yield served
            finally:
                process.terminate()
                reader.join()
        finally:
            process.terminate()
            process.wait()


def upstream(name: str, at: Control, models: str, **fields: object) -> str:
    """The lines of the configuration for an upstream, named as a provider's API or (`dialect`) as its own kind."""
    dialect = fields.pop("dialect", "anthropic" if models.startswith("claude") else "openai")
    given = {"name": name, "dialect": dialect, "base_url": at.url, "models": [models], "retries": 0, "key_env": "OUR_KEY"}
    lines = [f"{key} = {_toml(value)}" for key, value in {**given, **fields}.items() if value is not None]
    return "\n".join(["[[gateway.upstreams]]", *lines, ""])


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(inner)}' for key, inner in value.items()) + "}"
    return encode(value).decode()


def arrived(record: Record) -> Request:
    """What an upstream was asked, in no dialect."""
    return _DIALECTS[record.path].parse(encode(record.body), tenant=LOCAL_TENANT).request


def the_one(control: Control) -> Record:
    """The only request that came."""
    [record] = control.requests()
    return record
