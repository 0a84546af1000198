"""URIs of MLflow stores: what is refused, what is never shown, and what a relative path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.config.store_uri import absolute_uri, has_secret, shown_uri, uri_problem, without_secrets

WITH_SECRETS = (
    ("http://me:pw7@host:5000/x", "http://***@host:5000/x"),
    ("https://token9@host", "https://***@host"),
    ("http://bob:S3cr@pw7@127.0.0.1:9", "http://***@127.0.0.1:9"),
    ("HTTP://bob:S3cret/pw7@127.0.0.1/x", "HTTP://***@127.0.0.1/x"),
    ("http://bob:pw7?#@[::1]:5000", "http://***@[::1]:5000"),
    ("postgresql+psycopg2://u:p%40w@db/ml?sslmode=on", "postgresql+psycopg2://***@db/ml?sslmode=on"),
    ("mysql://db/ml?user=u&password=pw7", "mysql://db/ml?user=u&password=***"),
    ("https://host/?access_token=abc#end", "https://host/?access_token=***#end"),
)


@pytest.mark.parametrize(("uri", "shown"), WITH_SECRETS)
def test_secrets_are_hidden_in_the_uri_and_in_messages_about_it(uri: str, shown: str) -> None:
    assert (has_secret(uri), shown_uri(uri), uri_problem(uri)) == (True, shown, None)
    message = without_secrets(f"POST {uri} failed: no user for 'pw7'", uri)
    for secret in ("pw7", "token9", "p%40w", "abc"):
        assert secret not in message or secret not in uri
    assert message.startswith(f"POST {shown} failed")


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://host/a@b",
        "http://[::1]:5000/a@b",
        "databricks://profile",
        "file:/data/mlruns",
        "sqlite:///runs/mlflow.db",
        "sqlite:////data/me@home/x.db",
        "databricks",
        "postgresql://db/ml?sslmode=on",
    ],
)
def test_a_uri_without_secrets_is_taken_and_shown_as_it_is(uri: str) -> None:
    assert (uri_problem(uri), has_secret(uri), shown_uri(uri)) == (None, False, uri)
    assert without_secrets(f"{uri}: lost", uri) == f"{uri}: lost"


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("mlflow.db", "'mlflow.db' is a path and no URI; for a database write sqlite:///PATH"),
        ("./mlruns", "is a path"),
        ("bob:S3cret@127.0.0.1", "'***@127.0.0.1' is a path and no URI"),
        ("localhost:5000", "is a path and no URI"),
        ("/data/mlruns", "is a path"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:relative.db", "names no file"),
        ("sqlite:///a%20b.db", "'%' or '?'"),
        ("sqlite:////data/x.db?timeout=5", "'%' or '?'"),
    ],
)
def test_what_names_no_store_is_refused(uri: str, part: str) -> None:
    problem = uri_problem(uri)
    assert problem is not None
    assert part in problem


def test_a_relative_database_is_one_file_for_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/ml.db") == f"sqlite:///{tmp_path}/runs/ml.db"
    assert absolute_uri("sqlite:////data/ml.db") == "sqlite:////data/ml.db"
    assert absolute_uri("http://host/a") == "http://host/a"
