"""One character for the minus of numbers, so that they can be searched and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dsnet", "search", "dashboards", "orchestration", "benchmarks", "docs", "examples")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_text_has_another_minus_than_the_hyphen_minus(folder: str) -> None:
    texts = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".svg", ".yaml")]
    assert texts
    assert [path.name for path in texts if "\N{MINUS SIGN}" in path.read_text(encoding="utf-8")] == []
