"""Warnings about a search, from the workers' checks of their arithmetic; each is given once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsnet.arithmetic import arithmetic_facts
from dsnet.files import atomic_write_json, read_json
from search.gate_check import Finding
from search.study.runner import CohortFunction

VERSION = 1
"""Raised by hand when the checks give another digest on the same machine; a digest of another
version is not compared."""
REPEATED = "end to end"
"""Stands in place of a kind of router in `Finding.unequal`: training the same gate twice gave two
results."""


@dataclass(frozen=True)
class StartCheck:
    """A check that every worker makes before its first trial."""

    look: Callable[[CohortFunction], Finding]
    """Makes the check in the worker, on its trial function; must be picklable."""
    hear: Callable[[Finding], None]
    """Called in the driver with the finding."""


class ArithmeticReport:
    """Compares workers' findings with each other and with the one that began the search; warns once
    of each difference."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Keep the file with the finding that began the search, and the function that warns."""
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
                "search: two workers round differently (processors of different kinds, or other libraries), so that the last bits of a "
                "trial, and through them the study, depend on which of them ran it; to get the same study again, use machines of one kind"
            )
        if REPEATED in finding.unequal:
            self._tell(
                "search: training the same gate twice on the same images gave two results on this machine: the same sweep launched again "
                "ends with a slightly different study; gate.end_to_end.threads: 1 may mend it"
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
        begun = read_json(self._path) if self._path.exists() else now
        if begun.get("version") != VERSION:
            begun = now
        if begun["digest"] != digest:
            self._tell(
                "search: this machine rounds differently from the one that began this search (another processor, other libraries, or "
                f"MKL_CBWR, which was {begun['mkl_cbwr']} and is {now['mkl_cbwr']}): what is tried from here on may differ from what an "
                "uninterrupted search would have tried"
            )
        atomic_write_json(self._path, begun)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warn(text)


def _way_out() -> str:
    """A remedy for products that depend on what is computed beside them."""
    if arithmetic_facts()["mkl_cbwr"] == "not set":
        return "Where torch computes with MKL (Intel and AMD), MKL_CBWR=COMPATIBLE mends it; elsewhere nothing needs to be done"
    return "Unset MKL_CBWR, or set it to COMPATIBLE, if torch computes with MKL; elsewhere nothing needs to be done"
