"""URIs of MLflow stores, as a person writes them: which are understood, and what of them may be
shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

URI_VARIABLE = "MLFLOW_TRACKING_URI"
"""The environment variable that is the default of `tracking.uri`, as everywhere in MLflow."""
SQLITE = "sqlite:///"
HIDDEN = "***"
SHORTEST_PIECE = 3
_WITHOUT_SCHEME = ("databricks", "databricks-uc")
"""Stores that MLflow knows by a word alone."""
_WITHOUT_SLASHES = ("sqlite:", "file:", "databricks:", "databricks-uc:")
"""Beginnings of URIs that need no `//`."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SEPARATOR = "://"
_HOST = re.compile(r"(\[[^\]]*\]|[^:@]*)(:\d*)?")
"""Host and port without a user."""
_SECRET_VALUE = re.compile(r"(?i)((?:password|passwd|pwd|token|secret|key)=)([^&#]*)")


def uri_of_environment() -> str | None:
    """The store that the environment names; None if it names none."""
    return os.environ.get(URI_VARIABLE, "").strip() or None


def uri_problem(uri: str) -> str | None:
    """Why a URI names no store that a sweep can be recorded in; None if it does."""
    if uri in _WITHOUT_SCHEME:
        return None
    if not _SCHEME.match(uri) or (_SEPARATOR not in uri and not uri.startswith(_WITHOUT_SLASHES)):
        return (
            f"{shown_uri(uri)!r} is a path and no URI; for a database write {SQLITE}PATH, for a server http://HOST:PORT"
        )
    if not uri.startswith("sqlite:"):
        return None
    path = uri.removeprefix(SQLITE)
    if path == uri or not path or path == ":memory:":
        return f"{shown_uri(uri)!r} names no file; write {SQLITE}PATH, with a fourth slash before an absolute path"
    if set("%?") & set(path):
        return f"{shown_uri(uri)!r} has '%' or '?' in the path, which MLflow and SQLite read differently; choose another path"
    return None


def absolute_uri(uri: str) -> str:
    """The URI with an absolute path if it is a file of SQLite, which is else taken from the working
    directory of whatever process opens it; other URIs unchanged."""
    path = uri.removeprefix(SQLITE)
    return uri if path == uri else f"{SQLITE}{Path(path).expanduser().absolute()}"


def database_of(store_uri: str) -> Path | None:
    """The file of a store that is an SQLite database; None if it is a server or another
    database."""
    return Path(store_uri.removeprefix(SQLITE)) if store_uri.startswith(SQLITE) else None


def is_server(store_uri: str) -> bool:
    """Whether a store is an MLflow server."""
    return store_uri.lower().startswith("http")


def has_secret(uri: str) -> bool:
    """Whether a URI holds a password or a token."""
    return shown_uri(uri) != uri


def shown_uri(uri: str) -> str:
    """The URI for people and files: without user, password and secret parameters."""
    start, end = _user_part(uri)
    return _SECRET_VALUE.sub(rf"\1{HIDDEN}", f"{uri[:start]}{HIDDEN}{uri[end:]}" if end else uri)


def _user_part(uri: str) -> tuple[int, int]:
    """Start and end of user and password in the URI; (0, 0) if there are none. A password may hold
    `@` and `/`, although they should be written %40 and %2F."""
    start = uri.find(_SEPARATOR)
    start = 0 if start < 0 else start + len(_SEPARATOR)
    end = uri.rfind("@")
    authority = re.split(r"[/?#]", uri[start:], maxsplit=1)[0]
    return (0, 0) if end < start or (start and _HOST.fullmatch(authority)) else (start, end)


def without_secrets(text: str, uri: str) -> str:
    """A text, such as a message of MLflow, in which the secrets of a URI are hidden."""
    if not has_secret(uri):
        return text
    text = text.replace(uri, shown_uri(uri))
    start, end = _user_part(uri)
    user = uri[start:end]
    password = user.partition(":")[2]
    # A library that takes the password for a part of the host may show a piece of it.
    pieces = [piece for piece in re.split("[:@/?#]", user) if len(piece) >= SHORTEST_PIECE]
    known = [user, password, unquote(password), *pieces, *(match[2] for match in _SECRET_VALUE.finditer(uri))]
    for secret in (each for each in known if each):
        text = text.replace(secret, HIDDEN)
    return text
