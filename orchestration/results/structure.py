"""How the sub-networks of a run were chosen, and what that and the training have cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards.structure import Scored, StructureInfo
from dsnet.files import read_json
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import STRUCTURE
from dsnet.structure.search import TRACE, scored_candidates
from dsnet.training.supernet import FINAL
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.train_cost import training_madds
from orchestration.results.run import RunResults

PETA = 1e15


@dataclass(frozen=True)
class TrainingCost:
    """MAdds that were spent until the supernet was trained, in 10^15 (peta)."""

    bases: float
    """Training of the networks that the choice of sub-networks needs."""
    search: float
    """Forward passes of candidates."""
    joint: float
    """Training of the supernet."""

    @property
    def total(self) -> float:
        """Everything together."""
        return self.bases + self.search + self.joint

    def __str__(self) -> str:
        if not self.bases + self.search:
            return f"{self.total:.3g} PMAdds"
        return f"{self.total:.3g} PMAdds ({self.bases + self.search:.2g} to choose sub-networks)"


def _summary(results: RunResults) -> dict[str, Any] | None:
    """The summary of the structure stage; None where there is none that is done."""
    if results.stage_key("structure") is None or not results.is_done("structure"):
        return None
    folder = results.run.stage_dir("structure", results.done_key("structure"))
    summary: dict[str, Any] = read_json(folder / f"{STRUCTURE}.json")["structure"]["summary"]
    return summary


def _supernet(results: RunResults) -> tuple[SubnetSet, SupernetRun] | None:
    """The sub-networks and the settings of the trained supernet; None before it is trained, or if
    another release has trained it."""
    made = results.supernet
    if made is None:
        return None
    meta = read_json(results.run.stage_dir("supernet", results.done_key("supernet")) / f"{FINAL}.json")
    return SubnetSet.from_json(SupernetSpec.from_json(meta["spec"]), meta["subnets"]), made.run


def training_cost(results: RunResults) -> TrainingCost | None:
    """What was spent on a run's supernet; None before it is trained.

    Epochs of start weights that were given are not part of it.
    """
    trained, summary = _supernet(results), _summary(results) or {}
    splits = results.run.splits_json
    if trained is None or not splits.is_file():
        return None
    subnets, run = trained
    joint = training_madds(run, subnets, read_json(splits)["num_images"]["train"], subnets.spec.image_size)
    return TrainingCost(summary.get("train_madds", 0.0) / PETA, summary.get("madds", 0.0) / PETA, joint / PETA)


def structure_of(results: RunResults) -> StructureInfo | None:
    """The sub-networks by ascending MAdds and the search for them; None where the family declares
    them, or before they are found."""
    summary, trained = _summary(results), _supernet(results)
    if summary is None or trained is None:
        return None
    subnets = trained[0]
    spec = subnets.spec
    members = [subnets[number] for number in subnets.by_madds()]
    trace = _trace(results)
    scores = scored_candidates(trace)
    chosen = {member.widths for member in members}
    points = [(candidate.widths, Scored(candidate.madds / 1e6, score.accuracy)) for candidate, score in scores]
    return StructureInfo(
        method=summary["method"] + (f", channels sorted by {summary['order']}" if summary["order"] != "none" else ""),
        subnets=tuple(member.name for member in members),
        madds_m=tuple(subnet_cost(spec, member, spec.image_size).madds / 1e6 for member in members),
        groups=tuple(group.name for group in spec.groups),
        widths=tuple(member.widths for member in members),
        max_widths=spec.max_widths,
        candidates=tuple(point for _, point in points),
        chosen=tuple(point for widths, point in points if widths in chosen),
        num_images=scores[0][1].num_images if scores else 0,
    )


def _trace(results: RunResults) -> Path:
    return results.run.stage_dir("structure", results.done_key("structure")) / TRACE
