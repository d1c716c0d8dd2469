"""`anaphora chat`: talk to a running server, and see per turn what it did not have to compute."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from anaphora.cli.parsing import Commands, add_command, add_server_flags
from anaphora.clock import Clock, SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx2

EXAMPLES = """\
  anaphora chat                                    a conversation; /reset starts over, /quit or Ctrl-D ends it
  anaphora chat --system "Answer in one word."
  echo "Why is the sky blue?" | anaphora chat      one question; figures go to standard error
"""


class Turn(msgspec.Struct, frozen=True):
    """One answer, and what it took. Times are seconds since the question was sent."""

    text: str
    first_token_s: float | None
    total_s: float
    prompt_tokens: int
    output_tokens: int
    reused_tokens: int
    cache_status: str

    def summary(self) -> str:
        """One line: `first token 12 ms · 4,096 of 4,130 prompt tokens reused · 20 tokens in 0.51 s · cache: fwd=miss`."""
        first = "no token" if self.first_token_s is None else f"first token {self.first_token_s * 1000:,.0f} ms"
        return (
            f"{first} · {self.reused_tokens:,} of {self.prompt_tokens:,} prompt tokens reused · "
            f"{self.output_tokens:,} tokens in {self.total_s:.2f} s"
            + (f" · cache: {self.cache_status}" if self.cache_status else "")
        )


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "chat", run, summary="talk to a running server, seeing what each turn reused", examples=EXAMPLES
    )
    add_server_flags(parser)
    parser.add_argument("--model", help="model to ask (default: the server's first)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens per answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")


def run(args: argparse.Namespace) -> int:
    from anaphora.cli.connection import connect

    with connect(args) as client:
        model = args.model or _first_model(client)
        options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        settings = {name: value for name, value in options.items() if value is not None}

        def ask(messages: list[dict[str, str]], write: Callable[[str], None]) -> Turn:
            return ask_once(client, {"model": model, "messages": messages, **settings}, write)

        opening = [{"role": "system", "content": args.system}] if args.system else []
        if sys.stdin.isatty():
            _converse(ask, opening, model, args.url)
            return 0
        turn = ask([*opening, {"role": "user", "content": sys.stdin.read().strip()}], _write)
        print()
        print(turn.summary(), file=sys.stderr)
    return 0


def ask_once(client: httpx2.Client, body: dict[str, Any], write: Callable[[str], None], clock: Clock | None = None) -> Turn:
    """Ask over `/v1/chat/completions`, streaming; `write` gets the text as it comes. Raises ServerProblem."""
    from anaphora.cli.connection import ServerProblem, check

    clock = clock or SystemClock()
    started_s = clock.monotonic_s()
    first_token_s: float | None = None
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        check(response)
        for chunk in _chunks(response.iter_lines()):
            if "error" in chunk:
                raise ServerProblem(f"the answer was cut: {chunk['error'].get('message', chunk['error'])}")
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("content")
                if piece:
                    first_token_s = first_token_s or clock.monotonic_s() - started_s
                    pieces.append(piece)
                    write(piece)
        headers = response.headers
    return Turn(
        text="".join(pieces),
        first_token_s=first_token_s,
        total_s=clock.monotonic_s() - started_s,
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
        reused_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        cache_status=headers.get("cache-status", "").partition(";")[2].strip(),
    )


def _chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line, up to `[DONE]`."""
    for line in lines:
        if line.startswith("data: [DONE]"):
            return
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


def _converse(
    ask: Callable[[list[dict[str, str]], Callable[[str], None]], Turn], opening: list[dict[str, str]], model: str, url: str
) -> None:
    from rich.console import Console

    from anaphora.cli.connection import ServerProblem

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing and a history, where there is one

    console = Console(markup=False, highlight=False)
    console.print(f"{model} at {url}. /reset starts over, /quit or Ctrl-D ends.", style="dim")
    messages = list(opening)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if question == "/reset":
            messages = list(opening)
            continue
        if not question:
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            turn = ask(asked, _write)
        except ServerProblem as problem:  # the conversation stays as it was before this question
            console.print(f"\n{problem}", style="red")
            continue
        print()
        console.print(turn.summary(), style="dim")
        messages = [*asked, {"role": "assistant", "content": turn.text}]


def _first_model(client: httpx2.Client) -> str:
    from anaphora.cli.connection import ServerProblem, check

    response = client.get("/v1/models")
    check(response)
    models = response.json()["data"]
    if not models:
        raise ServerProblem("the server has no model yet; it may still be loading (see /ready)")
    return str(models[0]["id"])


def _write(text: str) -> None:
    print(text, end="", flush=True)
