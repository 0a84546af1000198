"""Why a running Ray cluster was not joined: nobody listens, its token is missing or another one, or
its versions are others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Environment variables with which Ray finds the token of a cluster."""
DEFAULT_FILE = Path(".ray", "auth_token")
"""Ray's file of the token, below the home folder."""
CLIENT = "ray://"
"""Beginning of an address by which Ray's client joins a cluster."""
ADDRESS = "RAY_ADDRESS"
"""Environment variable with the address that `auto` joins; without it `auto` is the cluster of this
machine."""
SEE = "see docs/cluster.md"


def joined_address(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """The address that Ray joins for a value of `ray.address`."""
    return (environ.get(ADDRESS) or address) if address == "auto" else address


def why_not_joined(address: str, error: BaseException, environ: Mapping[str, str] = os.environ) -> str:
    """The message for an address at which no cluster could be joined.

    Args:
        address: `ray.address`.
        error: what was raised: ConnectionRefusedError and the like if nobody listens there.
        environ: environment of this process.
    """
    told = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return f"ray.address: nobody answers at '{address}' ({told}); check host and port, or use address: local"
    if isinstance(error, ConnectionRefusedError):
        return f"ray.address: no Ray cluster answers at '{address}' ({told}); start one, or use address: local"
    if "ersion mismatch" in told:
        return (
            f"ray.address: the cluster at '{address}' was not joined: {told}; all nodes need the same versions, {SEE}"
        )
    if isinstance(error, ConnectionError) or type(error).__name__ == "AuthenticationError":
        return (
            f"ray.address: something listens at '{address}', but does not accept this program; {_about_token(environ)}"
        )
    return f"ray.address: the cluster at '{address}' was not joined ({told}); {SEE}"


def _about_token(environ: Mapping[str, str]) -> str:
    """What to do about the token, by what this process has of it."""
    source = token_source(environ)
    if environ.get(MODE, "").lower() != "token":
        found = f"a token is there ({source})" if source else "no token is there"
        return (
            f"if the cluster asks for a token, as one does that was started where a token existed, set {MODE}=token: it is "
            f"{environ.get(MODE) or 'not set'}, so that no token is sent; {found}, and must be that of the cluster ({SEE})"
        )
    if source is None:
        return (
            f"{MODE} is token, but no token is there: copy ~/{DEFAULT_FILE} from a node of the cluster, or set {TOKEN} or {TOKEN_PATH} "
            f"({SEE})"
        )
    return (
        f"{MODE} is token; the token of this machine ({source}) is not that of the cluster, or the cluster asks for none (then unset "
        f"{MODE}); {SEE}"
    )


def token_source(environ: Mapping[str, str]) -> str | None:
    """Where Ray finds a token, in its order; None if nowhere. The token itself is never shown."""
    if environ.get(TOKEN):
        return TOKEN
    if environ.get(TOKEN_PATH):
        return environ[TOKEN_PATH]
    default = Path(environ.get("HOME", ""), DEFAULT_FILE)
    return f"~/{DEFAULT_FILE}" if default.is_file() else None
