"""Latency of grouped dynamic inference, compared with the static networks, with the masking of the
published code, and with the ideal latency.

By default it uses random weights (accuracy does not matter here) and a constructed gate that
spreads the images evenly over its routes: every batch holds equally many images of each route, in
random order, and batch 1 is one image of each route in turn. With `--run` it uses a trained
network, a router of its sweep and the images of `val`, so that groups are as uneven as in use.

The ideal is trunk(B) + decide(B) + sum of tail_k(n_k) (docs/definitions.md, Latency), whose parts
are timed at exactly the group sizes that occur, in the same rounds. With `--engine` everything runs
in an inference engine, also the static networks, each as a single graph; the ideal is then
everything up to the decision, which is one graph, and the tails. Every call of every contender is
timed separately, between calls of others, so that caches are as cold for the ideal as for the
network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
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
from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.engines import TORCH, Engine, engine_names, timing_engine
from dsnet.deploy.materialize import PlainSubnet, materialize_tail
from dsnet.deploy.onnx_files import GraphSegments, open_model, write_graphs
from dsnet.deploy.segments import CutSegments, rows_by
from dsnet.families import Task, create
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.routers.gate import GateRouter
from dsnet.space.route_tree import RouteTree
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from orchestration.commands.planning import prepare_again
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from search.front.points import trial_name

BENCHMARK = "grouped dynamic inference over its ideal, beside static and masked, batch 1 to 256 (goal: at most 1.10 at batch 64)"
GOAL = 1.10
HEADLINE_BATCH = 64
IMAGE_SIZE = 32
NUM_POOL = 512
ROUNDS_OF_ONE = 10
"""Factor of the number of rounds at batch 1, where a call takes a millisecond and varies most."""
NUM_REAL_BATCHES = {1: 128, 16: 8, 64: 4}
"""Number of batches of real images by batch size, several for small ones because groups differ
between batches; one for other sizes."""
PARAMS = (
    click.Option(
        ["--run"],
        type=click.Path(exists=True, path_type=Path),
        help="Time a router of this run's folder, in place of random weights.",
    ),
    click.Option(["--trial"], type=int, help="With --run: the number of the router's trial; its knee where not given."),
    click.Option(
        ["--engine"],
        type=click.Choice(engine_names()),
        default=TORCH,
        show_default=True,
        help="What runs dynamic and static networks on the CPU.",
    ),
    click.Option(
        ["--only"], help="Without --run: time this network alone, by the first word of its title, such as DS-ViT."
    ),
    click.Option(["--equal"], help="With --run: the sub-network whose accuracy alone is nearest to the router's."),
)


@dataclass(frozen=True)
class Network:
    """A network with random weights whose routes are spread evenly over the images."""

    title: str
    family: str
    options: tuple[tuple[str, Any], ...]
    routes: tuple[int, ...]
    """Ids of the routes, by increasing cost."""

    @property
    def name(self) -> str:
        """The first word of its title."""
        return self.title.split(maxsplit=1)[0].rstrip(",")


DS_MBNET = Network("DS-MBNet, 4 routes", "ds_mbnet", (("stem_stride", 1),), (0, 4, 9, 13))
"""A network with as many routes as the published gate, spread evenly over the set."""
ALL_ROUTES = Network("DS-MBNet, 14 routes", "ds_mbnet", (("stem_stride", 1),), tuple(range(14)))
WIDE_LIST = Network(
    "DS-ResNet-8 x2, 1/8 to 1",
    "ds_resnet",
    (("depth", 8), ("width", 2.0), ("ratios", (0.125, 0.25, 0.5, 1.0)), ("paths", "uniform")),
    (0, 1, 2, 3),
)
"""A network for stating the acceleration by routing: its widest route takes at least 2.5 times as
long as the cheapest."""
VIT = Network("DS-ViT, 4 routes", "ds_vit", (("dim", 96), ("heads", 3), ("depth", 6)), (0, 1, 2, 3))
"""A vision transformer of the size that docs/cli.md gives for images of 32 pixels."""
NETWORKS = (DS_MBNET, WIDE_LIST, VIT, ALL_ROUTES)


def spread_gate(hidden: Tensor, routes: tuple[int, ...]) -> GateRouter:
    """A gate that sends equal numbers of the images with these hidden vectors [N, H] to each route.

    Route k scores k * s - offset_k for one projection s of the hidden vector: the lines cross at s
    = offset_k - offset_(k-1), which is put on the quantiles of s.
    """
    scaled = hidden.double() - hidden.double().mean(0)
    direction = torch.linalg.svd(scaled, full_matrices=False).Vh[0]
    score = hidden.double() @ direction
    cuts = torch.quantile(score, torch.arange(1, len(routes), dtype=torch.float64, device=score.device) / len(routes))
    steps = torch.arange(len(routes), dtype=torch.float64, device=score.device)
    offset = torch.cat([torch.zeros(1, dtype=torch.float64, device=score.device), cuts.cumsum(0)])
    return GateRouter(steps[:, None] * direction, offset, routes)


class MaskedTail(nn.Module):
    """The published masking: every channel of the widest route is computed, and those beyond an
    image's own width are then set to zero.

    Its time is a lower bound: the published code also selects BatchNorm statistics for each image;
    here those of the widest route are folded in.
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
        """Map features [B, c, H, W] and routes [B] to logits."""
        x = features
        for number, part in enumerate(self.tail.children()):
            x = part(x)
            if number < self.num_blocks:
                x = x * self.get_buffer(f"mask_{number}")[chosen]
        return x


class Spy:
    """A wrapper of a router that records the calls of `step`, so that the decisions can be timed
    alone and the groups that ran are known.

    All other attributes are those of the wrapped router.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.asked: list[tuple[Evidence, tuple[Executed, ...]]] = []
        self.executed: tuple[Executed, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)

    @property
    def max_runs(self) -> int:
        """One more than the router's, so that `step` is also called after the last round and
        records what ran in it."""
        return self.router.max_runs + 1

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """The router's own decision."""
        answer = self.router.step(evidence, executed)
        self.executed = tuple(executed)
        if (answer != STOP).any():
            self.asked.append((evidence, self.executed))
        return answer

    def decide_again(self) -> None:
        """Repeat all decisions of the batch, with their transfer to the host and the grouping of
        the images."""
        for evidence, executed in self.asked:
            rows_by(self.router.step(evidence, executed).tolist())


Calls = dict[str, Callable[[], object]]
Placed = Callable[[Supernet, Router, int, int | None], "Contenders"]
"""(supernet, router, image size, route timed alone) -> the contenders of a workload."""


class Contenders:
    """The networks of one workload on one device.

    Args:
        supernet: in eval mode, on the device.
        router: router over its routes, which are ordered by increasing cost.
        equal: a route that is timed alone, like the widest and the cheapest.
    """

    def __init__(self, supernet: Supernet, router: Router, equal: int | None = None) -> None:
        self.dynamic = DynamicNet(supernet, router)
        segments = self.dynamic.segments
        assert isinstance(segments, CutSegments)
        self.trunk: Callable[[Tensor], Any] = segments.trunk
        self.tails: dict[int, Callable[[Tensor], Tensor]] = {route: segments.tail(route) for route in router.routes}
        order = supernet.subnets.by_madds()
        self.static: dict[str, Callable[[Tensor], object]] = {
            name: PlainSubnet(segments.trunk, segments.tail(route)).eval()
            for name, route in self._named(supernet, equal).items()
        }
        self.memory_bytes: dict[str, int] = {
            "cut": self.dynamic.memory_bytes,
            "sliced": DynamicNet(supernet, router, cut_weights=False).memory_bytes,
        }
        self.masked: MaskedTail | None = None
        if supernet.spec.family == "ds_mbnet" and (router.num_gates, router.max_runs) == (1, 1):
            device = next(supernet.parameters()).device
            self.masked = (
                MaskedTail(supernet, tuple(route for route in order if route in router.routes)).to(device).eval()
            )

    @staticmethod
    def _named(supernet: Supernet, equal: int | None) -> dict[str, int]:
        """The routes that are timed alone."""
        order = supernet.subnets.by_madds()
        named = {"static widest": order[-1], "static cheapest": order[0]}
        return named | ({} if equal is None else {"static equal": equal})

    def calls(self, batches: Sequence[Tensor]) -> Calls:
        """Calls to time; the part of a name before the first slash is the contender, the times of
        whose calls are added up."""
        calls: Calls = {}
        for number, batch in enumerate(batches):
            calls[f"dynamic/{number}"] = _bind(self.dynamic, batch)
            for name, module in self.static.items():
                calls[f"{name}/{number}"] = _bind(module, batch)
            if self.masked is not None:
                calls[f"masked/{number}"] = _bind(self._run_masked, batch)
            calls |= self._ideal(number, batch)
        return calls

    def _ideal(self, number: int, batch: Tensor) -> Calls:
        spy = Spy(self.dynamic.router)
        self.dynamic.with_router(spy)(batch)
        features = self.trunk(batch).features
        calls: Calls = {f"ideal/{number}/trunk": _bind(self.trunk, batch), f"ideal/{number}/decide": spy.decide_again}
        for turn, executed in enumerate(spy.executed):
            for route, tail in self.tails.items():
                group = features[executed.routes == route]
                if len(group):
                    calls[f"ideal/{number}/tail {turn} {route}"] = _bind(tail, group)
        return calls

    def _run_masked(self, batch: Tensor) -> Tensor:
        assert self.masked is not None
        trunk = self.trunk(batch)
        evidence = Evidence(
            {part: trunk.evidence(part) for part in self.dynamic.router.needs}, len(batch), batch.device
        )
        return self.masked(trunk.features, self.dynamic.router.step(evidence, ()))

    def largest_difference(self, batch: Tensor) -> float:
        """Largest difference between the dynamic logits and those of each image's route alone,
        relative to the largest logit."""
        output = self.dynamic(batch)
        alone = torch.stack(
            [
                self.tails[int(route)](self.trunk(image[None]).features)[0]
                for image, route in zip(batch, output.routes, strict=True)
            ]
        )
        return float((output.logits - alone).abs().max() / alone.abs().max())


class InEngine(Contenders):
    """The networks of one workload in an inference engine.

    Args:
        supernet: in eval mode, on the CPU.
        router: see `Contenders`.
        engine: the engine.
        threads: threads of one call.
        image_size: height and width in pixels.
        equal: see `Contenders`.
    """

    def __init__(
        self,
        supernet: Supernet,
        router: Router,
        engine: Engine,
        threads: int,
        image_size: int,
        equal: int | None = None,
    ) -> None:
        with TemporaryDirectory(prefix="dsnet-graphs-") as name:
            graphs = write_graphs(supernet, [router], image_size, Path(name))
            self.segments = GraphSegments(Path(name), RouteTree.of(supernet.subnets), [router], engine, threads)
        self.dynamic = DynamicNet(supernet, router, segments=self.segments)
        self.trunk = partial(self.segments.upto_gate, 0, 0)
        self.tails = {route: partial(self.segments.rest, 1, route) for route in router.routes}
        self.static = {
            name: open_model(graphs.static(route), engine, threads)
            for name, route in self._named(supernet, equal).items()
        }
        self.memory_bytes = {}
        self.masked = None

    def _ideal(self, number: int, batch: Tensor) -> Calls:
        entry = self.segments.entry(self.dynamic.router)
        if entry is None:
            return super()._ideal(number, batch)
        features, routes, _ = entry(batch)
        calls: Calls = {f"ideal/{number}/entry": _bind(entry, batch)}
        for route, rows in rows_by(routes).items():
            if route != STOP:
                calls[f"ideal/{number}/tail {route}"] = _bind(self.tails[route], features[rows].contiguous())
        return calls


def _bind(module: Callable[[Tensor], object], argument: Tensor) -> Callable[[], object]:
    return lambda: module(argument)


@dataclass(frozen=True)
class Workload:
    """Networks and the images that they are timed on."""

    title: str
    device: str
    contenders: Contenders
    pool: Tensor
    """Normalised images, on the device."""
    draw: Callable[[int, int], list[Tensor]]
    """(batch size, seed) -> rows of the pool for each batch."""

    def batches(self, batch_size: int, seed: int) -> list[Tensor]:
        """The images of each batch."""
        return [self.pool[rows.to(self.pool.device)].contiguous() for rows in self.draw(batch_size, seed)]


def in_torch(supernet: Supernet, router: Router, image_size: int, equal: int | None) -> Contenders:
    """The networks of a workload in torch, on the device of the supernet; `image_size` is not
    needed."""
    return Contenders(supernet, router, equal)


def synthetic(network: Network, device: str, seed: int, placed: Placed = in_torch) -> Workload:
    """A workload of random weights and images."""
    pool = torch.randn((NUM_POOL, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(seed)).to(device)
    supernet = create(network.family, Task(10, 3, IMAGE_SIZE), dict(network.options), seed=seed).to(device)
    recalibrate(supernet, [pool[:64]])  # else activations shrink to denormals, which are slow
    supernet.eval()
    gate = spread_gate(supernet.trunk(pool, supernet.subnets[0]).hidden, network.routes)
    contenders = placed(supernet, gate, IMAGE_SIZE, None)
    chosen = contenders.dynamic(pool).routes.cpu()
    of_route = [torch.nonzero(chosen == route)[:, 0] for route in network.routes]

    def draw(batch_size: int, seed: int) -> list[Tensor]:
        if batch_size == 1:
            return [rows[:1] for rows in of_route]
        counts = [batch_size // len(of_route) + (index < batch_size % len(of_route)) for index in range(len(of_route))]
        batch = torch.cat([rows[:count] for rows, count in zip(of_route, counts, strict=True)])
        return [batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))]]

    return Workload(network.title, device, contenders, pool, draw)


def of_run(folder: Path, trial: int | None, equal: str | None, device: str, placed: Placed = in_torch) -> Workload:
    """A workload of a run's router on real images, those of `val`, because `test` stays sealed.

    Raises:
        click.BadParameter: the run has no front, or no sub-network called `equal`.
    """
    results = RunResults(RunDir(folder.parent, folder.name))
    slot = results.knee if trial is None else trial
    if slot is None:
        raise click.BadParameter(f"{folder} has no front yet; give a trial", param_hint="--trial")
    supernet, _ = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)
    names = [subnet.name for subnet in supernet.subnets]
    if equal is not None and equal not in names:
        raise click.BadParameter(
            f"{folder} has no sub-network {equal!r}; it has {', '.join(names)}", param_hint="--equal"
        )
    router = results.router(slot)
    prepared = prepare_again(results)
    size = prepared.image_set.image_shape[1]
    contenders = placed(supernet.to(device).eval(), router, size, None if equal is None else names.index(equal))
    pool = prepared.normalization.apply(prepared.data.images("val").to(device))

    def draw(batch_size: int, seed: int) -> list[Tensor]:
        count = NUM_REAL_BATCHES.get(batch_size, 1)
        rows = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: count * batch_size]
        return list(rows.split(batch_size))

    return Workload(f"{folder.name}, {router.kind} {trial_name(slot)}", device, contenders, pool, draw)


@dataclass(frozen=True)
class Row:
    """Result of one workload at one batch size."""

    title: str
    device: str
    batch_size: int
    samples: Samples
    """Milliseconds of each call."""
    num_batches: int
    routes_taken: dict[str, int]
    """Number of images by the route that answered."""

    @property
    def contenders(self) -> tuple[str, ...]:
        """Contenders in the order of their first calls."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.samples.ms))

    def ratio(self, numerator: str, denominator: str) -> Estimate | None:
        """Ratio of the times of two contenders, over all their calls; None if one did not run."""
        if not {numerator, denominator} <= set(self.contenders):
            return None
        return self.samples.ratio(self._calls(numerator), self._calls(denominator))

    def _calls(self, contender: str) -> list[str]:
        return [name for name in self.samples.ms if name.partition("/")[0] == contender]

    def per_batch(self, contender: str) -> Estimate:
        """Median milliseconds per batch."""
        total = np.sum([self.samples.ms[name] for name in self._calls(contender)], axis=0)
        return Samples({contender: total / self.num_batches}).median_ms(contender)


RATIOS = (
    ("ceiling: widest/cheapest", "static widest", "static cheapest"),
    ("widest/dynamic", "static widest", "dynamic"),
    ("equal/dynamic", "static equal", "dynamic"),
    ("masked/dynamic", "masked", "dynamic"),
    ("dynamic/ideal", "dynamic", "ideal"),
)


def workloads(
    options: Options, run: Path | None, trial: int | None, equal: str | None, engine: str, only: str | None
) -> list[Workload]:
    """Workloads on every device, or on the CPU in an engine: the run's router, or the networks with
    random weights, of which `only` may name one.

    Raises:
        click.BadParameter: no network has the name `only`.
    """
    own = timing_engine(engine)

    def placed(supernet: Supernet, router: Router, image_size: int, equal: int | None) -> Contenders:
        if own is None:
            return in_torch(supernet, router, image_size, equal)
        return InEngine(supernet, router, own, options.threads, image_size, equal)

    kinds = [device.type for device in devices()] if own is None else ["cpu"]
    if run is not None:
        return [of_run(run, trial, equal, kind, placed) for kind in kinds]
    networks = [own for own in NETWORKS if only in (None, own.name)]
    if not networks:
        known = ", ".join(dict.fromkeys(own.name for own in NETWORKS))
        raise click.BadParameter(f"no network is called {only!r}; known: {known}", param_hint="--only")
    return [synthetic(network, kind, options.seed, placed) for kind in kinds for network in networks]


@torch.inference_mode()
def measure(
    options: Options,
    run: Path | None = None,
    trial: int | None = None,
    equal: str | None = None,
    engine: str = TORCH,
    only: str | None = None,
) -> Report:
    """Time the contenders of each row interleaved; the headline is the first workload on the
    CPU."""
    sizes = (1, 16, 64) if options.quick else (1, 16, 64, 256)
    works = workloads(options, run, trial, equal, engine, only)
    rows = [
        _measure_row(work, size, options)
        for work in works
        for size in ((HEADLINE_BATCH,) if work.title == ALL_ROUTES.title else sizes)
    ]
    headline = next(row for row in rows if row.batch_size == HEADLINE_BATCH)
    ceiling, over_ideal = headline.ratio("static widest", "static cheapest"), headline.ratio("dynamic", "ideal")
    assert ceiling is not None
    assert over_ideal is not None
    run_by = "" if engine == TORCH else f"{engine}, "
    label = f"dynamic/ideal at batch {HEADLINE_BATCH}, {headline.title}, {run_by}{options.threads} thread(s), ceiling {ceiling.text(2)}"
    differences = {
        f"{work.device}, {work.title}": work.contenders.largest_difference(work.pool[:HEADLINE_BATCH]) for work in works
    }
    return Report(
        [_ratios(rows), _times(rows, options), *([_memory(works)] if engine == TORCH else [])],
        Headline(label, over_ideal, "", GOAL),
        {
            "rows": [_figures(row) for row in rows],
            "largest_logit_difference": differences,
            "memory_bytes": {f"{work.device}, {work.title}": work.contenders.memory_bytes for work in works},
        },
    )


def _measure_row(work: Workload, batch_size: int, options: Options) -> Row:
    rounds, budget_s = (10, 6.0) if options.quick else (40, 20.0)
    rounds *= ROUNDS_OF_ONE if batch_size == 1 else 1
    batches = work.batches(batch_size, options.seed)
    samples = sample_interleaved(
        work.contenders.calls(batches), rounds=rounds, warmup=2, budget_s=budget_s, device=work.device
    )
    routes = torch.cat([work.contenders.dynamic(batch).routes for batch in batches]).cpu()
    names = [subnet.name for subnet in work.contenders.dynamic.subnets]
    taken = {names[route]: int((routes == route).sum()) for route in routes.unique().tolist()}
    return Row(work.title, work.device, batch_size, samples, len(batches), taken)


def _memory(works: Sequence[Workload]) -> Section:
    cells = [
        (f"{work.device}, {work.title}", *(f"{size / 1e6:.2f}" for size in work.contenders.memory_bytes.values()))
        for work in works
    ]
    return Section(
        "Memory of weights and statistics, MB", ("", "cut for every route, BN folded", "sliced on the fly"), cells
    )


def _title(row: Row) -> str:
    return f"{row.device}, {row.title}, batch {row.batch_size}"


def _times(rows: list[Row], options: Options) -> Section:
    names = list(dict.fromkeys(name for row in rows for name in row.contenders))
    cells = [
        (
            _title(row),
            *(row.per_batch(name).text(2) if name in row.contenders else "" for name in names),
            str(row.samples.num_rounds),
        )
        for row in rows
    ]
    title = f"float32, {options.threads} thread(s): ms a batch [95 %]"
    return Section(title, ("", *names, "rounds"), cells)


def _ratios(rows: list[Row]) -> Section:
    cells = []
    for row in rows:
        ratios = [row.ratio(top, bottom) for _, top, bottom in RATIOS]
        cells.append((_title(row), *("" if ratio is None else ratio.text(2) for ratio in ratios)))
    return Section("Ratios of medians [95 %]", ("", *(name for name, _, _ in RATIOS)), cells)


def _figures(row: Row) -> dict[str, Any]:
    ratios = {name: row.ratio(top, bottom) for name, top, bottom in RATIOS}
    return {
        "title": row.title,
        "device": row.device,
        "batch_size": row.batch_size,
        "num_batches": row.num_batches,
        "routes_taken": row.routes_taken,
        "times": row.samples.figures(),
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items() if ratio is not None},
    }


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure, params=PARAMS)
