"""The embedded engine as the gateway sees it: a client of the engine process, and the supervisor that keeps it alive.

One engine process owns the device; it listens on a Unix socket. `EngineClient` is a backend over that socket and may exist
in many gateway workers; `EngineSupervisor` exists once, starts the process and brings it back when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from anaphora.backends.engine_ipc import (
    Cancel,
    CountTokens,
    Deltas,
    Failed,
    Forget,
    Measure,
    Reply,
    Stats,
    Status,
    Submit,
    ToEngine,
    error_of,
    frame,
    from_engine_decoder,
    read_frame,
)
from anaphora.errors import BackendFailed, ConfigError, EngineDied, InvalidRequest, ServiceError
from anaphora.prompt import Lengths, Prompt
from anaphora.types import Delta, End, ModelInfo, Request, Scope

GiB = 1024**3
_LONGEST_ADDRESS = 103
"""Bytes of a Unix socket's path: 108 on Linux, 104 on macOS, with a zero at the end."""


Quantization = Literal["none", "int8"]


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the engine process is told. Sizes in bytes; 0 means that the engine chooses."""

    model: str = "smollm2"
    served_name: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantization: Quantization = "none"
    """Of the weights."""
    device: str = "auto"
    kv_memory: int = 2 * GiB
    models_dir: str = ""
    threads: int = 0
    max_num_seqs: int = 16
    max_queue: int = 256
    prefill_chunk: int = 512
    """Prompt tokens per step while nobody is decoding."""
    mixed_chunk: int = 128
    """Prompt tokens per step while others are decoding: bounds how long a step keeps their streams waiting."""
    block_size: int = 16
    policy: str = "lru"
    prefix_caching: bool = True
    kv_dir: str = ""
    """Folder of the KV blocks that outlive this process."""
    kv_ram: int = 0
    """Bytes of KV blocks kept in the host's memory beside the pool, encoded by `kv_codec`. 0: none."""
    kv_disk: int = 0
    """Bytes in `kv_dir`. 0: none."""
    kv_shared: str = ""
    """URL of a Valkey or Redis server that keeps KV blocks for several machines."""
    kv_shared_capacity: int = 4 * GiB
    kv_shared_prefix: str = "anaphora:kv:"
    """What every key there begins with."""
    kv_shared_ca_file: str = ""
    kv_tenant_share: float = 1.0
    """Of each of these places, at most so much is one tenant's."""
    kv_codec: str = "raw"
    pin_quota: float = 0.25
    """Share of the KV blocks that promises to one tenant may keep from being evicted, in memory and in each of these places."""
    niceness: int = 5
    """Scheduling priority given up by the engine process, so that the gateway answers while tokens are computed."""


class EngineSupervisor:
    """Starts the engine process and restarts it when it dies, waiting longer each time it dies young."""

    def __init__(self, options: EngineOptions, *, on_log: Callable[[str], None] | None = None) -> None:
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="anaphora-engine-"))
        if len(os.fsencode(self.address)) > _LONGEST_ADDRESS:
            shutil.rmtree(self._folder)
            raise ConfigError(f"the path of the engine's socket is too long, {self.address}: set TMPDIR to a shorter one")
        self._on_log = on_log
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.num_restarts = 0

    @property
    def address(self) -> str:
        return str(self._folder / "engine.sock")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._keep_alive(), name="engine-supervisor")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), timeout=5.0)
            except TimeoutError:
                process.kill()
                await process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _keep_alive(self) -> None:
        clock = asyncio.get_running_loop()
        pause_s = 0.1
        while True:
            started_s = clock.time()
            returncode = await self._run_once()
            pause_s = 0.1 if clock.time() - started_s > 30.0 else min(pause_s * 2, 10.0)
            self._log(f"the engine process ended with status {returncode}; starting it again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            self.num_restarts += 1

    async def _run_once(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)
        # Its standard input is a pipe that only this process holds: when this process dies in any way, the engine reads the
        # end of it and goes too.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "anaphora.backends.engine_child",
            self.address,
            stdin=asyncio.subprocess.PIPE,
            env=_child_environment(self._options),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._options) + b"\n")
        return await self._process.wait()

    def _log(self, text: str) -> None:
        if self._on_log is not None:
            self._on_log(text)


def _child_environment(options: EngineOptions) -> dict[str, str]:
    threads = str(options.threads or os.cpu_count() or 1)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,  # the gateway's own is 1
        # Idle compute threads spin for some tens of microseconds, the gap between two layers, and then sleep: the gateway
        # shares these cores. libgomp's default would let them spin for milliseconds.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
    }


class EngineClient:
    """A backend over the engine's socket. Reconnects by itself; requests in flight when it breaks get EngineDied."""

    def __init__(self, address: str, *, wait_ready_s: float = 300.0, on_status: Callable[[Status], None] | None = None) -> None:
        self._address = address
        self._wait_ready_s = wait_ready_s
        self._on_status = on_status
        self._streams: dict[int, asyncio.Queue[tuple[Delta, ...] | ServiceError]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.status = Status("waiting for the engine process")

    async def start(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name="engine-client")

    def ready(self) -> bool:
        return self.status.ready

    async def models(self) -> tuple[ModelInfo, ...]:
        await self._until_ready()
        return self.status.models

    async def run(self, request: Request) -> AsyncIterator[Delta]:
        await self._until_ready()
        id = self._take_id()
        stream: asyncio.Queue[tuple[Delta, ...] | ServiceError] = asyncio.Queue()
        self._streams[id] = stream
        finished = False
        try:
            self._send(Submit(id, request))
            while not finished:
                item = await stream.get()
                if isinstance(item, ServiceError):
                    finished = True
                    raise item
                for delta in item:
                    finished = finished or isinstance(delta, End)
                    yield delta
        finally:
            del self._streams[id]
            if not finished and self._writer is not None:
                self._send(Cancel(id))

    async def count_tokens(self, request: Request) -> int:
        return int(await self._ask(lambda id: CountTokens(id, request)))

    async def measure(self, request: Request, prompt: Prompt) -> Lengths | None:
        """As `backends.base.Measuring` says. What it takes to tokenise the prompt is not spent again when it is run."""
        bare = tuple(msgspec.structs.replace(block, content=b"") for block in prompt.blocks)
        prompt = msgspec.structs.replace(prompt, blocks=bare)
        return msgspec.convert(await self._ask(lambda id: Measure(id, request, prompt)), Lengths | None)

    async def forget(self, scope: Scope) -> int:
        return int(await self._ask(lambda id: Forget(id, scope)))

    async def stats(self) -> dict[str, Any]:
        if not self.ready():
            return {"ready": 0, "stage": self.status.stage}
        return dict(await self._ask(Stats))

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._break("the gateway is shutting down")

    async def _ask(self, make: Callable[[int], ToEngine]) -> Any:
        await self._until_ready()
        id = self._take_id()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[id] = future
        try:
            self._send(make(id))
            return await future
        finally:
            del self._replies[id]

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _send(self, message: ToEngine) -> None:
        if self._writer is None:
            raise _died()
        try:
            self._writer.write(frame(message))
        except OverflowError:
            raise InvalidRequest("a number in this request does not fit into 64 bits") from None

    async def _until_ready(self) -> None:
        """Requests that arrive while the engine starts, or comes back, wait for it instead of failing."""
        if self.status.ready:
            return
        try:
            async with asyncio.timeout(self._wait_ready_s):
                while not self.status.ready and self.status.refused is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            message = f"the engine is not ready after {self._wait_ready_s:.0f} s ({self.status.stage}); retry later"
            raise EngineDied(message, retry_after_s=10.0) from None
        if self.status.refused is not None:
            raise BackendFailed(f"the engine cannot run as configured: {self.status.refused}")

    async def _stay_connected(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._address)
            except OSError:  # not listening yet, or gone
                await asyncio.sleep(0.05)
                continue
            while (message := await read_frame(reader, from_engine_decoder)) is not None:
                self._receive(message)
            self._break("the engine process died")

    def _receive(self, message: Status | Deltas | Failed | Reply) -> None:
        if isinstance(message, Status):
            self._set_status(message)
        elif isinstance(message, Reply):
            if (future := self._replies.get(message.id)) is not None and not future.done():
                future.set_result(message.value)
        elif (stream := self._streams.get(message.id)) is not None:
            stream.put_nowait(error_of(message) if isinstance(message, Failed) else message.deltas)
        elif isinstance(message, Failed) and (future := self._replies.get(message.id)) is not None and not future.done():
            future.set_exception(error_of(message))

    def _break(self, stage: str) -> None:
        """The connection is gone: everything in flight is lost, and says so."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.status.refused is None:
            self._set_status(Status(stage))
        for stream in self._streams.values():
            stream.put_nowait(_died())
        for future in self._replies.values():
            if not future.done():
                future.set_exception(_died())

    def _set_status(self, status: Status) -> None:
        self.status = status
        self._changed.set()
        if self._on_status is not None:
            self._on_status(status)


def _died() -> EngineDied:
    return EngineDied(
        "the engine process died while working on this request; it is being restarted, please retry", retry_after_s=1.0
    )


class Engine(EngineClient):
    """Supervisor and client together: what a gateway with one worker uses."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        wait_ready_s: float = 300.0,
        on_status: Callable[[Status], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        if not options.models_dir:
            raise ConfigError("the engine needs a folder for converted models (models_dir)")
        self.supervisor = EngineSupervisor(options, on_log=on_log)
        super().__init__(self.supervisor.address, wait_ready_s=wait_ready_s, on_status=on_status)

    async def start(self) -> None:
        await self.supervisor.start()
        await super().start()

    async def stats(self) -> dict[str, Any]:
        return {**await super().stats(), "num_restarts": self.supervisor.num_restarts}

    async def aclose(self) -> None:
        await super().aclose()
        await self.supervisor.aclose()
