"""How long blocks are to the engine: exact, and the same in every prompt that begins with the same blocks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backends.tokenizers import CHATML, QWEN, byte_fallback, byte_level

from anaphora.backends.engine_lengths import lengths
from anaphora.backends.engine_template import Template, Tokenised
from anaphora.breakpoints import steps
from anaphora.prompt import Lengths, Prompt
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}" + CHATML
)
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = """{%- for message in messages %}
{%- if loop.last and tools %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + (message.tool_calls or '') | string + '<|im_end|>' }}
{%- endfor %}"""

TEMPLATES = {
    "chatml": Template(byte_level(CHATML)),
    "a default system prompt": Template(byte_level(DEFAULT_SYSTEM)),
    "trimming": Template(byte_level(TRIMMING)),
    "tools behind the system prompt": Template(byte_level(QWEN)),
    "no system role": Template(byte_level(NO_SYSTEM)),
    "byte-fallback": Template(byte_fallback(CHATML)),
    "no seams": Template(byte_level(CHATML, normalized=True)),
}

Item = tuple[str, str]
"""Kind and text of a block."""


def body(items: list[Item]) -> dict[str, Any]:
    """An Anthropic body of these blocks: neighbours of one role are one message."""
    tools = [{"name": f"t{i}", "description": text, "input_schema": {}} for i, text in enumerate(of(items, "tool"))]
    system = [{"type": "text", "text": text} for text in of(items, "system")]
    messages: list[dict[str, Any]] = []
    for place, (kind, text) in enumerate(items):
        if kind in ("tool", "system"):
            continue
        role = "assistant" if kind in ("assistant", "call") else "user"
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        if kind == "call":
            block: Any = {"type": "tool_use", "id": f"c{place}", "name": "t0", "input": {"a": text}}
        elif kind == "result":
            block = {"type": "tool_result", "tool_use_id": f"c{place - 1}", "content": [{"type": "text", "text": text}]}
        else:
            block = {"type": "text", "text": text}
        messages[-1]["content"].append(block)
    return {"model": "m", "max_tokens": 1, "tools": tools, "system": system, "messages": messages}


def of(items: list[Item], kind: str) -> list[str]:
    return [text for found, text in items if found == kind]


def measured(template: Template, raw: dict[str, Any], dialect: Any = None) -> tuple[Lengths, list[int], Prompt]:
    parsed = (dialect or Anthropic()).parse(msgspec.json.encode(raw), tenant=LOCAL_TENANT)
    tokenised = template.tokenise(parsed.request)
    found = lengths(template, parsed.request, parsed.prompt, tokenised)
    assert found is not None
    return found, tokenised.ids, parsed.prompt


texts = st.one_of(
    st.sampled_from(["a", "word", " the dog\n", "<|im_end|>", "x.\n\n", "<tool_call>", "s", "a\U000f0000b", "Let me see.  "]),
    st.text('ab \n.{}"é😀<|', min_size=1, max_size=12).filter(str.strip),
)
starts = st.lists(st.tuples(st.just("tool"), texts), max_size=2).flatmap(
    lambda tools: st.lists(st.tuples(st.just("system"), texts), max_size=2).map(lambda system: [*tools, *system])
)
turns = st.lists(
    st.one_of(
        st.tuples(st.just("user"), texts).map(lambda item: [item]),
        st.tuples(st.just("assistant"), texts).map(lambda item: [item]),
        st.tuples(texts, texts).map(lambda pair: [("call", pair[0]), ("result", pair[1])]),
    ),
    min_size=1,
    max_size=5,
).map(lambda groups: [item for group in groups for item in group])


def ordered(items: list[Item]) -> list[Item]:
    order = ("tool", "system")
    return sorted(items, key=lambda item: order.index(item[0]) if item[0] in order else len(order))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150)
@given(start=starts, turns=turns, others=turns, data=st.data())
def test_what_two_prompts_share_has_the_same_ends_and_tokens(
    name: str, start: list[Item], turns: list[Item], others: list[Item], data: st.DataObject
) -> None:
    template = TEMPLATES[name]
    one = [*start, ("user", "Hello!"), *turns]
    cut = data.draw(st.integers(0, len(one)))
    if cut < len(one) and one[cut][0] == "result":  # a call has its answer
        cut += 1
    tail = data.draw(starts) if cut <= len(start) else []
    two = ordered([*one[:cut], *tail, *others] if cut > len(start) else [*one[:cut], *tail, ("user", "Well?"), *others])
    if name == "trimming":  # white space at the end of a text is there or not, as the text is the last of its turn or not
        one, two = ([(kind, text.strip()) for kind, text in items] for items in (one, two))
    ours, our_ids, our_prompt = measured(template, body(one))
    theirs, their_ids, their_prompt = measured(template, body(two))
    for found, ids in ((ours, our_ids), (theirs, their_ids)):
        assert list(found.ends) == sorted(found.ends)
        assert found.ends[-1] <= found.total == len(ids)
        assert found.steps == ()
    for i, (mine, other) in enumerate(zip(our_prompt.blocks, their_prompt.blocks, strict=False)):
        if mine.content != other.content or mine.role != other.role:
            break
        end = min(ours.ends[i], theirs.ends[i])
        assert our_ids[:end] == their_ids[:end]
        # Whether an assistant goes on, and whether there is a system prompt ahead of tools, is for later blocks to say.
        if mine.role != "assistant" and mine.section != "system":
            assert ours.ends[i] == theirs.ends[i]


def test_blocks_are_as_long_as_what_is_rendered_of_them() -> None:
    template = TEMPLATES["chatml"]
    items = [("system", "one two"), ("system", "three"), ("user", "a dog"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    found, ids, _ = measured(template, body(items))
    texts = [
        "<|im_start|>system\none two",
        "\nthree",
        "<|im_end|>\n<|im_start|>user\na dog",
        "\nb",
        "<|im_end|>\n<|im_start|>assistant\nc",
        "<|im_end|>\n<|im_start|>user\nd",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    tokenizer = template._backend
    starts = [0, *found.ends]
    pieces = [ids[start:end] for start, end in zip(starts, [*found.ends, found.total], strict=True)]
    assert [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces] == texts


def test_tools_come_first_and_each_has_its_end() -> None:
    template = TEMPLATES["a default system prompt"]
    found, ids, _ = measured(template, body([("tool", "Looks."), ("tool", "Sees."), ("system", "Be brief."), ("user", "hi")]))
    texts = [template._backend.decode(ids[:end], skip_special_tokens=False) for end in found.ends]
    assert '"Looks."' in texts[0]
    assert '"Sees."' not in texts[0]
    assert texts[1].endswith("}}")
    assert texts[2].endswith("</tool_call>\n\nBe brief.")
    assert texts[3].endswith("<|im_start|>user\nhi")


def test_tools_behind_the_system_prompt_count_with_it() -> None:
    template = TEMPLATES["tools behind the system prompt"]
    assert template.tools_place == "behind the system prompt"
    found, ids, _ = measured(template, body([("tool", "Looks."), ("system", "Be brief."), ("user", "hi")]))
    assert found.ends[0] == 0
    assert "Looks." in template._backend.decode(ids[: found.ends[1]], skip_special_tokens=False)


def test_nothing_can_be_told_where_a_template_moves_tools_about() -> None:
    template = Template(byte_level(MISTRAL))
    assert (template.native_tools, template.tools_place) == (False, "first") or template.tools_place == "anywhere"
    body_ = body([("tool", "Looks."), ("user", "hi")])
    parsed = Anthropic().parse(msgspec.json.encode(body_), tenant=LOCAL_TENANT)
    assert lengths(template, parsed.request, parsed.prompt, template.tokenise(parsed.request)) is None


def test_a_choice_of_tools_is_behind_the_last_block() -> None:
    template = TEMPLATES["chatml"]
    items = [("tool", "Looks."), ("user", "hi")]
    auto, ids, _ = measured(template, body(items))
    forced, forced_ids, _ = measured(template, {**body(items), "tool_choice": {"type": "any"}})
    assert forced.ends == auto.ends
    assert forced.total > auto.total
    assert forced_ids[: auto.ends[-1]] == ids[: auto.ends[-1]]


def test_what_is_not_rendered_has_no_length() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    found, _, _ = measured(TEMPLATES["chatml"], {"model": "m", "max_tokens": 1, "messages": chat})
    assert found.ends[0] == found.ends[1] == found.ends[2] < found.ends[3] < found.ends[4]


def test_openais_tool_answers_in_parts_end_with_the_last_one() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "t", "arguments": "{}"}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
    ]
    found, ids, prompt = measured(TEMPLATES["chatml"], {"model": "m", "messages": chat}, OpenAIChat())
    assert [block.kind for block in prompt.blocks] == ["text", "tool_use", "tool_result", "tool_result"]
    assert found.ends[1] == found.ends[2] < found.ends[3]
    assert found.steps == steps(ids)


def test_a_raw_prompt_is_one_block() -> None:
    raw = {"model": "m", "prompt": "Once upon a time"}
    parsed = OpenAICompletions().parse(msgspec.json.encode(raw), tenant=LOCAL_TENANT)
    template = TEMPLATES["chatml"]
    ids = template.encode_prompt("Once upon a time")
    found = lengths(template, parsed.request, parsed.prompt, Tokenised(ids))
    assert found == Lengths((len(ids),), len(ids), steps(ids))
