"""Talking to a running server from the command line. Imported only by commands that do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from anaphora.errors import AnaphoraError


class ServerProblem(AnaphoraError):
    """The server cannot be reached, or refused; the message is for the person at the terminal."""


@contextmanager
def connect(args: argparse.Namespace) -> Iterator[httpx2.Client]:
    """A client for `--url` and `--api-key`. Failures inside the block become ServerProblem."""
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    # A cold prompt may take long before its first token; only connecting has a limit.
    timeout = httpx2.Timeout(None, connect=5.0)
    try:
        with httpx2.Client(base_url=args.url, headers=headers, timeout=timeout) as client:
            yield client
    except httpx2.ConnectError as error:
        raise ServerProblem(f"no server answers at {args.url}; start one with `anaphora serve`") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServerProblem(f"the connection to {args.url} failed: {error}") from error


def check(response: httpx2.Response) -> None:
    """Raises ServerProblem with the server's own words unless the status is 2xx. Reads the body of a failed stream."""
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text.strip() or response.reason_phrase
    raise ServerProblem(f"the server answered {response.status_code}: {message}")
