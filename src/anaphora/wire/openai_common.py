"""What OpenAI's three dialects share: how errors are worded, tool definitions, media, log-probabilities, models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from anaphora.errors import (
    ContextTooLong,
    InvalidRequest,
    LimitReached,
    ModelNotFound,
    NotCached,
    ServiceError,
    Unauthenticated,
)
from anaphora.types import FinishReason, MediaPart, ModelInfo, Sampling, Tenant, TokenLogprob, Tool, ToolChoice, Usage
from anaphora.wire.base import Dialect, Parsed, Rendering, encode, read_sampling, settled_choice, tool_extra
from anaphora.wire.fields import (
    FieldError,
    Json,
    bad_value,
    decode_object,
    named,
    object_,
    only,
    opt_bool,
    opt_int,
    opt_object,
    opt_string,
    string,
    type_name,
    unsupported,
    wrong_type,
)
from anaphora.wire.openai_prompt import MARK, one_of

MAX_CHOICES = 128
FINISH_REASONS: dict[FinishReason, str] = {
    "end_turn": "stop",
    "max_tokens": "length",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class OpenAIDialect(Dialect):
    """Parsing frame and errors of all OpenAI dialects."""

    def parse(self, body: bytes, *, tenant: Tenant, version: str | None = None) -> Parsed:
        fields = decode_object(body)
        try:
            return self._read(fields, tenant)
        except FieldError as error:
            raise refusal(error) from error

    def _read(self, body: Json, tenant: Tenant) -> Parsed:
        raise NotImplementedError

    def render_error(self, error: ServiceError, request_id: str) -> tuple[int, bytes, dict[str, str]]:
        headers = {"content-type": "application/json", "x-request-id": request_id}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error, NotCached) or (isinstance(error, LimitReached) and not error.soon):
            headers["x-should-retry"] = "false"  # SDKs would by themselves; nothing will be otherwise a second later
        elif error.status in (429, 503):
            headers["x-should-retry"] = "true"
        status = 503 if error.status == 529 else error.status  # Anthropic's word for overloaded
        return status, encode({"error": error_object(error)}), headers


# -- body → Request ------------------------------------------------------------------------------------------------------


def read_stream(body: Json) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = opt_bool(body, "stream", False)
    options = opt_object(body, "stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise bad_value("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    try:
        return stream, opt_bool(options, "include_usage", False)
    except FieldError as error:
        error.under("stream_options")
        raise


def read_n(body: Json) -> int:
    return opt_int(body, "n", 1, MAX_CHOICES) or 1


def openai_sampling(body: Json, *, stop: tuple[str, ...] = (), n: int = 1, logprobs: int | None = None) -> Sampling:
    return read_sampling(body, max_temperature=2, stop=stop, n=n, logprobs=logprobs)


def check_neutral(body: Json) -> None:
    """Fields that are dropped must at least have the right type."""
    opt_object(body, "metadata")
    opt_bool(body, "store", False)
    opt_string(body, "user")


def function_tool(tool: Json) -> Tool:
    """The object with `name`, `description`, `parameters`: nested in Chat, flat in Responses."""
    if tool.get(MARK) is not None:
        raise FieldError("unknown", MARK)
    return Tool(
        name=named(tool, "name"),
        description=opt_string(tool, "description") or "",
        parameters=opt_object(tool, "parameters") or {},
        extra=tool_extra(tool, _TOOL_FIELDS),
    )


_TOOL_FIELDS = frozenset({"type", "name", "description", "parameters", "cache_control"})


def check_function_type(owner: Json) -> None:
    kind = string(owner, "type")
    if kind != "function":
        raise unsupported(f"Tools of type '{kind}' are not supported: only functions are.", "type")


def read_tool_choice(body: Json, tools: Sequence[Tool], function_name: Callable[[Json], str]) -> ToolChoice:
    """`tool_choice` and `parallel_tool_calls`. `function_name` finds the name in a choice of one function."""
    parallel = opt_bool(body, "parallel_tool_calls", True)
    match body.get("tool_choice"):
        case None | "auto":
            choice = ToolChoice(parallel=parallel)
        case "none":
            choice = ToolChoice("none")
        case "required":
            choice = ToolChoice("any", parallel=parallel)
        case str(word):
            raise bad_value(one_of(word, "none", "auto", "required"), "tool_choice")
        case dict(named_choice):
            try:
                check_function_type(named_choice)
                choice = ToolChoice("tool", function_name(named_choice), parallel)
            except FieldError as error:
                error.under("tool_choice")
                raise
        case other:
            raise wrong_type("string", other, "tool_choice")
    return settled_choice(choice, tools, "tool_choice")


TEXT_FIELDS = frozenset({"type", "text", "cache_control"})
MARKED_TEXT_FIELDS = TEXT_FIELDS | {MARK}


def image_from_url(url: str, detail: str | None) -> MediaPart:
    """`detail` "auto" is the default, so it is not kept."""
    options: Json = {} if detail in (None, "auto") else {"detail": detail}
    if not url.startswith("data:"):
        return MediaPart("image", "", {"url": url}, options)
    media_type, data = split_data_url(url)
    return MediaPart("image", media_type, {"base64": data}, options)


def split_data_url(url: str) -> tuple[str, str]:
    """(media type, base64)."""
    head, comma, data = url.removeprefix("data:").partition(",")
    if not comma or not head.endswith(";base64"):
        raise bad_value("Only data URLs of the form 'data:<media type>;base64,<data>' are supported.")
    return head.removesuffix(";base64"), data


def file_part(file: Json) -> MediaPart:
    """Chat's `file` object and Responses' `input_file` part have the same fields."""
    only(file, _FILE_FIELDS)
    name = opt_string(file, "filename")
    options: Json = {} if name is None else {"title": name}
    if (file_id := opt_string(file, "file_id")) is not None:
        return MediaPart("document", "", {"file_id": file_id}, options)
    if (url := opt_string(file, "file_url")) is not None:
        return MediaPart("document", "", {"url": url}, options)
    data = string(file, "file_data")
    if not data.startswith("data:"):
        return MediaPart("document", "", {"base64": data}, options)
    try:
        media_type, data = split_data_url(data)
    except FieldError as error:
        error.under("file_data")
        raise
    return MediaPart("document", media_type, {"base64": data}, options)


_FILE_FIELDS = frozenset({"type", "file_id", "file_url", "file_data", "filename", "prompt_cache_breakpoint", "cache_control"})


def audio_part(part: Json) -> MediaPart:
    only(part, frozenset({"type", "input_audio", "prompt_cache_breakpoint", "cache_control"}))
    audio = object_(part, "input_audio")
    try:
        return MediaPart("audio", f"audio/{named(audio, 'format')}", {"base64": string(audio, "data")})
    except FieldError as error:
        error.under("input_audio")
        raise


def path_text(path: Sequence[str | int]) -> str:
    """messages[0].content"""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


_TYPE_NAMES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a decimal",
    "boolean": "a boolean",
    "array": "an array",
    "object": "an object",
}


def refusal(error: FieldError) -> InvalidRequest:
    """What is wrong with a field, in OpenAI's words."""
    path = path_text(error.path)
    number = "decimal" if isinstance(error.got, float) else "integer"
    code = "invalid_value"
    match error.kind:
        case "missing":
            sentence, code = f"Missing required parameter: '{path}'.", "missing_required_parameter"
        case "unknown":
            sentence, code = f"Unknown parameter: '{path}'.", "unknown_parameter"
        case "type":
            expected, got = _TYPE_NAMES[error.detail], type_name(error.got)
            sentence, code = f"Invalid type for '{path}': expected {expected}, but got {got} instead.", "invalid_type"
        case "above":
            bound = f"{number} above maximum value. Expected a value <= {error.detail}, but got {error.got} instead."
            sentence, code = f"Invalid '{path}': {bound}", f"{number}_above_max_value"
        case "below":
            bound = f"{number} below minimum value. Expected a value >= {error.detail}, but got {error.got} instead."
            sentence, code = f"Invalid '{path}': {bound}", f"{number}_below_min_value"
        case "unsupported":
            sentence, code = error.detail, "unsupported_parameter"
        case _:
            # Whole sentences stand for themselves; fragments are about the field.
            sentence = error.detail if error.detail[:1].isupper() else f"Invalid '{path}': {error.detail}."
    return InvalidRequest(sentence, param=path, code=code)


# -- answer → body ---------------------------------------------------------------------------------------------------------


def token_logprob(entry: TokenLogprob) -> Json:
    """One token in the format of Chat and Responses."""
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": list(entry.token.encode()),
        "top_logprobs": [{"token": top.token, "logprob": top.logprob, "bytes": list(top.token.encode())} for top in entry.top],
    }


def chat_usage(usage: Usage, rendering: Rendering) -> Json:
    """Usage of Chat and Completions. Tokens read from the cache, and written to it, are part of `prompt_tokens`."""
    details: Json = {"cached_tokens": usage.cache_read_input_tokens}
    if rendering.writes_billed or usage.written:
        details["cache_write_tokens"] = usage.cache_creation_input_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": details,
    }


# -- errors, models ----------------------------------------------------------------------------------------------------------

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ERROR_CODES: dict[type[ServiceError], str] = {
    ContextTooLong: "context_length_exceeded",
    Unauthenticated: "invalid_api_key",
    ModelNotFound: "model_not_found",
    NotCached: "not_cached",
}
_STATUS_CODES = {429: "rate_limit_exceeded", 413: "request_too_large", 503: "engine_unavailable"}


def error_object(error: ServiceError) -> Json:
    """The value of `error` in an error body."""
    code = error.code or _ERROR_CODES.get(type(error)) or _STATUS_CODES.get(error.status)
    kind = _ERROR_TYPES.get(error.status, "server_error")
    return {"message": error.message, "type": kind, "param": error.param, "code": code}


def render_models(models: Sequence[ModelInfo]) -> bytes:
    return encode({"object": "list", "data": [_model(model) for model in models]})


def render_model(model: ModelInfo) -> bytes:
    return encode(_model(model))


def _model(model: ModelInfo) -> Json:
    fields: Json = {"id": model.id, "object": "model", "created": model.created_s, "owned_by": "anaphora"}
    if model.max_input_tokens:
        fields["max_model_len"] = model.max_input_tokens  # vLLM's word for it; OpenAI has none
    return fields
