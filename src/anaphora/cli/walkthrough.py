"""The steps of `anaphora demo`: what is asked of the server, what each step promises, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import httpx2
import msgspec
from rich.console import Console
from rich.table import Table

from anaphora.cli.asking import Turn, ask_anthropic, ask_openai
from anaphora.cli.connection import ServerProblem, check
from anaphora.cli.own_server import OwnServer
from anaphora.cli.waiting import Waiting
from anaphora.clock import Clock, SystemClock

Format = Literal["OpenAI", "Anthropic"]
Source = Literal["computed", "KV in memory", "KV on disk", "answer in memory", "answer on disk"]

FIRST = "Which two interesting men does Anna Pavlovna expect tonight?"
SECOND = "Describe Pierre in one sentence."
FOLLOW_UP = "And what is he wearing?"
AFTER_RESTART = "List three guests of the reception."
LAST = "What is the vicomte telling?"

INSTRUCTION = "You answer questions about this text.\n\n"
MAX_TOKENS = 32
MIN_TOKENS = 200
"""A shorter document is hardly longer than the questions about it: nothing would be shown."""
ROOM = 256
"""Tokens of context left for questions and answers."""
SLACK = 48
"""Tokens at the end of a shared prefix that need not be found again: KV is reused in whole blocks, and templates differ in
what they put behind the system prompt."""


class Step(msgspec.Struct, frozen=True):
    """One question, its answer, and what was to be seen."""

    name: str
    format: Format
    question: str
    source: Source
    turn: Turn
    broken: tuple[str, ...]
    """What the step promised and the server did not do; empty where all is well."""

    @property
    def first_token_s(self) -> float:
        return self.turn.total_s if self.turn.first_token_s is None else self.turn.first_token_s

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens."""
        return 0 if self.turn.hit else self.turn.prompt_tokens - self.turn.reused_tokens


class Report(msgspec.Struct, frozen=True):
    steps: tuple[Step, ...]
    engine: dict[str, Any]
    document_tokens: int
    start_s: float
    restart_s: float

    @property
    def ok(self) -> bool:
        return not any(step.broken for step in self.steps)

    @property
    def prompt_tokens(self) -> int:
        return sum(step.turn.prompt_tokens for step in self.steps)

    @property
    def computed_tokens(self) -> int:
        return sum(step.computed_tokens for step in self.steps)

    def figures(self) -> dict[str, Any]:
        """For `--json`. Times are seconds."""
        names = ("model", "dtype", "device", "context_tokens", "kv_block_size")
        return {
            "ok": self.ok,
            "engine": {name: self.engine[name] for name in names if name in self.engine},
            "document_tokens": self.document_tokens,
            "start_s": round(self.start_s, 3),
            "restart_s": round(self.restart_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "computed_prompt_tokens": self.computed_tokens,
            "steps": [
                {
                    "step": step.name,
                    "format": step.format,
                    "from": step.source,
                    "first_token_s": round(step.first_token_s, 4),
                    "total_s": round(step.turn.total_s, 4),
                    "prompt_tokens": step.turn.prompt_tokens,
                    "computed_prompt_tokens": step.computed_tokens,
                    "output_tokens": step.turn.output_tokens,
                    "cache_status": step.turn.cache_status,
                    "broken": list(step.broken),
                }
                for step in self.steps
            ],
        }


class Walkthrough:
    """`walk` takes minutes and leaves no process behind, however it ends. Raises ServerProblem where there is no going on."""

    def __init__(
        self, console: Console, flags: list[str], document: str, num_tokens: int, *, api_key: str, clock: Clock | None = None
    ) -> None:
        self._console = console
        self._flags = flags
        self._document = document
        self._num_tokens = num_tokens
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._clock = clock or SystemClock()
        self._steps: list[Step] = []
        self._client: httpx2.Client
        self._model = ""

    def walk(self) -> Report:
        self._print("Anaphora computes once and reuses everywhere. Here is what that means on a long document.", style="bold")
        self._heading("1. Start the server")
        with self._server() as start_s:
            engine = self._engine()
            document_tokens = self._cut_document()
            self._say(
                f"The document: War and Peace, from its beginning, {document_tokens:,} tokens. It is the system prompt of "
                "every question below. Watch the times; a small model's answers are not its strong side."
            )
            self._first_process(document_tokens)
        self._heading("5. Stop the server, and start it again")
        with self._server() as restart_s:
            self._second_process(document_tokens)
        report = Report(tuple(self._steps), engine, document_tokens, start_s, restart_s)
        self._close(report)
        return report

    # -- the steps -----------------------------------------------------------------------------------------------------

    def _first_process(self, document_tokens: int) -> None:
        self._heading("2. Cold: the first question")
        cold = self._ask("cold", "computed", [_user(FIRST)])
        shared = document_tokens - SLACK

        self._heading("3. Warm: another question about the same document, then a follow-up")
        warm = self._ask("warm", "KV in memory", [_user(SECOND)], at_least=shared, faster_than=cold)
        self._compare(warm, cold)
        conversation = [_user(SECOND), {"role": "assistant", "content": warm.turn.text}, _user(FOLLOW_UP)]
        at_least = max(shared, warm.turn.prompt_tokens - SLACK)
        followed = self._ask("follow-up", "KV in memory", conversation, at_least=at_least, faster_than=cold)
        own = followed.turn.reused_tokens - warm.turn.prompt_tokens
        if own > 0:
            self._say(f"Reused are the document, the question before, and {own} tokens of the model's own answer to it.")

        self._heading("4. The first question once more, through the other API")
        again = self._ask("repeated", "answer in memory", [_user(FIRST)], "Anthropic", same_as=cold)
        self._compare(again, cold)

    def _second_process(self, document_tokens: int) -> None:
        cold = self._steps[0]
        again = self._ask("repeated", "answer on disk", [_user(FIRST)], same_as=cold)
        self._compare(again, cold)
        self._say("Answers lie on disk, and so does KV: a new question about the document is warm even now.")
        shared = document_tokens - SLACK
        back = self._ask("after restart", "KV on disk", [_user(AFTER_RESTART)], at_least=shared, faster_than=cold)
        self._compare(back, cold)
        warm = self._ask("warm again", "KV in memory", [_user(LAST)], "Anthropic", at_least=shared, faster_than=cold)
        self._compare(warm, cold)

    def _ask(
        self,
        name: str,
        source: Source,
        messages: list[dict[str, str]],
        format: Format = "OpenAI",
        *,
        at_least: int = 0,
        faster_than: Step | None = None,
        same_as: Step | None = None,
    ) -> Step:
        """Ask, show, and compare with the promise: `at_least` reused tokens (none if 0), `same_as`: a remembered answer."""
        question = messages[-1]["content"]
        self._print(f"\n[{format}] {question}", style="cyan")
        settings = {"model": self._model, "max_tokens": MAX_TOKENS, "temperature": 0}
        with Waiting(self._console, "waiting for the first token") as waiting:

            def write(text: str) -> None:
                waiting.stop()
                self._console.out(text, end="", highlight=False)

            if format == "OpenAI":
                system = [{"role": "system", "content": self._system}]
                turn = ask_openai(self._client, {**settings, "messages": [*system, *messages]}, write, self._clock)
            else:
                turn = ask_anthropic(
                    self._client, {**settings, "system": self._system, "messages": messages}, write, self._clock
                )
        self._console.out("")
        broken = _broken(turn, at_least, faster_than, same_as)
        step = Step(name, format, question, source, turn, broken)
        self._steps.append(step)
        self._print(_facts(step), style="dim")
        for text in broken:
            self._print(f"Not as promised: {text}.", style="bold red")
        return step

    def _compare(self, step: Step, cold: Step) -> None:
        if step.broken or not step.first_token_s:
            return
        saved = "" if step.turn.saved_s is None else f", and {step.turn.saved_s:.1f} s of computing saved"
        self._say(f"First token {cold.first_token_s / step.first_token_s:,.0f} times sooner than cold{saved}.", style="green")

    # -- the server ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _server(self) -> Iterator[float]:
        """A server that is ready; gives the seconds that took."""
        started_s = self._clock.monotonic_s()
        waiting = Waiting(self._console, "starting")
        # The document takes its time, so answers have no time limit. A proxy has no business between these two processes.
        with (
            waiting,
            OwnServer(self._flags, waiting.stage) as server,
            httpx2.Client(base_url=server.url, headers=self._headers, timeout=None, trust_env=False) as client,
        ):
            server.wait_until_ready(client)
            waiting.stop()
            self._client = client
            self._model = self._first_model()
            took_s = self._clock.monotonic_s() - started_s
            self._say(f"{self._shown_engine()} at {server.url}, ready after {took_s:.1f} s.")
            yield took_s

    def _engine(self) -> dict[str, Any]:
        response = self._client.get("/anaphora/stats")
        check(response)
        backend: dict[str, Any] = response.json()["backend"]
        return backend

    def _shown_engine(self) -> str:
        engine = self._engine()
        if "dtype" not in engine:
            return self._model
        return f"{self._model} ({engine['dtype']}, {engine['device']}, {engine['context_tokens']:,} tokens of context)"

    def _first_model(self) -> str:
        response = self._client.get("/v1/models")
        check(response)
        models = response.json()["data"]
        if not models:
            raise ServerProblem("the server has no model")
        return str(models[0]["id"])

    def _cut_document(self) -> int:
        """Shorten the document to the tokens asked for, and to what the model can hold. Returns how many it has now."""
        context = self._engine().get("context_tokens", self._num_tokens + ROOM)
        wanted = min(self._num_tokens, context - ROOM)
        if wanted < MIN_TOKENS:
            raise ServerProblem(f"a context of {context} tokens is too short for the demo")
        while (num_tokens := self._count()) > wanted:
            self._document = self._document[: len(self._document) * wanted // num_tokens].rpartition(" ")[0]
        return num_tokens

    def _count(self) -> int:
        body = {"model": self._model, "system": self._system, "messages": [_user("")]}
        response = self._client.post("/v1/messages/count_tokens", json=body, headers={"anthropic-version": "2023-06-01"})
        check(response)
        return int(response.json()["input_tokens"])

    @property
    def _system(self) -> str:
        return INSTRUCTION + self._document

    # -- telling -------------------------------------------------------------------------------------------------------

    def _close(self, report: Report) -> None:
        table = Table(
            "step", "API", "first token", "tokens reused", "of", "from", title="In short", box=None, title_justify="left"
        )
        for name in ("first token", "tokens reused", "of"):
            next(column for column in table.columns if column.header == name).justify = "right"
        for number, step in enumerate(report.steps):
            if number and step.source == "answer on disk":
                table.add_row("(restart)")
            reused = "all" if step.turn.hit else f"{step.turn.reused_tokens:,}"
            time = _duration(step.first_token_s)
            source = step.source if not step.broken else "NOT AS PROMISED"
            table.add_row(step.name, step.format, time, reused, f"{step.turn.prompt_tokens:,}", source)
        self._console.out("")
        self._console.print(table)
        share = report.computed_tokens / report.prompt_tokens
        self._print(
            f"\nOf {report.prompt_tokens:,} prompt tokens asked about, {report.computed_tokens:,} were computed ({share:.0%})."
        )
        if report.ok:
            self._print(
                "Now yours: `make serve`, or `anaphora serve`, and any OpenAI or Anthropic client; see docs/quickstart.md."
            )
        else:
            self._print("Not everything was as promised; see above.", style="bold red")

    def _heading(self, text: str) -> None:
        self._print(f"\n{text}", style="bold")

    def _say(self, text: str, style: str = "") -> None:
        self._print(text, style=style)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style or None, soft_wrap=not self._console.is_terminal)


def _broken(turn: Turn, at_least: int, faster_than: Step | None, same_as: Step | None) -> tuple[str, ...]:
    """What is not as a step promises."""
    broken = []
    if same_as is not None:
        if not turn.hit:
            broken.append(f"the answer was computed again (cache-status: {turn.cache_status})")
        if turn.text != same_as.turn.text:
            broken.append("it is another answer")
        return tuple(broken)
    if turn.hit:
        broken.append("the answer came from the cache")
    if not at_least and turn.reused_tokens:
        broken.append(f"{turn.reused_tokens:,} tokens were reused, so it was not cold")
    if turn.reused_tokens < at_least:
        broken.append(f"{turn.reused_tokens:,} tokens were reused, and at least {at_least:,} should have been")
    if faster_than is not None and (turn.first_token_s or turn.total_s) >= faster_than.first_token_s:
        broken.append("its first token came no sooner than cold")
    return tuple(broken)


def _facts(step: Step) -> str:
    turn = step.turn
    first = f"first token after {_duration(step.first_token_s)}"
    if turn.hit:
        return f"{first} · nothing computed · cache-status: {turn.cache_status}"
    reused = f"{turn.reused_tokens:,} of {turn.prompt_tokens:,} prompt tokens reused"
    return f"{first} · {reused} · {turn.output_tokens} tokens in {turn.total_s:.1f} s"


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
