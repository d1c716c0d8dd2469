"""One of several gateway processes: `python -m anaphora.server.worker`, started only by `server.run`."""

from __future__ import annotations

import asyncio
import logging
import sys

import msgspec

from anaphora.server.run import Job, run, work
from anaphora.server.voice import Silent


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="anaphora: %(levelname)s: %(message)s")
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    run(work(job, voice=Silent(), orphaned=_end_of_input))


async def _end_of_input() -> None:
    """Returns when the process that started this one is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


if __name__ == "__main__":
    main()
