"""The ASGI application, and running it with uvicorn.

A question's path is looked up in a dictionary before Starlette's router sees it: an answer from the cache should cost little
more than reading the request and writing the response.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from anaphora.errors import MethodNotAllowed, NotFound, ServiceError
from anaphora.server import routes
from anaphora.server.embeddings import EmbeddingsEndpoint
from anaphora.server.endpoint import OPENAI, Api, Endpoint, dialect_of
from anaphora.server.foreign import METHODS, Elsewhere
from anaphora.server.ledger import LedgerPage
from anaphora.server.replicas import Replicas
from anaphora.server.semantic import Evidence, Feedback, Semantic
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import new_ids
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses


class App:
    """The whole HTTP surface. The gateway in `api` is started and closed by whoever made it."""

    def __init__(self, api: Api) -> None:
        self.api = api
        anthropic = Anthropic(provider_blocks=api.gateway.takes_provider_blocks)
        api.gateway.on_forget(api.explanations.forget)
        self._hot: dict[str, Endpoint] = {
            "/v1/chat/completions": routes.Answers(api, OPENAI),
            "/v1/completions": routes.Answers(api, OpenAICompletions()),
            "/v1/responses": routes.Answers(api, OpenAIResponses()),
            "/v1/messages": routes.Answers(api, anthropic),
            "/v1/embeddings": EmbeddingsEndpoint(api),
        }
        post = [Route(path, endpoint, methods=["POST"]) for path, endpoint in self._hot.items()]
        self._rest = Starlette(
            routes=[
                *post,
                Route("/v1/messages/count_tokens", routes.CountTokens(api, anthropic), methods=["POST"]),
                Route("/v1/models", routes.Models(api), methods=["GET"]),
                Route("/v1/models/{id:path}", routes.Models(api), methods=["GET"]),
                Route("/health", routes.Health(api), methods=["GET"]),
                Route("/ready", routes.Ready(api), methods=["GET"]),
                Route("/metrics", routes.MetricsPage(api), methods=["GET"]),
                Route("/anaphora/stats", routes.Stats(api), methods=["GET"]),
                Route("/anaphora/explain", routes.Explain(api), methods=["GET"]),
                Route("/anaphora/explain/{id}", routes.Explain(api), methods=["GET"]),
                Route("/anaphora/ledger", LedgerPage(api), methods=["GET"]),
                Route("/anaphora/replicas", Replicas(api), methods=["GET", "POST"]),
                Route("/anaphora/clock", routes.MoveClock(api), methods=["POST"]),
                Route("/anaphora/feedback", Feedback(api), methods=["POST"]),
                Route("/anaphora/semantic", Semantic(api), methods=["GET"]),
                Route("/anaphora/semantic/evidence", Evidence(api), methods=["POST"]),
                Route("/anaphora/forget", routes.Forget(api), methods=["POST"]),
                *([Route("/v1/{path:path}", Elsewhere(api), methods=METHODS)] if api.gateway.hosting else []),
            ],
            exception_handlers={HTTPException: self._refuse},
        )

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        if connection["type"] == "http" and connection["method"] == "POST":
            endpoint = self._hot.get(connection["path"])
            if endpoint is not None:
                await endpoint(connection, receive, send)
                return
        await self._rest(connection, receive, send)

    async def _refuse(self, request: HttpRequest, error: Exception) -> Response:
        """Starlette's own refusals (no such path, wrong method), in the caller's dialect."""
        assert isinstance(error, HTTPException)
        refusal = _refusal(request, error)
        ids = new_ids(self.api.clock.now_s())
        dialect = dialect_of(request.url.path, dict(request.scope["headers"]))
        status, body, headers = dialect.render_error(refusal, f"req_{ids.id}")
        return Response(body, status, {**headers, **(error.headers or {})})


def _refusal(request: HttpRequest, error: HTTPException) -> ServiceError:
    if error.status_code == 405:
        return MethodNotAllowed(f"{request.method} is not possible at {request.url.path}.", code="method_not_allowed")
    return NotFound(f"There is nothing at {request.method} {request.url.path}.", code="unknown_url")
