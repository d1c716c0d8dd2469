"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from anaphora.config.sections import GIB, KIB, MIB


def parse_size(text: str) -> int:
    """Bytes from "2GiB", "500 MB", "1.5g" or "1024". A bare K, M, G or T is binary. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(ib?|b)?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a size such as 512MiB or 2GiB, got {text!r}")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    return int(float(number) * base ** ("kmgt".index(prefix.lower()) + 1 if prefix else 0))


def format_size(size: int) -> str:
    """The shortest exact text that `parse_size` reads back: 2147483648 → "2GiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
