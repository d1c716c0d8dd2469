"""API keys to tenants, and where a server without keys may listen."""

from __future__ import annotations

import pytest

from anaphora.errors import ConfigError, Unauthenticated
from anaphora.server.auth import Keyring, check_bind
from anaphora.types import LOCAL_TENANT, Owner, Tenant

ALICE = Owner(Tenant("alice"), "research")


def test_without_keys_everybody_is_local() -> None:
    assert Keyring({}).owner(b"Bearer whatever", b"whatever") == Owner(LOCAL_TENANT, admin=True)


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [(b"Bearer secret", None), (b"bearer  secret", None), (None, b"secret"), (b"Basic xyz", b"secret")],
)
def test_either_header_names_the_owner(authorization: bytes | None, api_key: bytes | None) -> None:
    assert Keyring({"secret": ALICE}).owner(authorization, api_key) == ALICE


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [(None, None), (b"Bearer wrong", None), (b"secret", None), (b"Basic secret", None), (None, b"secre"), (None, b"")],
)
def test_anything_else_is_refused_without_repeating_the_key(authorization: bytes | None, api_key: bytes | None) -> None:
    with pytest.raises(Unauthenticated) as error:
        Keyring({"secret": ALICE}).owner(authorization, api_key)
    assert "secre" not in error.value.message


def test_the_keyring_keeps_no_key() -> None:
    assert "secret" not in repr(vars(Keyring({"secret": ALICE})))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    check_bind(host, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_everything_else_does(host: str) -> None:
    with pytest.raises(ConfigError, match="API keys"):
        check_bind(host, {})
    check_bind(host, {"secret": ALICE})
