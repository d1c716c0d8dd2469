"""`GET /anaphora/ledger`: what the book says of the caller's own tenant."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec

from anaphora.errors import BackendFailed, ConfigError, InvalidRequest, NotFound
from anaphora.ledger.book import BookProblem
from anaphora.ledger.export import row
from anaphora.ledger.query import Query, dimensions, period, plain
from anaphora.server.endpoint import Call, Endpoint
from anaphora.server.routes import read_query


class _Asked(msgspec.Struct, frozen=True, rename={"start": "from", "end": "to"}):
    by: str = ""
    since: str | None = None
    start: str | None = None
    end: str | None = None
    rows: bool = False
    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000


class LedgerPage(Endpoint):
    """Groups, or with `rows=true` the requests themselves, `limit` of them behind number `after`."""

    async def answer(self, call: Call) -> None:
        books = self.api.books
        if books is None:
            raise NotFound("This server keeps no ledger (ledger.enabled).", code="no_ledger")
        asked = read_query(call, _Asked)
        try:
            by = dimensions(asked.by)
            from_us, to_us = period(asked.since, asked.start, asked.end, self.api.clock.now_s())
        except ConfigError as error:
            raise InvalidRequest(f"The query is wrong: {error}.") from error
        query = Query(from_us, to_us, call.tenant)
        try:
            if asked.rows:
                found = await asyncio.to_thread(books.rows, query, asked.after, asked.limit)
                told: dict[str, object] = {"requests": [{"number": number, **row(entry)} for number, entry in found]}
            else:
                told = {"groups": [plain(group) for group in await asyncio.to_thread(books.groups, by, query)]}
        except BookProblem as error:
            raise BackendFailed("The ledger cannot be read.") from error
        await call.json(msgspec.json.encode({"tenant": call.tenant, **told}))
