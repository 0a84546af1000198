"""Preparation before the first stage: the data and its splits, the network's layout, and the
dependencies of each stage."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsnet.data.normalization import Normalization
from dsnet.data.settings import Augmentation, SplitSizes
from dsnet.data.sources import ImageSource, load_source
from dsnet.data.splits import Splits, data_fingerprint, splits_of
from dsnet.data.tensors import TensorData
from dsnet.data.training_images import InMemoryImages, TrainingImages
from dsnet.environment import resolve_device
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import Task
from dsnet.files import atomic_write_text, read_object, read_stored, understood
from dsnet.gates.problem import check_choice
from dsnet.image_size import ImageSize, image_size_of
from dsnet.measure.settings import MAIN_DEVICE, DeviceSettings, LatencySettings
from dsnet.metrics import share_names
from dsnet.routers.kinds import router_kind
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.standalone.output_folder import RESULT_VERSIONS
from dsnet.stored.names import FINAL, STRUCTURE
from dsnet.structure.expected import expected_subnets
from dsnet.structure.method import Base, StructureProblem
from dsnet.structure.methods import check_structure, structure_method
from dsnet.structure.problem import structure_problem
from dsnet.structure.scoring import holdout_warning
from dsnet.training.data_defaults import DataDefault
from dsnet.training.normalizing import ChosenNormalization, choose_normalization
from dsnet.training.plain_start import PlainStart
from dsnet.training.settings import BootstrapSettings, TrainSettings, penalty_problem
from dsnet.training.start import StartWeights, check_start, find_checkpoint, first_weights, lay_out, load_start
from dsnet.training.supernet import result_settings
from dsnet.training.supernet_run import SupernetRun
from orchestration.config.resolve import conditions, resolve_cores, resolve_threads
from orchestration.config.space import absolute_targets, possible_routers
from orchestration.config.stage_keys import Stage, stage_subset
from orchestration.config.supernet import FROM_DATA, REGIME_KEYS, resolve_regime
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.adoption import Adoption, Wanted, find_adoption, standalone_config
from orchestration.prepare.data_defaults import with_data_defaults
from orchestration.prepare.few_routes import few_routes_warning
from orchestration.prepare.reach import hopeless_conditions
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StageDefinition, StageDir, StageRecord, stage_record
from search.conditions.constraints import BASELINE
from search.front.analysis_records import BudgetPick

logger = logging.getLogger(__name__)

STAGE_VERSIONS: Mapping[str, int] = {**RESULT_VERSIONS, "search": 3, "verify": 3}
"""Version of each stage's code; raised by hand when its results change."""


@dataclass(frozen=True)
class StartPoint:
    """The checkpoint that training starts from, without its tensors."""

    path: Path
    """Stem of the checkpoint, absolute, because workers have other working directories."""
    sha256: str
    """SHA-256 of the tensors."""
    origin: Mapping[str, Any]
    """Origin for the record, see `SupernetRun.origin`."""
    fresh: tuple[str, ...]
    """Names of the network's tensors that the checkpoint does not have."""

    @classmethod
    def of(cls, start: StartWeights, subnets: SubnetSet) -> StartPoint:
        """Load the weights into the network once, so that weights that do not fit are refused
        before anything runs.

        Raises:
            CheckpointError: they do not fit.
        """
        _, fresh = first_weights(subnets, 0, start)
        return cls(start.stem.absolute(), start.sha256, start.origin(), tuple(fresh))


@dataclass(frozen=True)
class StructurePlan:
    """The choice of sub-networks that comes before the training of the supernet."""

    problem: StructureProblem
    start: StartPoint | None
    """The weights with which it begins; None for fresh ones."""


@dataclass(frozen=True)
class Prepared:
    """Data, network and settings that all stages share."""

    config: SweepConfig
    """The configuration with defaults derived from the data filled in."""
    image_set: ImageSource
    """Facts about all images."""
    splits: Splits
    data: TensorData
    """The images without the test split, and without the training split if `data.stream` is
    true."""
    chosen_normalization: ChosenNormalization
    """The normalisation, and where it comes from."""
    subnets: SubnetSet
    """The sub-networks; before the structure stage is done those that are expected of it."""
    fingerprint: str
    """Digest of pixels, labels and splits."""
    start: StartPoint | None = None
    """The start weights of the supernet; None for fresh ones."""
    structure: StructurePlan | None = None
    """How the sub-networks are chosen; None where the family declares them."""
    adoption: Adoption | None = None
    """Finished stages that `supernet.init_from` holds already."""
    derived: Mapping[str, DataDefault] = field(default_factory=dict)
    """Settings decided by the data, by dotted key."""

    @property
    def normalization(self) -> Normalization:
        """Normalisation of the images."""
        return self.chosen_normalization.normalization

    @property
    def start_sha256(self) -> str | None:
        """SHA-256 of the start weights for the key of the first stage; for an adopted training that
        of its own start weights."""
        if self.adoption is not None:
            return self.adoption.origin.get("sha256")
        start = self.start if self.structure is None else self.structure.start
        return None if start is None else start.sha256

    @property
    def image_size(self) -> ImageSize:
        """Size of the images."""
        return image_size_of(self.image_set.image_shape)

    @cached_property
    def supernet_run(self) -> SupernetRun:
        """The training settings as the core's own type."""
        config, start = self.config, self.start
        supernet, images = config.supernet, config.supernet.recalibration.images
        assert images != FROM_DATA, "prepare fills it in"
        return SupernetRun(
            train=TrainSettings(**supernet.train.model_dump(exclude=set(REGIME_KEYS))),
            regime=resolve_regime(supernet),
            bootstrapping=BootstrapSettings(**supernet.bootstrapping.model_dump(exclude={"mode", "num_random"})),
            augmentation=Augmentation.for_images(self.image_set, **config.data.augment.model_dump()),
            normalization=self.normalization,
            seed=config.seed,
            balance=config.data.balance,
            weights=supernet.weights,
            recalibration_images=images,
            recalibration_batch=supernet.recalibration.batch_size,
            keep_checkpoints=supernet.keep_checkpoints,
            origin={} if start is None else start.origin,
        )

    def training_images(self) -> TrainingImages:
        """The training split for the training loop; images in memory are not copied."""
        augmentation = self.supernet_run.augmentation
        if self.config.data.stream:
            return self.image_set.training_images(self.splits, augmentation)
        return InMemoryImages(self.data.images("train"), self.data.labels("train"), augmentation)

    def decided_by_data(self) -> str:
        """The training settings that were derived from the images, by their last names; empty if
        all are written."""
        prefix = "supernet.train."
        own = {key.removeprefix(prefix): each.value for key, each in self.derived.items() if key.startswith(prefix)}
        return ", ".join(f"{name} {value:g}" for name, value in own.items())

    def open_test(self) -> TensorData:
        """The data with the test split; only verify and report may call it, and they count it in
        the manifest."""
        return self.image_set.tensor_data(self.splits, open_test=True)

    def warnings(self) -> tuple[str, ...]:
        """Warnings about allowed settings that have no effect or cannot be met on this network."""
        gate, space = self.config.gate, self.config.space
        trees = [kind for kind in possible_routers(gate, space) if router_kind(kind).is_tree]
        warnings = [] if self.chosen_normalization.warning is None else [self.chosen_normalization.warning]
        if trees and len(self.subnets.spec.gates) == 1:
            name = self.subnets.spec.family
            warnings += [f"gate.router {kind}: {name} has one gate, so {kind} equals {kind[:-1]}" for kind in trees]
        madds_m = [subnet_cost(self.subnets.spec, subnet, self.image_size).madds / 1e6 for subnet in self.subnets]
        for target in absolute_targets(gate, space):
            if not min(madds_m) <= target <= max(madds_m):
                warnings.append(
                    f"gate.target_madds_m {target:g} lies outside the sub-networks' {min(madds_m):.4g} to {max(madds_m):.4g} "
                    "M MAdds; trials take the nearest"
                )
        return (
            *warnings,
            *self._equal_views(),
            *self._small_holdout(),
            *self._too_fine(),
            *(few_routes_warning(self.config, len(self.subnets)) if self.structure is None else ()),
            *hopeless_conditions(self.config, self.subnets, self.image_size),
        )

    def _equal_views(self) -> Iterator[str]:
        """A warning about two views that are equal, because nothing is augmented."""
        run = self.supernet_run
        if run.regime.views == "own" and run.augmentation == Augmentation() and not self.config.data.stream:
            yield "supernet.train.views own: data.augment changes no image, so that both views are equal; the regime is ib"

    def _small_holdout(self) -> Iterator[str]:
        """A warning about a hold-out that is too small for the search of the structure method."""
        if self.structure is None:
            return
        problem = self.structure.problem
        if structure_method(problem.settings.method).num_candidates(problem):
            warning = holdout_warning(problem.settings.num_held_out(len(self.splits.train)))
            yield from [] if warning is None else [warning]

    def _too_fine(self) -> Iterator[str]:
        """Warnings about conditions finer than one image of `val`."""
        num_val = len(self.splits.val)
        for comparison in conditions(self.config):
            reads_share = {name.removeprefix(BASELINE) for name in comparison.names} & share_names()
            finest = min((number for number in map(abs, comparison.numbers) if number > 0), default=math.inf)
            if reads_share and finest < 1 / num_val:
                yield (
                    f"condition {comparison}: {finest:g} is too fine for the {num_val} images of val: one image changes an accuracy by "
                    f"{1 / num_val:.4f}"
                )

    def notes(self) -> tuple[str, ...]:
        """Notes that qualify every number of this run."""
        num_val, num_test = len(self.splits.val), len(self.splits.test)
        notes = list(self.image_set.notes)
        if min(num_val, num_test) < 1000:
            notes.append(
                f"Few images: {num_val} in val and {num_test} in test, so that one image is "
                f"{100 / min(num_val, num_test):.2f} points of accuracy."
            )
        return tuple(notes)


@dataclass(frozen=True)
class Images:
    """The data of a sweep, independent of the network that it trains."""

    image_set: ImageSource
    splits: Splits
    data: TensorData

    @property
    def fingerprint(self) -> str:
        """Digest of pixels, labels and splits."""
        return data_fingerprint(self.image_set.fingerprint, self.splits)


def load_images(config: SweepConfig) -> Images:
    """Load the images and make the splits.

    Raises:
        DataError: data missing or broken.
        ConfigError: split sizes that do not fit.
    """
    image_set = _open_images(config)
    sizes = SplitSizes(**config.data.splits.model_dump())
    splits = splits_of(image_set, sizes, config.seed, config.data.limit)
    return Images(image_set, splits, image_set.tensor_data(splits))


def prepare(
    config: SweepConfig,
    run: RunDir | None = None,
    warn: Callable[[str], None] = logger.warning,
    images: Images | None = None,
) -> Prepared:
    """Load the data, make the splits, lay out the network.

    The source in `supernet.init_from` may be deleted once the supernet is trained: the finished
    stage then holds everything needed from it.

    Args:
        config: resolved.
        run: where the sweep's results are, or will be; it need not exist. None = no results to
            continue from.
        warn: called with one sentence if the start weights are gone.
        images: result of `load_images` for this `data` and `seed`; None = load them here.

    Raises:
        DataError: data missing or broken.
        ConfigError: options, split sizes or start weights that do not fit.
        CheckpointError: the start weights are missing, broken, or of another network.
        PreflightError: no such device.
    """
    prepared = _prepared(config, run, warn, images)
    return prepared if run is None else with_found_structure(prepared, run)


def _prepared(config: SweepConfig, run: RunDir | None, warn: Callable[[str], None], images: Images | None) -> Prepared:
    """See `prepare`; the structure stage has not been looked at."""
    source = config.supernet.init_from
    if source is None:
        return _checked(_laid_out(config, None, images), None)
    try:
        find_checkpoint(Path(source))
    except CheckpointError:
        if run is None or (finished := _from_finished_stage(config, run, images)) is None:
            raise
        warn(
            f"supernet.init_from: {source} does not exist any more; run {run.name!r} continues with the supernet trained from it"
        )
        return finished
    start = load_start(Path(source))
    prepared = _checked(_laid_out(config, start, images), start)
    return replace(prepared, adoption=_adoption(prepared))


def with_found_structure(prepared: Prepared, run: RunDir) -> Prepared:
    """The preparation with the sub-networks and start weights of the run's structure stage, if that
    is done; else unchanged.

    Raises:
        CheckpointError: the stage's files are damaged.
    """
    if prepared.structure is None:
        return prepared
    folder = StageDir(run.stage_dir("structure", stage_record(stage_definitions(prepared)[0], {}).key))
    if not folder.is_done():
        return prepared
    stem = folder.path.absolute() / STRUCTURE
    path = stem.with_name(f"{STRUCTURE}.json")
    meta = read_object(path)
    with understood(path):
        subnets = SubnetSet.from_json(SupernetSpec.from_json(meta["spec"]), meta["subnets"])
    origin = {"file": f"{STRUCTURE}.safetensors", "sha256": str(meta["sha256"])}
    return replace(prepared, subnets=subnets, start=StartPoint(stem, str(meta["sha256"]), origin, ()))


def _from_finished_stage(config: SweepConfig, run: RunDir, images: Images | None) -> Prepared | None:
    """The preparation with the recorded origin of a run's finished supernet; None if that is not
    the supernet that `config` asks for."""
    if not run.manifest_path.is_file():
        return None
    entry = Manifest(run.manifest_path).read()["stages"].get("supernet")
    if entry is None:
        return None
    folder = StageDir(run.stage_dir("supernet", entry["key"]))
    if not folder.is_done():
        return None
    stem = folder.path.absolute() / FINAL
    origin = _recorded_origin(run, folder)
    start = StartPoint(stem, origin["sha256"], origin, ()) if origin else None
    images = images or load_images(config)
    for is_pretrained in (False, True):  # what its own start weights were can no longer be seen
        laid_out = _laid_out(config, load_start(stem), images, is_pretrained=is_pretrained)
        prepared = _with_structure(replace(laid_out, start=start))
        if supernet_record(prepared).key == entry["key"]:
            return prepared
    return None


def _recorded_origin(run: RunDir, supernet: StageDir) -> Mapping[str, Any]:
    """The record of the start weights of a finished supernet, or of the choice of its sub-networks;
    empty if they were fresh, also in a training elsewhere that was taken over."""
    record = supernet.record()
    key = None if record is None else record.parent_keys.get("structure")
    if key is None:
        return read_stored(supernet.path / f"{FINAL}.json", lambda meta: dict(meta["run"]["origin"]))
    path = run.stage_dir("structure", key) / f"{STRUCTURE}.json"
    return read_stored(path, lambda meta: dict(meta["structure"]["summary"]["origin"]))


def _checked(prepared: Prepared, start: StartWeights | None) -> Prepared:
    """The preparation with its start weights checked against the network."""
    if start is not None:
        prepared = replace(prepared, start=StartPoint.of(start, prepared.subnets))
    fresh = () if prepared.start is None else prepared.start.fresh
    problem = penalty_problem(prepared.supernet_run.train.gamma_l1, prepared.subnets.spec.has_batch_norm)
    if problem is not None:
        raise ConfigError(problem)
    check_start(prepared.supernet_run, start, fresh, len(prepared.image_set.class_names))
    return _with_structure(prepared)


def _with_structure(prepared: Prepared) -> Prepared:
    """The preparation with the choice of sub-networks, where the settings have one, and the
    sub-networks that are expected of it.

    Raises:
        ConfigError: no choice can fulfil the settings.
    """
    structure = prepared.config.supernet.structure
    if not structure.is_chosen:
        return prepared
    problem = structure_problem(prepared.subnets, structure.settings(), prepared.supernet_run, prepared.image_size)
    check_structure(problem)
    expected = expected_subnets(problem)
    check_routing(prepared.config, [subnet.name for subnet in expected])
    return replace(prepared, subnets=expected, structure=StructurePlan(problem, prepared.start), start=None)


def _laid_out(
    config: SweepConfig, start: StartWeights | None, images: Images | None, *, is_pretrained: bool | None = None
) -> Prepared:
    """Prepare data, splits and network; `start` may give the network and the normalisation.

    `is_pretrained` says whether training starts from a plain network; None: whether `start` is one.
    """
    supernet = config.supernet
    resolve_device(supernet.device)
    latency_settings(config)
    images = images or load_images(config)
    image_set, splits, data = images.image_set, images.splits, images.data
    channels, size = image_set.image_shape[0], image_size_of(image_set.image_shape)
    task = Task(num_classes=len(image_set.class_names), in_channels=channels, image_size=size)
    subnets = lay_out(supernet.model, task, supernet.options, resolve_regime(supernet).norm, start)
    is_chosen = supernet.structure.is_chosen
    if not is_chosen:
        check_routing(config, [subnet.name for subnet in subnets])
    whole = replace(subnets, teacher=Subnet("whole", subnets.spec.max_widths)) if is_chosen else subnets
    is_plain = isinstance(start, PlainStart) if is_pretrained is None else is_pretrained
    filled = with_data_defaults(config, image_set, splits, whole, is_plain)
    return Prepared(
        config=filled.config,
        image_set=image_set,
        splits=splits,
        data=data,
        chosen_normalization=choose_normalization(config.data.written_normalization(), image_set, splits, start),
        subnets=subnets,
        fingerprint=images.fingerprint,
        derived=filled.defaults,
    )


def _adoption(prepared: Prepared) -> Adoption | None:
    config = prepared.config
    if config.supernet.init_from is None:
        return None
    source, measure = Path(config.supernet.init_from), standalone_config(config).measure
    declared = prepared.subnets if prepared.structure is None else prepared.structure.problem.subnets
    wanted = Wanted(prepared.supernet_run, declared, config.supernet.structure.settings(), prepared.fingerprint)
    return find_adoption(source, wanted, measure)


def _open_images(config: SweepConfig) -> ImageSource:
    data = config.data
    return load_source(
        data.name,
        data.path,
        data.image_size,
        stream=data.stream,
        num_threads=resolve_threads(config, resolve_cores(config)),
        crop_fraction=data.crop_fraction,
        options=data.file_options(),
    )


def check_routing(config: SweepConfig, routes: Sequence[str]) -> None:
    """Refuse a network without a choice, and routing indices that it does not have, before anything
    is trained.

    Args:
        config: the configuration.
        routes: the names of the sub-networks among which a router may choose.

    Raises:
        ConfigError: there is only one; or `first` or `last`, fixed or at an end of its range, names
            no sub-network.
    """
    try:
        check_choice(routes)
    except ValueError as error:
        raise ConfigError(f"supernet.model {config.supernet.model}: {error}") from error
    num_routes = len(routes)
    num_left = min([num_routes, *_beams(config)])
    beam = f", of which gate.routing.beam keeps {num_left}" if num_left < num_routes else ""
    for key, lowest in (("first", 0), ("last", -num_left)):
        name = f"gate.routing.{key}"
        values = config.space[name].edge_values() if name in config.space else (getattr(config.gate.routing, key),)
        where = f"space.{name}" if name in config.space else name
        for value in values:
            if not lowest <= int(value) < num_left:
                raise ConfigError(
                    f"{where}: {value} names no sub-network; {config.supernet.model} has {num_routes} here{beam}, "
                    f"so it must lie in {lowest}..{num_left - 1}"
                )


def _beams(config: SweepConfig) -> list[int]:
    """The extreme values of `gate.routing.beam` in the trials; empty if there is no beam."""
    if "gate.routing.beam" in config.space:
        return [int(beam) for beam in config.space["gate.routing.beam"].edge_values()]
    return [] if config.gate.routing.beam is None else [config.gate.routing.beam]


def latency_settings(config: SweepConfig) -> dict[str, LatencySettings]:
    """The measurement settings of each device as the core's own type, the main device first.

    Raises:
        PreflightError: a device is not there.
        ConfigError: the package of an engine is not installed.
    """
    measure = config.measure
    devices = {name: DeviceSettings(**own.model_dump()) for name, own in measure.devices.items()}
    return LatencySettings(**{**measure.model_dump(), "devices": devices}).by_device(resolve_device)


def other_latency_settings(config: SweepConfig, **given: Any) -> LatencySettings:
    """The settings of the main device with another device, number of threads or engine.

    Args:
        config: the sweep.
        given: `device`, `threads`, `engine`; None keeps the setting of the sweep.

    Raises:
        PreflightError: the device is not there.
        ConfigError: an impossible setting, or the package of the engine is not installed.
    """
    own = {name: value for name, value in given.items() if value is not None}
    settings = LatencySettings(**{**config.measure.model_dump(), "devices": {}, **own})
    return settings.by_device(resolve_device)[MAIN_DEVICE]


def stage_definitions(prepared: Prepared) -> list[StageDefinition]:
    """Everything on which structure (where there is a choice), supernet, measure, table and search
    depend, in this order. The verify stage depends on the front, which is known later."""
    parents: dict[Stage, tuple[Stage, ...]] = {
        "supernet": (),
        "measure": ("supernet",),
        "table": ("supernet",),
        "search": ("measure", "table"),
    }
    declared = prepared.subnets
    first: Stage = "supernet"
    bases: dict[str, Any] = {}
    if prepared.structure is not None:
        problem = prepared.structure.problem
        parents = {"structure": (), **parents, "supernet": ("structure",)}
        declared, first = problem.subnets, "structure"
        bases = {"bases": [_digest_of_base(base) for base in structure_method(problem.settings.method).bases(problem)]}
    config = prepared.config
    subsets = {name: stage_subset(config, name) for name in parents}
    # The layout itself, because another release may lay out the same options differently.
    subsets[first] |= {"layout": _digest(declared.to_json()), "start": prepared.start_sha256, **bases}
    return [
        StageDefinition(name, STAGE_VERSIONS[name], subsets[name], prepared.fingerprint, above)
        for name, above in parents.items()
    ]


def supernet_record(prepared: Prepared) -> StageRecord:
    """The record with which the supernet's stage would begin."""
    records: dict[str, StageRecord] = {}
    for definition in stage_definitions(prepared):
        parents = {name: records[name].key for name in definition.parents}
        records[definition.name] = stage_record(definition, parents)
    return records["supernet"]


def _digest_of_base(base: Base) -> str:
    """A digest of everything that determines the weights of a network that a choice of sub-networks
    trains, beside images and start weights."""
    return _digest({"subnets": base.subnets.to_json(), "run": result_settings({**base.run.to_json(), "origin": {}})})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_definition(
    config: SweepConfig, fingerprint: str, front: Sequence[int], contenders: Sequence[BudgetPick]
) -> StageDefinition:
    """Everything on which the verify stage depends: the slots of the frozen front, and the
    contenders of each kind of router."""
    picks = [asdict(pick) for pick in contenders]
    subset = {**stage_subset(config, "verify"), "front": list(front), "contenders": picks}
    return StageDefinition("verify", STAGE_VERSIONS["verify"], subset, fingerprint, ("search",))


def write_splits(path: Path, splits: Splits) -> None:
    """Write the splits; a file with other content is replaced (the stages' keys distinguish
    them)."""

    path.parent.mkdir(exist_ok=True)
    text = json.dumps(splits.to_json()) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        atomic_write_text(path, text)
