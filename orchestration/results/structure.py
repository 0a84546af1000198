"""How the sub-networks of a run were chosen, and what that and the training have cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dashboards.structure import Scored, StructureInfo
from dsnet.files import read_stored
from dsnet.space.cost import subnet_cost
from dsnet.stored.names import STRUCTURE
from dsnet.structure.search import TRACE, scored_candidates
from dsnet.training.train_cost import training_madds
from dsnet.wording import prefixed
from orchestration.results.run import RunResults


@dataclass(frozen=True)
class TrainingCost:
    """MAdds that were spent until the supernet was trained."""

    bases: float
    """Training of the networks that the choice of sub-networks needs, and sorting of channels."""
    search: float
    """Forward passes of candidates."""
    joint: float
    """Training of the supernet."""

    @property
    def choice(self) -> float:
        """What the choice of the sub-networks has cost."""
        return self.bases + self.search

    @property
    def total(self) -> float:
        """Everything together."""
        return self.choice + self.joint

    def __str__(self) -> str:
        if not self.choice:
            return f"{prefixed(self.total)}MAdds"
        return f"{prefixed(self.total)}MAdds ({prefixed(self.choice)}MAdds of them to choose sub-networks)"


def _summary(results: RunResults) -> dict[str, Any] | None:
    """The summary of the structure stage; None where there is none that is done."""
    folder = results.structure_dir
    return None if folder is None else read_stored(folder / f"{STRUCTURE}.json", summary_in)


def summary_in(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The summary in the JSON file of a chosen structure."""
    return dict(meta["structure"]["summary"])


def training_cost(results: RunResults) -> TrainingCost | None:
    """What was spent on a run's supernet; None before it is trained.

    Epochs of start weights that were given are not part of it.
    """
    made, data = results.supernet, results.manifest.get("data")
    if made is None or data is None:
        return None
    subnets, summary = results.trained_subnets, _summary(results) or {}
    joint = training_madds(made.run, subnets, data["num_images"]["train"], subnets.spec.image_size)
    return TrainingCost(summary.get("train_madds", 0.0), summary.get("madds", 0.0), joint)


def structure_of(results: RunResults) -> StructureInfo | None:
    """The sub-networks by ascending MAdds and the search for them; None where the family declares
    them, or before they are found."""
    summary, folder = _summary(results), results.structure_dir
    if summary is None or folder is None or results.supernet is None:
        return None
    subnets = results.trained_subnets
    spec = subnets.spec
    members = [subnets[number] for number in subnets.by_madds()]
    scores = scored_candidates(folder / TRACE)
    points = [(candidate.widths, Scored(candidate.madds / 1e6, score.accuracy)) for candidate, score in scores]
    # A network that is fine-tuned during the search scores a sub-network again.
    chosen = {member.widths for member in members}
    last = {widths: number for number, (widths, _) in enumerate(points) if widths in chosen}
    return StructureInfo(
        method=summary["method"] + (f", channels sorted by {summary['order']}" if summary["order"] != "none" else ""),
        subnets=tuple(member.name for member in members),
        madds_m=tuple(subnet_cost(spec, member, spec.image_size).madds / 1e6 for member in members),
        groups=tuple(group.name for group in spec.groups),
        widths=tuple(member.widths for member in members),
        max_widths=spec.max_widths,
        units=tuple(f"{group.unit}s" for group in spec.groups),
        candidates=tuple(point for _, point in points),
        chosen=tuple(points[number][1] for number in last.values()),
        chosen_before=tuple(
            point for number, (widths, point) in enumerate(points) if last.get(widths, number) != number
        ),
        num_images=scores[0][1].num_images if scores else 0,
    )
