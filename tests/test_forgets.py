from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from anaphora.forgets import EVERYTHING, Forgets
from anaphora.types import Scope, Tenant

A = Scope(tenant=Tenant("a"), tag="t", model="m")
B = Scope(tenant=Tenant("b"))


def test_what_one_tells_all_hear_once_and_in_order(tmp_path: Path) -> None:
    teller, hearer = Forgets(tmp_path / "forgets"), Forgets(tmp_path / "forgets")
    assert hearer.news() == ()
    teller.tell(A)
    teller.tell(B)
    assert hearer.news() == teller.news() == (A, B)
    assert hearer.news() == teller.news() == ()


def test_who_comes_later_hears_only_what_is_told_from_then_on(tmp_path: Path) -> None:
    teller = Forgets(tmp_path / "forgets")
    teller.tell(A)
    late = Forgets(tmp_path / "forgets")
    assert late.news() == ()
    teller.tell(B)
    assert late.news() == (B,)


def test_another_process_is_heard(tmp_path: Path) -> None:
    hearer = Forgets(tmp_path / "forgets")
    teller = "import sys, pathlib; from anaphora.forgets import *; Forgets(pathlib.Path(sys.argv[1])).tell(Scope(tag='x'))"
    subprocess.run([sys.executable, "-c", teller, str(tmp_path / "forgets")], check=True)
    assert hearer.news() == (Scope(tag="x"),)


def test_what_is_too_long_for_the_ring_is_told_as_more_than_was_meant(tmp_path: Path) -> None:
    forgets = Forgets(tmp_path / "forgets")
    forgets.tell(Scope(tenant=Tenant("a"), tag="t" * 1000))
    forgets.tell(Scope(tenant=Tenant("a" * 1000), tag="t"))
    assert forgets.news() == (Scope(tenant=Tenant("a")), EVERYTHING)


names = st.sampled_from("abc")
acts = st.one_of(
    st.builds(Scope, tenant=names.map(Tenant), tag=st.none() | names),
    st.integers(1, 300),  # so many at once
    st.none(),  # listen
)


@given(st.lists(acts, max_size=12))
def test_nobody_misses_anything_however_late_he_listens(happened: list[Scope | int | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        teller, hearer = Forgets(Path(folder, "forgets")), Forgets(Path(folder, "forgets"))
        told: list[Scope] = []
        for act in [*happened, None]:
            if act is None:
                news = hearer.news()
                assert news in (tuple(told), (EVERYTHING,))
                assert news != (EVERYTHING,) or len(told) > 200
                told.clear()
                continue
            for scope in [act] if isinstance(act, Scope) else [B] * act:
                teller.tell(scope)
                told.append(scope)
