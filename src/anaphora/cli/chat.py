"""`anaphora chat`: talk to a running server, and see per turn what it did not have to compute."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from anaphora.cli.parsing import Commands, add_command, add_server_flags

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

    from anaphora.cli.asking import Turn

EXAMPLES = """\
  anaphora chat                                    a conversation; /reset starts over, /quit or Ctrl-D ends it
  anaphora chat --system "Answer in one word."
  anaphora chat --temperature 0.2                  likelier tokens: small models ramble less
  echo "Why is the sky blue?" | anaphora chat      one question; figures go to standard error
"""


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
    from anaphora.cli.asking import ask_openai
    from anaphora.cli.connection import connect

    with connect(args) as client:
        model = args.model or _first_model(client)
        options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        settings = {name: value for name, value in options.items() if value is not None}

        def ask(messages: list[dict[str, str]], write: Callable[[str], None]) -> Turn:
            return ask_openai(client, {"model": model, "messages": messages, **settings}, write)

        opening = [{"role": "system", "content": args.system}] if args.system else []
        if sys.stdin.isatty():
            _converse(ask, opening, model, args.url)
            return 0
        turn = ask([*opening, {"role": "user", "content": sys.stdin.read().strip()}], _write)
        print()
        print(turn.summary(), file=sys.stderr)
    return 0


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
