"""What the benchmark of dynamic inference times: real group sizes, every round of a cascade, bundles on their own images."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch

from benchmarks.dynamic_inference import WIDE_LIST, Contenders, Spy, of_bundle, spread_gate, synthetic
from dsnet.bundle import save_bundle
from dsnet.cost import subnet_cost
from dsnet.data.normalization import Normalization
from dsnet.families import Task, create
from dsnet.routers import CascadeRouter, Evidence, GateRouter
from dsnet.supernet import Supernet
from tests.dsnet.samples import random_images, random_pixels, random_supernet_router, shaken, small_supernet


@pytest.mark.parametrize("num_routes", [2, 4, 14])
def test_the_spread_gate_gives_every_route_an_equal_share(num_routes: int) -> None:
    hidden = torch.rand(420, 66, generator=torch.Generator().manual_seed(0))
    gate = spread_gate(hidden, tuple(range(num_routes)))
    counts = torch.bincount(gate.step(Evidence({"hidden": hidden}, len(hidden)), ()))
    assert int(counts.max() - counts.min()) <= 2


def test_a_synthetic_batch_has_equal_shares_and_the_answers_of_its_routes() -> None:
    work = synthetic(WIDE_LIST, "cpu", seed=0)
    (batch,) = work.batches(10, seed=0)
    assert sorted(torch.bincount(work.contenders.dynamic(batch).routes).tolist()) == [2, 2, 3, 3]
    singles = work.batches(1, seed=0)
    assert [work.contenders.dynamic(single).routes.tolist() for single in singles] == [[0], [1], [2], [3]]
    assert work.contenders.largest_difference(batch) < 1e-4
    assert work.contenders.masked is None


def test_the_named_width_list_leaves_room_for_an_acceleration() -> None:
    supernet = create(WIDE_LIST.family, Task(10, 3, 32), dict(WIDE_LIST.options))
    costs = [subnet_cost(supernet.spec, subnet, 32).madds for subnet in supernet.subnets]
    assert costs[WIDE_LIST.routes[-1]] > 10 * costs[WIDE_LIST.routes[0]]


@torch.no_grad()
def test_the_ideal_of_a_cascade_is_every_tail_that_ran_at_its_size() -> None:
    supernet, images = small_supernet(), random_images(9)
    confidence = supernet(images, supernet.subnets[0]).softmax(1).amax(1)
    router = CascadeRouter(0, 2, float(confidence.sort().values[3:5].mean()))
    calls = Contenders(supernet, router).calls([images])
    ideal = {name.removeprefix("ideal/0/"): call for name, call in calls.items() if name.startswith("ideal/")}
    assert set(ideal) == {"trunk", "decide", "tail 0 0", "tail 1 2"}
    assert len(ideal["tail 0 0"]()) == 9  # type: ignore[arg-type]
    assert len(ideal["tail 1 2"]()) == 4  # type: ignore[arg-type]


def test_a_spy_times_the_decisions_and_not_the_stop() -> None:
    supernet = small_supernet()
    spy = Spy(random_supernet_router("gate", supernet))
    Contenders(supernet, spy.router).dynamic.with_router(spy)(random_images(4))
    assert len(spy.asked) == 1
    assert len(spy.executed) == 1


def bundle_on_digits(folder: Path) -> tuple[Supernet, Path]:
    supernet = shaken(create("ds_tiny", Task(10, 1, 8), {"num_routes": 3})).eval()
    hidden = supernet.trunk(torch.randn(64, 1, 8, 8), supernet.subnets[0]).hidden
    facts = {"name": "digits", "image_size": 8, "seed": 0, "limit": None}
    sizes = {"train": 0.55, "gate": 0.15, "val": 0.15, "test": 0.15}
    save_bundle(
        folder / "bundle",
        supernet,
        spread_gate(hidden, (0, 1, 2)),
        normalization=Normalization((60.0,), (70.0,)),
        class_names=tuple("0123456789"),
        examples=random_pixels(2, 8)[:, :1],
        claims={"data": {**facts, "sizes": sizes}},
        gate_yaml="",
    )
    return supernet, folder / "bundle"


def test_a_bundle_is_timed_on_its_own_test_images(tmp_path: Path) -> None:
    supernet, path = bundle_on_digits(tmp_path)
    name = supernet.subnets[1].name
    work = of_bundle(path, None, name, "cpu")
    assert isinstance(work.contenders.dynamic.router, GateRouter)
    assert 260 <= len(work.pool) <= 280
    calls = work.contenders.calls(work.batches(16, seed=0))
    assert {call.partition("/")[0] for call in calls} == {
        "dynamic",
        "ideal",
        "static widest",
        "static cheapest",
        "static equal",
    }
    images = work.batches(16, seed=0)[0]
    torch.testing.assert_close(
        work.contenders.static["static equal"](images), supernet(images, supernet.subnets[1]), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(click.BadParameter, match=f"no route 'nope'; it has .*{name}"):
        of_bundle(path, None, "nope", "cpu")
