"""Caching headers as RFC 9111 and RFC 9211 write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.answer import Recalled
from anaphora.errors import InvalidRequest
from anaphora.events import Hit
from anaphora.server.headers import MAX_KEEP_S, cache_control, of_answer, semantic_risk, with_wishes
from anaphora.types import CacheControl, Completion, Key, Request, Usage


@pytest.mark.parametrize(
    ("value", "control"),
    [
        (None, CacheControl()),
        (b"", CacheControl()),
        (b"no-store", CacheControl(no_store=True)),
        (b"No-Cache , ONLY-IF-CACHED", CacheControl(no_cache=True, only_if_cached=True)),
        (b"max-age=60", CacheControl(max_age_s=60)),
        (b'max-age="60", foo="a, no-store", no-transform', CacheControl(max_age_s=60)),
        (b"max-age=60,max-age=5", CacheControl(max_age_s=5)),
        (b"max-age=soon", CacheControl(max_age_s=0)),
        (b"max-age=-1", CacheControl(max_age_s=0)),
        (b"max-age", CacheControl(max_age_s=0)),
        (b",,=;, no-store", CacheControl(no_store=True)),
        (b"no-storely", CacheControl()),
    ],
)
def test_request_directives(value: bytes | None, control: CacheControl) -> None:
    assert cache_control(value) == control


@pytest.mark.parametrize(("value", "risk"), [(None, None), (b"off", 0.0), (b" OFF ", 0.0), (b"0.01", 0.01), (b"5e-1", 0.5)])
def test_what_is_wished_of_answers_in_other_words(value: bytes | None, risk: float | None) -> None:
    assert semantic_risk(value) == risk


@pytest.mark.parametrize("value", [b"", b"on", b"0", b"-0.1", b"0.51", b"nan", b"inf", b"1%", b"\xff"])
def test_another_wish_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidRequest, match="x-anaphora-semantic"):
        semantic_risk(value)


@given(st.binary(max_size=60))
def test_no_header_breaks_the_parser(value: bytes) -> None:
    assert isinstance(cache_control(value), CacheControl)


def recalled(ttl_s: float | None) -> Recalled:
    completion = Completion("m", (), Usage())
    hit = Hit("exact", Key(b"\xcd" * 32), completion, age_s=12.9, ttl_s=ttl_s, cost_s=0.25)
    return Recalled(hit, Key(b"\xab" * 32))


def test_a_hit_says_its_age_what_is_left_and_what_it_saved() -> None:
    assert dict(of_answer(recalled(30.5), 0)) == {
        b"cache-status": b'anaphora; hit; ttl=30; key="abababababababab"',
        b"age": b"12",
        b"x-anaphora-saved-ms": b"250",
    }


def test_an_entry_without_a_limit_says_no_ttl() -> None:
    assert dict(of_answer(recalled(None), 0))[b"cache-status"] == b'anaphora; hit; key="abababababababab"'


def test_a_request_may_demand_exact_kv_and_wish_for_its_prompt_to_be_kept() -> None:
    plain = Request("m", prompts=("p",))
    assert with_wishes(plain, None, None) is plain
    assert with_wishes(plain, b"Exact", None).exact_kv
    (keep,) = with_wishes(plain, None, b"3600").keep
    assert keep.for_s == 3600.0
    assert keep.num_tokens > 1 << 32, "the whole prompt, however long"


@pytest.mark.parametrize(
    ("exact", "keep"),
    [(b"lossy", None), (b"", None), (None, b"1h"), (None, b"0"), (None, b"-5"), (None, b"%d" % (MAX_KEEP_S + 1))],
)
def test_a_wish_that_is_not_understood_is_refused(exact: bytes | None, keep: bytes | None) -> None:
    with pytest.raises(InvalidRequest, match="x-anaphora-kv"):
        with_wishes(Request("m"), exact, keep)
