"""From sampled tokens to deltas, for one choice: detokenise, cut at stop strings, parse tool calls, attach log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from anaphora.backends.engine_sampling import Sampled
from anaphora.backends.engine_text import Detokenizer, StopStrings, ToolCallParser
from anaphora.types import Delta, TextDelta, TokenLogprob, ToolUseDelta, TopLogprob


class Output:
    def __init__(
        self,
        choice: int,
        detokenizer: Detokenizer,
        stops: StopStrings,
        tools: ToolCallParser | None,
        token_text: Callable[[int], str],
        *,
        one_call: bool = False,
    ) -> None:
        """`one_call`: the answer ends with its first tool call (`tool_choice.parallel` is false)."""
        self._choice = choice
        self._detokenizer = detokenizer
        self._stops = stops
        self._tools = tools
        self._token_text = token_text
        self._one_call = one_call
        self._logprobs: list[TokenLogprob] = []
        """Of tokens whose text is still held back: they go out with the next text."""
        self.stopped_by: str | None = None
        self.called_tools = False

    @property
    def complete(self) -> bool:
        """Whether more tokens would add nothing."""
        return self._one_call and self.called_tools

    def push(self, sampled: Sampled) -> list[Delta]:
        """The deltas that became final with one more token."""
        if sampled.logprob is not None:
            top = tuple(TopLogprob(self._token_text(token), logprob) for token, logprob in sampled.top)
            self._logprobs.append(TokenLogprob(self._token_text(sampled.token), sampled.logprob, top))
        return self._cut(self._detokenizer.push(sampled.token))

    def finish(self) -> list[Delta]:
        """What was held back. After a stop string there is nothing left to say."""
        deltas: list[Delta] = []
        if self.stopped_by is None:
            deltas += self._cut(self._detokenizer.flush())
        if self.stopped_by is None:
            deltas += self._parse(self._stops.flush())
        if self._tools is not None:
            deltas += self._label(self._tools.flush())
        if self._logprobs:
            deltas += self._label([TextDelta(self._choice, "")])
        return deltas

    def _cut(self, text: str) -> list[Delta]:
        text, self.stopped_by = self._stops.push(text)
        return self._parse(text)

    def _parse(self, text: str) -> list[Delta]:
        if not text:
            return []
        return list(self._label([TextDelta(self._choice, text)] if self._tools is None else self._tools.push(text)))

    def _label(self, deltas: Iterable[TextDelta | ToolUseDelta]) -> Iterator[Delta]:
        for delta in deltas:
            if self.complete and not (isinstance(delta, TextDelta) and not delta.text):
                continue
            if isinstance(delta, TextDelta):
                yield TextDelta(self._choice, delta.text, tuple(self._logprobs))
                self._logprobs = []
            else:
                self.called_tools = True
                yield delta
