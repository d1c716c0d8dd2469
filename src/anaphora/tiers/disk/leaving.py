"""Which entries leave a folder, in what order, and which are kept. All of it inside a transaction of the index."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from anaphora.clock import Clock
from anaphora.sqlite import execute_all, integer, transaction
from anaphora.tiers.base import ALL_KEPT_SHARE, Entry, Eviction
from anaphora.tiers.disk import erased
from anaphora.tiers.disk.rows import Removed, remove, select
from anaphora.tiers.disk.schema import SHARES, rank_sql
from anaphora.types import Key, Tenant

_OVER = """
SELECT 1 FROM entries WHERE expires_at <= :now UNION ALL SELECT 1 FROM entries WHERE kept_until <= :now
UNION ALL SELECT 1 FROM erased WHERE at <= :noted LIMIT 1
"""


class _Victim(NamedTuple):
    id: int
    size: int
    rank: float


class Leaving:
    """`values_folder` is where the files of large values lie."""

    def __init__(self, capacity: int, eviction: Eviction, clock: Clock, values_folder: Path) -> None:
        self._capacity = capacity
        self._eviction = eviction
        self._clock = clock
        self._values = values_folder
        self._settled = False

    def unsettle(self) -> None:
        """The next connection is perhaps to another index."""
        self._settled = False

    def settle(self, db: sqlite3.Connection) -> None:
        """Once, before the first put: make the folder's order ours, and have it count what each tenant uses if we ask that."""
        if self._settled:
            return
        with transaction(db):
            self._rank_anew(db)
            if self._eviction.tenant_share < 1 and not db.execute("PRAGMA table_info(used_by_tenant)").fetchall():
                execute_all(db, SHARES)
        self._settled = True

    def _rank_anew(self, db: sqlite3.Connection) -> None:
        """By our order, if that is not the folder's."""
        if db.execute("UPDATE meta SET ranked_by = :order WHERE ranked_by <> :order", {"order": self._eviction.order}).rowcount:
            db.execute(f"UPDATE entries SET rank = {rank_sql('frequency')}")

    def apply_touches(self, db: sqlite3.Connection, touched: Iterable[Key]) -> None:
        used = f"accessed = ?, frequency = frequency + 1, rank = {rank_sql('(frequency + 1)')}"
        for key in touched:
            db.execute(f"UPDATE entries SET {used} WHERE key = ?", (self.tick(db), key))

    def tick(self, db: sqlite3.Connection) -> int:
        """A logical time: unlike a clock's it never stands still, and never goes back."""
        return integer(db, "UPDATE meta SET tick = tick + 1 RETURNING tick")

    def make_room(self, db: sqlite3.Connection, entry: Entry) -> Removed | None:
        """Evict until `entry` fits; (key, size) of what went. None, and nothing went, if what is kept leaves it no room."""
        share = self._eviction.tenant_share * self._capacity
        if entry.size > min(share, self._capacity):
            return None
        victims: list[_Victim] = []
        if self._eviction.tenant_share < 1:
            used = db.execute("SELECT bytes FROM used_by_tenant WHERE tenant = ?", (entry.tenant,)).fetchone()
            excess = (used[0] if used else 0) + entry.size - share
            own = self._first(db, excess, of=entry.tenant)
            if own is None:
                return None
            victims += own
        excess = self._used(db) + entry.size - self._capacity - sum(victim.size for victim in victims)
        others = self._first(db, excess, besides=victims)
        return None if others is None else self._evict(db, victims + others)

    def _first(
        self, db: sqlite3.Connection, num_bytes: float, *, of: Tenant | None = None, besides: Iterable[_Victim] = ()
    ) -> list[_Victim] | None:
        """What leaves first, together so large, of what is not kept; None if there is not so much."""
        first: list[_Victim] = []
        if num_bytes <= 0:
            return first
        chosen = {victim.id for victim in besides}
        whose, values = ("", ()) if of is None else ("AND tenant = ?", (of,))
        sql = f"SELECT id, size, rank FROM entries WHERE kept_until IS NULL {whose} ORDER BY rank, accessed"
        with closing(db.execute(sql, values)) as rows:
            for victim in map(_Victim._make, rows):
                if victim.id not in chosen:
                    first.append(victim)
                    num_bytes -= victim.size
                    if num_bytes <= 0:
                        return first
        return None

    def _evict(self, db: sqlite3.Connection, victims: Iterable[_Victim]) -> Removed:
        evicted: Removed = []
        for victim in victims:
            if victim.rank:
                self._grow_older(db, victim.rank)
            evicted += remove(db, self._values, "id = ?", (victim.id,))
        return evicted

    def _grow_older(self, db: sqlite3.Connection, rank: float) -> None:
        """As `policies.gdsf` does when what has this rank leaves: if it is at the front, of all that may leave."""
        in_front = "SELECT 1 FROM entries WHERE kept_until IS NULL AND rank < :rank"
        db.execute(f"UPDATE meta SET age = :rank WHERE age < :rank AND NOT EXISTS ({in_front})", {"rank": rank})

    def _used(self, db: sqlite3.Connection) -> int:
        return integer(db, "SELECT used FROM meta")

    def shrink(self, db: sqlite3.Connection) -> Removed:
        """What a smaller capacity, or a smaller share of what is kept, has no room for goes."""
        kept = self._kept(db)
        if not self._may_keep(kept.total(), max(kept.values(), default=0)):
            self._keep_less(db)
        excess = self._used(db) - self._capacity
        if excess <= 0:
            return []
        self._rank_anew(db)
        return self._evict(db, self._first(db, excess) or [])

    # -- what is kept --------------------------------------------------------------------------------------------------

    def end_times(self, db: sqlite3.Connection) -> float:
        """Remove what has expired, and keep no longer what was kept until now; what time that is."""
        now_s = self._clock.now_s()
        times = {"now": now_s, "noted": now_s - erased.REMEMBERED_S}
        if db.execute(_OVER, times).fetchall():
            remove(db, self._values, "expires_at <= ?", (now_s,))
            db.execute("UPDATE entries SET kept_until = NULL WHERE kept_until <= :now", times)
            db.execute("DELETE FROM erased WHERE at <= :noted", times)
        return now_s

    def _kept(self, db: sqlite3.Connection) -> Counter[str]:
        """Bytes by tenant."""
        sql = "SELECT tenant, SUM(size) FROM entries WHERE kept_until IS NOT NULL GROUP BY tenant"
        return Counter(dict(db.execute(sql)))

    def _may_keep(self, num_bytes: int, of_one_tenant: int) -> bool:
        return num_bytes <= ALL_KEPT_SHARE * self._capacity and of_one_tenant <= self._eviction.keep_share * self._capacity

    def keep(self, db: sqlite3.Connection, until_s: Mapping[Key, float]) -> int:
        """How many of them are there and kept so long; first come, first served."""
        rows = {key: row for key, *row in select(db, "key, id, size, tenant, kept_until", until_s)}
        kept = self._kept(db) if any(already_s is None for *_, already_s in rows.values()) else Counter[str]()
        num_bytes = kept.total()
        num_kept = 0
        for key in until_s:
            if key not in rows:
                continue
            row, size, tenant, already_s = rows[key]
            if already_s is None:
                if not self._may_keep(num_bytes + size, kept[tenant] + size):
                    continue
                num_bytes += size
                kept[tenant] += size
            if already_s is None or already_s < until_s[key]:
                db.execute("UPDATE entries SET kept_until = ? WHERE id = ?", (until_s[key], row))
            num_kept += 1
        return num_kept

    def _keep_less(self, db: sqlite3.Connection) -> None:
        """As much of what is kept as the shares leave room for, what would leave last first."""
        last_first = "SELECT key, kept_until FROM entries WHERE kept_until IS NOT NULL ORDER BY rank DESC, accessed DESC"
        kept = {Key(key): until_s for key, until_s in db.execute(last_first)}
        db.execute("UPDATE entries SET kept_until = NULL WHERE kept_until IS NOT NULL")
        self.keep(db, kept)
