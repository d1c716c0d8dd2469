"""What OpenAI's dialects share as upstreams: tools, media, words for the same wish, usage, log-probabilities, errors."""

from __future__ import annotations

import base64

from anaphora.errors import BackendFailed
from anaphora.types import (
    MediaPart,
    Part,
    Request,
    Sampling,
    TextPart,
    TokenLogprob,
    Tool,
    ToolChoice,
    ToolResultPart,
    TopLogprob,
    Usage,
)
from anaphora.wire.fields import Json
from anaphora.wire.upstream import (
    EFFORTS,
    UNKNOWN_FILE,
    UNKNOWN_USAGE,
    UpstreamError,
    cannot_say,
    count_of,
    json_object,
    object_of,
    objects_of,
    text_of,
    unreadable_error,
)

TOOL_FAILED = TextPart("The tool call failed:")
"""Stands before the result of a tool that failed: these dialects have no flag for it."""

MAX_STOPS = 4


# -- Request → body --------------------------------------------------------------------------------------------------------


def from_openai(request: Request) -> bool:
    """Whether `request` came in one of OpenAI's dialects: files have the same ids in all of them."""
    return request.native is not None and request.native.dialect.startswith("openai")


def function(tool: Tool, path: str, *, own: bool) -> Json:
    if tool.kind != "custom":
        raise cannot_say(path, f"a tool of the kind '{tool.kind}' exists only at Anthropic's API")
    if not own:
        for field in tool.extra:
            if field != "strict":
                raise cannot_say(f"{path}.{field}", "this upstream does not have it")
    described = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **described, "parameters": tool.parameters, **tool.extra}


def tool_choice(choice: ToolChoice, named: Json) -> Json:
    """`named`: how the dialect names the one function that must be called."""
    fields: Json = {}
    if choice.mode == "tool":
        fields["tool_choice"] = {"type": "function", **named}
    elif choice.mode != "auto":
        fields["tool_choice"] = "required" if choice.mode == "any" else "none"
    if not choice.parallel:
        fields["parallel_tool_calls"] = False
    return fields


def result_content(part: ToolResultPart) -> tuple[Part, ...]:
    return (TOOL_FAILED, *part.content) if part.is_error else part.content


def file_fields(part: MediaPart, path: str, *, own: bool, ids: bool) -> Json:
    """Of a document. `ids`: files have the same ids there as where the request came from."""
    for option in part.options:
        if option != "title":
            raise cannot_say(f"{path}.{option}", "this upstream does not have it")
    name = part.options.get("title")
    named: Json = {} if name is None else {"filename": name}
    source = part.source
    if (file_id := source.get("file_id")) is not None:
        _check_id(path, ids)
        return {"file_id": file_id, **named}
    if (url := source.get("url")) is not None:
        return {"file_url": url, **named}
    if (text := source.get("text")) is not None:
        data, media_type = base64.b64encode(text.encode()).decode(), "text/plain"
    else:
        data, media_type = source["base64"], part.media_type
    if not own and name is None:
        named = {"filename": "document.txt" if media_type == "text/plain" else "document.pdf"}  # the API demands one
    return {"file_data": data_url(media_type, data) if media_type else data, **named}


def data_url(media_type: str, data: str) -> str:
    return f"data:{media_type};base64,{data}"


def image_source(part: MediaPart, path: str, *, ids: bool) -> Json:
    """`url` or `file_id`."""
    source = part.source
    if (file_id := source.get("file_id")) is not None:
        _check_id(path, ids)
        return {"file_id": file_id}
    url = source.get("url")
    return {"url": data_url(part.media_type, source["base64"]) if url is None else url}


def _check_id(path: str, ids: bool) -> None:
    if not ids:
        raise cannot_say(path, UNKNOWN_FILE)


def sampling_fields(sampling: Sampling, *, native: frozenset[str], extensions: bool) -> Json:
    """`native`: which fields the provider's own API has. Stop strings are `stop` where there are any."""
    values: Json = {key: getattr(sampling, key) for key in ("temperature", "top_p", "top_k", "min_p", "seed")}
    values |= {key: getattr(sampling, key) or None for key in ("frequency_penalty", "presence_penalty")}
    values["stop"] = list(sampling.stop) or None
    fields = {key: value for key, value in values.items() if value is not None}
    for key in fields:
        if key not in native and not extensions:
            raise cannot_say(key, "this upstream does not have it")
    if len(sampling.stop) > MAX_STOPS and not extensions:
        raise cannot_say("stop", f"this upstream takes at most {MAX_STOPS} stop strings")
    return fields


def own_words(extra: Json, *, summaries: bool) -> Json:
    """The wishes in `extra` of a request that came in another dialect, in the words of Chat.

    `summaries`: the dialect has `reasoning`, which can ask for summaries of what the model thinks.
    """
    words: Json = {}
    for key, value in extra.items():
        if key in ("response_format", "reasoning_effort", "verbosity"):
            words[key] = value
        elif key == "output_config":
            words |= _output_config(object_of(value))
        elif key == "thinking":
            words |= _thinking(object_of(value), summaries=summaries)
        else:
            raise cannot_say(key, "this upstream's dialect does not have it")
    return words


def _output_config(config: Json) -> Json:
    words: Json = {}
    for key, value in config.items():
        if value is None:
            continue
        if key == "effort" and value in EFFORTS:
            words["reasoning_effort"] = value
        elif key == "format" and object_of(value).get("type") == "json_schema":
            # The other API answers by the schema and nothing else; so does this one if it is strict.
            schema = {"name": "answer", "strict": True, "schema": object_of(value).get("schema")}
            words["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            raise cannot_say(f"output_config.{key}", "this upstream does not have it")
    return words


def _thinking(config: Json, *, summaries: bool) -> Json:
    """Adaptive thinking is what these models do anyway."""
    if config.get("type") != "adaptive":
        raise cannot_say("thinking", "this upstream takes no budget for thinking; set output_config.effort, or leave it out")
    for key, value in config.items():
        if key != "type" and value is not None and (key, value) != ("display", "omitted"):
            if not summaries or (key, value) != ("display", "summarized"):
                raise cannot_say(f"thinking.{key}", "this upstream does not have it")
            return {"reasoning": {"summary": "auto"}}
    return {}


# -- answer → deltas ---------------------------------------------------------------------------------------------------------


def read_usage(value: object) -> Usage:
    """Usage of all three dialects. What was read from a cache, and written to it, is part of the prompt's tokens there."""
    usage = object_of(value)
    if not usage:
        return UNKNOWN_USAGE
    responses = "input_tokens" in usage
    prompt, output = ("input_tokens", "output_tokens") if responses else ("prompt_tokens", "completion_tokens")
    of_prompt, of_output = object_of(usage.get(f"{prompt}_details")), object_of(usage.get(f"{output}_details"))
    num_prompt, num_output = count_of(usage.get(prompt)), count_of(usage.get(output))
    cached = of_prompt.get("cached_tokens")
    cached = usage.get("prompt_cache_hit_tokens") if cached is None else cached
    read = min(num_prompt, count_of(cached))
    written = min(num_prompt - read, count_of(of_prompt.get("cache_write_tokens")))
    lifetimes = object_of(of_prompt.get("cache_write_tokens_details"))
    by_lifetime = {ttl: count_of(lifetimes.get(f"ttl_{ttl}_tokens")) for ttl in ("30m", "12h")}
    details = {
        "reasoning": count_of(of_output.get("reasoning_tokens")),
        "audio_output": count_of(of_output.get("audio_tokens")),
        "audio_input": count_of(of_prompt.get("audio_tokens")),
        "image_input": count_of(of_prompt.get("image_tokens")),
    }
    return Usage(
        input_tokens=num_prompt - read - written,
        # Some servers count hidden reasoning in the total alone.
        output_tokens=max(num_output, count_of(usage.get("total_tokens")) - num_prompt),
        cache_read_input_tokens=read,
        cache_creation_input_tokens=written,
        written={ttl: count for ttl, count in by_lifetime.items() if count} if sum(by_lifetime.values()) == written else {},
        details={kind: count for kind, count in details.items() if count},
        reads_unsaid=cached is None,
    )


def read_logprobs(entries: object) -> tuple[tuple[TokenLogprob, ...], bool]:
    """And whether they say all: a token that is part of a letter is only in its bytes."""
    read: list[TokenLogprob] = []
    faithful = True
    for entry in objects_of(entries):
        tops = objects_of(entry.get("top_logprobs"))
        for token in (entry, *tops):
            spelled = token.get("bytes")
            faithful &= not isinstance(spelled, list) or spelled == list(text_of(token.get("token")).encode())
            faithful &= isinstance(token.get("logprob"), int | float)  # the first of a prompt has none
        top = tuple(TopLogprob(text_of(other.get("token")), _logprob(other)) for other in tops)
        read.append(TokenLogprob(text_of(entry.get("token")), _logprob(entry), top))
    return tuple(read), faithful


def _logprob(entry: Json) -> float:
    value = entry.get("logprob")
    return float(value) if isinstance(value, int | float) else 0.0


# -- errors ------------------------------------------------------------------------------------------------------------------

_STATUSES: dict[object, int] = {
    "invalid_request_error": 400,
    "invalid_prompt": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded_error": 503,
    "engine_overloaded": 503,
    "engine_unavailable": 503,
    "service_unavailable": 503,
}


def read_error(status: int, data: bytes) -> UpstreamError:
    try:
        fields = json_object(data)
    except BackendFailed:
        return unreadable_error(status, data)
    return error_in(fields, status) or unreadable_error(status, data)


def error_in(fields: Json, status: int = 0) -> UpstreamError | None:
    """The error that `fields` are or hold, in any of the forms that servers use; None where there is none.

    Within a stream (`status` 0) its words say which status it would have had.
    """
    error = fields.get("error")
    if isinstance(error, str) and error:
        return UpstreamError(status or 500, error)
    inner = object_of(error)
    if not inner and fields.get("object") == "error":
        inner = fields
    if not inner:
        detail = fields.get("detail")
        return UpstreamError(status, detail) if status and isinstance(detail, str) and detail else None
    code, kind = inner.get("code"), text_of(inner.get("type"))
    word = code if isinstance(code, str) and code else kind or None
    if not status:
        number = code if isinstance(code, int) and 400 <= code <= 599 else 500
        status = _STATUSES.get(word) or _STATUSES.get(kind) or number
    message = text_of(inner.get("message")) or word or f"The upstream answered with status {status}."
    param = inner.get("param")
    return UpstreamError(status, message, code=word, param=param if isinstance(param, str) else None, readable=inner is error)
