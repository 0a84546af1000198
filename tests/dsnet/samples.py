"""Small supernets, images and routing tables that the tests of the core share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsnet.data.normalization import Normalization
from dsnet.data.settings import Augmentation
from dsnet.data.tensors import Batch, TensorData
from dsnet.families import Task, create, layout
from dsnet.image_size import ImageSize, height_and_width
from dsnet.measure.evaluate import build_routing_table
from dsnet.measure.latency_table import LatencyTable
from dsnet.network.batchnorm import recalibrate
from dsnet.network.layers import BatchNormBank
from dsnet.network.supernet import EVIDENCE_PARTS, Supernet
from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.routers.cascade import CascadeRouter, LearnedCascadeRouter, answer_features
from dsnet.routers.gate import RICH_EVIDENCE, EvidenceGateRouter, GateRouter
from dsnet.routers.head import Head
from dsnet.routers.kinds import kind_names
from dsnet.routers.tree import GatesRouter
from dsnet.routing.routing_table import GateColumns, RoutingTable
from dsnet.space.route_tree import GateBranches, RouteTree
from dsnet.space.subnet_set import SubnetSet
from dsnet.training.settings import TEACHER_OF_MODE, BootstrapSettings, Regime, TrainSettings
from dsnet.training.supernet_run import SupernetRun

SMALL_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ds_mbnet": {"width": 0.25, "num_routes": 4, "stem_stride": 1},
    "ds_resnet": {"depth": 14, "width": 0.5, "ratios": [0.5, 1.0], "paths": [[0, 0, 0], [0, 1, 0], [1, 0, 1]]},
    "ds_tiny": {"width": 0.5, "num_routes": 3},
    "ds_vit": {"patch": 4, "dim": 24, "heads": 3, "depth": 4, "mlp_ratio": 2, "ratios": [0.25, 0.5, 0.75], "step": 4},
    **{f"tests.dsnet.nets:{name}": {"step": 2} for name in ("Residual", "Dense", "Pinned")},
}
"""Options that make a family quick to run; a family without an entry is tested with its
defaults."""
THREE_GATES: Mapping[str, Any] = {"depth": 8, "width": 0.5, "ratios": [0.5, 1.0], "paths": "all"}
"""Options of a quick DS-ResNet with three gates and eight paths."""
NORMALIZATION = Normalization((120.0, 130.0, 125.0), (60.0, 55.0, 65.0))
ROUTER_KINDS = kind_names()
"""Every kind of router: a new one is tested wherever these are."""


def task(num_classes: int = 10, image_size: ImageSize = 16) -> Task:
    """A task with colour images."""
    return Task(num_classes, 3, image_size)


def small_set(family: str, num_classes: int = 10, image_size: ImageSize = 16) -> SubnetSet:
    """The family's sub-networks, in small."""
    return layout(family, task(num_classes, image_size), SMALL_OPTIONS.get(family, {}))


def small_supernet(
    family: str = "ds_tiny", seed: int = 0, num_classes: int = 10, image_size: ImageSize = 16
) -> Supernet:
    """A small supernet in eval mode, every parameter and statistic of which is away from its
    initial value."""
    supernet = create(family, task(num_classes, image_size), SMALL_OPTIONS.get(family, {}), seed=seed)
    return shaken(supernet, seed).eval()


def lively_supernet(
    family: str = "ds_tiny", seed: int = 0, num_classes: int = 10, image_size: ImageSize = 16
) -> Supernet:
    """A small supernet whose answers depend on the image; with random statistics the signal would
    vanish before the logits."""
    supernet = small_supernet(family, seed, num_classes, image_size)
    recalibrate(supernet, [NORMALIZATION.apply(random_pixels(128, image_size, seed + 1))])
    return supernet.eval()


def three_gate_supernet(seed: int = 0, image_size: ImageSize = 16, **options: Any) -> Supernet:
    """A small DS-ResNet in eval mode with a gate before each of its three stages."""
    supernet = create("ds_resnet", task(image_size=image_size), {**THREE_GATES, **options}, seed=seed)
    return shaken(supernet, seed).eval()


@torch.no_grad()
def shaken(supernet: Supernet, seed: int = 0) -> Supernet:
    """The supernet itself, with random affine pairs, biases and running statistics and logits of
    order 1."""
    generator = torch.Generator().manual_seed(seed + 1000)
    for name, parameter in supernet.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif name == "classifier.weight":
            parameter.mul_(30.0)
    for norm in supernet.batch_norms():
        shake_statistics(norm, generator)
    return supernet


def without_dropout(supernet: Supernet) -> Supernet:
    """The supernet itself, without dropout: two ways that draw its mask in another order cannot be
    compared, and most cut networks have none."""
    if hasattr(supernet, "dropout"):
        supernet.dropout = 0.0
    for part in supernet.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return supernet


def shake_statistics(norm: BatchNormBank, generator: torch.Generator) -> None:
    """Random running statistics in every set of a bank."""
    for name, buffer in norm.named_buffers():
        if name.startswith("mean_"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.startswith("var_"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def random_images(count: int, size: ImageSize = 16, seed: int = 0) -> Tensor:
    """Normalised images, float32 [count, 3, height, width]."""
    return torch.randn((count, 3, *height_and_width(size)), generator=torch.Generator().manual_seed(seed))


def random_pixels(count: int, size: ImageSize = 16, seed: int = 0) -> Tensor:
    """Images as uint8 [count, 3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *height_and_width(size)), generator=generator, dtype=torch.uint8)


def random_labels(count: int, num_classes: int = 10, seed: int = 0) -> Tensor:
    """int64 [count]."""
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed + 1))


def tensor_data(count: int = 20, size: ImageSize = 16, num_classes: int = 10, split: str = "val") -> TensorData:
    """One split of random images whose ids are not their positions."""
    ids = torch.arange(count) * 3 + 7
    part = Batch(random_pixels(count, size), random_labels(count, num_classes), ids)
    names = tuple(f"class{index}" for index in range(num_classes))
    return TensorData(MappingProxyType({split: part}), names, (3, *height_and_width(size)))


def small_run(mode: str = "ib", **changes: Any) -> SupernetRun:
    """A training run of 4 epochs with everything switched on that draws random numbers."""
    train = TrainSettings(epochs=4, batch_size=16, lr=0.05, warmup_epochs=1.0)
    fields: dict[str, Any] = {
        "train": train,
        "regime": Regime(teacher=TEACHER_OF_MODE[mode], num_random=1),
        "bootstrapping": BootstrapSettings(teacher_min_updates=5, soft_ramp_epochs=1.0, trust="full"),
        "augmentation": Augmentation(crop_padding=1, flip=True, cutout=2),
        "normalization": NORMALIZATION,
        "seed": 3,
    }
    return SupernetRun(**{**fields, **changes})


def random_tree(num_routes: int, num_gates: int = 1) -> RouteTree:
    """Every path through gates of equally many choices each; `num_routes` is that number to the
    power of `num_gates`."""
    choices = round(num_routes ** (1 / num_gates))
    if choices**num_gates != num_routes:
        raise ValueError(f"{num_routes} routes are no full tree of {num_gates} gates")
    paths = list(product(range(choices), repeat=num_gates))
    prefixes = [sorted({path[:gate] for path in paths}) for gate in range(num_gates)]
    return RouteTree(
        tuple(
            GateBranches(
                tuple(prefixes[gate].index(path[:gate]) for path in paths), tuple(path[gate] for path in paths)
            )
            for gate in range(num_gates)
        )
    )


def random_table(
    num_images: int = 60,
    num_routes: int = 4,
    *,
    seed: int = 0,
    hidden: int = 6,
    split: str = "gate",
    num_gates: int = 1,
) -> RoutingTable:
    """A table with consistent columns in which routes of a higher number cost more and tend to be
    right.

    With several gates the routes are all paths through gates of equally many choices, and a node's
    poolings have as many channels as its number tells.
    """
    rng = np.random.default_rng(seed)
    num_classes = 7
    labels = rng.integers(0, num_classes, num_images)
    difficulty = rng.random(num_images)
    skill = np.linspace(0.0, 3.0, num_routes)
    logits = rng.normal(size=(num_images, num_routes, num_classes))
    logits[np.arange(num_images), :, labels] += 2.5 + skill - 4.0 * difficulty[:, None]
    slopes = {"mean": 1.0, "deviation": -0.5, "maximum": 2.0, "hidden": 2.0}

    def columns(part: str, length: int) -> np.ndarray[Any, Any]:
        slope = slopes[part] * np.linspace(-1, 1, length)
        return np.maximum(rng.normal(size=(num_images, length)) + difficulty[:, None] * slope, 0)

    tree = random_tree(num_routes, num_gates)
    evidence: list[np.ndarray[Any, Any]] = []
    gates = []
    for branches in tree.gates:
        layouts = []
        for node in range(branches.num_nodes):
            layout_here = {}
            for part in EVIDENCE_PARTS[::-1]:  # the hidden vector first: older expectations depend on the numbers drawn
                start = sum(block.shape[1] for block in evidence)
                evidence.append(columns(part, hidden if part == "hidden" else 3 + node))
                layout_here[part] = (start, start + evidence[-1].shape[1])
            layouts.append(layout_here)
        pooling = tuple(16 * (3 + node) for node in range(branches.num_nodes))
        gates.append(GateColumns(tuple(layouts), pooling))
    shifted = logits - logits.max(2, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(2, keepdims=True))
    p = np.sort(np.exp(log_p), axis=2)
    order = np.argsort(-logits, axis=2)
    return RoutingTable(
        split=split,
        routes=tuple(f"subnet-{k:02d}" for k in range(num_routes)),
        tree=tree,
        gates=tuple(gates),
        trunk_madds=500,
        num_classes=num_classes,
        image_ids=np.arange(num_images, dtype=np.int64),
        labels=labels.astype(np.int64),
        madds=(1000 + 700 * np.arange(num_routes) ** 2).astype(np.int64),
        ce=-log_p[np.arange(num_images), :, labels].astype(np.float32),
        predicted=order[:, :, 0].astype(np.int64),
        correct1=order[:, :, 0] == labels[:, None],
        correct5=(order[:, :, :5] == labels[:, None, None]).any(2),
        confidence=p[:, :, -1].astype(np.float32),
        margin=(p[:, :, -1] - p[:, :, -2]).astype(np.float32),
        entropy=(-(np.exp(log_p) * log_p).sum(2)).astype(np.float32),
        logits=logits.astype(np.float16),
        logit_classes=np.zeros((num_images, num_routes, 0), dtype=np.int32),
        evidence=np.concatenate(evidence, axis=1).astype(np.float32),
    )


def supernet_table(supernet: Supernet, num_images: int = 24) -> RoutingTable:
    """The table of a supernet on `tensor_data(num_images)`."""
    size = supernet.spec.image_size
    data = tensor_data(num_images, size, supernet.spec.num_classes)
    return build_routing_table(supernet, data, "val", NORMALIZATION)


def stored_answers(table: RoutingTable, routes: Tensor, rows: Sequence[int] | None = None) -> Executed:
    """The stored answers of a table for one route (int64 [B], never STOP) of each of some images,
    by default of all."""
    rows = list(range(table.num_images) if rows is None else rows)
    names = ("confidence", "margin", "entropy")
    stored = {name: torch.from_numpy(getattr(table, name)[rows, routes.numpy()]) for name in names}
    return Executed(routes, torch.from_numpy(table.logits[rows, routes.numpy()]), stored)


def table_evidence(
    router: Router, table: RoutingTable, rows: Sequence[int], gate: int = 0, route: int = STOP, node: int = 0
) -> Evidence:
    """The evidence for some images of a table at the node of a gate through which `route`
    passes."""
    parts = {name: torch.from_numpy(table.part(name, gate, node)[list(rows)]) for name in router.needs}
    return Evidence(parts, len(rows), gate=gate, route=route)


def random_head(generator: torch.Generator, num_features: int, num_options: int, units: int | None = None) -> Head:
    """A linear head without biases, or a perceptron of `units` hidden units."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    if units is None:
        return Head(draw(num_options, num_features))
    return Head(draw(num_options, units), draw(num_options), draw(units, num_features), draw(units))


def random_router(kind: str, table: RoutingTable, seed: int = 0, routes: Sequence[int] | None = None) -> Router:
    """A router of any kind over some routes (rising; all by default), its scores balanced so that
    images of the table part ways."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(range(table.num_routes)) if routes is None else tuple(routes)
    if kind in ("gates", "evidence_gates"):
        return _random_gates(RICH_EVIDENCE if kind == "evidence_gates" else ("hidden",), table, generator, ids)
    if kind in ("gate", "evidence_gate"):
        needs = RICH_EVIDENCE if kind == "evidence_gate" else ("hidden",)
        features = _features(table, needs)
        head = random_head(generator, features.shape[1], len(ids), 5 if kind == "evidence_gate" else None)
        offset = head(features).mean(0)
        if kind == "gate":
            return GateRouter(head.weight, offset, ids)
        return EvidenceGateRouter(head, offset, ids, 2 * table.gates[0].pooling_madds[0])
    first, *wider = sorted(ids, key=lambda route: table.madds[route])
    if kind == "cascade":
        return CascadeRouter(first, wider[-1], float(np.median(table.confidence[:, first])))
    if kind != "learned_cascade":
        raise ValueError(f"unknown router kind {kind!r}")
    answers = answer_features(stored_answers(table, torch.full((table.num_images,), first)), table.num_classes)
    features = torch.cat([answers, _features(table, RICH_EVIDENCE)], dim=1)
    head = random_head(generator, features.shape[1], len(ids), 6)
    pooling = 2 * table.gates[0].pooling_madds[0]
    return LearnedCascadeRouter(first, head, head(features).mean(0), ids, table.num_classes, RICH_EVIDENCE, pooling)


def random_supernet_router(kind: str, supernet: Supernet, seed: int = 0, routes: Sequence[int] | None = None) -> Router:
    """A router of any kind that fits a supernet."""
    return random_router(kind, supernet_table(supernet), seed, routes)


def _features(table: RoutingTable, needs: Sequence[str], gate: int = 0, node: int = 0) -> Tensor:
    return torch.cat([torch.from_numpy(table.part(part, gate, node)) for part in needs], dim=1)


def _random_gates(
    needs: tuple[str, ...], table: RoutingTable, generator: torch.Generator, ids: tuple[int, ...]
) -> GatesRouter:
    tree = table.tree.subset(ids)
    heads: list[tuple[Head, ...]] = []
    offsets: list[tuple[Tensor, ...]] = []
    pooling: list[tuple[int, ...]] = []
    for gate, branches in enumerate(tree.gates):
        places = [
            table.tree.gates[gate].node_of[ids[branches.routes_at(node)[0]]] for node in range(branches.num_nodes)
        ]
        features = [_features(table, needs, gate, place) for place in places]
        if needs == RICH_EVIDENCE:
            own = [random_head(generator, rows.shape[1], branches.num_choices, 5) for rows in features]
        else:
            own = [random_head(generator, features[0].shape[1], branches.num_choices)] * branches.num_nodes
        heads.append(tuple(own))
        balance = [head(rows).mean(0) for head, rows in zip(own, features, strict=True)]
        for node, offset in enumerate(balance):
            present = {branches.choice_of[column] for column in branches.routes_at(node)}
            offset[[choice for choice in range(branches.num_choices) if choice not in present]] = torch.inf
        offsets.append(tuple(balance))
        pooling.append(tuple(2 * table.gates[gate].pooling_madds[place] for place in places))
    is_rich = needs == RICH_EVIDENCE
    return GatesRouter(tree, ids, tuple(heads), tuple(offsets), needs, tuple(pooling) if is_rich else ())


def products_keep_apart() -> bool:
    """Whether a product of torch is the same to the bit alone and in a batch, at the sizes of
    gates, as with MKL's mode."""
    draw = torch.Generator().manual_seed(0)
    for rows, inner, columns in itertools.product((1, 3, 8, 14), (1, 5, 24, 66), (1, 7, 17, 51, 100, 270)):
        left = torch.randn(8, rows, inner, generator=draw)
        right = torch.randn(8, inner, columns, generator=draw)
        together = torch.bmm(left, right)
        if any(not torch.equal(torch.bmm(left[i : i + 2], right[i : i + 2]), together[i : i + 2]) for i in (0, 3, 6)):
            return False
    return True


needs_products_apart = pytest.mark.skipif(
    not torch.backends.mkl.is_available() and not products_keep_apart(),
    reason="torch computes without MKL here, and a product depends on those beside it: a search runs trials one by one",
)


def batch1_ms(table: LatencyTable, runs: NDArray[np.float64], routes: Sequence[str], kind: str = "gate") -> float:
    """Ideal latency at batch 1: the trunk, the decision and the tails that run."""
    tails = np.array([table.tails[1][name].median_ms for name in routes])
    decide = table.decisions.get(kind, table.decide)
    return table.trunk[1].median_ms + decide[1].median_ms + float(runs @ tails)
