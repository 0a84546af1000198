"""Evaluation of sub-networks on a split: static accuracies and the routing table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.data.tensors import TensorData
from dsnet.data.training_images import TrainingImages
from dsnet.deploy.segments import Segments
from dsnet.image_size import ImageSize, image_size_of
from dsnet.network.precision import exact_float32
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import EVIDENCE_PARTS, Supernet
from dsnet.routers.base import summary_of
from dsnet.routing.routing_table import MAX_FULL_CLASSES, NUM_TOP_LOGITS, GateColumns, RoutingTable
from dsnet.seeds import derive_seed
from dsnet.space.cost import evidence_channels, pooling_madds, subnet_cost
from dsnet.space.route_tree import RouteTree
from dsnet.space.spec import Subnet

EVALUATION_BATCH = 256
"""Batch size of every evaluation whose numbers are stored: the last bits of sums in float32 depend
on it."""
MAX_EVIDENCE_COLUMNS = 20_000
"""Largest number of values of evidence per image with which a table stores the poolings of later
gates."""
TRAIN_SAMPLE = 1000
"""Number of images of `train` on which the widest route is evaluated too: its error of about one
percentage point is small enough to detect overfitting."""


@exact_float32()
@torch.no_grad()
def subnet_accuracy(
    supernet: Supernet,
    subnet: Subnet,
    data: TensorData,
    split: str,
    normalization: Normalization,
    batch_size: int = EVALUATION_BATCH,
) -> tuple[float, float]:
    """(top-1, top-5) of one sub-network on a split, as fractions."""
    device = next(supernet.parameters()).device
    supernet.eval()
    right1 = right5 = 0
    for batch in data.batches(split, batch_size):
        labels = batch.labels.to(device)
        logits = supernet(normalization.apply(batch.images.to(device)), subnet)
        right1 += int((logits.argmax(1) == labels).sum())
        right5 += int(_in_top5(logits, labels).sum())
    return right1 / data.num_images(split), right5 / data.num_images(split)


def measure_subnets(
    supernet: Supernet,
    data: TensorData,
    split: str,
    normalization: Normalization,
    *,
    known: Sequence[Mapping[str, Any]] = (),
    on_row: Callable[[list[Mapping[str, Any]]], None] = lambda rows: None,
) -> dict[str, Any]:
    """Measure the accuracy on a split, and the cost, of every sub-network and the teacher.

    Args:
        supernet: trained and recalibrated.
        data: data with the split.
        split: name of the split.
        normalization: the normalisation that the supernet was trained with.
        known: the rows that an earlier, interrupted call has measured.
        on_row: called with all rows so far after each sub-network; it may raise to stop.

    Returns:
        the content of `subnets.json` of the measure stage.
    """
    subnets = supernet.subnets
    rows = list(known)
    for subnet in subnets.all[len(rows) :]:
        top1, top5 = subnet_accuracy(supernet, subnet, data, split, normalization)
        cost = subnet_cost(supernet.spec, subnet, image_size_of(data.image_shape))
        rows.append(
            {
                "name": subnet.name,
                "top1": top1,
                "top5": top5,
                "madds": cost.madds,
                "params": cost.params,
                "is_teacher": subnet == subnets.teacher,
            }
        )
        on_row(rows)
    return {"split": split, "num_images": data.num_images(split), "subnets": rows}


@exact_float32()
@torch.no_grad()
def sample_training_images(
    supernet: Supernet, images: TrainingImages, normalization: Normalization, limit: int = TRAIN_SAMPLE
) -> dict[str, Any]:
    """Measure top-1 of the widest route on a sample of `train` without augmentation; compared with
    top-1 on `val` it shows overfitting.

    Args:
        supernet: trained and recalibrated.
        images: the training split.
        normalization: the normalisation that the supernet was trained with.
        limit: number of images in the sample, which is the same for splits of the same size.

    Returns:
        the content of `train_sample.json` of the measure stage.
    """
    device = next(supernet.parameters()).device
    widest = supernet.subnets[supernet.subnets.by_madds()[-1]]
    generator = torch.Generator().manual_seed(derive_seed(0, "train sample"))
    rows = torch.randperm(len(images.labels), generator=generator)[:limit].split(EVALUATION_BATCH)
    supernet.eval()
    right = 0
    for own, batch in zip(rows, images.clean(rows, device), strict=True):
        logits = supernet(normalization.apply(batch), widest)
        right += int((logits.argmax(1).cpu() == images.labels[own]).sum())
    num_images = sum(map(len, rows))
    return {"split": "train", "num_images": num_images, "name": widest.name, "top1": right / num_images}


class GivenSegments(NamedTuple):
    """Segments that run in place of a supernet's weights, such as graphs in an engine."""

    segments: Segments
    """On the CPU."""
    parts: Sequence[str]
    """The parts of the evidence that they give, and that a table stores."""

    def num_gates(self, tree: RouteTree) -> int:
        """The number of gates at which they give evidence: segments that are not shared after the
        first gate give it there alone."""
        return len(tree.gates) if self.segments.shares_segments else 1


@exact_float32()
@torch.no_grad()
def build_routing_table(
    supernet: Supernet,
    data: TensorData,
    split: str,
    normalization: Normalization,
    *,
    given: GivenSegments | None = None,
    batch_size: int = EVALUATION_BATCH,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RoutingTable:
    """Run every member of the supernet's set once over a split; segments that they share run once
    for all of them.

    Args:
        supernet: trained and recalibrated; with several gates every path of its set is run.
        data: data with the split.
        split: name of the split.
        normalization: the normalisation that the supernet was trained with.
        given: what runs in place of the supernet's weights.
        batch_size: images at a time.
        on_progress: called with (images done, images in all).
    """
    subnets = supernet.subnets
    tree = RouteTree.of(subnets)
    if given is None:
        plan = _EvidencePlan(supernet, tree, image_size_of(data.image_shape), EVIDENCE_PARTS, len(tree.gates))
        run = partial(each_logits, supernet, subnets=subnets.members)
    else:
        plan = _EvidencePlan(supernet, tree, image_size_of(data.image_shape), given.parts, given.num_gates(tree))
        run = partial(_logits_of_segments, given, supernet, tree)
    device = next(supernet.parameters()).device
    supernet.eval()
    rows: list[dict[str, Tensor]] = []
    done = 0
    for batch in data.batches(split, batch_size):
        labels = batch.labels.to(device)
        images = normalization.apply(batch.images.to(device))
        seen: dict[tuple[int, int], Tensor] = {}
        answers_of = {
            subnet.name: _answers(logits, labels) for subnet, logits in run(images=images, on_node=plan.collector(seen))
        }
        per_route = [answers_of[subnet.name] for subnet in subnets]
        row = {name: torch.stack([answers[name] for answers in per_route], dim=1) for name in per_route[0]}
        row["evidence"] = torch.cat(
            [images.new_zeros(len(images), 0), *(seen[place] for place in plan.places if place in seen)], dim=1
        )
        rows.append({name: value.cpu() for name, value in row.items()})
        done += len(labels)
        on_progress(done, data.num_images(split))
    arrays = {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}
    costs = [subnet_cost(supernet.spec, subnet, image_size_of(data.image_shape)) for subnet in subnets]
    return RoutingTable(
        split=split,
        routes=tuple(subnet.name for subnet in subnets),
        tree=tree,
        gates=plan.columns(),
        trunk_madds=costs[0].trunk_madds,
        num_classes=supernet.spec.num_classes,
        image_ids=data.ids(split).cpu().numpy(),
        labels=data.labels(split).cpu().numpy(),
        madds=np.array([cost.madds for cost in costs], dtype=np.int64),
        **arrays,
    )


class _WithEvidence(Protocol):
    """The output of a segment, as far as a table reads it."""

    def evidence(self, part: str) -> Float[Tensor, "batch features"]:
        """One part of the evidence."""
        ...


_Collect = Callable[[int, Subnet, _WithEvidence], None]


def _logits_of_segments(
    given: GivenSegments, supernet: Supernet, tree: RouteTree, images: Tensor, on_node: _Collect
) -> Iterator[tuple[Subnet, Tensor]]:
    """Run all routes with segments, each shared one once; as `each_logits`."""
    members, segments, num_gates = supernet.subnets, given.segments, given.num_gates(tree)
    inputs = {0: images}
    for gate, branches in enumerate(tree.gates[:num_gates]):
        found = {}
        for node in range(branches.num_nodes):
            route = branches.routes_at(node)[0]
            before = tree.gates[gate - 1].node_of[route] if gate else 0
            output = segments.upto_gate(gate, node, inputs[before])
            on_node(gate, members[route], output)
            found[node] = output.features
        inputs = found
    last = tree.gates[num_gates - 1].node_of
    for route, subnet in enumerate(members):
        yield subnet, segments.rest(num_gates, route, inputs[last[route]])


class _EvidencePlan:
    """Plan of which parts of the evidence a table stores at every node, and in which columns.

    The given parts are stored at the first `num_gates` gates. At later ones than the first, the
    poolings are stored only if the nodes of all gates together need no more than
    `MAX_EVIDENCE_COLUMNS`: 64 nodes with a thousand channels would be 800 kB an image.
    """

    def __init__(
        self, supernet: Supernet, tree: RouteTree, image_size: ImageSize, parts: Sequence[str], num_gates: int
    ) -> None:
        self._parts = [part for part in EVIDENCE_PARTS if part in parts]
        self._subnets = supernet.subnets
        self._tree = tree
        self._image_size = image_size
        self.places = [(gate, node) for gate, nodes in enumerate(tree.gates) for node in range(nodes.num_nodes)]
        self._lengths = {place: self._lengths_at(*place) if place[0] < num_gates else {} for place in self.places}
        if sum(sum(lengths.values()) for lengths in self._lengths.values()) > MAX_EVIDENCE_COLUMNS:
            for (gate, node), lengths in self._lengths.items():
                if gate > 0:
                    self._lengths[gate, node] = {part: length for part, length in lengths.items() if part == "hidden"}

    def _lengths_at(self, gate: int, node: int) -> dict[str, int]:
        spec = self._subnets.spec
        subnet = self._subnets[self._tree.gates[gate].routes_at(node)[0]]
        channels = evidence_channels(spec, subnet, gate)
        return {part: spec.gates[gate].hidden if part == "hidden" else channels for part in self._parts}

    def collector(self, seen: dict[tuple[int, int], Tensor]) -> _Collect:
        """A callback that puts the evidence of a batch at each node into `seen`."""
        index = {subnet.name: k for k, subnet in enumerate(self._subnets)}

        def collect(gate: int, subnet: Subnet, output: _WithEvidence) -> None:
            place = (gate, self._tree.gates[gate].node_of[index[subnet.name]])
            if self._lengths[place]:
                seen[place] = torch.cat([output.evidence(part) for part in self._lengths[place]], dim=1).float()

        return collect

    def columns(self) -> tuple[GateColumns, ...]:
        """Column layout and pooling cost of the evidence at every gate."""
        layouts: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
        start = 0
        for place in self.places:
            layouts[place] = {}
            for part, length in self._lengths[place].items():
                layouts[place][part] = (start, start + length)
                start += length
        return tuple(
            GateColumns(
                tuple(layouts[gate, node] for node in range(nodes.num_nodes)),
                tuple(self._pooling(gate, nodes.routes_at(node)[0]) for node in range(nodes.num_nodes)),
            )
            for gate, nodes in enumerate(self._tree.gates)
        )

    def _pooling(self, gate: int, route: int) -> int:
        return pooling_madds(self._subnets.spec, self._subnets[route], gate, self._image_size)


def join_tables(parts: Sequence[RoutingTable]) -> RoutingTable:
    """Join the tables of consecutive pieces of a split into the table of the split.

    If every piece but the last holds a multiple of the batch size, the result is bit-equal to the
    table built in one pass with the same number of threads on the same processor.
    """
    arrays = parts[0].arrays()
    per_image = [name for name in arrays if name != "madds"]  # MAdds are per route, hence equal in all pieces
    joined = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in per_image}
    return RoutingTable.from_arrays({**arrays, **joined}, parts[0].meta())


def _in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)


def _answers(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The columns of a table for one route, from its logits [B, C]; every value is [B] or
    [B, L]."""
    predicted = logits.argmax(1)
    kept, classes = logits, torch.zeros(len(labels), 0, dtype=torch.int32, device=logits.device)
    if logits.shape[1] > MAX_FULL_CLASSES:
        kept, indices = logits.topk(NUM_TOP_LOGITS, dim=1)
        classes = indices.int()
    return {
        "ce": F.cross_entropy(logits.float(), labels, reduction="none"),
        "predicted": predicted,
        "correct1": predicted == labels,
        "correct5": _in_top5(logits, labels),
        **summary_of(logits),
        "logits": kept.half(),
        "logit_classes": classes,
    }
