"""Grouped dynamic inference against the static networks, the masked way of the published code, and its own ideal.

A randomly initialised DS-MBNet (accuracy plays no part), and a gate made by hand so that it spreads the images evenly over its routes.
Every batch holds equally many images of each route, in random order; batch 1 runs one image of each route in turn and divides. The ideal
is CONTRACTS' trunk(B) + decide(B) + sum of tail_k(n_k), its parts timed at exactly the group sizes that occur, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Estimate,
    Headline,
    Options,
    Report,
    Samples,
    Section,
    devices,
    run_benchmark,
    sample_interleaved,
)
from dsnet.batchnorm import recalibrate
from dsnet.dynamic import DynamicNet
from dsnet.families import Task, create
from dsnet.materialize import materialize, materialize_tail, materialize_trunk
from dsnet.routers import GateRouter
from dsnet.supernet import Supernet

BENCHMARK = "grouped dynamic inference over its ideal, beside static and masked, batch 1 to 256 (goal: at most 1.10 at batch 64)"
GOAL = 1.10
HEADLINE_BATCH = 64
IMAGE_SIZE = 32
NUM_POOL = 512
FOUR_ROUTES = (0, 4, 9, 13)
"""As many as the published gate has, evenly over the set."""


def spread_gate(hidden: Tensor, routes: tuple[int, ...]) -> GateRouter:
    """A gate that sends equally many of the images with these hidden vectors [N, H] down each route.

    Route k scores k * s - offset_k for one projection s of the hidden vector: the lines cross at s = offset_k - offset_(k-1), which is put
    on the quantiles of s.
    """
    scaled = hidden.double() - hidden.double().mean(0)
    direction = torch.linalg.svd(scaled, full_matrices=False).Vh[0]
    score = hidden.double() @ direction
    cuts = torch.quantile(score, torch.arange(1, len(routes), dtype=torch.float64, device=score.device) / len(routes))
    steps = torch.arange(len(routes), dtype=torch.float64, device=score.device)
    offset = torch.cat([torch.zeros(1, dtype=torch.float64, device=score.device), cuts.cumsum(0)])
    return GateRouter(steps[:, None] * direction, offset, routes)


class MaskedTail(nn.Module):
    """The published way: every channel of the widest route is computed, those beyond an image's own width are then zeroed.

    A lower bound of it: the published code also picks each image's BatchNorm statistics; here the widest route's are folded in.
    """

    def __init__(self, supernet: Supernet, routes: tuple[int, ...]) -> None:
        super().__init__()
        widest = supernet.subnets[routes[-1]]
        self.tail = materialize_tail(supernet, widest, fold_bn=True)
        out_groups = [
            block["out_group"] for block in supernet.spec.layout["blocks"][supernet.spec.layout["gated_block"] :]
        ]
        self.num_blocks = len(out_groups)
        for number, group in enumerate(out_groups):
            widths = torch.tensor([supernet.subnets[route].widths[group] for route in range(len(supernet.subnets))])
            mask = torch.arange(widest.widths[group]) < widths[:, None]
            self.register_buffer(f"mask_{number}", mask.float()[:, :, None, None])

    def forward(self, features: Tensor, chosen: Tensor) -> Tensor:
        """Features [B, c, H, W] and routes [B] -> logits."""
        x = features
        for number, part in enumerate(self.tail.children()):
            x = part(x)
            if number < self.num_blocks:
                x = x * self.get_buffer(f"mask_{number}")[chosen]
        return x


@dataclass(frozen=True)
class Workload:
    """One table row."""

    device: str
    routes: tuple[int, ...]
    batch_size: int


class Contenders:
    """The networks of one device and routing space, and a pool of images whose routes are known."""

    def __init__(self, device: str, routes: tuple[int, ...], seed: int) -> None:
        self.routes = routes
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn((NUM_POOL, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator).to(device)
        supernet = create("ds_mbnet", Task(10, 3, IMAGE_SIZE), {"stem_stride": 1}, seed=seed).to(device)
        recalibrate(supernet, [self.pool[:64]])  # else activations shrink to denormals, which are slow
        supernet.eval()
        subnets = supernet.subnets
        self.trunk = materialize_trunk(supernet, subnets[0], fold_bn=True)
        self.gate = spread_gate(self.trunk(self.pool).hidden, routes)
        self.dynamic = DynamicNet(supernet, self.gate)
        self.static = {route: materialize(supernet, subnets[route], fold_bn=True) for route in routes}
        self.tails = {route: self.static[route].tail for route in routes}
        self.masked = MaskedTail(supernet, routes).to(device).eval()
        self.chosen = self.gate.step({"hidden": self.trunk(self.pool).hidden}, ())

    def batches(self, batch_size: int, seed: int) -> list[Tensor]:
        """Pool rows: one batch with equal shares of the routes, or for batch 1 one image of each route."""
        rows = [torch.nonzero(self.chosen == route)[:, 0].cpu() for route in self.routes]
        if batch_size == 1:
            return [items[:1] for items in rows]
        counts = [batch_size // len(rows) + (index < batch_size % len(rows)) for index in range(len(rows))]
        batch = torch.cat([items[:count] for items, count in zip(rows, counts, strict=True)])
        return [batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))]]

    def calls(self, rows: list[Tensor]) -> dict[str, Callable[[], object]]:
        """What is timed on these batches; the names that begin with `ideal/` add up to the ideal."""
        batches = [self.pool[part.to(self.pool.device)].contiguous() for part in rows]
        trunks = [self.trunk(batch) for batch in batches]
        chosen = [self.gate.step({"hidden": trunk.hidden}, ()) for trunk in trunks]
        groups = {
            route: [trunk.features[picked == route] for trunk, picked in zip(trunks, chosen, strict=True)]
            for route in self.routes
        }
        calls = {
            "dynamic": lambda: [self.dynamic(batch) for batch in batches],
            "static widest": _each(self.static[self.routes[-1]], batches),
            "static cheapest": _each(self.static[self.routes[0]], batches),
            "masked": lambda: [self._run_masked(batch) for batch in batches],
            "ideal/trunk": _each(self.trunk, batches),
            "ideal/decide": lambda: [self._decide(trunk.hidden) for trunk in trunks],
        }
        for route, parts in groups.items():
            calls[f"ideal/tail {route}"] = _each(self.tails[route], [part for part in parts if len(part)])
        return calls

    def _run_masked(self, batch: Tensor) -> Tensor:
        trunk = self.trunk(batch)
        return self.masked(trunk.features, self.gate.step({"hidden": trunk.hidden}, ()))

    def _decide(self, hidden: Tensor) -> object:
        chosen = self.gate.step({"hidden": hidden}, ())
        return torch.unique_consecutive(chosen[torch.argsort(chosen)], return_counts=True)

    def largest_difference(self, batch: Tensor) -> float:
        """Between dynamic logits and those of each image's route alone, relative to the largest logit."""
        output = self.dynamic(batch)
        alone = torch.stack(
            [self.static[int(route)](image[None])[0] for image, route in zip(batch, output.routes, strict=True)]
        )
        return float((output.logits - alone).abs().max() / alone.abs().max())


def _each(module: Callable[[Tensor], object], batches: list[Tensor]) -> Callable[[], object]:
    return lambda: [module(batch) for batch in batches]


@dataclass(frozen=True)
class Row:
    """What one workload gave."""

    workload: Workload
    samples: Samples
    """Milliseconds a batch."""

    def ratio(self, numerator: str, denominator: str) -> Estimate:
        """Of two contenders; `ideal` is the sum of its parts."""
        return self.samples.ratio(self._names(numerator), self._names(denominator))

    def _names(self, contender: str) -> list[str]:
        return [name for name in self.samples.ms if name.startswith("ideal/")] if contender == "ideal" else [contender]


RATIOS = (
    ("dynamic/ideal", "dynamic", "ideal"),
    ("ceiling: widest/cheapest", "static widest", "static cheapest"),
    ("widest/dynamic", "static widest", "dynamic"),
    ("masked/dynamic", "masked", "dynamic"),
)


def workloads(options: Options, num_members: int = 14) -> list[Workload]:
    """Four routes at every batch size, and all routes at the headline's."""
    sizes = (1, 16, 64) if options.quick else (1, 16, 64, 256)
    rows = []
    for device in devices():
        rows += [Workload(device.type, FOUR_ROUTES, size) for size in sizes]
        rows.append(Workload(device.type, tuple(range(num_members)), HEADLINE_BATCH))
    return rows


@torch.inference_mode()
def measure(options: Options) -> Report:
    """Each row's contenders side by side; the headline is four routes on the CPU."""
    contenders: dict[tuple[str, tuple[int, ...]], Contenders] = {}
    rows, differences = [], {}
    rounds, budget_s = (10, 6.0) if options.quick else (40, 15.0)
    for work in workloads(options):
        key = (work.device, work.routes)
        if key not in contenders:
            contenders[key] = Contenders(*key, options.seed)
            differences[f"{work.device}, {len(work.routes)} routes"] = contenders[key].largest_difference(
                contenders[key].pool[:HEADLINE_BATCH]
            )
        batches = contenders[key].batches(work.batch_size, options.seed)
        samples = sample_interleaved(
            contenders[key].calls(batches), rounds=rounds, warmup=2, budget_s=budget_s, device=work.device
        )
        rows.append(Row(work, Samples({name: values / len(batches) for name, values in samples.ms.items()})))
    headline = next(row for row in rows if row.workload == Workload("cpu", FOUR_ROUTES, HEADLINE_BATCH))
    ceiling = headline.ratio("static widest", "static cheapest")
    label = f"dynamic/ideal at batch {HEADLINE_BATCH}, 4 routes, {options.threads} thread(s), ceiling {ceiling.text(2)}"
    return Report(
        [_times(rows, options), _ratios(rows)],
        Headline(label, headline.ratio("dynamic", "ideal"), "", GOAL),
        {"rows": [_figures(row) for row in rows], "largest_logit_difference": differences},
    )


def _title(row: Row) -> str:
    return f"{row.workload.device}, {len(row.workload.routes)} routes, batch {row.workload.batch_size}"


def _times(rows: list[Row], options: Options) -> Section:
    names = ("dynamic", "static widest", "static cheapest", "masked")
    cells = [
        (_title(row), *(row.samples.median_ms(name).text(1) for name in names), str(row.samples.num_rounds))
        for row in rows
    ]
    title = f"DS-MBNet, {IMAGE_SIZE} px, stem stride 1, float32, {options.threads} thread(s): ms a batch [95 %]"
    return Section(title, ("", *names, "rounds"), cells)


def _ratios(rows: list[Row]) -> Section:
    cells = [(_title(row), *(row.ratio(top, bottom).text(2) for _, top, bottom in RATIOS)) for row in rows]
    return Section("Ratios of medians [95 %]", ("", *(name for name, _, _ in RATIOS)), cells)


def _figures(row: Row) -> dict[str, Any]:
    return {
        **asdict(row.workload),
        "times": row.samples.figures(),
        "ratios": {name: asdict(row.ratio(top, bottom)) for name, top, bottom in RATIOS},
    }


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure)
