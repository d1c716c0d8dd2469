"""API keys to their owners, and where a server without keys may listen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from anaphora.config import is_loopback
from anaphora.errors import ConfigError, Unauthenticated
from anaphora.types import LOCAL_TENANT, Owner, Tenant

LOCAL = Owner(LOCAL_TENANT, admin=True)


class Keyring:
    """Who may ask. Keeps digests only: looking one up takes the same time however much of a guess is right, and no key can
    end up in a log. Without keys everybody is the one local tenant; with `any_key` every key is a tenant of its own then.
    Either way they may do everything: who listens without keys listens on loopback only."""

    def __init__(self, keys: Mapping[str, Owner], *, any_key: bool = False) -> None:
        self._owners = {_digest(key.encode()): owner for key, owner in keys.items()}
        self._any_key = any_key

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, authorization: bytes | None, api_key: bytes | None) -> Owner:
        """Of `Authorization: Bearer KEY` or `x-api-key: KEY`. Raises Unauthenticated."""
        if not self._owners and not self._any_key:
            return LOCAL
        key = api_key if api_key is not None else _bearer(authorization)
        if not self._owners:
            return LOCAL if key is None else Owner(Tenant(f"key-{_digest(key).hex()[:16]}"), admin=True)
        if key is None:
            raise Unauthenticated(
                "No API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.", code="missing_api_key"
            )
        owner = self._owners.get(_digest(key))
        if owner is None:
            raise Unauthenticated("This API key is not known.", code="invalid_api_key")
        return owner


def check_bind(host: str, keys: Mapping[str, Owner]) -> None:
    """Raises ConfigError where strangers could reach a server that asks for no key."""
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"server.host: without API keys only a loopback address may be listened on, not {host}; "
            "add [[server.keys]] or use 127.0.0.1"
        )


def _bearer(authorization: bytes | None) -> bytes | None:
    if authorization is None:
        return None
    scheme, _, key = authorization.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
