"""The yardstick for a cached answer over HTTP: one Starlette endpoint that returns fixed bytes and does nothing else.

`python -m anaphora.server.bare FILE`: answers every POST to /v1/chat/completions with FILE's content, on a free port of
127.0.0.1, which it prints. Run by `anaphora bench prefix`.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def main(path: str) -> None:
    content = Path(path).read_bytes()

    async def endpoint(request: Request) -> Response:
        await request.body()
        return Response(content, media_type="application/json")

    app = Starlette(routes=[Route("/v1/chat/completions", endpoint, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
