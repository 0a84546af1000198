"""Facts about how a supernet was made: the meaning of its regime, checkpoint and defaults, for
`plan`, the report and MLflow.

The families of networks need torch, and are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsnet.errors import ConfigError
from dsnet.files import read_object, understood
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.names import FINAL, STRUCTURE
from dsnet.structure.method import Base
from dsnet.structure.methods import structure_method
from dsnet.training.settings import REGIMES
from dsnet.training.supernet_run import SupernetRun
from dsnet.wording import plural
from orchestration.config.supernet import CHECKPOINT_MODEL, resolve_regime
from orchestration.config.sweep import SweepConfig

if TYPE_CHECKING:
    from dsnet.families import GatePlace
    from orchestration.prepare.preparation import Prepared, StructurePlan

_NUM_LISTED = 4
"""Maximum number of tensors without start weights that are named."""


@dataclass(frozen=True)
class SupernetFacts:
    """The network and the training settings of a supernet that was, or would be, made."""

    spec: SupernetSpec
    run: SupernetRun
    num_subnets: int
    normalized: str = field(default="", compare=False)
    """Where the normalisation comes from; empty if that is not known any more."""
    fresh: tuple[str, ...] = field(default=(), compare=False)
    """Names of the tensors that the start weights do not have; empty if they are not known any
    more."""
    structure: str = field(default="", compare=False)
    """How the sub-networks are chosen; empty if the family declares them, or if that is not known
    any more."""

    @classmethod
    def of_stage(cls, folder: Path) -> SupernetFacts | None:
        """The facts recorded by a finished supernet stage; None if it is of another release, whose
        settings are not known here."""
        path = folder / f"{FINAL}.json"
        meta = read_object(path)
        try:
            run = SupernetRun.from_json(meta.get("run", {}))
        except ConfigError:
            return None
        with understood(path):
            return cls(SupernetSpec.from_json(meta["spec"]), run, len(meta["subnets"]["members"]))

    @classmethod
    def of_prepared(cls, prepared: Prepared) -> SupernetFacts:
        """The facts of a supernet that a launch would train or take over."""
        run = prepared.supernet_run
        start = prepared.start
        if prepared.adoption is not None:
            run = replace(run, origin=prepared.adoption.origin)
        if prepared.structure is not None:
            start = prepared.structure.start
            run = replace(run, origin={} if start is None else start.origin)
        return cls(
            prepared.subnets.spec,
            run,
            len(prepared.subnets),
            normalized=prepared.chosen_normalization.reason,
            fresh=() if start is None else start.fresh,
            structure="" if prepared.structure is None else _structure(prepared.structure, len(prepared.splits.train)),
        )

    @property
    def naming(self) -> str:
        """The meaning of the sub-networks' names; empty if they are plain numbers."""
        if self.structure:
            return ""
        from dsnet.families import get_family

        return get_family(self.spec.family).naming

    @property
    def gate_places(self) -> tuple[GatePlace, ...]:
        """The places at which the network can have gates, where these can be chosen; a plain
        network is traced for them."""
        from dsnet.families import get_family

        return get_family(self.spec.family).gate_places(self.spec)

    def lines(self, init_from: str | None) -> tuple[tuple[str, str], ...]:
        """(topic, text) lines for people.

        Args:
            init_from: `supernet.init_from` of the sweep.
        """
        run, train = self.run, self.run.train
        norm = f"norm {self.spec.norm}" if self.spec.has_norms else "no BatchNorm"
        lines = [("network", f"{self.spec.family} with {self.num_subnets} sub-networks, {norm}")]
        if self.structure:
            lines.append(("sub-networks", self.structure))
        if train.epochs == 0:
            lines.append(("supernet training", "0 epochs: the start weights as they are"))
        else:
            lines += [
                ("supernet regime", self._regime()),
                (
                    "supernet training",
                    f"{train.epochs} epochs, {train.batch_size} images a step, {train.optimizer}, lr {train.lr:g} ({train.schedule}), "
                    f"precision {train.precision}; {run.weights} weights kept",
                ),
            ]
        return (
            *lines,
            ("start weights", self._start(init_from)),
            ("normalization", run.normalization.in_words() + (f" ({self.normalized})" if self.normalized else "")),
            ("BatchNorm statistics", self._statistics()),
        )

    def params(self) -> dict[str, Any]:
        """Parameters of MLflow's row, beside the sweep's own settings."""
        return {"network": {"family": self.spec.family, "norm": self.spec.norm}, "origin": dict(self.run.origin)}

    def keeps_statistics(self) -> bool:
        """Whether BatchNorm statistics are not estimated after training: the network has none, or
        the settings say so."""
        return not self.spec.has_batch_norm or self.run.recalibration_images == 0

    def _regime(self) -> str:
        regime = self.run.regime
        name = next((name for name, known in REGIMES.items() if known == regime), "of its own")
        drawn = f", num_random {regime.num_random}" if regime.widths == "sandwich" else ""
        views = " with views of its own" if regime.views == "own" else ""
        return f"{name}: widths {regime.widths}{drawn}, teacher {regime.teacher}{views}"

    def _start(self, init_from: str | None) -> str:
        origin = self.run.origin
        if origin and origin["file"].startswith(STRUCTURE):
            return "those of the choice of sub-networks" + (
                "" if init_from is None else f", which began with supernet.init_from {init_from}"
            )
        if origin:
            fresh = f"; newly initialised: {_listed(self.fresh)}" if self.fresh else ""
            return f"{origin['file']} (sha256 {origin['sha256'][:12]}), by supernet.init_from {init_from}{fresh}"
        return "fresh" if init_from is None else f"fresh, in the training that was taken over from {init_from}"

    def _statistics(self) -> str:
        if self.keeps_statistics():
            return "those of the start weights" if self.spec.has_batch_norm else "none"
        images = self.run.recalibration_images
        return f"estimated again on {'all' if images is None else images} training images"


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NUM_LISTED
    return ", ".join(names[:_NUM_LISTED]) + (f" and {more} more" if more > 0 else "")


def _structure(plan: StructurePlan, num_train: int) -> str:
    """How sub-networks are chosen, in words."""
    problem = plan.problem
    settings = problem.settings
    method = structure_method(settings.method)
    bases = method.bases(problem)
    text = f"chosen by {settings.method}"
    if problem.targets:
        targets = ", ".join(target.name for target in problem.targets)
        text += f" for {targets} of the widest's MAdds" if settings.targets else f" for {targets} MAdds"
    if problem.sorted_by != "none":
        text += f", channels sorted by {problem.sorted_by}"
    if bases:
        held_out, most = settings.num_held_out(num_train), method.num_candidates(problem)
        text += f", in {'a network that is' if len(bases) == 1 else 'networks that are'} trained beforehand for {_epochs(bases)}"
        if later := method.later(problem):
            text += f" and, during the search, in {plural(len(later), 'further training')} of {_epochs(later)}"
        if most:
            text += (
                f": at most {plural(most, 'candidate')} on about {plural(held_out, 'image')} of train that are held out"
            )
        if later := method.later(problem):
            text += f"; about {plural(len(later), 'further training')} of {plural(later[0].run.train.epochs, 'epoch')} during the search"
        text += "; until then the table assumes one ratio for all channels"
    return text


def _epochs(bases: Sequence[Base]) -> str:
    """The epochs of each network; once where all are equal."""
    found = [plural(base.run.train.epochs, "epoch") for base in bases]
    return f"{found[0]}{' each' if len(found) > 1 else ''}" if len(set(found)) == 1 else " and ".join(found)


def dry_layout(config: SweepConfig) -> SubnetSet | None:
    """The sub-networks of a sweep's family, laid out without its data; None for a model from a
    checkpoint, which is not opened.

    The numbers of classes and channels are placeholders.

    Raises:
        ConfigError: unknown family or option, or a value out of its range.
    """
    supernet = config.supernet
    if supernet.model == CHECKPOINT_MODEL:
        return None
    from dsnet.families import Task, layout

    task = Task(num_classes=10, in_channels=3, image_size=config.data.image_size or 32)
    return layout(supernet.model, task, supernet.options, resolve_regime(supernet).norm)


def resolved_settings(config: SweepConfig) -> dict[str, Any]:
    """The settings of `supernet`, with the nulls that its regime decides filled in.

    `train.bn` is the family's own norm if none is set, and `checkpoint` if it is known only from a
    checkpoint.
    """
    settings = config.supernet.model_dump(mode="json")
    regime, subnets = resolve_regime(config.supernet), dry_layout(config)
    settings["train"] |= {
        "widths": regime.widths,
        "num_random": regime.num_random,
        "teacher": regime.teacher,
        "views": regime.views,
        "bn": CHECKPOINT_MODEL if subnets is None else subnets.spec.norm,
    }
    return settings
