"""The fenced blocks and the commands of README.md and docs/*.md, in the order in which a reader
meets them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
LANGUAGES = ("bash", "python", "yaml", "")
"""Languages of fenced blocks; a block without a language is the output of a command, or a
drawing."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TABLE_ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
_SPAN = re.compile(r"`((?:dsnet-orch|python -m) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Its page and line, for messages."""
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Its commands as lists of words; `a && b` are two, comments are left out."""
        words = [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]
        return [command for line in words for command in _parts(line) if command]


def _parts(words: list[str]) -> Iterator[list[str]]:
    while "&&" in words:
        at = words.index("&&")
        yield words[:at]
        words = words[at + 1 :]
    yield words


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages."""
    return [
        Block(page.name, text[: match.start()].count("\n") + 1, match[1], match[2])
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for match in _FENCE.finditer(text)
        if match[1] in languages
    ]


def spans() -> list[tuple[str, list[str]]]:
    """(page, words) of the commands in running text and in docs/cli.md's table of commands."""
    found = []
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        found += [(page.name, shlex.split(span, comments=True)) for span in _SPAN.findall(text)]
    table = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8").partition("\n\nSettings come from")[0]
    rows = [re.sub(r"[\[\]]", "", row) for row in _TABLE_ROW.findall(table)]
    return found + [("cli.md", ["dsnet-orch", *shlex.split(row)]) for row in rows]
