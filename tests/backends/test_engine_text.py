from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anaphora.backends.engine_text import Detokenizer, StopStrings, ToolCallParser
from anaphora.types import TextDelta, Tool, ToolUseDelta

CORPUS = ["The cat sat on the mat, didn't it?", "名前は何ですか 你好世界", "naïve café 😀 — “quotes”", "a b  c   d\n\n\tindent"]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "é", "two words", "日"])
    return fast(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """The shape of Llama 2's tokenizer: words behind ▁, unknown characters as byte tokens."""
    pieces = [chr(c) for c in range(0x21, 0x7F)] + ["▁", "▁▁", "▁the", "▁cat", "你", "好", "�"]
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return fast(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    vocab = [(piece, -1.0) for piece in ["<unk>", "▁", "▁▁", "▁cat", "cat", "s", "a", "▁a", "你", "."]]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return fast(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "cat", "##s", "sat", ".", "n't", "##a", "do", "'", "you", "ve"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return fast(tokenizer)


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace, word_piece)}


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(id) for id in ids), detokenizer.flush()]


# -- ids → text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_the_pieces_joined_are_the_decoded_whole_for_any_ids(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    # A few ids beyond the vocabulary: models' heads are often padded.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=40))
    whole = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == whole


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n the你好😀�")), max_size=30))
def test_encoded_text_comes_back_character_by_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if name == "byte_level" and not {"�", "é"} & set(text):  # é is an added token, which ByteLevel takes for a byte
        assert not any("�" in piece for piece in pieces)


def test_half_an_emoji_waits_for_its_other_half() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.backend_tokenizer.encode("x🧠y").ids
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert [piece for piece in pieces if piece] == ["x", "🧠", "y"]


def test_an_answer_cut_within_a_character_ends_with_a_replacement_character() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.backend_tokenizer.encode("x🧠").ids[:-1]
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == "x�"


def test_words_come_out_at_once_with_their_spaces() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.backend_tokenizer.encode("the cat").ids
    assert [piece for piece in pieces_of(Detokenizer(tokenizer), ids) if piece] == ["t", "h", "e", " ", "c", "a", "t"]


def test_a_long_answer_is_decoded_over_a_bounded_window() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.backend_tokenizer.encode("the cat, 你好 and more. " * 200).ids
    widest = 0
    for id in ids:
        detokenizer.push(id)
        widest = max(widest, len(detokenizer._window))
    assert widest < 10


# -- stop strings ------------------------------------------------------------------------------------------------------


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


small_text = st.text("ab\n", max_size=30)


@settings(max_examples=300)
@given(st.lists(small_text, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_stream_is_cut_where_the_whole_text_is_however_it_arrives(chunks: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    given_out, matched, seen = "", None, ""
    for chunk in chunks:
        text, matched = matcher.push(chunk)
        given_out, seen = given_out + text, seen + chunk
        if matched is None:
            held = seen[len(given_out) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)  # nothing is held back without need
    if matched is None:
        given_out += matcher.flush()
    assert (given_out, matched) == naive_cut(seen, stops)


def test_without_stop_strings_text_passes_through() -> None:
    matcher = StopStrings(())
    assert matcher.push("abc") == ("abc", None)
    assert matcher.flush() == ""


def test_nothing_comes_out_after_a_stop_string() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("oneEN") == ("one", None)
    assert matcher.push("Dtwo") == ("", "END")
    assert matcher.push("three") == ("", "END")
    assert matcher.flush() == ""


# -- tool calls --------------------------------------------------------------------------------------------------------

TOOLS = (Tool("weather"), Tool("time"))


def parse(chunks: list[str], tools: tuple[Tool, ...] = TOOLS) -> tuple[str, list[tuple[str, Any]]]:
    """(all text, all calls); checks the form of the deltas."""
    ids = iter(f"id{i}" for i in range(1000))
    parser = ToolCallParser(tools, lambda: next(ids), choice=3)
    deltas = [delta for chunk in chunks for delta in parser.push(chunk)] + parser.flush()
    calls = [delta for delta in deltas if isinstance(delta, ToolUseDelta)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert [call.id for call in calls] == [f"id{i}" for i in range(len(calls))]
    assert all(delta.choice == 3 for delta in deltas)
    assert parser.num_calls == len(calls)
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)), [
        (call.name, json.loads(call.arguments)) for call in calls
    ]


def block(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


CALL = block("weather", {"city": "Oslo", "days": 2})
CALLED = ("weather", {"city": "Oslo", "days": 2})

ANSWERS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("Hello there.", "Hello there.", []),
    (CALL, "", [CALLED]),
    (f"Let me look.\n\n{CALL}", "Let me look.", [CALLED]),
    (f"{CALL}\n{block('time', {})}\n", "", [CALLED, ("time", {})]),
    (f"{CALL}\n\nDone.", "Done.", [CALLED]),
    (CALL.removesuffix("</tool_call>"), "", [CALLED]),
    (CALL.removesuffix("\n</tool_call>") + "\n</tool_c", CALL.removesuffix("\n</tool_call>") + "\n</tool_c", []),
    (CALL[:30], CALL[:30], []),
    (block("unknown", {}), block("unknown", {}), []),
    (f"x {block('unknown', {})} {CALL}", f"x {block('unknown', {})}", [CALLED]),
    ("<tool_call>{not json}</tool_call> after", "<tool_call>{not json}</tool_call> after", []),
    (f"<tool_call> {CALL}", "<tool_call>", [CALLED]),
    (f'<tool_call>{{"name": "x</tool_call>{CALL}', '<tool_call>{"name": "x</tool_call>', [CALLED]),
    (block("weather", {"city": "a </tool_call> b"}), "", [("weather", {"city": "a </tool_call> b"})]),
    ('<tool_call>{"name": "weather"}</tool_call>', "", [("weather", {})]),
    ('<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "weather", "arguments": {"x": 1e999}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "weather", "arguments": {"x": "\\ud800"}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>',) * 2 + ([],),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>",) * 2 + ([],),
    ('<tool_call>{"name": "weather", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>",) * 2 + ([],),
    (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>',
        "",
        [("weather", {"city": "Oslo"})],
    ),
    ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", [("weather", {"city": "Oslo"})]),
    (' \n{"name": "time", "arguments": {}} \n', "", [("time", {})]),
    ('[{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {}}]', "", [("time", {}), ("weather", {})]),
    ('```json\n{"name": "time", "arguments": {"zone": "``` UTC"}}\n```', "", [("time", {"zone": "``` UTC"})]),
    ('```\n{"name": "time", "arguments": {}}\n```', "", [("time", {})]),
    ('{"type": "function", "function": {"name": "time", "parameters": {}}}', "", [("time", {})]),
    ('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    ('{"name": "time"}', '{"name": "time"}', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "time", "arguments": {}} is the call', '{"name": "time", "arguments": {}} is the call', []),
    (f'{{"name": "Ada"}} {CALL}', '{"name": "Ada"}', [CALLED]),
    ("```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
    ("[1, 2, 3]", "[1, 2, 3]", []),
    ("{", "{", []),
    ("  ", "  ", []),
    ("", "", []),
    ("a < b and <tool", "a < b and <tool", []),
]


@pytest.mark.parametrize(("answer", "text", "calls"), ANSWERS)
def test_calls_are_found_and_everything_else_is_text(answer: str, text: str, calls: list[tuple[str, Any]]) -> None:
    assert parse([answer]) == (text, calls)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([case for case in ANSWERS if len(case[0]) < 1000]), st.randoms(use_true_random=False))
def test_an_answer_is_parsed_the_same_however_it_arrives(case: tuple[str, str, list[Any]], random: Any) -> None:
    answer, text, calls = case
    chunks = []
    while answer:
        size = random.randint(1, 12)
        chunks.append(answer[:size])
        answer = answer[size:]
    assert parse(chunks) == (text, calls)


def test_text_before_a_call_streams_live() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.push("I will") == [TextDelta(0, "I will")]
    assert parser.push(" look <") == [TextDelta(0, " look")]
    assert parser.push("b> it") == [TextDelta(0, " <b> it")]
    assert parser.push(" up\n<tool") == [TextDelta(0, " up")]
    assert parser.push('_call>{"name": "time"}') == []


def test_a_json_answer_that_is_no_call_streams_from_its_first_key_on() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.push('{"ans') == [TextDelta(0, '{"ans')]


def test_without_offered_tools_nothing_is_parsed() -> None:
    assert parse([CALL], tools=()) == (CALL, [])


def test_arguments_come_out_compact_and_in_order() -> None:
    (call,) = ToolCallParser(TOOLS).push('<tool_call>{"name": "time", "arguments": {"z": "é", "a": [1, 2]}}</tool_call>')
    assert isinstance(call, ToolUseDelta)
    assert call.arguments == '{"z":"é","a":[1,2]}'
    assert call.id.startswith("call_")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name":', '"time"', "}", " x", "[", '"', "\\", "```", "\n"])))
def test_no_answer_without_calls_loses_a_character(pieces: list[str]) -> None:
    text, calls = parse(pieces)
    if not calls:
        assert text == "".join(pieces)
