"""Sub-networks beside the same networks alone: the network, its cost, the choice of the learning
rate, the gaps, and a small real run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alone import main, scale_of_sweep
from benchmarks.alone_report import best_rates, find_gaps, make_report
from benchmarks.alone_runs import (
    ALONE,
    ARMS,
    RATE_FACTORS,
    SCALES,
    Job,
    Material,
    Trainer,
    accuracy,
    alone,
    image_madds,
    jobs,
    load_material,
)
from benchmarks.regime_runs import begin, do_jobs, record_path
from dsnet.deploy.materialize import materialize
from dsnet.errors import ConfigError
from dsnet.families import Task, create, family_names
from dsnet.files import atomic_write_json
from dsnet.space.cost import pooling_madds, subnet_cost
from dsnet.training.settings import REGIMES
from dsnet.training.train_cost import shared_forward_madds, step_madds
from orchestration.config.loading import load_config
from orchestration.prepare.preparation import prepare
from tests.dsnet.cases import FAMILIES
from tests.dsnet.samples import random_images, small_supernet

TINY = replace(SCALES["quick"], train=replace(SCALES["quick"].train, epochs=2), lengths=(1.0,))


@pytest.fixture(scope="module")
def material() -> Material:
    return load_material(TINY, None)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_alone_has_the_shape_of_the_materialised_sub_network(family: str) -> None:
    supernet = small_supernet(family)
    for subnet in supernet.subnets.all:
        network = alone(supernet, subnet, seed=1).eval()
        plain = materialize(supernet, subnet)
        shapes = [tuple(parameter.shape) for parameter in materialize(network, subnet).parameters()]
        assert shapes == [tuple(parameter.shape) for parameter in plain.parameters()]
        assert len(network.subnets) == 1
        cost = subnet_cost(supernet.spec, subnet, supernet.spec.image_size)
        assert subnet_cost(network.spec, subnet, supernet.spec.image_size) == cost
        assert sum(parameter.numel() for parameter in network.parameters()) == cost.params


def test_networks_alone_differ_by_their_seed() -> None:
    supernet = small_supernet()
    first, again, other = (alone(supernet, supernet.subnets[0], seed) for seed in (1, 1, 2))
    weights = [next(network.parameters()) for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_forward_costs_what_its_segments_cost_when_each_runs_once(family: str) -> None:
    """Counted by torch: the trunk once, then every tail."""
    supernet = small_supernet(family).eval()
    spec, subnets = supernet.spec, list(supernet.subnets)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        trunk = supernet.trunk(random_images(1), subnets[0])
        for subnet in subnets:
            supernet.tail(trunk.features, subnet)
    found = shared_forward_madds(spec, subnets, spec.image_size)
    pooled = sum(_pooling(spec, subnet, subnet == subnets[0]) for subnet in subnets)
    if len(spec.gates) == 1:
        assert found == counted.get_total_flops() // 2 + pooled
    costs = [subnet_cost(spec, subnet, spec.image_size) for subnet in subnets]
    assert max(cost.madds for cost in costs) <= found <= sum(cost.madds for cost in costs)
    assert shared_forward_madds(spec, subnets[:1], spec.image_size) == costs[0].madds
    assert shared_forward_madds(spec, [], spec.image_size) == 0


def _pooling(spec: Any, subnet: Any, with_trunk: bool) -> int:
    """Poolings, which torch does not count: those after the gate, and those before it once."""
    total = 0
    sizes = {"image": (spec.image_size, spec.image_size)}
    for op in spec.ops:
        height, width = sizes[op.reads]
        if op.window is not None:
            sizes[op.name] = op.window.output_size((height, width))
        elif op.kind == "tokens":
            sizes[op.name] = (height * width + 1, 1)
        else:
            strided = (-(-height // op.stride), -(-width // op.stride))
            sizes[op.name] = (1, 1) if op.kind in ("pool", "linear") else strided
        if op.kind in ("attention", "pool", "maxpool") and (op.segment > 0 or with_trunk):
            total += op.input_width(spec, subnet.widths) * height * width
    return total


def test_a_step_costs_three_forwards_of_who_learns_and_one_of_who_teaches() -> None:
    supernet = small_supernet()
    size, first = supernet.spec.image_size, supernet.subnets[0]
    cost = subnet_cost(supernet.spec, first, size).madds
    assert step_madds(supernet.spec, [first], [], size) == 3 * cost
    assert step_madds(supernet.spec, [first], [first], size) == 4 * cost
    single = alone(supernet, first, 0)
    assert image_madds(single, REGIMES["ib"]) == image_madds(single, REGIMES["ce"]) == 3 * cost
    assert pooling_madds(supernet.spec, first, 0, size) > 0
    largest, mixed = (
        image_madds(supernet, REGIMES["ce"], 1.0),
        image_madds(supernet, REGIMES["ce"], 0.25),
    )
    assert largest == 3 * subnet_cost(supernet.spec, supernet.subnets.largest, size).madds
    assert mixed == pytest.approx(0.25 * largest + 0.75 * image_madds(supernet, REGIMES["ce"]))


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    always_0 = torch.zeros(8, dtype=torch.int64)
    assert accuracy(always_0, labels, is_balanced=False) == 0.75
    assert accuracy(always_0, labels, is_balanced=True) == 0.5


def test_only_the_first_seed_tries_every_learning_rate() -> None:
    found = jobs(["ib"], ["a", "b"], (4, 5), (1.0,))
    assert sum(job.factor in RATE_FACTORS for job in found if job.seed == 4) == 3 * len(RATE_FACTORS)
    assert [job.factor for job in found if job.seed == 5] == [None, None, None]
    assert len({job.name for job in found}) == len(found)


def test_every_scale_trains_sub_networks_alone_that_it_has() -> None:
    for name, scale in SCALES.items():
        names = {
            subnet.name for subnet in create(scale.family, Task(10, 3, scale.image_size or 32), scale.options).subnets
        }
        assert set(scale.alone or ()) <= names, name
    assert {"path-000", "path-333"} <= set(SCALES["cifar_paths"].alone or ())


def test_a_sweep_file_is_a_scale_with_the_same_images_and_settings(tmp_path: Path) -> None:
    sweep = tmp_path / "mine.yaml"
    text = "version: 1\nname: mine\ndata: {name: digits}\nsupernet: {model: ds_tiny, options: {num_routes: 3}, train: {epochs: 4}}\n"
    text = text.replace("{name: digits}", "{name: digits, augment: {cutout: 2}}")
    sweep.write_text(text)
    scale = scale_of_sweep(sweep)
    prepared = prepare(load_config(sweep, known_models=family_names()).config)
    material = load_material(scale, None)
    assert material.split_hash.endswith(f"/{prepared.splits.hash}")
    assert scale.train == prepared.supernet_run.train
    assert material.training.augmentation == prepared.supernet_run.augmentation
    assert material.training.augmentation.cutout == 2
    assert scale.train.epochs == 4
    assert [subnet.name for subnet in create(scale.family, material.task, scale.options).subnets] == [
        subnet.name for subnet in prepared.subnets
    ]
    sweep.write_text(text + "seed: 3\n")
    with pytest.raises(ConfigError, match="remove seed"):
        scale_of_sweep(sweep)


def test_networks_alone_have_the_first_length_and_cost_shares_too() -> None:
    found = jobs(["ib", "ib_third"], ["a"], (0,), (1.0, 0.5))
    assert {job.length for job in found if job.arm in (ALONE, "ib_third")} == {1.0}
    assert {job.length for job in found if job.arm == "ib"} == {1.0, 0.5}


def test_later_seeds_take_the_rate_that_was_best_on_val_and_wait_for_it(tmp_path: Path, material: Material) -> None:
    begin(tmp_path, TINY, material)
    trainer = Trainer(TINY, material, torch.device("cpu"), tmp_path, first_seed=0)
    later = Job(ALONE, 1, 1.0, "subnet-00", None)
    assert trainer(later, tmp_path / "work", lambda: False) is None
    for factor in RATE_FACTORS:
        job = Job(ALONE, 0, 1.0, "subnet-00", factor)
        rows = [{"name": "subnet-00", "is_member": True, "val": 0.9 if factor == 0.5 else 0.1, "top1": 0.2}]
        atomic_write_json(record_path(tmp_path, job), {"subnets": rows})
    record = trainer(later, tmp_path / "work", lambda: False)
    assert record is not None
    assert record["factor"] == 0.5
    assert record["settings"]["train"]["lr"] == pytest.approx(0.5 * TINY.train.lr)


def record(arm: str, seed: int, top1: Mapping[str, float], **others: Any) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "is_member": name != "teacher",
            "madds": 10 * number + 10,
            "params": 1,
            "val": value,
            "top1": value,
        }
        for number, (name, value) in enumerate(top1.items())
    ]
    own = {"arm": arm, "seed": seed, "length": 1.0, "steps": 5, "factor": 1.0, "subnet": None}
    own |= {"train_pmadds": 2.0, "all_alone_pmadds": 4.0}
    return {**own, "subnets": rows, **others}


def test_gaps_are_paired_by_seed_and_the_best_rate_alone_counts() -> None:
    records = [
        record("ib", 0, {"small": 0.5, "middle": 0.5, "large": 0.8, "teacher": 0.9}),
        record("ib", 1, {"small": 0.6, "middle": 0.5, "large": 0.7, "teacher": 0.9}),
        record("ib", 2, {"small": 0.6, "large": 0.7, "teacher": 0.9}),  # no network alone has this seed: not compared
        # `middle` was not trained alone, so it is not compared.
        *(record(ALONE, 0, {"small": value}, subnet="small", factor=rate) for value, rate in ((0.4, 1.0), (0.1, 2.0))),
        record(ALONE, 1, {"small": 0.4}, subnet="small"),
        record(ALONE, 0, {"large": 0.7}, subnet="large"),
        record(ALONE, 1, {"large": 0.8}, subnet="large"),
    ]
    (gap,) = find_gaps(records)
    assert gap.names == ("small", "large")
    assert [part.mean for part in gap.gaps] == pytest.approx([0.15, 0.0])
    assert gap.mean.mean == pytest.approx(0.075)
    assert gap.mean.num_seeds == 2
    assert gap.cost == pytest.approx(2.0 / 4.0)


def test_a_supernet_takes_the_rate_that_is_best_for_the_mean_of_its_members_and_never_one_that_diverged() -> None:
    even = record("ib", 0, {"small": 0.6, "large": 0.6, "teacher": 0.1})
    uneven = record("ib", 0, {"small": 0.1, "large": 0.9, "teacher": 0.9}, factor=2.0)
    diverged = record("ib", 0, {}, factor=4.0, error="the loss is not finite")
    other_seed = record("ib", 1, {"small": 0.2, "large": 0.2})
    assert best_rates([uneven, even, diverged, other_seed]) == [even, other_seed]
    assert best_rates([diverged]) == []


@pytest.mark.slow
def test_a_small_run_is_resumed_and_reported(
    tmp_path: Path, material: Material, threads_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.alone_runs.RATE_FACTORS", (0.5, 1.0))
    begin(tmp_path, TINY, material)
    names = [subnet.name for subnet in Trainer(TINY, material, torch.device("cpu"), tmp_path, 0).blueprint.subnets]
    todo = jobs(["ib", "ib_third"], names, (0,), (1.0,))
    trainer = Trainer(TINY, material, torch.device("cpu"), tmp_path, 0)
    asked = iter([False] * 8 + [True] * 100)
    assert do_jobs(tmp_path, todo, trainer, should_stop=lambda: next(asked), say=lambda text: None)
    assert do_jobs(tmp_path, todo, trainer, say=lambda text: None) == []
    report = make_report(tmp_path)
    gaps = {gap["arm"]: gap for gap in report.figures["gaps"]}
    assert gaps["ib_third"]["cost"] < gaps["ib"]["cost"]
    assert gaps["ib"]["steps"][0] == gaps["ib"]["steps"][1]
    assert set(gaps) == {"ib", "ib_third"} < set(ARMS)
    assert main(["report", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text().count("subnet-00") == 2
