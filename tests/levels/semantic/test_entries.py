"""The questions that are remembered: what every process sees, what lasts, and what is nowhere after a forget."""

from __future__ import annotations

import asyncio
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from anaphora.clock import Clock, ManualClock, SystemClock
from anaphora.events import Dropped, Event, Evicted, Failed
from anaphora.keys import digest
from anaphora.levels.semantic import entries as module
from anaphora.levels.semantic import entry_file, entry_rows
from anaphora.levels.semantic.entries import Decision, Entries, EntriesFailed, Entry, Labelled
from anaphora.types import Key, Scope, Tenant

DIMENSIONS = 32
SCOPES = [Scope(), Scope(tenant=Tenant("t")), Scope(tag="x"), Scope(model="n")]
SPACE, OTHER_SPACE = digest((b"space",)), digest((b"other",))


def vector_of(text: str) -> npt.NDArray[np.float32]:
    return np.random.default_rng(list(text.encode())).standard_normal(DIMENSIONS).astype(np.float32)


def digest_of(text: str) -> bytes:
    return digest((text.lower().encode(),))


def opened(folder: Path, *, start: bool = True, clock: Clock | None = None, **options: Any) -> Entries:
    about = {"dimensions": DIMENSIONS, "encoder": "one", "clock": clock or SystemClock(), **options}
    made = Entries(folder, **about)
    if start:
        made.start()
    return made


def add(entries: Entries, text: str, *, space: bytes = SPACE, tenant: str = "t", tag: str = "", **options: Any) -> Entry | None:
    return entries.add(
        space=space,
        digest=digest_of(text),
        key=Key(digest((b"key", text.encode()))),
        text=text,
        vector=vector_of(text),
        tenant=Tenant(tenant),
        model="m",
        tags=(tag,) if tag else (),
        **options,
    )


def texts(entries: Entries, space: bytes = SPACE) -> set[str]:
    return {entry.text for entry, _ in entries.near(space, vector_of("any"), 10_000)}


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 120))


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_question_is_found_at_once_by_its_content_and_by_what_is_near(tmp_path: Path) -> None:
    entries = opened(tmp_path, start=False)
    made = add(entries, "How tall is it?")
    add(entries, "Something else")
    assert made is not None
    assert entries.same(SPACE, digest_of("HOW TALL IS IT?")) == made
    assert entries.get(made.id) == made
    near = entries.near(SPACE, vector_of("How tall is it?"), 2)
    assert [entry.text for entry, _ in near] == ["How tall is it?", "Something else"]
    assert near[0][1] == pytest.approx(1, abs=0.01)
    assert entries.same(OTHER_SPACE, made.digest) is None
    assert entries.near(OTHER_SPACE, vector_of("How tall is it?"), 2) == []


def test_the_same_content_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    entries = opened(tmp_path, start=False)
    add(entries, "how?")
    again = add(entries, "How?")
    assert texts(entries) == {"How?"}
    assert entries.same(SPACE, digest_of("how?")) == again


def test_what_has_expired_is_not_found(tmp_path: Path) -> None:
    clock = ManualClock()
    entries = opened(tmp_path, start=False, clock=clock)
    made = add(entries, "now", ttl_s=10)
    clock.advance(9)
    assert made is not None
    assert entries.same(SPACE, made.digest) == made
    clock.advance(1)
    assert entries.same(SPACE, made.digest) is None
    assert texts(entries) == set()


@pytest.mark.parametrize("vector", [np.zeros(DIMENSIONS), np.ones(3), np.full(DIMENSIONS, np.nan), np.full(DIMENSIONS, 1e9)])
def test_a_vector_that_is_none_is_not_remembered(tmp_path: Path, vector: npt.NDArray[np.float64]) -> None:
    entries = opened(tmp_path, start=False)
    about: dict[str, Any] = {"digest": b"d" * 32, "key": Key(b"k" * 32), "text": "t", "tenant": Tenant("t"), "model": "m"}
    assert entries.add(space=SPACE, vector=vector, **about) is None
    assert len(entries) == 0
    assert entries.same(SPACE, b"d" * 32) is None


def test_a_removed_entry_is_found_no_more(tmp_path: Path) -> None:
    async def body() -> None:
        entries, other = opened(tmp_path), opened(tmp_path)
        made = add(entries, "gone")
        add(entries, "kept")
        await entries.flush()
        await other.flush()
        assert made is not None
        entries.remove(made.id)
        assert texts(entries) == {"kept"}
        await entries.flush()
        await other.flush()
        assert texts(other) == {"kept"}
        await entries.aclose()
        await other.aclose()

    run(body())


# -- several processes -------------------------------------------------------------------------------------------------


def test_what_one_adds_the_other_finds(tmp_path: Path) -> None:
    async def body() -> None:
        one, other = opened(tmp_path), opened(tmp_path)
        made = add(one, "shared", tag="x", ttl_s=1000)
        await one.flush()
        await other.flush()
        assert other.same(SPACE, digest_of("shared")) == made
        assert texts(other) == {"shared"}
        await one.aclose()
        await other.aclose()

    run(body())


def test_the_later_of_two_of_the_same_content_stays_everywhere(tmp_path: Path) -> None:
    async def body() -> None:
        one, other = opened(tmp_path), opened(tmp_path)
        add(one, "same")
        await one.flush()
        await other.flush()
        later = add(other, "SAME")
        await other.flush()
        await one.flush()
        assert texts(one) == texts(other) == {"SAME"}
        assert one.same(SPACE, digest_of("same")) == later
        await one.aclose()
        await other.aclose()

    run(body())


def test_labels_reach_other_processes_once_and_their_own_writer_never(tmp_path: Path) -> None:
    async def body() -> None:
        one, other = opened(tmp_path), opened(tmp_path)
        label = Labelled(tenant=Tenant("t"), model="m", score=0.9, wrong=True, u=0.3, inclusion=0.05, source="feedback", at_s=5)
        one.note(label)
        await one.flush()
        await other.flush()
        assert (other.take_labels(), other.take_labels()) == ([label], [])
        later = Labelled(tenant=Tenant("t"), model="m", score=0.5, wrong=False)
        other.note(later)
        await other.flush()
        await one.flush()
        assert (one.take_labels(), other.take_labels()) == ([later], [])
        await one.aclose()
        await other.aclose()
        again = opened(tmp_path)
        await again.flush()
        assert again.take_labels() == await again.labels() == [label, later]
        await again.aclose()

    run(body())


def test_decisions_are_found_by_tenant_and_by_either_id_the_latest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry_rows, "DECISIONS_PER_TENANT", 3)

    async def body() -> None:
        entries = opened(tmp_path)
        made = [
            Decision(
                tenant=Tenant("t"), model="m", request_id=f"r{n}", answer_id=f"a{n}", outcome="served", text="x", score=0.5
            )
            for n in range(5)
        ]
        for decision in [*made, Decision(tenant=Tenant("u"), model="m", request_id="r4", outcome="refused")]:
            entries.note(decision)
        await entries.flush()
        assert await entries.decisions("t") == made[:1:-1]
        assert await entries.decisions("t", limit=1) == made[4:]
        assert await entries.decisions("t", request="a3") == await entries.decisions(request="r3") == [made[3]]
        assert [found.tenant for found in await entries.decisions(request="r4")] == ["u", "t"]
        await entries.aclose()

    run(body())


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_useful_leave_first(tmp_path: Path) -> None:
    async def body() -> None:
        clock, events = ManualClock(), list[Event]()
        entries = opened(tmp_path, clock=clock, max_entries=3, emit=events.append)
        for text in "abc":
            made = add(entries, text)
            clock.advance(1)
            if text == "a":
                first = made
        assert first is not None
        entries.used(first.id)
        add(entries, "d")
        await entries.flush()
        assert texts(entries) == {"a", "c", "d"}
        assert events == [Evicted("semantic", 1, 1)]
        assert entries.stats().num_evicted == 1
        await entries.aclose()

    run(body())


def test_expired_entries_leave_the_file(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        entries = opened(tmp_path, clock=clock)
        add(entries, "brief-and-secret", ttl_s=10)
        await entries.flush()
        clock.advance(100)
        await entries.flush()
        assert len(entries) == 0
        await entries.aclose()
        with sqlite3.connect(tmp_path / "semantic.db") as connection:
            assert connection.execute("SELECT COUNT(*) FROM entries").fetchone() == (0,)
        connection.close()

    run(body())


def test_memory_stays_bounded_where_the_file_cannot_say_who_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEYOND", 2)
    entries = opened(tmp_path, start=False, max_entries=3)
    for number in range(20):
        add(entries, str(number))
    assert texts(entries) == {"15", "16", "17", "18", "19"}


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_nothing_that_was_forgotten_lies_in_any_file(tmp_path: Path) -> None:
    async def body() -> None:
        one, other = opened(tmp_path), opened(tmp_path)
        for number in range(300):
            tag = "secret" if number % 3 == 0 else ""
            add(one, f"{tag or 'plain'}-question-{number}" * 5, tag=tag)
            one.note(
                Decision(tenant=Tenant("t"), model="m", tags=(tag,), request_id="r", outcome="served", text=f"{tag}-decided")
            )
            one.note(Labelled(tenant=Tenant("t"), model="m", tags=(tag,), score=0.5, wrong=True))
        await one.flush()
        await other.flush()
        await other.aclose()  # and so saves vectors
        assert (tmp_path / "semantic.vectors").exists()
        vector = vector_of("secret-question-0" * 5).astype(np.float16).tobytes()
        assert b"secret-question-0" in bytes_in(tmp_path)
        assert vector in bytes_in(tmp_path)
        receipt = await one.forget(Scope(tag="secret"))
        assert receipt.complete
        assert receipt.removed == {"semantic": 100}
        assert b"secret-" not in bytes_in(tmp_path)
        assert vector not in bytes_in(tmp_path)
        assert not (tmp_path / "semantic.vectors").exists()
        assert len(texts(one)) == len(one) == 200
        assert {decision.tags for decision in await one.decisions()} == {("",)}
        assert len(await one.labels()) == 200
        await one.aclose()
        assert b"secret-" not in bytes_in(tmp_path)

    run(body())


def test_a_receipt_counts_what_was_not_written_yet(tmp_path: Path) -> None:
    async def body() -> None:
        entries = opened(tmp_path)
        await entries.flush()
        for text in "abc":
            add(entries, text, tenant="u" if text == "c" else "t")
        receipt = await entries.forget(Scope(tenant=Tenant("t"), model="m"))
        assert receipt.removed == {"semantic": 2}
        assert texts(entries) == {"c"}
        await entries.aclose()

    run(body())


def test_after_another_process_has_forgotten_something_it_is_not_found_here(tmp_path: Path) -> None:
    async def body() -> None:
        one, other = opened(tmp_path), opened(tmp_path)
        made = add(one, "mine")
        add(one, "theirs", tenant="u")
        await one.flush()
        await other.flush()
        before = other.mark()
        await one.forget(Scope(tenant=Tenant("t")))
        assert made is not None
        assert other.same(SPACE, made.digest) is None  # at once, without being told
        assert other.get(made.id) is None
        assert "mine" not in texts(other)
        assert other.mark() != before
        await other.flush()
        assert texts(other) == {"theirs"}
        await one.aclose()
        await other.aclose()

    run(body())


def test_what_came_up_before_a_forget_is_not_written_after_it(tmp_path: Path) -> None:
    async def body() -> None:
        late, other = opened(tmp_path, start=False), opened(tmp_path)
        await other.flush()
        add(late, "late-and-secret")
        late.note(Decision(tenant=Tenant("t"), model="m", request_id="r", outcome="served", text="late-and-secret"))
        await other.forget(Scope())
        late.start()
        await late.flush()
        assert len(late) == 0
        await late.aclose()
        await other.aclose()
        assert b"late-and-secret" not in bytes_in(tmp_path)

    run(body())


def test_what_was_asked_before_a_forget_is_not_remembered_after_it(tmp_path: Path) -> None:
    async def body() -> None:
        entries = opened(tmp_path)
        mark = entries.mark()
        assert add(entries, "in time", since=mark) is not None
        await entries.forget(Scope(tag="whatever"))
        assert add(entries, "late", since=mark) is None
        mark = entries.mark()
        entries.drop(Scope(tag="whatever"))
        assert add(entries, "late", since=mark) is None
        assert texts(entries) == {"in time"}
        await entries.aclose()

    run(body())


def test_a_process_that_is_told_drops_what_it_has(tmp_path: Path) -> None:
    entries = opened(tmp_path, start=False)
    add(entries, "a", tag="x")
    add(entries, "b")
    entries.drop(Scope(tag="x"))
    assert texts(entries) == {"b"}


# -- restarts ----------------------------------------------------------------------------------------------------------


def reopened(folder: Path, **options: Any) -> set[str]:
    found: set[str] = set()

    async def body() -> None:
        entries = opened(folder, **options)
        await entries.flush()
        found.update(texts(entries))
        assert {entry for entry in found if entries.same(SPACE, digest_of(entry)) is None} == set()
        await entries.aclose()

    run(body())
    return found


def filled(folder: Path, names: str) -> None:
    async def body() -> None:
        entries = opened(folder)
        await entries.flush()
        for name in names:
            add(entries, name)
        await entries.aclose()

    run(body())


def test_everything_is_there_after_a_restart_and_the_graph_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "abc")

    def unread(*_: object) -> dict[int, bytes]:
        raise AssertionError("vectors were read from the entries")

    assert (tmp_path / "semantic.vectors").exists()
    monkeypatch.setattr(entry_file.EntryFile, "vectors", lambda file, ids: unread() if ids else {})
    assert reopened(tmp_path) == {"a", "b", "c"}


def test_entries_newer_than_the_vectors_file_are_added_and_older_ones_removed(tmp_path: Path) -> None:
    filled(tmp_path, "abc")
    old = (tmp_path / "semantic.vectors").read_bytes()
    filled(tmp_path, "de")
    with sqlite3.connect(tmp_path / "semantic.db") as connection:
        connection.execute("DELETE FROM entries WHERE text = 'a'")
    connection.close()
    (tmp_path / "semantic.vectors").write_bytes(old)
    assert reopened(tmp_path) == {"b", "c", "d", "e"}


@pytest.mark.parametrize("content", [b"", b"rubbish" * 1000, None])
def test_a_damaged_vectors_file_is_built_anew(tmp_path: Path, content: bytes | None) -> None:
    filled(tmp_path, "abc")
    path = tmp_path / "semantic.vectors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    assert reopened(tmp_path) == {"a", "b", "c"}
    filled(tmp_path, "d")
    assert reopened(tmp_path) == {"a", "b", "c", "d"}


def test_what_is_added_while_the_file_is_still_being_read_stays(tmp_path: Path) -> None:
    async def body() -> None:
        entries = opened(tmp_path, start=False)
        add(entries, "early")
        assert texts(entries) == {"early"}
        entries.start()
        await entries.flush()
        assert texts(entries) == {"a", "b", "early"}
        await entries.aclose()

    filled(tmp_path, "ab")
    run(body())
    assert reopened(tmp_path) == {"a", "b", "early"}


def test_vectors_of_another_encoder_are_dropped(tmp_path: Path) -> None:
    filled(tmp_path, "abc")
    assert reopened(tmp_path, encoder="two") == set()
    assert reopened(tmp_path, encoder="two", dimensions=DIMENSIONS) == set()


def test_a_killed_process_leaves_what_it_had_acknowledged(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from tests.levels.semantic.test_entries import add, opened\n"
        "async def main():\n"
        "    entries = opened(Path(sys.argv[1]))\n"
        "    for number in range(100_000):\n"
        "        add(entries, f'question {number}'); await entries.flush(); print(number, flush=True)\n"
        "asyncio.run(main())"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(20)][-1]
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
    found = reopened(tmp_path)
    assert found >= {f"question {number}" for number in range(acknowledged + 1)}
    assert len(found) <= acknowledged + 2


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_put_aside_and_a_new_one_begun(tmp_path: Path) -> None:
    filled(tmp_path, "abc")
    (tmp_path / "semantic.db").write_bytes(b"not a database, and secret" * 1000)
    assert reopened(tmp_path) == set()
    assert (tmp_path / "semantic.damaged.db").exists()
    filled(tmp_path, "d")
    assert reopened(tmp_path) == {"d"}

    async def body() -> None:
        entries = opened(tmp_path)
        assert (await entries.forget(Scope(tag="anything"))).complete
        await entries.aclose()

    run(body())
    assert not (tmp_path / "semantic.damaged.db").exists()
    assert b"and secret" not in bytes_in(tmp_path)


def ruin(folder: Path) -> None:
    for part in folder.glob("semantic.db*"):
        part.unlink()
    (folder / "semantic.db").write_bytes(b"not a database" * 1000)


def test_a_file_that_is_damaged_under_a_running_process_takes_what_it_held_along(tmp_path: Path) -> None:
    async def body() -> None:
        one, other = opened(tmp_path), opened(tmp_path)
        add(one, "lost")
        await one.flush()
        await other.flush()
        ruin(tmp_path)
        await one.flush()
        await other.flush()
        assert texts(one) == texts(other) == set()
        add(one, "new")
        await one.flush()
        await other.flush()
        assert texts(one) == texts(other) == {"new"}
        await one.aclose()
        await other.aclose()

    run(body())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_with_a_full_disk_memory_goes_on_and_the_rest_is_written_later(tmp_path: Path) -> None:
    async def body() -> None:
        events: list[Event] = []
        entries = opened(tmp_path, emit=events.append)
        add(entries, "before")
        await entries.flush()
        with files_of_at_most(4096):
            for number in range(50):
                add(entries, f"question {number}" * 100)
            await entries.flush()
            assert any(isinstance(event, Failed) and event.operation == "write" for event in events)
            assert len(texts(entries)) == 51
        await entries.flush()
        await entries.aclose()

    run(body())
    assert len(reopened(tmp_path)) == 51


def test_what_waits_for_a_file_that_cannot_be_written_is_bounded_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 5)
    (tmp_path / "file").write_bytes(b"")

    async def body() -> None:
        events: list[Event] = []
        entries = opened(tmp_path / "file" / "below", emit=events.append)  # no folder can be made there
        for number in range(20):
            add(entries, str(number))
        await entries.flush()
        assert len(texts(entries)) == 20
        assert sum(event.num_entries for event in events if isinstance(event, Dropped)) == 15
        receipt = await entries.forget(Scope())
        assert receipt.failed == ("semantic",)
        assert not receipt.complete
        assert texts(entries) == set()
        assert await entries.decisions() == []
        assert await entries.labels() == []
        await entries.aclose()

    run(body())


def test_a_forget_that_failed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        entries = opened(tmp_path)
        for number in range(50):
            add(entries, f"secret {number}" * 50)
        await entries.flush()
        reader = sqlite3.connect(tmp_path / "semantic.db")
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM entries").fetchone()  # and so the log cannot be done with
        receipt = await entries.forget(Scope())
        assert receipt.failed == ("semantic",)
        reader.close()
        await entries.flush()
        assert b"secret 7" not in bytes_in(tmp_path)
        await entries.aclose()

    monkeypatch.setattr(entry_file, "BUSY_S", 0.1)
    run(body())


def test_a_file_of_a_later_version_is_put_aside(tmp_path: Path) -> None:
    filled(tmp_path, "a")
    with sqlite3.connect(tmp_path / "semantic.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert reopened(tmp_path) == set()


def test_what_was_computed_of_a_text_is_there_after_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        entries = opened(tmp_path)
        add(entries, "a", form=b"computed")
        await entries.aclose()
        again = opened(tmp_path)
        await again.flush()
        found = again.same(SPACE, digest_of("a"))
        assert found is not None
        assert found.form == b"computed"
        await again.aclose()

    run(body())


def test_a_file_of_the_first_format_goes_on_without_what_was_computed_of_its_texts(tmp_path: Path) -> None:
    filled(tmp_path, "ab")
    with sqlite3.connect(tmp_path / "semantic.db") as connection:
        connection.execute("ALTER TABLE entries DROP COLUMN form")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    assert reopened(tmp_path) == {"a", "b"}
    filled(tmp_path, "c")
    assert reopened(tmp_path) == {"a", "b", "c"}


def test_nobody_else_may_read_the_files(tmp_path: Path) -> None:
    filled(tmp_path, "abc")
    assert {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {
        "semantic.db": 0,
        "semantic.epoch": 0,
        "semantic.lock": 0,
        "semantic.vectors": 0,
    }


def test_once_closed_questions_are_refused_in_words(tmp_path: Path) -> None:
    async def body() -> None:
        entries = opened(tmp_path)
        await entries.aclose()
        await entries.aclose()
        with pytest.raises(EntriesFailed, match="closed"):
            await entries.flush()

    run(body())


# -- against a model ---------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Two processes' entries over one folder. What one of them has not written when the other forgets may be lost, and nothing
    else; what was forgotten is found nowhere, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.entries = [opened(Path(self.folder.name), clock=self.clock) for _ in range(2)]
        self.sure: dict[str, Entry] = {}
        self.unsure: dict[str, Entry] = {}
        self.unwritten: list[set[str]] = [set(), set()]
        self.gone: set[str] = set()
        self.num_added = 0
        self.sync()

    def teardown(self) -> None:
        self.wait(lambda entries: entries.aclose())
        self.folder.cleanup()
        self.runner.close()

    def wait(self, ask: Callable[[Entries], Coroutine[Any, Any, None]]) -> None:
        for entries in self.entries:
            self.runner.run(ask(entries))

    @rule(which=st.integers(0, 1), tenant=st.sampled_from("tu"), tag=st.sampled_from(["", "x"]))
    def add(self, which: int, tenant: str, tag: str) -> None:
        self.num_added += 1
        text = f"question {self.num_added}"
        made = add(self.entries[which], text, tenant=tenant, tag=tag)
        if made is not None:  # None: another one's forget has not been heeded yet
            self.sure[text] = made
            self.unwritten[which].add(text)

    @rule(which=st.integers(0, 1), data=st.data())
    def remove(self, which: int, data: st.DataObject) -> None:
        self.sync()
        if self.sure:
            text = data.draw(st.sampled_from(sorted(self.sure)))
            self.entries[which].remove(self.sure.pop(text).id)
            self.gone.add(text)
            self.sync()

    @rule(
        which=st.integers(0, 1), scope=st.sampled_from([Scope(), Scope(tenant=Tenant("t")), Scope(tag="x"), Scope(model="n")])
    )
    def forget(self, which: int, scope: Scope) -> None:
        receipt = self.runner.run(self.entries[which].forget(scope))
        assert receipt.complete
        for known in (self.sure, self.unsure):
            for text in [text for text, entry in known.items() if entry.within(scope)]:
                del known[text]
                self.gone.add(text)
        for text in self.unwritten[1 - which] & self.sure.keys():
            self.unsure[text] = self.sure.pop(text)

    @rule()
    def sync(self) -> None:
        for _ in range(2):
            self.wait(lambda entries: entries.flush())
        for entries in self.entries:
            found = texts(entries)
            assert self.sure.keys() <= found <= self.sure.keys() | self.unsure.keys()
        assert texts(self.entries[0]) == texts(self.entries[1])
        self.sure.update({text: entry for text, entry in self.unsure.items() if text in texts(self.entries[0])})
        self.unsure.clear()
        self.unwritten = [set(), set()]

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.runner.run(self.entries[which].aclose())
        self.entries[which] = opened(Path(self.folder.name), clock=self.clock)
        self.sync()

    @invariant()
    def nothing_that_went_is_found(self) -> None:
        for entries in self.entries:
            assert not texts(entries) & self.gone
            assert all(entries.same(SPACE, digest_of(text)) is None for text in self.gone)


TestAgainstAModel = Machine.TestCase
TestAgainstAModel.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
