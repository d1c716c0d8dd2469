"""A hosted API, or any other server that speaks one of its dialects, as a backend: one HTTP request for one answer.

A body of the upstream's own dialect goes out as it came in, apart from the model's name, and what comes back is passed on
event by event (`types.Raw`) beside what it means. Any other request is written down anew (`wire.upstream`).

`run` is one attempt. What may be tried again, and where, is in the `UpstreamFailed` it raises; trying is the fleet's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import msgspec

from anaphora import __version__
from anaphora.backends.base import Foreign, Forwarded
from anaphora.backends.http import Http, Reply, Unreachable
from anaphora.backends.optimising import OptimiserOptions, Optimising, Sending
from anaphora.backends.upstream_replies import (
    OF_THE_CONNECTION,
    client_headers,
    is_repeatable,
    kv_reused_tokens,
    meant,
    retry_after_s,
    with_headers,
    with_reused,
)
from anaphora.clock import Clock, SystemClock
from anaphora.errors import BackendFailed, ConfigError, InvalidRequest, NotFound, ServiceError, UpstreamFailed
from anaphora.patience import HELD_UP_S, Patience
from anaphora.types import (
    Begin,
    Delta,
    End,
    Finish,
    MediaPart,
    ModelInfo,
    Raw,
    Request,
    Scope,
    TextDelta,
    ThinkingDelta,
    ToolUseDelta,
    Usage,
)
from anaphora.wire.base import encode
from anaphora.wire.fields import Json
from anaphora.wire.upstream import UpstreamDialect

ANTHROPIC_VERSION = "2023-06-01"
"""Sent where the client said none."""

_NO_TOKEN, _NO_MORE, _NOT_OVER = "no first token came", "nothing more came", "the answer was not over"

_MAX_ERROR_BODY = 1 << 20
_TEXT_S, _TOKENIZE_S, _MAX_TEXT = 5.0, 10.0, 1 << 24


class UpstreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As in `config.UpstreamConfig`, with the key itself."""

    name: str
    base_url: str
    anthropic: bool = False
    key: str = msgspec.field(default="")
    models: tuple[str, ...] = ("*",)
    rename: dict[str, str] = {}
    headers: dict[str, str] = {}
    other_paths: tuple[str, ...] = ()
    ca_file: str = ""
    connect_s: float = 5.0
    first_s: float = 120.0
    between_s: float = 60.0
    total_s: float = 1800.0
    max_concurrency: int = 0
    optimiser: OptimiserOptions = OptimiserOptions()

    def __repr__(self) -> str:
        return f"UpstreamOptions({self.name!r}, {self.base_url!r})"


class Upstream:
    """A `Backend`. `dialects` are those it speaks; what is of none of them is written in the first."""

    def __init__(
        self,
        options: UpstreamOptions,
        dialects: Mapping[str, UpstreamDialect],
        *,
        optimising: Optimising | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.options = options
        self.name = options.name
        self._dialects = dict(dialects)
        self._main = next(iter(dialects.values()))
        self._optimising = optimising
        self._clock = clock or SystemClock()
        self._base = options.base_url.rstrip("/").removesuffix("/v1")
        headers = {"user-agent": f"anaphora/{__version__}", "accept": "*/*", "accept-encoding": "identity", **options.headers}
        self._http = Http(self._base, connect_s=options.connect_s, ca_file=options.ca_file, headers=headers)
        self._slots = asyncio.Semaphore(options.max_concurrency) if options.max_concurrency else None
        self.num_running = 0
        self._finishing: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_requests = 0
        self._num_failed = 0

    # -- what it is asked for ----------------------------------------------------------------------------------------------

    def serves(self, model: str) -> int | None:
        """How exactly it names `model`: the number of letters that its best pattern spells out. None: not at all."""
        found = [_literal(pattern) for pattern in self.options.models if fnmatchcase(model, pattern)]
        return max(found, default=None)

    def speaks(self, dialect: str) -> bool:
        return dialect in self._dialects

    # -- Backend -------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        try:
            await self._http.start()
        except ConfigError as error:
            raise ConfigError(f"gateway.upstreams: {self.name}: {error}") from error

    def ready(self) -> bool:
        return self._http.started

    async def models(self) -> tuple[ModelInfo, ...]:
        """Those that the configuration names; a pattern names none."""
        return tuple([ModelInfo(name) for name in self.options.models if not _is_pattern(name)])

    async def run(self, request: Request) -> AsyncGenerator[Delta, None]:
        async with aclosing(self.bursts(request)) as bursts:
            async for burst in bursts:
                for delta in burst:
                    yield delta

    def bursts(self, request: Request, optimiser: OptimiserOptions | None = None) -> AsyncGenerator[list[Delta], None]:
        """As `run`, whatever came at once as one. `optimiser`: instead of the upstream's own settings."""
        dialect, body = self._written(request)
        sending = None
        if self._optimising is not None:
            options = self.options.optimiser if optimiser is None else optimiser
            sending = self._optimising.prepare(request, dialect.name, body, self.name, options)
        if sending is None:
            return self._answer(self._request(request, dialect.path, encode(body)), dialect, body)
        return self._optimised(request, dialect, body, sending)

    async def _optimised(
        self, request: Request, dialect: UpstreamDialect, body: Json, sending: Sending
    ) -> AsyncGenerator[list[Delta], None]:
        try:
            await sending.wait()
            sent = self._request(request, dialect.path, encode(sending.body), sending.headers)
            async with aclosing(self._answer(sent, dialect, body)) as bursts:
                async for burst in bursts:
                    yield _told(burst, sending)
        finally:
            sending.over()

    async def _answer(self, sent: _Sent, dialect: UpstreamDialect, body: Json) -> AsyncGenerator[list[Delta], None]:
        """Lists of deltas as they come. Raises UpstreamFailed where they stop coming, or take longer than they may. `body` is
        what the answer's reader knows of, whatever is sent."""
        started_s = self._clock.monotonic_s()
        if self._slots is not None:
            await self._slots.acquire()
        self.num_running += 1
        self._idle.clear()
        self._num_requests += 1
        try:
            reply = await self._begun(sent, dialect, body)
            try:
                headers, reused = client_headers(reply.headers, self.name), kv_reused_tokens(reply.headers)
                reader = dialect.reader(body) if body.get("stream") else None
                said = False
                while not reply.over:
                    if reader is None:
                        burst, failure = dialect.read_whole(await self._whole(reply, started_s)), None
                    else:
                        burst, failure = meant(reader, await self._chunk(reply, started_s, said=said))
                    if burst:
                        said = said or any(not isinstance(delta, Raw | Begin | Finish) for delta in burst)
                        if headers:
                            burst, headers = [with_headers(burst[0], headers), *burst[1:]], ()
                        # Whoever has the end of an answer reads no further, but its connection is good for the next one.
                        reply.over = reader is None or isinstance(burst[-1], End)
                        if isinstance(burst[-1], End):
                            burst[-1] = msgspec.structs.replace(burst[-1], compute_s=self._clock.monotonic_s() - started_s)
                        yield [with_reused(delta, reused) for delta in burst] if reused else burst
                    if failure is not None:
                        raise failure
            finally:
                if reply.over:
                    self._finish(reply)
                else:
                    reply.close()
        except Unreachable as error:
            self._num_failed += 1
            raise self._unreachable(error, body) from error
        except ServiceError:
            self._num_failed += 1
            raise
        finally:
            self.num_running -= 1
            if not self.num_running:
                self._idle.set()
            if self._slots is not None:
                self._slots.release()

    def _finish(self, reply: Reply) -> None:
        if reply.at_end:
            reply.close()
            return
        task = asyncio.create_task(reply.finish(), name="anaphora-finish")
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def ping(self, request: Request, body: Json) -> Usage:
        """Send `body` for what it does to the provider's cache; what it cost. Raises UpstreamFailed."""
        dialect = self._main
        whole = {name: value for name, value in body.items() if name != "stream"}
        sent = self._request(request, dialect.path, encode(whole))
        try:
            reply = await self._begun(sent, dialect, whole)
            try:
                async with Patience(self.options.first_s):
                    data = await reply.read()
            finally:
                reply.close()
        except TimeoutError as error:
            raise self._late(_NOT_OVER, self.options.first_s) from error
        except Unreachable as error:
            raise self._unreachable(error, whole) from error
        return next((delta.usage for delta in dialect.read_whole(data) if isinstance(delta, End)), Usage())

    async def count_tokens(self, request: Request) -> int:
        """By the way that its dialect has, or by vLLM's `/tokenize`. Raises NotFound where it has neither."""
        native = request.native
        if not self.options.anthropic:
            return await self._count_tokenized(request)
        dialect = self._main
        if native is not None and native.dialect == dialect.name:
            body = dialect.passed(native.body, model=self.model_there(request.model))
        else:
            body = dialect.write(request, model=self.model_there(request.model))
            for key in ("max_tokens", "stream"):
                body.pop(key, None)
        sent = self._request(request, f"{dialect.path}/count_tokens", encode(body))
        try:
            async with Patience(self.options.first_s):
                reply = await self._head(sent, dialect, body)
                try:
                    data = await reply.read()
                finally:
                    reply.close()
        except TimeoutError as error:
            raise self._late("it did not count", self.options.first_s) from error
        except Unreachable as error:
            raise self._unreachable(error, body) from error
        try:
            return msgspec.json.decode(data, type=_Counted).input_tokens
        except msgspec.MsgspecError as error:
            raise UpstreamFailed(f"The upstream {self.name} answered with something else than a count.", 502) from error

    async def _count_tokenized(self, request: Request) -> int:
        try:
            tokens = await self.tokenize(request)
        except NotFound:
            tokens = []
        if not tokens:
            raise NotFound(f"The upstream {self.name} has no way to count tokens.", code="no_token_count")
        return len(tokens)

    async def tokenize(self, request: Request) -> list[int]:
        """The tokens of the prompt, by vLLM's `/tokenize`; none of one that is more than words. Raises NotFound where the
        upstream has no such thing, UpstreamFailed where it does not answer."""
        body = self._to_tokenize(request)
        if body is None:
            return []
        status, data = await self._small(self._request(request, "/tokenize", encode(body)), body, _TOKENIZE_S)
        if status in (404, 405, 501):
            raise NotFound(f"The upstream {self.name} has no /tokenize.", code="no_tokenize")
        try:
            return msgspec.json.decode(data, type=_Tokenized).tokens
        except msgspec.MsgspecError as error:
            raise UpstreamFailed(f"The upstream {self.name} answered with something else than tokens.", 502) from error

    async def adapters(self, request: Request) -> frozenset[str]:
        """Those of its models that are adapters of another one, as vLLM tells them; `request` is asked for the key. Raises
        UpstreamFailed where it cannot be reached."""
        sent = _Sent("GET", f"{self._base}/v1/models", b"", self._authorisation(request))
        _, data = await self._small(sent, {}, _TEXT_S)
        try:
            listed = msgspec.json.decode(data, type=_Listed).data
        except msgspec.MsgspecError:
            return frozenset()
        return frozenset([model.id for model in listed if model.parent is not None])

    def model_there(self, name: str) -> str:
        """What it calls the model."""
        return self.options.rename.get(name, name)

    def _to_tokenize(self, request: Request) -> Json | None:
        words = all(not isinstance(part, MediaPart) for message in request.messages for part in message.content)
        if not words or (request.native is not None and request.native.unread):
            return None
        request = msgspec.structs.replace(request, cache_salt=None)  # it changes no token
        dialect, body = self._written(request)
        if dialect.name not in ("openai_chat", "openai_completions"):
            if (chat := self._dialects.get("openai_chat")) is None:
                return None
            body = chat.write(request, model=self.model_there(request.model))
        found = {name: body[name] for name in _TOKENIZED if name in body}
        return found if "messages" in found or isinstance(found.get("prompt"), str) else None

    def has(self, path: str) -> bool:
        """Whether clients may ask for what Anaphora itself does not know at `path`."""
        path = path.partition("?")[0]
        return not self.options.key or any(fnmatchcase(path, pattern) for pattern in self.options.other_paths)

    async def forward(self, asked: Foreign) -> Forwarded:
        """Raises UpstreamFailed where it cannot be reached."""
        native = asked.native
        key = self._key_header() or ((native.credential,) if native.credential is not None else ())
        headers = dict((*native.headers, *key))
        sent = _Sent(asked.method, self._base + asked.path, native.body, headers)
        try:
            async with Patience(self.options.first_s):
                reply = await self._http.send(*sent)
        except TimeoutError as error:
            raise self._late("no answer came", self.options.first_s) from error
        except Unreachable as error:
            raise self._unreachable(error, {"store": True}) from error
        passed = [(name, value) for name, value in reply.headers.items() if name not in OF_THE_CONNECTION]
        return Forwarded(reply.status, (*passed, ("x-anaphora-upstream", self.name)), self._chunks(reply))

    async def _chunks(self, reply: Reply) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(reply.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Unreachable as error:
            raise BackendFailed(f"The upstream {self.name} cut its answer off.") from error

    async def forget(self, scope: Scope) -> int:
        return 0  # it keeps nothing for us

    async def stats(self) -> dict[str, Any]:
        return {
            "num_requests_running": self.num_running,
            "num_requests": self._num_requests,
            "num_requests_failed": self._num_failed,
        }

    async def text(self, path: str) -> str:
        """What it says at `path`, a few seconds at most. Raises UpstreamFailed."""
        status, data = await self._small(_Sent("GET", self._base + path, b"", dict(self._key_header())), {}, _TEXT_S)
        if status != 200:
            raise UpstreamFailed(f"The upstream {self.name} has nothing at {path}: status {status}.", 502)
        return data.decode("utf-8", "replace")

    async def _small(self, sent: _Sent, body: Json, within_s: float) -> tuple[int, bytes]:
        """Status and body of an answer, whatever it says, to what was sent: `body`. Raises UpstreamFailed where none comes."""
        try:
            async with Patience(within_s):
                reply = await self._http.send(*sent)
                try:
                    return reply.status, await reply.read(_MAX_TEXT)
                finally:
                    reply.close()
        except TimeoutError as error:
            raise self._late("no answer came", within_s) from error
        except Unreachable as error:
            raise self._unreachable(error, body) from error

    async def leave(self) -> None:
        """Answer what was asked, and close."""
        try:
            await self._idle.wait()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    # -- the request ---------------------------------------------------------------------------------------------------------

    def _written(self, request: Request) -> tuple[UpstreamDialect, Json]:
        native, model = request.native, self.model_there(request.model)
        if native is not None and (own := self._dialects.get(native.dialect)) is not None:
            return own, own.passed(native.body, model=model)
        if native is not None and native.unread:
            raise InvalidRequest(native.unread)
        return self._main, self._main.write(request, model=model)

    def _request(self, request: Request, path: str, data: bytes, further: dict[str, str] | None = None) -> _Sent:
        native = request.native
        headers = {"content-type": "application/json"}
        if native is not None and native.dialect in self._dialects:
            headers |= dict(native.headers)
        if self.options.anthropic:
            headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
        headers |= {name: value for name, value in (further or {}).items() if name not in headers}
        headers |= self._authorisation(request)
        return _Sent("POST", self._base + path, data, headers)

    def _authorisation(self, request: Request) -> dict[str, str]:
        if own := self._key_header():
            return dict(own)
        native = request.native
        if native is None or native.credential is None or native.dialect not in self._dialects:
            return {}
        name, value = native.credential
        return {name: value}

    def _key_header(self) -> tuple[tuple[str, str], ...]:
        key = self.options.key
        if not key:
            return ()
        return (("x-api-key", key) if self.options.anthropic else ("authorization", f"Bearer {key}"),)

    # -- the answer ----------------------------------------------------------------------------------------------------------

    async def _begun(self, sent: _Sent, dialect: UpstreamDialect, body: Json) -> Reply:
        """An answer that has begun. One that is not streamed has when it is nearly there, so it may take all the time."""
        what, within_s = _NOT_OVER, self.options.total_s
        if body.get("stream") and self.options.first_s < within_s:
            what, within_s = _NO_TOKEN, self.options.first_s
        try:
            async with Patience(within_s):
                return await self._head(sent, dialect, body)
        except TimeoutError as error:
            raise self._late(what, within_s) from error

    async def _head(self, sent: _Sent, dialect: UpstreamDialect, body: Json) -> Reply:
        reply = await self._http.send(*sent)
        if reply.status == 200:
            return reply
        try:
            data = await reply.read(_MAX_ERROR_BODY)
        finally:
            reply.close()
        raise self._refused(reply, data, dialect, body)

    async def _whole(self, reply: Reply, started_s: float) -> bytes:
        try:
            # What has come by now is read, however long this process did not look.
            async with Patience(max(HELD_UP_S, self.options.total_s - (self._clock.monotonic_s() - started_s))):
                return await reply.read()
        except TimeoutError as error:
            raise self._late(_NOT_OVER, self.options.total_s) from error

    async def _chunk(self, reply: Reply, started_s: float, *, said: bool) -> bytes:
        """The next piece of a stream, of which something was `said` or not yet."""
        options = self.options
        spent_s = self._clock.monotonic_s() - started_s
        what, allowed_s = (_NO_MORE, options.between_s) if said else (_NO_TOKEN, options.first_s)
        within_s = allowed_s if said else allowed_s - spent_s
        left_s = options.total_s - spent_s
        if left_s < within_s:
            what, allowed_s, within_s = _NOT_OVER, options.total_s, left_s
        try:
            chunk = await reply.chunk(max(HELD_UP_S, within_s))
        except TimeoutError as error:
            raise self._late(what, allowed_s, elsewhere=not said) from error
        if not chunk:
            raise BackendFailed(f"The upstream {self.name} cut its answer off.")
        return chunk

    # -- what goes wrong ---------------------------------------------------------------------------------------------------

    def _refused(self, reply: Reply, data: bytes, dialect: UpstreamDialect, body: Json) -> UpstreamFailed:
        status = reply.status
        error = dialect.read_error(status, data)
        advice = reply.headers.get("x-should-retry")
        not_done = status in (429, 503, 529)
        again = advice == "true" or (advice != "false" and (not_done or (status in (500, 502) and is_repeatable(body))))
        message = f"{self.name}: {error.message}"
        if status in (401, 403) and self.options.key:
            # Ours is the key that was refused, so there is nothing the client could mend.
            return UpstreamFailed(f"The upstream {self.name} refused its API key.", 502, code="upstream_auth", elsewhere=True)
        if status < 400:
            message, status = f"The upstream {self.name} answered with status {status}.", 502
        return UpstreamFailed(
            message,
            status,
            param=error.param,
            code=error.code,
            retry_after_s=retry_after_s(reply.headers),
            elsewhere=status >= 500 or status in (408, 429) or (status == 404 and error.code != "not_found_error"),
            again=again,
            dialect=dialect.name,
            body=data if error.readable else b"",
        )

    def _unreachable(self, error: Unreachable, body: Json) -> UpstreamFailed:
        what = "cannot be reached" if error.unsent else "broke the connection"
        return UpstreamFailed(
            f"The upstream {self.name} {what}: {error}",
            502,
            code="upstream_unreachable",
            elsewhere=True,
            again=error.unsent or is_repeatable(body),
        )

    def _late(self, what: str, within_s: float, *, elsewhere: bool = True) -> UpstreamFailed:
        message = f"The upstream {self.name} is too slow: {what} within {within_s:g} s."
        return UpstreamFailed(message, 504, code="upstream_timeout", elsewhere=elsewhere)


class _Sent(NamedTuple):
    """An HTTP request."""

    method: str
    url: str
    body: bytes
    headers: dict[str, str]


class _Counted(msgspec.Struct, frozen=True):
    input_tokens: int


class _Tokenized(msgspec.Struct, frozen=True):
    tokens: list[int]


class _Model(msgspec.Struct, frozen=True):
    id: str
    parent: str | None = None


class _Listed(msgspec.Struct, frozen=True):
    data: list[_Model]


_TOKENIZED = (
    "model",
    "messages",
    "prompt",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
)
"""Fields that make the tokens of a prompt."""


def _told(burst: list[Delta], sending: Sending) -> list[Delta]:
    """With what the optimiser decided, on the first piece; and it is told when an answer begins to say something."""
    if any(isinstance(delta, TextDelta | ThinkingDelta | ToolUseDelta | End) for delta in burst):
        sending.begun()
    first = burst[0]
    if isinstance(first, Raw) and first.headers:
        headers = (*first.headers, ("x-anaphora-optimiser", sending.summary))
        return [msgspec.structs.replace(first, headers=headers), *burst[1:]]
    return burst


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _literal(pattern: str) -> int:
    """Letters that `pattern` spells out; a name without wildcards counts more than any pattern."""
    return len(pattern) + 1000 if not _is_pattern(pattern) else len(pattern.replace("*", "").replace("?", ""))
