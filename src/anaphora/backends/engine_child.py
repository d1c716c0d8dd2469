"""The engine process: `python -m anaphora.backends.engine_child SOCKET`. Started by `engine.EngineSupervisor`.

The first line of its standard input is its options, which may hold a password: a command line can be read by anyone.

Two threads: the main one loads the model and runs the engine's loop; the other serves the socket and tokenises. They meet
in an inbox of callables (towards the engine) and in the socket thread's own event loop (towards the clients).

This is a program of its own, so it reads the registry of policies itself, as `build` does for the gateway.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from anaphora.backends.engine import EngineOptions
from anaphora.backends.engine_ipc import (
    Cancel,
    CountTokens,
    Deltas,
    Failed,
    Forget,
    FromEngine,
    Measure,
    Reply,
    Stats,
    Status,
    Submit,
    ToEngine,
    failed,
    frame,
    read_frame,
    to_engine_decoder,
)
from anaphora.clock import Clock, SystemClock
from anaphora.errors import BackendFailed, ConfigError, EngineDied, ServiceError
from anaphora.registry import CODECS, POLICIES, TIERS
from anaphora.store import Store, StoreOptions
from anaphora.tiers.base import Eviction, Tier, eviction
from anaphora.tiers.following import Leader, following
from anaphora.types import Delta, End, Scope

if TYPE_CHECKING:
    from anaphora.backends.engine_core import EngineCore

_PENDING_BYTES = 256 << 20
_LOOKUP_S = 5.0
"""For one batch of blocks from one tier: computing them again takes seconds, too."""
_FLUSH_S = 4.0
"""How long the last blocks may take to be written when the gateway goes. It waits a little longer."""

Inbox = queue.SimpleQueue[Callable[[], None]]


class Connection:
    """One gateway worker. Requests of a worker that goes away are cancelled."""

    def __init__(self, server: SocketServer, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._writer = writer
        self._live: set[int] = set()
        """Requests submitted and not yet answered: they are cancelled with the connection."""

    def send(self, message: FromEngine) -> None:
        """From the socket thread."""
        if isinstance(message, Failed) or (isinstance(message, Deltas) and isinstance(message.deltas[-1], End)):
            self._live.discard(message.id)
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    def post(self, message: FromEngine) -> None:
        """From the engine thread."""
        self._server.loop.call_soon_threadsafe(self.send, message)

    def receive(self, message: ToEngine, core: EngineCore | None) -> None:
        if core is None:
            self.send(failed(message.id, EngineDied("the engine is still loading", retry_after_s=5.0)))
            return
        try:
            self._act(message, core)
        except ServiceError as error:
            self.send(failed(message.id, error))
        except Exception as error:  # a template or a tokenizer that breaks on one request must not end all the others
            traceback.print_exc()
            self.send(failed(message.id, BackendFailed(f"the engine could not take this request: {error!r}")))

    def close(self, core: EngineCore | None) -> None:
        if core is not None:
            for id in self._live:
                self._server.inbox.put(lambda id=id: core.cancel((self, id)))  # type: ignore[misc]  # bound at once
        self._writer.close()

    def _act(self, message: ToEngine, core: EngineCore) -> None:
        inbox = self._server.inbox
        id = message.id
        if isinstance(message, Submit):
            job = core.prepare(
                (self, id), message.request, lambda deltas: self._emit(id, deltas), lambda e: self.post(failed(id, e))
            )
            self._live.add(id)
            inbox.put(lambda: core.submit(job))
        elif isinstance(message, Cancel):
            self._live.discard(id)
            inbox.put(lambda: core.cancel((self, id)))
        elif isinstance(message, CountTokens):
            self.send(Reply(id, core.count_tokens(message.request)))
        elif isinstance(message, Measure):
            self.send(Reply(id, core.measure(message.request, message.prompt)))
        elif isinstance(message, Forget):
            inbox.put(lambda: self._guard(id, lambda: self._forget(id, message.scope, core)))
        elif isinstance(message, Stats):
            inbox.put(lambda: self._guard(id, lambda: self.post(Reply(id, core.stats()))))

    def _forget(self, id: int, scope: Scope, core: EngineCore) -> None:
        """On the engine thread, which computes on while slower tiers are cleared."""
        forgetting = core.start_forget(scope)

        def end(_: object = None) -> None:
            self._server.inbox.put(lambda: self._guard(id, lambda: self.post(Reply(id, core.end_forget(forgetting)))))

        if forgetting.erasing is None:
            end()
        else:
            forgetting.erasing.add_done_callback(end)

    def _guard(self, id: int, work: Callable[[], None]) -> None:
        """On the engine thread, where an error that nobody catches would end the process: it is the caller's."""
        try:
            work()
        except ServiceError as error:
            self.post(failed(id, error))
        except Exception as error:
            traceback.print_exc()
            self.post(failed(id, BackendFailed(f"the engine failed: {error!r}")))

    def _emit(self, id: int, deltas: list[Delta]) -> None:
        self.post(Deltas(id, tuple(deltas)))


class SocketServer:
    """The socket thread. `core` is None until the model is loaded."""

    def __init__(self, address: str, inbox: Inbox) -> None:
        self._address = address
        self.inbox = inbox
        self.loop = asyncio.new_event_loop()
        self._core: EngineCore | None = None
        self._status = Status("starting")
        self._connections: set[Connection] = set()

    def start(self) -> None:
        threading.Thread(target=self._run, name="engine-socket", daemon=True).start()

    def announce(self, status: Status, core: EngineCore | None = None) -> None:
        """From the engine thread: tell every client how far it is."""
        self.loop.call_soon_threadsafe(self._announce, status, core)

    def _announce(self, status: Status, core: EngineCore | None) -> None:
        self._status = status
        self._core = core or self._core
        for connection in self._connections:
            connection.send(status)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(asyncio.start_unix_server(self._serve, self._address))
        self.loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, writer)
        self._connections.add(connection)
        connection.send(self._status)
        try:
            while (message := await read_frame(reader, to_engine_decoder)) is not None:
                connection.receive(message, self._core)
        finally:
            self._connections.discard(connection)
            connection.close(self._core)


def main(address: str) -> None:
    # Ctrl-C in a terminal, or a service manager that stops a whole group, reaches this process too. The gateway decides: it
    # lets answers finish, and then closes our standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    options = msgspec.json.decode(_first_line(), type=EngineOptions)
    cores: list[EngineCore] = []
    threading.Thread(target=_die_with_parent, args=(cores,), name="parent-watch", daemon=True).start()
    os.nice(options.niceness)
    inbox: Inbox = queue.SimpleQueue()
    server = SocketServer(address, inbox)
    server.start()
    try:
        core = _load(options, lambda stage: server.announce(Status(stage)))
    except ConfigError as error:
        server.announce(Status("refused", refused=str(error)))
        threading.Event().wait()  # restarting would not help: stay, and tell whoever asks, until the supervisor goes
        return
    cores.append(core)
    server.announce(Status("ready", models=(core.info,), ready=True), core)
    _loop(core, inbox)


def _load(options: EngineOptions, progress: Callable[[str], None]) -> EngineCore:
    try:
        import psutil  # noqa: F401  # `stats` needs it: better missed now than then
        from transformers.utils import logging

        from anaphora.backends.engine_core import EngineCore
    except ImportError as error:
        raise ConfigError(
            f"the embedded engine needs packages that are not installed ({error}): pip install 'anaphora[local]'"
        ) from error
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Blocks that any of our own codecs wrote can be read. Of other packages' codecs only the one that is asked for is
    # loaded: one that is broken should not keep an engine from starting that has no use for it.
    codecs = {name: CODECS.load(name)() for name in {*CODECS.builtin, options.kv_codec}}
    return EngineCore(
        options,
        POLICIES.load(options.policy)(),
        store=_store(options),
        codec=codecs[options.kv_codec],
        readable=codecs,
        progress=progress,
    )


def _store(options: EngineOptions) -> Store | None:
    """Where KV blocks go beyond the pool: memory, this machine's disk, the server that machines share. None: nowhere."""
    from anaphora.tiers.disk import DiskOptions
    from anaphora.tiers.ram import RamOptions

    if not options.prefix_caching:
        return None
    clock = SystemClock()
    leaving = eviction(options.policy, tenant_share=options.kv_tenant_share, keep_share=options.pin_quota)
    tiers: list[Tier] = []
    if options.kv_ram:
        memory = RamOptions(options.kv_ram, leaving)
        tiers.append(TIERS.load("ram")(memory, policy=POLICIES.load(options.policy)(), clock=clock))
    shared = _shared(options, leaving, clock) if options.kv_shared else None
    if options.kv_disk:
        disk: Tier = TIERS.load("disk")(DiskOptions(options.kv_dir, options.kv_disk, eviction=leaving), clock=clock)
        tiers.append(disk if shared is None else following(disk, shared, Path(options.kv_dir), options.kv_shared))
    if shared is not None:
        tiers.append(shared)
    if not tiers:
        return None
    return Store(tiers, clock=clock, options=StoreOptions(max_pending_bytes=_PENDING_BYTES, lookup_timeout_s=_LOOKUP_S))


def _shared(options: EngineOptions, leaving: Eviction, clock: Clock) -> Leader:
    kind = TIERS.load("valkey")  # before its options are imported: this says what to install
    from anaphora.tiers.valkey import ValkeyOptions

    where = ValkeyOptions(
        options.kv_shared,
        options.kv_shared_capacity,
        prefix=options.kv_shared_prefix,
        ca_file=options.kv_shared_ca_file,
        timeout_s=_LOOKUP_S,
        eviction=leaving,
    )
    tier: Leader = kind(where, clock=clock)
    return tier


def _loop(core: EngineCore, inbox: Inbox) -> None:
    busy = False
    while True:
        if not busy:
            inbox.get()()
        while not inbox.empty():
            inbox.get()()
        try:
            busy = core.step()
        except RuntimeError as error:  # torch: out of memory, a broken kernel. The batch is lost, the engine is not.
            print(f"anaphora engine: a step failed: {error}", file=sys.stderr, flush=True)
            core.fail_all(BackendFailed(f"the engine failed on this batch: {error}"))
            busy = False


def _first_line() -> bytes:
    """Unbuffered: another thread reads on where this ends."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            sys.exit("the engine process is started by a gateway, which tells it its options")
        line += byte
    return line


def _die_with_parent(cores: list[EngineCore]) -> None:
    """The supervisor holds the other end of standard input; when it is gone, in whatever way, so is the engine's purpose.
    What was computed may still be written to where it outlives the process."""
    while os.read(0, 4096):
        pass
    for core in cores:
        core.flush(_FLUSH_S)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
