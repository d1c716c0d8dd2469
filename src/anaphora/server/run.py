"""Running the server: one process, or several workers on one socket with one engine between them.

A signal (SIGINT, SIGTERM) stops accepting, lets answers under way finish for `DRAIN_S` at most, then closes everything.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from anaphora.backends.engine_ipc import Status
from anaphora.build import build, engine_options
from anaphora.clock import Clock, ManualClock, SystemClock
from anaphora.config import Config, api_keys, upstream_key
from anaphora.errors import ConfigError
from anaphora.events import Event, among
from anaphora.explain import Explanations
from anaphora.forgets import Forgets
from anaphora.gateway import Gateway
from anaphora.ledger.accounts import Ledger
from anaphora.server.app import App
from anaphora.server.auth import Keyring, check_bind
from anaphora.server.books import Books, check_books
from anaphora.server.endpoint import Api
from anaphora.server.metrics import Metrics
from anaphora.server.protocol import Protocol
from anaphora.server.voice import Announcer, Lines, Voice
from anaphora.sums import Sums
from anaphora.types import Owner

DRAIN_S = 30
KEEP_ALIVE_S = 75
"""For how long a connection may rest between two requests: longer than clients and what stands between keep theirs (5 s and
60 s are usual), so that they close it, and never we just when a request is on its way."""
BACKLOG = 2048
_YOUNG_S = 5.0
"""A worker that dies younger than this is not brought back at once."""
_SWITCH_EVERY_S = 0.0005
"""How long a thread that writes to disk may keep the event loop waiting for the interpreter."""
_COLLECT_AFTER = (20_000, 2, 2)
"""Thresholds of the cyclic garbage collector. Nearly all of a request is freed without it, and each of its passes takes the
processor's caches from the requests under way: with the usual (700, 10, 10) a first byte comes 0.1 ms later, and the slowest
more. All generations are walked half as often as by default, no less: what errors leave behind is not to lie there for long."""
_HEED_EVERY_S = 1.0
"""How long a worker that nobody asks anything may hold what another one was told to forget."""


class Job(msgspec.Struct, frozen=True):
    """What a worker process is told, over its standard input: API keys have no place on a command line."""

    config: Config
    keys: dict[str, Owner]
    socket: int
    """Descriptor of the listening socket."""
    engine: str | None
    """Address of the engine process; None where the backend needs none."""
    folder: str
    """Of the files that the workers share."""
    number: int = 0
    """Of the worker. One that takes another's place has its number."""


def serve(config: Config, voice: Voice | None = None) -> None:
    """Listen and answer until a signal comes. Raises ConfigError for settings it cannot start with."""
    voice = voice or Lines()
    logging.basicConfig(level=logging.INFO, format="anaphora: %(levelname)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # not a line for every request to an upstream
    keys = api_keys(config)
    check_bind(config.server.host, keys)
    check_books(config)
    listener = listen(config.server.host, config.server.port)
    voice.say(f"listening on {_url(listener)}")
    if config.server.workers == 1:
        run(answer(config, keys, listener, None, voice=voice))
        return
    with tempfile.TemporaryDirectory(prefix="anaphora-workers-") as folder:
        job = Job(config, keys, listener.fileno(), None, folder)
        run(_supervise(job, listener, voice))


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket; port 0 takes any free one. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"server.host, server.port: cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


async def answer(
    config: Config,
    keys: dict[str, Owner],
    listener: socket.socket,
    engine: str | None,
    *,
    voice: Voice,
    orphaned: Callable[[], Coroutine[Any, Any, None]] | None = None,
    sums: Sums | None = None,
    forgets: Forgets | None = None,
    tallies: Path | None = None,
) -> None:
    """Serve on `listener` until a signal comes, or until `orphaned` returns. ConfigError where the gateway's own engine says
    that it will never be ready as configured. `sums`, `forgets` and `tallies` are what several workers share."""
    sys.setswitchinterval(_SWITCH_EVERY_S)
    sums = Sums() if sums is None else sums
    metrics, ledger = Metrics(sums), Ledger(sums)
    clock: Clock = ManualClock(float(int(time.time()))) if config.server.virtual_clock else SystemClock()

    explanations = Explanations(clock, size=config.server.explanations)

    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody counts any more
            loop.call_soon_threadsafe(emit, event)

    books = Books(config, clock, tell=tell, shared=tallies) if config.ledger.enabled else None
    emit = among((metrics, ledger, explanations, *([books.recorder] if books is not None else [])))
    announcer = Announcer(voice, _url(listener), with_keys=bool(keys))
    refusals: list[str] = []

    def on_status(status: Status) -> None:
        announcer.on_status(status)
        if status.refused is not None and engine is None:  # else whoever owns the engine process ends all of us
            refusals.append(status.refused)
            server.should_exit = True

    gateway = build(
        config,
        clock=clock,
        emit=emit,
        say=voice.say,
        on_status=on_status,
        engine=engine,
        forgets=forgets,
        allowance=None if books is None else books.allowance,
    )
    if books is not None:
        gateway.on_forget(books.recorder.forget)
        books.recorder.start()
    announcer.watch(gateway)
    # Clients who bring keys of their own, for upstreams that have none of ours, are strangers to each other.
    strangers = any(not upstream_key(upstream) for upstream in config.gateway.upstreams)
    keyring = Keyring(keys, any_key=config.engine.kind == "echo" or strangers)
    app = App(Api(gateway, keyring, metrics, ledger, clock, config.server.max_body, explanations, books, emit))
    settings = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        proxy_headers=False,  # nothing depends on where a client is
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a signal once more when it has stopped: it must not end this process before the gateway is closed.
        signal.signal(number, server.handle_exit)
    watches = [asyncio.create_task(_heed(gateway), name="anaphora-heed")] if forgets is not None else []
    if orphaned is not None:
        watches.append(asyncio.create_task(_stop_when(orphaned, server)))
    try:
        await gateway.start()
        if gateway.ready():  # a backend that need not load tells no status
            announcer.on_status(Status("ready", ready=True))
        gc.freeze()  # what is loaded stays: full collections need not walk it
        gc.set_threshold(*_COLLECT_AFTER)
        await server.serve(sockets=[listener])
    finally:
        for watch in watches:
            watch.cancel()
        announcer.close()
        await gateway.aclose()
        if books is not None:
            await books.aclose()
    if refusals:
        raise ConfigError(refusals[0])


async def _stop_when(orphaned: Callable[[], Coroutine[Any, Any, None]], server: uvicorn.Server) -> None:
    await orphaned()
    server.should_exit = True


# -- several workers -----------------------------------------------------------------------------------------------------


async def work(job: Job, *, voice: Voice, orphaned: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Be one of several workers."""
    listener = socket.socket(fileno=job.socket)
    sums, forgets = Sums(Path(job.folder, f"{job.number}.sums")), Forgets(Path(job.folder, "forgets"))
    await answer(
        job.config,
        job.keys,
        listener,
        job.engine,
        voice=voice,
        orphaned=orphaned,
        sums=sums,
        forgets=forgets,
        tallies=Path(job.folder, "tallies"),
    )


async def _heed(gateway: Gateway) -> None:
    """Requests heed by themselves; this is for the time without any."""
    while True:
        gateway.heed()
        await asyncio.sleep(_HEED_EVERY_S)


async def _supervise(job: Job, listener: socket.socket, voice: Voice) -> None:
    """Keep the workers alive until a signal comes. The engine, if there is one, belongs to this process; ConfigError where it
    says that it will never be ready as configured."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    announcer = Announcer(voice, _url(listener), with_keys=bool(job.keys))
    supervisor = client = None
    refusals: list[str] = []

    def on_status(status: Status) -> None:
        announcer.on_status(status)
        if status.refused is not None:
            refusals.append(status.refused)
            stop.set()

    if job.config.engine.kind == "transformers":
        from anaphora.backends.engine import EngineClient, EngineSupervisor

        supervisor = EngineSupervisor(engine_options(job.config), on_log=voice.say)
        await supervisor.start()
        job = msgspec.structs.replace(job, engine=supervisor.address)
        # This process asks the engine for nothing but how it is.
        client = EngineClient(supervisor.address, on_status=on_status)
        announcer.watch(client)
        await client.start()
    keepers = [
        asyncio.create_task(_keep(job, number, voice), name=f"worker-{number}") for number in range(job.config.server.workers)
    ]
    try:
        await stop.wait()
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        listener.close()
        announcer.close()
        if client is not None:
            await client.aclose()
        if supervisor is not None:
            await supervisor.aclose()
    if refusals:
        raise ConfigError(refusals[0])


async def _keep(job: Job, number: int, voice: Voice) -> None:
    """Run one worker, and another when it dies. Cancelled: let it drain."""
    job = msgspec.structs.replace(job, number=number)
    loop = asyncio.get_running_loop()
    while True:
        started_s = loop.time()
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "anaphora.server.worker", stdin=asyncio.subprocess.PIPE, pass_fds=(job.socket,)
        )
        assert worker.stdin is not None
        try:
            worker.stdin.write(msgspec.json.encode(job) + b"\n")  # and it stays open: its end tells the worker that we died
            status = await worker.wait()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                worker.terminate()
            await worker.wait()
            raise
        voice.say(f"worker {number} ended with status {status}; starting another")
        if loop.time() - started_s < _YOUNG_S:
            await asyncio.sleep(1.0)


def run(main: Coroutine[Any, Any, None]) -> None:
    """On the fastest event loop there is here."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(main)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
