"""Messages about a cluster that cannot be joined."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.workers.joining import why_not_joined

REFUSED = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
SECRET = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("variables", "has_file", "said"),
    [
        ({}, False, "set RAY_AUTH_MODE=token: it is not set, so that no token is sent; no token is there"),
        ({}, True, "it is not set, so that no token is sent; a token is there (~/.ray/auth_token)"),
        (
            {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": SECRET},
            False,
            "it is disabled, so that no token is sent; a token is there",
        ),
        ({"RAY_AUTH_MODE": "token"}, False, "RAY_AUTH_MODE is token, but no token is there: copy ~/.ray/auth_token"),
        ({"RAY_AUTH_MODE": "token"}, True, "the token of this machine (~/.ray/auth_token) is not that of the cluster"),
        (
            {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN": SECRET},
            True,
            "the token of this machine (RAY_AUTH_TOKEN) is not",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/token"},
            True,
            "the token of this machine (/run/token)",
        ),
    ],
)
def test_a_refused_connection_says_what_this_process_has_of_a_token(
    tmp_path: Path, variables: dict[str, str], has_file: bool, said: str
) -> None:
    if has_file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(SECRET)
    told = why_not_joined("10.0.0.1:6379", REFUSED, {"HOME": str(tmp_path), **variables})
    assert said in told
    assert "'10.0.0.1:6379'" in told
    assert "docs/cluster.md" in told
    assert SECRET not in told


def test_other_reasons_are_not_taken_for_a_missing_token() -> None:
    versions = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.12.1")
    assert "Ray: 2.50.0 Python: 3.12.1" in why_not_joined("a:1", versions, {})
    for error in (ConnectionRefusedError("refused"), TimeoutError("timed out"), ValueError("no such address")):
        assert "RAY_AUTH" not in why_not_joined("a:1", error, {})
