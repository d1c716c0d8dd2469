"""Every exception Anaphora raises on purpose.

AnaphoraError
├── ConfigError                 the configuration or the command line is wrong; says what to change
├── TierFailed                  a storage tier could not do what it was asked; never reaches a client (invariant 8)
├── DamagedBlock                stored KV is not what it should be: a counted miss, which never reaches a client (invariant 8)
└── ServiceError                ends a request; carries an HTTP status, rendered by `wire` in the caller's dialect
    ├── InvalidRequest     400  bad JSON, bad field (`param` names it), unsupported feature
    │   └── ContextTooLong 400  the prompt (plus max_tokens) does not fit the model
    ├── Unauthenticated    401  no or unknown API key
    ├── PermissionDenied   403  the key may not do this
    ├── NotFound           404  no such path or object
    │   └── ModelNotFound  404  no such model
    ├── MethodNotAllowed   405  the path exists, but not with this method
    ├── TooLarge           413  the body is larger than the limit
    ├── QueueFull          429  too many requests are waiting; `retry_after_s` says when to come back
    ├── LimitReached       429  the tenant has used up a rate or a budget; `soon`: within a minute there is more
    ├── BackendFailed      500  the computation failed in a way a retry may not mend
    ├── UpstreamFailed     any  a hosted API refused the request, or could not be reached; with its own words
    ├── EngineDied         503  the engine went away under the request; it is coming back, retry
    └── NotCached          504  `only-if-cached` and nothing cached (RFC 9111 §5.2.1.7)
"""

from __future__ import annotations


class AnaphoraError(Exception):
    """Root of the tree."""


class ConfigError(AnaphoraError):
    """The configuration cannot be used. The message names the setting and what to do."""


class TierFailed(AnaphoraError):
    """A tier's medium failed: disk full, read-only, unreachable. `store` catches it, counts it, and goes on without."""


class DamagedBlock(AnaphoraError):
    """A stored KV block is cut short, altered, or of another kind or shape than asked for. Says which."""


class ServiceError(AnaphoraError):
    """Ends one request. Subclasses fix `status`; `param`, `code` and `retry_after_s` are optional detail for the client."""

    status = 500

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    status = 400


class ContextTooLong(InvalidRequest):
    pass


class Unauthenticated(ServiceError):
    status = 401


class PermissionDenied(ServiceError):
    status = 403


class NotFound(ServiceError):
    status = 404


class ModelNotFound(NotFound):
    pass


class MethodNotAllowed(ServiceError):
    status = 405


class TooLarge(ServiceError):
    status = 413


class QueueFull(ServiceError):
    status = 429


class LimitReached(ServiceError):
    status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.soon = retry_after_s <= 60
        code = "rate_limit_exceeded" if self.soon else "budget_exceeded"
        super().__init__(message, code=code, retry_after_s=retry_after_s)


class BackendFailed(ServiceError):
    status = 500


class UpstreamFailed(ServiceError):
    """What an upstream answered instead of an answer, or what kept it from answering.

    `status` is its own where the client can do something with it, else 502 or 504. `elsewhere`: another upstream may well
    answer the same request. `again`: so may this one, and it has certainly not answered it yet, or answering twice does no
    harm.
    """

    def __init__(
        self,
        message: str,
        status: int,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        elsewhere: bool = False,
        again: bool = False,
        dialect: str = "",
        body: bytes = b"",
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.status = status
        self.elsewhere = elsewhere
        self.again = again
        self.dialect = dialect
        self.body = body
        """The upstream's own words: JSON in `dialect`. Empty: it had none."""


class EngineDied(ServiceError):
    status = 503


class NotCached(ServiceError):
    status = 504
