"""A request as a chain of what its prompt begins with."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from anaphora.routing.questions import BYTES_PER_TOKEN, EXPECTED_TOKENS, MEDIA_TOKENS, PIECE_BYTES, SHORTEST_BYTES, of_request
from anaphora.types import MediaPart, Message, Native, Request, Tenant, TextPart, Tool

MESSAGES = st.lists(
    st.builds(
        lambda role, text: Message(role, (TextPart(text),)),
        st.sampled_from(["user", "assistant"]),
        st.text(min_size=1, max_size=40).map(lambda text: text * 60),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@given(MESSAGES, MESSAGES)
def test_requests_that_begin_alike_have_the_same_beginning_of_a_chain(
    shared: tuple[Message, ...], rest: tuple[Message, ...]
) -> None:
    short, long = of_request(Request("m", messages=shared)), of_request(Request("m", messages=shared + rest))
    assert long.blocks[: len(short.blocks)] == short.blocks
    assert long.ends[: len(short.ends)] == short.ends
    assert list(long.ends) == sorted(long.ends)
    assert all(end <= long.num_tokens for end in long.ends)
    assert len(set(long.blocks)) == len(long.blocks)


def test_a_chain_ends_where_prompts_part() -> None:
    piece = "x" * (2 * PIECE_BYTES)
    one = of_request(Request("m", messages=(Message("user", (TextPart(piece + "one"), TextPart(piece))),)))
    other = of_request(Request("m", messages=(Message("user", (TextPart(piece + "two"), TextPart(piece))),)))
    common = sum(a == b for a, b in zip(one.blocks, other.blocks, strict=True))
    assert 1 <= common < len(one.blocks)
    assert one.blocks[common:] != other.blocks[common:]
    assert one.ends[0] == PIECE_BYTES // BYTES_PER_TOKEN


@given(MESSAGES, st.integers(SHORTEST_BYTES, 5000))
def test_the_next_turn_begins_with_all_of_the_turn_before_it(before: tuple[Message, ...], num_bytes: int) -> None:
    turn = (*before, Message("user", (TextPart("x" * num_bytes),)))
    asked = of_request(Request("m", messages=turn))
    assert asked.num_tokens - asked.ends[-1] <= SHORTEST_BYTES / BYTES_PER_TOKEN
    later = of_request(Request("m", messages=(*turn, Message("assistant", (TextPart("Yes."),)))))
    assert later.blocks[: len(asked.blocks)] == asked.blocks


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=50))
def test_no_piece_is_shorter_than_it_is_worth_or_longer_than_it_may_be(lengths: list[int]) -> None:
    messages = tuple(Message("user", (TextPart("x" * length),)) for length in lengths)
    ends = of_request(Request("m", messages=messages)).ends
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    # tokens are rounded where a piece ends
    assert all(SHORTEST_BYTES / BYTES_PER_TOKEN - 1 < size < PIECE_BYTES / BYTES_PER_TOKEN + 1 for size in sizes)


def test_what_keeps_caches_apart_parts_the_chains_and_a_tenant_of_one_server_does_not() -> None:
    request = Request("m", messages=(Message("user", (TextPart("x" * 5000),)),))
    base = of_request(request)
    keyed = msgspec.structs.replace(request, native=Native("anthropic", b"{}", credential=("x-api-key", "a")))
    for other in (
        msgspec.structs.replace(request, model="n"),
        msgspec.structs.replace(request, cache_salt="s"),
        msgspec.structs.replace(request, tools=(Tool("t"),)),
        keyed,
    ):
        assert not set(of_request(other).blocks) & set(base.blocks)
    assert of_request(msgspec.structs.replace(request, tenant=Tenant("other"))).blocks == base.blocks


def test_media_count_by_the_piece_and_answers_by_their_limit() -> None:
    image = MediaPart("image", "image/png", {"base64": "A" * 100_000})
    found = of_request(Request("m", messages=(Message("user", (image, TextPart("What is it?"))),), max_tokens=7))
    assert MEDIA_TOKENS < found.num_tokens < MEDIA_TOKENS + 50
    assert found.output_tokens == 7
    assert of_request(Request("m", max_tokens=100_000)).output_tokens == EXPECTED_TOKENS


def test_a_body_that_was_not_understood_has_a_chain_as_well() -> None:
    turns = [{"role": "user", "content": [{"type": "new", "data": "x" * 3000}]}]
    first = of_request(Request("m", extra={"messages": turns, "system": "s" * 3000}))
    second = of_request(Request("m", extra={"messages": [*turns, {"role": "user", "content": "more"}], "system": "s" * 3000}))
    assert len(first.blocks) > 3
    assert second.blocks[: len(first.blocks)] == first.blocks
