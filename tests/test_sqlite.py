"""What SQLite files need that several processes share."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from anaphora.sqlite import Unreadable, execute_all, inode, integer, is_damage, locked, prepare, put_aside, transaction


def opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def at_once(num: int, work: Callable[[], None]) -> list[BaseException]:
    """What is raised by `num` threads that begin together."""
    problems: list[BaseException] = []
    ready = threading.Barrier(num)

    def run() -> None:
        ready.wait()
        try:
            work()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    def work(path: Path) -> None:
        db = opened(path)
        prepare(db)
        with transaction(db):
            execute_all(db, "CREATE TABLE IF NOT EXISTS t (n INTEGER);\nINSERT INTO t VALUES (1);\n")
        db.close()

    for number in range(20):
        path = tmp_path / f"{number}.db"
        assert at_once(8, lambda path=path: work(path)) == []  # type: ignore[misc]
        db = opened(path)
        assert integer(db, "SELECT COUNT(*) FROM t") == 8
        db.close()


def test_whoever_makes_a_new_file_is_waited_for_even_where_sqlite_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = sqlite3.connect(tmp_path / "a.db", timeout=0, isolation_level=None), opened(tmp_path / "a.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError):
        prepare(one, patience_s=0.0)
    monkeypatch.setattr("anaphora.sqlite.time.sleep", lambda seconds: other.execute("COMMIT"))
    prepare(one)
    assert one.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    one.close()
    other.close()


def test_a_transaction_that_fails_leaves_nothing_and_undoes_what_is_not_in_the_file(tmp_path: Path) -> None:
    db = opened(tmp_path / "a.db")
    db.execute("CREATE TABLE t (n INTEGER)")
    undone: list[bool] = []

    def fail() -> None:
        with transaction(db, lambda: undone.append(db.in_transaction)):
            db.execute("INSERT INTO t VALUES (1)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert undone == [True]  # while the lock was held
    assert not db.in_transaction
    assert integer(db, "SELECT COUNT(*) FROM t") == 0
    db.close()


def test_a_lock_is_held_by_one_and_the_others_do_not_wait_forever(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", 1.0), pytest.raises(BlockingIOError), locked(tmp_path / "lock", 0.0):
        pass
    with locked(tmp_path / "lock", 0.0):
        pass


def test_damage_is_told_from_what_passes(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.db", tmp_path / "aside.db"
    path.write_bytes(b"this is no database, and was never meant to be one" * 100)
    before = inode(path)
    db = opened(path)
    with pytest.raises(sqlite3.DatabaseError) as raised:
        prepare(db)
    assert is_damage(raised.value)
    db.close()
    put_aside(path, aside)
    assert not path.exists()
    assert inode(aside) == before
    one, other = opened(path), opened(path)
    one.execute("PRAGMA busy_timeout = 0")
    with transaction(other), pytest.raises(sqlite3.OperationalError) as busy:
        one.execute("BEGIN IMMEDIATE")
    assert not is_damage(busy.value)
    with pytest.raises(Unreadable):
        integer(one, "SELECT 'no number'")
    one.close()
    other.close()
