"""The tables of the index, from the first format on."""

from __future__ import annotations

from anaphora.tiers.disk import erased

FORMATS = (
    """
CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0), used INTEGER NOT NULL CHECK (used >= 0), tick INTEGER NOT NULL);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, accessed INTEGER NOT NULL, file TEXT,
    stored_at REAL NOT NULL, expires_at REAL, cost REAL NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL,
    tags TEXT NOT NULL, checksum BLOB NOT NULL, value BLOB
);
CREATE INDEX entries_by_access ON entries (accessed);
CREATE INDEX entries_by_expiry ON entries (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX entries_by_file ON entries (file) WHERE file IS NOT NULL;
CREATE TRIGGER used_grows AFTER INSERT ON entries BEGIN UPDATE meta SET used = used + NEW.size; END;
CREATE TRIGGER used_shrinks AFTER DELETE ON entries BEGIN UPDATE meta SET used = used - OLD.size; END;
INSERT INTO meta VALUES (0, 0, 0);
""",
    """
ALTER TABLE meta ADD COLUMN ranked_by TEXT NOT NULL DEFAULT 'lru';
ALTER TABLE meta ADD COLUMN age REAL NOT NULL DEFAULT 0;
ALTER TABLE entries ADD COLUMN rank REAL NOT NULL DEFAULT 0;
ALTER TABLE entries ADD COLUMN frequency INTEGER NOT NULL DEFAULT 1;
ALTER TABLE entries ADD COLUMN kept_until REAL;
DROP INDEX entries_by_access;
CREATE INDEX entries_by_rank ON entries (rank, accessed, size, kept_until) WHERE kept_until IS NULL;
CREATE INDEX entries_by_keeping ON entries (kept_until, size, expires_at) WHERE kept_until IS NOT NULL;
CREATE INDEX entries_by_keeper ON entries (tenant, size, kept_until) WHERE kept_until IS NOT NULL;
""",
    erased.SCHEMA,
)
"""Statements that lead from each format to the next. A semicolon at a line's end ends a statement."""
FORMAT = len(FORMATS)
"""SQLite's `user_version`. An index of a later format is put aside like a damaged one."""

SHARES = """
CREATE TABLE used_by_tenant (tenant TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO used_by_tenant SELECT tenant, SUM(size) FROM entries GROUP BY tenant;
CREATE INDEX entries_by_tenant ON entries (tenant, rank, accessed, size, kept_until) WHERE kept_until IS NULL;
CREATE TRIGGER tenant_grows AFTER INSERT ON entries
    BEGIN INSERT INTO used_by_tenant VALUES (NEW.tenant, NEW.size) ON CONFLICT DO UPDATE SET bytes = bytes + NEW.size; END;
CREATE TRIGGER tenant_shrinks AFTER DELETE ON entries
    BEGIN UPDATE used_by_tenant SET bytes = bytes - OLD.size WHERE tenant = OLD.tenant; END;
CREATE TRIGGER nothing_used AFTER UPDATE ON used_by_tenant WHEN NEW.bytes <= 0
    BEGIN DELETE FROM used_by_tenant WHERE tenant = NEW.tenant; END;
"""
"""Only in folders of which a process has limited the share of a tenant: others need not pay for it."""
COLUMNS = "id, key, file, stored_at, expires_at, cost, tenant, model, tags, checksum, value"


def rank_sql(frequency: str, cost: str = "cost", size: str = "size") -> str:
    """SQL for the first thing that entries are ordered by; the second is their last use. As `policies.gdsf` has it."""
    return f"(SELECT CASE ranked_by WHEN 'gdsf' THEN age + {frequency} * {cost} / {size} ELSE 0 END FROM meta)"
