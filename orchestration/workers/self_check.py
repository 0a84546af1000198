"""Warnings about a search, from the workers' checks of their arithmetic; each is given once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsnet.arithmetic import arithmetic_facts
from dsnet.errors import CheckpointError
from dsnet.files import read_sealed, set_aside, write_sealed
from search.gate_check import Finding
from search.study.runner import CohortFunction

VERSION = 1
"""Raised by hand when the checks give another digest on the same machine; a digest of another
version is not compared."""
REPEATED = "end to end"
"""Entry of `Finding.unequal`, beside kinds of router: training the same gate twice gave two
different results."""


@dataclass(frozen=True)
class StartCheck:
    """A check that every worker makes before its first trial."""

    look: Callable[[CohortFunction], Finding]
    """Makes the check in the worker, on its trial function; must be picklable."""
    hear: Callable[[Finding], None]
    """Called in the driver with the finding."""


class ArithmeticReport:
    """Compares the findings of the workers with each other and with that of the search's first
    worker; warns once about each difference."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Keep the file with the finding of the first worker, and the function that warns."""
        self._path = path
        self._warn = warn
        self._first: str | None = None
        self._told: set[str] = set()

    def hear(self, finding: Finding) -> None:
        """Compare the finding of a worker that has started."""
        if self._first is None:
            self._first = finding.digest
            self._compare_with_the_beginning(finding.digest)
        elif finding.digest != self._first:
            self._tell(
                "search: two workers round differently (processors of different kinds, or other libraries), so the results of a trial, and "
                "thereby the study, depend on which worker ran it; to reproduce a study, use machines of one kind"
            )
        if REPEATED in finding.unequal:
            self._tell(
                "search: training the same gate twice on the same images gave two results on this machine: the same sweep launched again "
                "ends with a slightly different study; gate.end_to_end.threads: 1 may help"
            )
        elif finding.unequal:
            self._tell(
                f"search: on this machine a router that is trained beside others differs in its last bits from the same router trained "
                f"alone ({', '.join(finding.unequal)}; MKL_CBWR is {arithmetic_facts()['mkl_cbwr']}). So that the study is the same "
                "whatever the number of workers, trials are trained one by one, which takes about three times as long. "
                f"{_way_out()}"
            )

    def _compare_with_the_beginning(self, digest: str) -> None:
        now = {"version": VERSION, "digest": digest, **arithmetic_facts()}
        begun = self._begun() or now
        if begun.get("version") != VERSION:
            begun = now
        if begun["digest"] != digest:
            self._tell(
                "search: this machine rounds differently from the one that began this search (another processor, other libraries, or "
                f"MKL_CBWR, which was {begun['mkl_cbwr']} and is {now['mkl_cbwr']}): further trials may differ from those "
                "of an uninterrupted search"
            )
        write_sealed(self._path, begun)

    def _begun(self) -> dict[str, Any] | None:
        """The facts stored when the search began; None if there are none, or damaged ones."""
        if not self._path.exists():
            return None
        try:
            return read_sealed(self._path)
        except CheckpointError as error:
            kept = set_aside(self._path).name
            self._tell(f"search: {error} It is kept as {kept}; this machine is taken for the one that began the search")
            return None

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warn(text)


def _way_out() -> str:
    """A remedy for matrix products whose last bits depend on the other rows of the product."""
    if arithmetic_facts()["mkl_cbwr"] == "not set":
        return "If torch computes with MKL (Intel and AMD), set MKL_CBWR=COMPATIBLE; else nothing needs to be done"
    return "If torch computes with MKL, unset MKL_CBWR or set it to COMPATIBLE; else nothing needs to be done"
