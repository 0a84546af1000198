"""Seeds for independent random streams, derived from one base seed."""

from __future__ import annotations

import hashlib


def derive_seed(base: int, *stream: int | str) -> int:
    """A 63-bit seed for the stream named by `stream`; equal arguments give equal seeds on every
    machine."""
    text = "/".join([str(base), *map(str, stream)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
