"""The words everything else is written in: frozen structs without behaviour.

Usage counts use Anthropic's words everywhere inside Anaphora; `wire/` translates them once for each dialect:
`input_tokens` are prompt tokens that were computed (neither read from nor written to a cache at a price),
`cache_read_input_tokens` are prompt tokens whose KV was really reused. The prompt is the sum of the three input counts.
"""

from __future__ import annotations

from typing import Any, Literal, NewType

import msgspec

Tenant = NewType("Tenant", str)
"""Who owns an entry. Comes from the API key, never from a client's header."""

Key = NewType("Key", bytes)
"""32 bytes (SHA-256) that name one cached thing of one tenant. Made only in `keys`."""

BlockHash = NewType("BlockHash", bytes)
"""32 bytes (SHA-256) that name one KV block: its parent, its tokens, and the namespace they live in."""

LOCAL_TENANT = Tenant("local")
"""The one tenant of a server without configured API keys."""


class Owner(msgspec.Struct, frozen=True):
    """Whom an API key stands for."""

    tenant: Tenant
    workspace: str = ""
    """Within a tenant: promises of prompt caching are shared with no other workspace. Everything else is the tenant's."""
    admin: bool = False
    """May change who answers."""


Role = Literal["system", "user", "assistant"]
FinishReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


# -- what is asked -----------------------------------------------------------------------------------------------------


class TextPart(msgspec.Struct, frozen=True, tag="text", omit_defaults=True):
    text: str


class ThinkingPart(msgspec.Struct, frozen=True, tag="thinking", omit_defaults=True):
    text: str
    signature: str = ""


class ToolUsePart(msgspec.Struct, frozen=True, tag="tool_use", omit_defaults=True):
    """The model asks for a tool. `arguments` is JSON text, exactly as it was written."""

    id: str
    name: str
    arguments: str


class ToolResultPart(msgspec.Struct, frozen=True, tag="tool_result", omit_defaults=True):
    tool_use_id: str
    content: tuple[TextPart | MediaPart | ProviderPart, ...]
    is_error: bool = False


class MediaPart(msgspec.Struct, frozen=True, tag="media", omit_defaults=True):
    """An image, a sound or a document. `source` is the dialect-neutral {"base64": ...} | {"url": ...} | {"file_id": ...}."""

    kind: Literal["image", "audio", "document"]
    media_type: str
    source: dict[str, str]
    options: dict[str, Any] = {}


class ProviderPart(msgspec.Struct, frozen=True, tag="provider", omit_defaults=True):
    """A block that only the provider's own model can take (what its server tools did, search results, hidden thinking), kept
    as it was sent. A backend that does not stand for such a model refuses it."""

    kind: str
    body: dict[str, Any]


Part = TextPart | ThinkingPart | ToolUsePart | ToolResultPart | MediaPart | ProviderPart


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tool results are parts of a user message, as in Anthropic's dialect; `wire` folds OpenAI's `tool` role into it."""

    role: Role
    content: tuple[Part, ...]
    name: str | None = None


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    """Fields of the definition that Anaphora does not know (`strict`, ...): kept, and part of the key."""
    kind: str = "custom"
    """Any other is a tool of the provider's own, which only its own models can use."""


class ToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    mode: Literal["auto", "none", "any", "tool"] = "auto"
    name: str | None = None
    parallel: bool = True


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """None means that the request did not say: the backend's own default holds."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    """None: no log-probabilities. 0..20: of the chosen token and that many most likely alternatives."""


class Keep(msgspec.Struct, frozen=True, array_like=True):
    """The first `num_tokens` of a prompt are promised: their KV is not to be evicted for `for_s` seconds."""

    num_tokens: int
    for_s: float


class Native(msgspec.Struct, frozen=True):
    """A body as the client sent it, for an upstream that speaks the same dialect: nothing in it is lost on the way."""

    dialect: str
    """As `wire.base.Dialect.name`."""
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    """Of the client's request, lower-case names: what the provider is to see of them (its API's version and betas)."""
    credential: tuple[str, str] | None = None
    """The client's own key with the name of its header, where upstreams may be asked with it. Never shown."""
    request_id: str = ""
    unread: str = ""
    """Why Anaphora could not read the body: only an upstream of the same dialect may know better."""
    names_usage: bool = False
    """It says something of usage in streams: who does not must not be given the same bytes."""

    def __repr__(self) -> str:
        return f"Native({self.dialect!r}, {len(self.body)} bytes)"


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One question, whatever dialect it came in. Either `messages` or `prompts` is set.

    `extra` holds body fields that Anaphora does not interpret; they are part of the key. Fields on the key's deny-list
    (`stream`, `metadata`, `user`, ...) are not kept here, apart from those the path needs.
    """

    model: str
    tenant: Tenant = LOCAL_TENANT
    messages: tuple[Message, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Raw prompts of `/v1/completions`: text or token ids. Choice index = prompt index * n + i."""
    echo: bool = False
    """`/v1/completions`: put the prompt in front of the answer."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    """None: up to the context's end. 0: pre-warm, prefill only."""
    stream: bool = False
    cache_salt: str | None = None
    """Set by the client: requests with different salts share nothing, in no level."""
    extra: dict[str, Any] = {}
    exact_kv: bool = False
    """Nothing of the answer may rest on KV that was stored with a loss. Set by the client, in a header."""
    keep: tuple[Keep, ...] = ()
    """Set by the gateway where promises are made, or by the client's wish to. No part of the question, so of no key."""
    native: Native | None = None
    """The body itself, where an upstream may answer. It says nothing that is not in the other fields, so it is of no key."""
    variant: str = ""
    """Headers that change what a provider answers (`anthropic-beta`), where an upstream may answer."""


# -- what is answered --------------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one request. Invariant 6: a read that had to be recomputed is not a read."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    written: dict[str, int] = {}
    """`cache_creation_input_tokens` by lifetime ("5m", "1h", "30m", "12h"), where a profile tells them apart."""
    kv_reused_tokens: int = 0
    """Prompt tokens whose KV the engine took from its cache, whatever the dialect's accounting says."""
    details: dict[str, int] = {}
    """Kinds of tokens among those counted above, where an upstream tells: `reasoning` and `audio_output` of the output,
    `audio_input` and `image_input` of the prompt."""
    reads_unsaid: bool = False
    """The upstream says nothing of its cache: that nothing was read is not known."""

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt: computed, read and written."""
        return self.input_tokens + self.cache_read_input_tokens + self.cache_creation_input_tokens


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: str
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """First delta of every answer: the input side of usage is known before the first token."""

    model: str
    usage: Usage
    upstream: str = ""
    """The name of the upstream that answers. Empty: the engine of this server."""
    answer_id: str = ""
    """By which that upstream knows the answer; so do clients of its dialect, to whom the answer goes as it came."""


class TextDelta(msgspec.Struct, frozen=True, tag="text", array_like=True):
    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ThinkingDelta(msgspec.Struct, frozen=True, tag="thinking", array_like=True):
    choice: int
    text: str
    signature: str = ""


class ToolUseDelta(msgspec.Struct, frozen=True, tag="tool_use", array_like=True):
    """`index` counts the tool calls of one choice from 0; one call ends before the next begins. `id` and `name` are set on a
    call's first delta only."""

    choice: int
    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


class Finish(msgspec.Struct, frozen=True, tag="finish", array_like=True):
    choice: int
    reason: FinishReason
    stop_sequence: str | None = None


class End(msgspec.Struct, frozen=True, tag="end", array_like=True):
    """Last delta of a clean answer, exactly one. An answer without it was cut and is never learned."""

    usage: Usage
    compute_s: float = 0.0
    """Seconds the backend spent on this answer: what a later hit saves."""
    faithful: bool = True
    """False: an upstream's answer held more than deltas can say (a citation, a block of an unknown kind). It is not learned."""


class Raw(msgspec.Struct, frozen=True, tag="raw", array_like=True):
    """Bytes of an upstream's answer, as they came: one event of a stream, or a whole body. They mean what the deltas behind
    them say, until the next `Raw`. A client of the same dialect is given these bytes, every other one the deltas."""

    dialect: str
    data: bytes
    headers: tuple[tuple[str, str], ...] = ()
    """Of the answer, on its first `Raw` only: those that are the client's business (rate limits, the request's id)."""


Said = Begin | TextDelta | ThinkingDelta | ToolUseDelta | Finish | End
"""Order: Begin, then per choice its text/thinking/tool deltas and one Finish (choices may interleave), then End."""

Delta = Said | Raw
"""`Raw` may stand anywhere before End, also before Begin."""


class Choice(msgspec.Struct, frozen=True, omit_defaults=True):
    content: tuple[TextPart | ThinkingPart | ToolUsePart, ...]
    reason: FinishReason
    stop_sequence: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


class Completion(msgspec.Struct, frozen=True, omit_defaults=True):
    """A finished answer, in no dialect: what the exact level remembers. Ids and `created` are made when it is rendered."""

    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    compute_s: float = 0.0
    faithful: bool = True
    """As in `End`."""
    upstream: str = ""
    """As in `Begin`."""


# -- about ownership and freshness -------------------------------------------------------------------------------------


class Scope(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to forget: everything that matches all fields that are set. All None means everything."""

    tenant: Tenant | None = None
    tag: str | None = None
    model: str | None = None


class CacheControl(msgspec.Struct, frozen=True, omit_defaults=True):
    """Request directives of RFC 9111 §5.2.1 that Anaphora honours for answers."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age_s: float | None = None
    stale_s: float = 0.0
    """How long past its lifetime an answer may be: `max-stale`."""
    stale_if_error_s: float | None = None
    """The same where no new one can be computed (RFC 5861). None: as the server is set. So below."""
    stale_while_revalidate_s: float | None = None
    """The same while a new one is computed for those who come later."""
    semantic_risk: float | None = None
    """How often an answer to a question in other words may be wrong, as a share of those given. 0: none is wanted. None: as
    the server is set."""


class ModelInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    created_s: int = 0
    max_input_tokens: int = 0
    fingerprint: str = ""
    """Hex digest over weights, tokenizer, template, dtype and block layout: changes when the answers may."""
