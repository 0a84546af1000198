"""Running sub-networks over a split: static accuracies and the routing table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet.cost import subnet_cost
from dsnet.data.normalization import Normalization
from dsnet.data.tensors import TensorData
from dsnet.precision import exact_float32
from dsnet.prefix_tree import each_logits
from dsnet.routing_table import MAX_FULL_CLASSES, NUM_TOP_LOGITS, RoutingTable
from dsnet.space import Subnet
from dsnet.supernet import EVIDENCE_PARTS, Supernet

EVALUATION_BATCH = 256
"""Images at a time wherever a number is kept: sums in float32 depend on it in their last bits."""


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
    """Accuracy on a split and cost of every sub-network, the teacher too.

    Args:
        supernet: trained and recalibrated.
        data: holds the split.
        split: which one.
        normalization: what the supernet was trained with.
        known: the first rows, where an earlier call was stopped.
        on_row: hears all rows so far after each sub-network; it may raise to give up.

    Returns:
        what `subnets.json` of the measure stage holds.
    """
    subnets = supernet.subnets
    rows = list(known)
    for subnet in subnets.all[len(rows) :]:
        top1, top5 = subnet_accuracy(supernet, subnet, data, split, normalization)
        cost = subnet_cost(supernet.spec, subnet, data.image_shape[-1])
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
def build_routing_table(
    supernet: Supernet,
    data: TensorData,
    split: str,
    normalization: Normalization,
    *,
    batch_size: int = EVALUATION_BATCH,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RoutingTable:
    """Run every member of the supernet's set once over a split; the trunk runs once for all of them.

    Args:
        supernet: trained and recalibrated, with one gate.
        data: holds the split.
        split: which one.
        normalization: what the supernet was trained with.
        batch_size: images at a time.
        on_progress: hears (images done, images in all).
    """
    subnets = supernet.subnets
    subnets.prefix_upto(0)
    device = next(supernet.parameters()).device
    supernet.eval()
    rows: list[dict[str, Tensor]] = []
    layout: dict[str, tuple[int, int]] = {}
    done = 0
    for batch in data.batches(split, batch_size):
        labels = batch.labels.to(device)
        trunk = supernet.trunk(normalization.apply(batch.images.to(device)), subnets[0])
        parts = {name: trunk.evidence(name) for name in EVIDENCE_PARTS}
        layout = _spans(parts)
        answers_of = {
            subnet.name: _answers(logits, labels)
            for subnet, logits in each_logits(supernet, trunk.features, subnets.members, gate=1)
        }
        per_route = [answers_of[subnet.name] for subnet in subnets]
        row = {name: torch.stack([answers[name] for answers in per_route], dim=1) for name in per_route[0]}
        row["evidence"] = torch.cat(list(parts.values()), dim=1)[:, None, :]
        rows.append({name: value.cpu() for name, value in row.items()})
        done += len(labels)
        on_progress(done, data.num_images(split))
    arrays = {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}
    costs = [subnet_cost(supernet.spec, subnet, data.image_shape[-1]) for subnet in subnets]
    return RoutingTable(
        split=split,
        routes=tuple(subnet.name for subnet in subnets),
        layout=layout,
        trunk_madds=costs[0].trunk_madds,
        image_ids=data.ids(split).cpu().numpy(),
        labels=data.labels(split).cpu().numpy(),
        madds=np.array([cost.madds for cost in costs], dtype=np.int64),
        **arrays,
    )


def join_tables(parts: Sequence[RoutingTable]) -> RoutingTable:
    """The table of a split from those of its consecutive pieces.

    Where every piece but the last holds a multiple of the batch size, the result is bit-equal to the table built at once.
    """
    arrays = parts[0].arrays()
    per_image = [name for name in arrays if name != "madds"]  # that is of the routes, hence equal in all pieces
    joined = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in per_image}
    return RoutingTable.from_arrays({**arrays, **joined}, parts[0].meta())


def _spans(parts: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    spans, start = {}, 0
    for name, value in parts.items():
        spans[name] = (start, start + value.shape[1])
        start += value.shape[1]
    return spans


def _in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)


def _answers(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a table keeps of one route's logits [B, C]; every value is [B] or [B, L]."""
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    top2 = p.topk(2, dim=1).values
    predicted = logits.argmax(1)
    kept, classes = logits, torch.zeros(len(labels), 0, dtype=torch.int32, device=logits.device)
    if logits.shape[1] > MAX_FULL_CLASSES:
        kept, indices = logits.topk(NUM_TOP_LOGITS, dim=1)
        classes = indices.int()
    return {
        "ce": F.nll_loss(log_p, labels, reduction="none"),
        "predicted": predicted,
        "correct1": predicted == labels,
        "correct5": _in_top5(logits, labels),
        "confidence": top2[:, 0],
        "margin": top2[:, 0] - top2[:, 1],
        "entropy": -(p * log_p).sum(1),
        "logits": kept.half(),
        "logit_classes": classes,
    }
