"""`/anaphora/replicas`: who answers, looked at and changed while the server runs."""

from __future__ import annotations

import msgspec

from anaphora.config import UpstreamConfig, check_upstream
from anaphora.errors import ConfigError, InvalidRequest, PermissionDenied
from anaphora.server.endpoint import Call, Endpoint


class _Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of these."""

    add: UpstreamConfig | None = None
    drain: str | None = None
    resume: str | None = None
    remove: str | None = None


class Replicas(Endpoint):
    """`GET /anaphora/replicas`: the upstreams, and how they are doing. `POST` with one of `{"add": {...}}` (fields as in
    `[[gateway.upstreams]]`), `{"drain": name}`, `{"resume": name}`, `{"remove": name}`: for administrators."""

    async def answer(self, call: Call) -> None:
        if not call.admin:
            raise PermissionDenied("Only a key with `admin = true` may look at replicas or change them.")
        fleet = self.api.gateway.fleet()
        if call.connection["method"] == "POST":
            if self.api.gateway.shared:
                raise InvalidRequest("Replicas can be changed at run time by one worker only: set server.workers = 1.")
            change = _read(await call.body())
            if change.add is not None:
                try:
                    check_upstream(change.add, "add")
                    await fleet.add(change.add)
                except ConfigError as error:
                    raise InvalidRequest(str(error), param="add") from error
            elif change.remove is not None:
                await fleet.remove(change.remove)
            else:
                fleet.drain(change.drain or change.resume or "", draining=change.drain is not None)
        await call.json(msgspec.json.encode({"replicas": fleet.replicas()}))


def _read(body: bytes) -> _Change:
    try:
        change = msgspec.json.decode(body, type=_Change)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The body is wrong: {error}.") from error
    if sum(getattr(change, name) is not None for name in change.__struct_fields__) != 1:
        raise InvalidRequest("The body must have exactly one of add, drain, resume and remove.")
    return change
