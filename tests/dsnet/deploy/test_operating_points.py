"""Bundles with several operating points: each point is what its own bundle would be, the weights
are there once, and a budget chooses the best point."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsnet.deploy.bundle import (
    MANIFEST,
    Bundle,
    BundleContents,
    check_bundle_examples,
    check_bundle_files,
    load_bundle,
    save_bundle,
)
from dsnet.deploy.materialize import materialize
from dsnet.deploy.operating_points import LATENCY_CLAIM, OperatingPoint, OperatingPoints
from dsnet.errors import CheckpointError, ConfigError, DsnetError, NotFoundError, VerificationError
from dsnet.files import own_digest
from dsnet.network.supernet import Supernet
from dsnet.routers.fixed import FixedRouter
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import static_run
from dsnet.space.cost import subnet_cost
from dsnet.stored.checkpoint import load_tensors, save_tensors
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    lively_supernet,
    random_pixels,
    random_supernet_router,
    random_table,
    three_gate_supernet,
)

CLASSES = tuple(f"class{index}" for index in range(10))
DATA = {"name": "digits"}


def claims(top1: float, madds_m: float, ms: Mapping[int, float] | None = None) -> dict[str, Any]:
    own: dict[str, Any] = {"data": DATA, "val": {"top1": top1, "madds_m": madds_m}}
    if ms is not None:
        sizes = {str(size): value for size, value in ms.items()}
        own[LATENCY_CLAIM] = {"": {"device": "a processor", "threads": 1, "batches_ms": sizes}}
    return own


def save(folder: Path, supernet: Supernet, points: Sequence[OperatingPoint]) -> None:
    """A bundle with these points; the first is its own."""
    first, *further = points
    contents = BundleContents(
        supernet=supernet,
        router=first.router,
        normalization=NORMALIZATION,
        class_names=CLASSES,
        examples=random_pixels(16),
        point_name=first.name,
        further_points=further,
    )
    save_bundle(folder, contents, claims=first.claims, gate_yaml="for people\n")


def members_of(supernet: Supernet) -> list[OperatingPoint]:
    """All sub-networks, of which the dearer are the better; the widest first."""
    subnets = supernet.subnets
    costs = [subnet_cost(supernet.spec, subnet, 16).madds / 1e6 for subnet in subnets]
    return [
        OperatingPoint(subnets[k].name, FixedRouter(k), claims(0.5 + k / 100, costs[k], {1: 1.0 + k, 8: 5.0 + k}))
        for k in reversed(range(len(subnets)))
    ]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return lively_supernet()


@pytest.fixture
def folder(supernet: Supernet, tmp_path: Path) -> Path:
    save(tmp_path / "members", supernet, members_of(supernet))
    return tmp_path / "members"


def verify(folder: Path) -> int:
    bundle = load_bundle(folder)
    check_bundle_files(bundle)
    return check_bundle_examples(bundle)


@pytest.mark.parametrize("route", range(4))
def test_a_fixed_router_runs_like_its_static_sub_network_on_a_table(route: int) -> None:
    table = random_table(50, 4, num_gates=2)
    run, expected = run_on_table(FixedRouter(route), table), static_run(table, route)
    for name in ("routes", "ran", "madds", "is_tie", "lead"):
        assert np.array_equal(getattr(run, name), getattr(expected, name))
    assert "fixed" not in ROUTER_KINDS, "a search must not offer it"


@pytest.mark.parametrize("make", [lively_supernet, three_gate_supernet])
@pytest.mark.parametrize(("cut_weights", "fold_bn"), [(True, True), (False, False)])
def test_a_member_answers_as_the_plain_sub_network(
    tmp_path: Path, make: Callable[[], Supernet], cut_weights: bool, fold_bn: bool
) -> None:
    supernet, pixels = make(), random_pixels(9, seed=3)
    save(tmp_path / "members", supernet, members_of(supernet))
    bundle = load_bundle(tmp_path / "members", cut_weights=cut_weights, fold_bn=fold_bn)
    images = NORMALIZATION.apply(pixels)
    for route, subnet in enumerate(supernet.subnets):
        one = bundle.at(subnet.name)
        plain = materialize(supernet, subnet, fold_bn=fold_bn)
        torch.testing.assert_close(one.net(images).logits, plain(images), rtol=1e-6, atol=1e-6)
        answer = one(pixels)
        assert answer.routes.tolist() == [route] * 9
        assert answer.madds.tolist() == [subnet_cost(supernet.spec, subnet, 16).madds] * 9
        assert [len(value) for value in one(pixels[:0])] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("make", [lively_supernet, three_gate_supernet])
def test_every_router_is_at_its_point_what_it_is_in_a_bundle_of_its_own(
    tmp_path: Path, make: Callable[[], Supernet]
) -> None:
    supernet, pixels = make(), random_pixels(24)
    everything = range(len(supernet.subnets))
    # A router over some of the routes is stored in a bundle that also has the others.
    routes_of = {kind: everything[number % 2 :] for number, kind in enumerate(ROUTER_KINDS)}
    routes_of |= {"gate": everything, "gates": everything[1:], "evidence_gates": everything[:-1]}
    points = [
        OperatingPoint(kind, random_supernet_router(kind, supernet, seed, routes), claims(0.5, seed))
        for seed, (kind, routes) in enumerate(routes_of.items())
    ]
    save(tmp_path / "front", supernet, points)
    assert verify(tmp_path / "front") == 16
    bundle = load_bundle(tmp_path / "front")
    assert bundle.operating_point.name == points[0].name
    assert [point.name for point in bundle.operating_points] == [point.name for point in points]
    for point in points:
        save(tmp_path / "own", supernet, [point])
        own, ours = load_bundle(tmp_path / "own"), bundle.at(point.name)
        expected, answer = own(pixels), ours(pixels)
        assert [ours.route_names[k] for k in answer.routes] == [own.route_names[k] for k in expected.routes]
        assert torch.equal(answer.madds, expected.madds)
        torch.testing.assert_close(answer.probabilities, expected.probabilities, rtol=1e-5, atol=1e-6)
        assert ours.claims == own.claims == point.claims


def choices(points: Sequence[OperatingPoint], budget: float, cost: Callable[[OperatingPoint], float]) -> str | None:
    """The best point by sorting all: top-1 first, then the budgeted cost, then MAdds."""
    allowed = [point for point in points if cost(point) <= budget]
    allowed.sort(key=lambda point: point.claims["val"]["madds_m"])
    allowed.sort(key=cost)
    allowed.sort(key=lambda point: point.claims["val"]["top1"], reverse=True)
    return allowed[0].name if allowed else None


@pytest.mark.parametrize("seed", range(20))
def test_the_point_of_a_budget_is_the_one_found_by_sorting_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few different values, so that there are ties.
    values = random.integers(1, 5, (9, 4)).tolist()
    rows = [
        OperatingPoint(f"p{k}", FixedRouter(0), claims(top1 / 10, madds, {1: one, 8: eight}))
        for k, (top1, madds, one, eight) in enumerate(values)
    ]
    points = OperatingPoints(rows)
    assert [point.madds_m for point in points] == sorted(float(madds) for _, madds, *_ in values)

    def chosen(**budget: float) -> str | None:
        try:
            return points.choose(**budget).name  # type: ignore[arg-type]
        except NotFoundError:
            return None

    for budget in (0.5, 1, 2.5, 4, math.inf):
        assert chosen(madds_m=budget) == choices(rows, budget, lambda point: point.claims["val"]["madds_m"])
        for size in (1, 8):
            ms = {row.name: row.claims[LATENCY_CLAIM][""]["batches_ms"][str(size)] for row in rows}
            assert chosen(latency_ms=budget, batch_size=size) == choices(rows, budget, lambda p, ms=ms: ms[p.name])  # type: ignore[misc]
    for least in (0.0, 0.15, 0.3, 0.4, 0.5):
        enough = [point for point in rows if point.claims["val"]["top1"] >= least]
        enough.sort(key=lambda point: (point.claims["val"]["madds_m"], -point.claims["val"]["top1"]))
        assert chosen(top1=least) == (enough[0].name if enough else None)
    assert points.best == points.choose(madds_m=math.inf)


def test_points_never_read_test() -> None:
    better_on_test = {**claims(0.4, 1.0), "test": {"top1": 0.99, "madds_m": 0.1}}
    points = OperatingPoints(
        [OperatingPoint("a", FixedRouter(0), claims(0.5, 2.0)), OperatingPoint("b", FixedRouter(0), better_on_test)]
    )
    assert points.choose(madds_m=3.0).name == points.best.name == points.choose(top1=0.45).name == "a"
    with pytest.raises(NotFoundError):
        points.choose(madds_m=0.5)


@pytest.mark.parametrize(("asked", "has"), [({"madds_m": 1.0}, "costs 2;"), ({"top1": 0.9}, "reaches 0.5;")])
def test_a_bundle_with_one_point_is_told_how_to_get_more(asked: dict[str, float], has: str) -> None:
    points = OperatingPoints([OperatingPoint("knee", FixedRouter(0), claims(0.5, 2.0))])
    with pytest.raises(NotFoundError, match=rf"the bundle has only one, knee, which {has} .*--pick front$"):
        points.choose(**asked)


def pointers(bundle: Bundle) -> set[int]:
    return {value.data_ptr() for value in bundle.net.parameters()}


def test_points_share_their_weights_and_a_budget_moves_only_its_own_bundle(folder: Path, supernet: Supernet) -> None:
    bundle = load_bundle(folder)
    widest, cheapest = supernet.subnets[2].name, supernet.subnets[0].name
    least = bundle.operating_points[0].madds_m
    small = bundle.at(madds_m=least)
    assert (bundle.operating_point.name, small.operating_point.name) == (widest, cheapest)
    assert pointers(small) == pointers(bundle)
    assert bundle.set_budget(latency_ms=6.0, batch_size=8).name == supernet.subnets[1].name
    assert bundle.claims == bundle.operating_points[1].claims
    assert small.operating_point.name == cheapest
    with pytest.raises(NotFoundError, match="no operating point reaches"):
        bundle.set_budget(top1=0.9)
    assert bundle.operating_point.name == supernet.subnets[1].name, "a budget that fails changes nothing"
    pixels = random_pixels(3)
    for point in bundle.operating_points:
        bundle.set_budget(madds_m=point.madds_m)
        assert {bundle.route_names[k] for k in bundle(pixels).routes} == {point.name}
    seconds = []
    for number in range(200):
        start = time.perf_counter()
        bundle.set_budget(madds_m=(least, math.inf)[number % 2])
        seconds.append(time.perf_counter() - start)
    assert float(np.median(seconds)) < 1e-3


def test_the_weights_are_stored_once(folder: Path, supernet: Supernet, tmp_path: Path) -> None:
    save(tmp_path / "widest", supernet, members_of(supernet)[:1])
    stored = load_tensors(folder / "weights.safetensors")
    assert not any(name.startswith("point.") for name in stored), "a fixed router has no tensors"
    largest = load_tensors(tmp_path / "widest" / "weights.safetensors")
    shared = [name for name, value in largest.items() if value.ndim > 1]
    assert shared
    assert all(stored[name].shape == largest[name].shape for name in shared)


def test_a_bundle_of_one_router_has_one_point_and_stores_none(tmp_path: Path, supernet: Supernet) -> None:
    contents = BundleContents(
        supernet=supernet,
        router=random_supernet_router("gate", supernet),
        normalization=NORMALIZATION,
        class_names=CLASSES,
        examples=random_pixels(4),
    )
    own = claims(0.5, 0.25)
    own["val"]["latency_ms"] = 1.5
    save_bundle(tmp_path / "knee", contents, claims=own, gate_yaml="")
    assert "points" not in json.loads((tmp_path / "knee" / MANIFEST).read_text())
    bundle = load_bundle(tmp_path / "knee")
    (point,) = bundle.operating_points
    assert (point.name, point.router.kind, point.claims) == ("knee", "gate", own)
    assert bundle.at(latency_ms=1.5).operating_point is bundle.at("knee").operating_point is point
    assert len(str(bundle).splitlines()) == 5


BAD_BUDGETS: dict[str, tuple[dict[str, float], type[DsnetError], Sequence[str]]] = {
    "none": ({}, ConfigError, ["exactly one", "none"]),
    "two": ({"madds_m": 1, "top1": 0.5}, ConfigError, ["exactly one", "madds_m=1, top1=0.5"]),
    "percent": ({"top1": 75}, ConfigError, ["fraction from 0 to 1", "75"]),
    "NaN": ({"madds_m": math.nan}, ConfigError, ["above 0", "nan"]),
    "negative": ({"latency_ms": -1}, ConfigError, ["latency_ms", "-1"]),
    "too cheap": ({"madds_m": 1.2}, NotFoundError, ["at most 1.2 M MAdds", "2.834 (a)", "9.1 (b)", "at least 2.835"]),
    "too fast": ({"latency_ms": 0.1}, NotFoundError, ["at most 0.1 ms", "0.5 (a)", "at least 0.5"]),
    "too good": ({"top1": 0.9}, NotFoundError, ["reaches top-1 0.9", "0.7 (a)", "0.8766 (b)", "at most 0.8765"]),
    "batch": (
        {"latency_ms": 1, "batch_size": 4},
        NotFoundError,
        ["batch of 4", "batches of 1, 8", "measure.batch_sizes"],
    ),
}


@pytest.mark.parametrize("name", BAD_BUDGETS)
def test_a_budget_that_no_point_fulfils_says_the_range_and_the_way_out(name: str) -> None:
    points = OperatingPoints(
        [
            OperatingPoint("a", FixedRouter(0), claims(0.7, 2.8341, {1: 0.5, 8: 3.0})),
            OperatingPoint("b", FixedRouter(1), claims(0.87657, 9.1, {1: 0.9, 8: 5.0})),
        ]
    )
    budget, error, parts = BAD_BUDGETS[name]
    with pytest.raises(error) as caught:
        points.choose(**budget)  # type: ignore[arg-type]
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_latency_that_was_not_measured_says_how_to_get_it(folder: Path) -> None:
    bundle = load_bundle(folder)
    with pytest.raises(NotFoundError, match=r"on device 'phone'; measure it with `dsnet-orch measure RUN`"):
        bundle.at(latency_ms=5.0, device="phone")
    with pytest.raises(NotFoundError, match=r"no operating point 'subnet-0l'; did you mean 'subnet-0\d'\? known: "):
        bundle.at("subnet-0l")
    with pytest.raises(ConfigError, match="but not both"):
        bundle.at("subnet-00", madds_m=1.0)


@pytest.mark.parametrize("name", ["madds_m", "latency_ms", "top1"])
def test_a_budget_that_is_no_number_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a number, but is '0.4'"):
        load_bundle(folder).set_budget(**{name: "0.4"})  # type: ignore[arg-type]


def test_a_point_in_an_interpreter_is_one_line_without_weights(folder: Path) -> None:
    point = load_bundle(folder).operating_point
    assert repr(point) == f"OperatingPoint({point})"


def test_a_printed_bundle_and_its_table_show_the_points(folder: Path) -> None:
    bundle = load_bundle(folder)
    lines = str(bundle).splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("points  3: subnet-00 (")
    assert lines[1].endswith("; present one: subnet-02")
    assert lines[2].startswith("router  fixed, which always takes subnet-02 (")
    title, *rows, device = str(bundle.operating_points).splitlines()
    assert title.split("  ")[0] == "point"
    assert "test" not in title, "nothing was verified on test"
    assert [row.split()[0] for row in rows] == ["subnet-00", "subnet-01", "subnet-02"]
    assert [row.split()[-3:] for row in rows] == [["50.0", "1", "5"], ["51.0", "2", "6"], ["52.0", "3", "7"]]
    assert device == "ms on a processor, 1 thread"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make it consistent again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": own_digest(manifest)}))


def rewrite_tensors(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file and make their hash and the manifest consistent again."""
    tensors = load_tensors(folder / file)
    change(tensors)
    sha256 = save_tensors(folder / file, tensors)
    rewrite(folder, lambda manifest: manifest["files"].update({file: sha256}))


@pytest.fixture
def gates_folder(supernet: Supernet, tmp_path: Path) -> Path:
    points = [
        OperatingPoint(f"trial-{seed}", random_supernet_router("gate", supernet, seed), claims(0.5, seed))
        for seed in range(2)
    ]
    save(tmp_path / "front", supernet, points)
    return tmp_path / "front"


def test_missing_parts_of_a_point_are_refused(gates_folder: Path) -> None:
    assert verify(gates_folder) == 16
    kept = gates_folder.joinpath("examples.safetensors").read_bytes()
    rewrite_tensors(gates_folder, "examples.safetensors", lambda tensors: tensors.pop("point.1.logits"))
    with pytest.raises(VerificationError, match="operating point trial-1: no routes and logits"):
        verify(gates_folder)
    gates_folder.joinpath("examples.safetensors").write_bytes(kept)
    rewrite_tensors(gates_folder, "weights.safetensors", lambda tensors: tensors.pop("point.1.offset"))
    with pytest.raises(CheckpointError, match=r"bundle\.json: .* cannot be rebuilt: 'offset' .*export it again"):
        load_bundle(gates_folder)


@pytest.mark.parametrize("part", ["name", "router", "claims"])
def test_an_incomplete_point_is_refused(gates_folder: Path, part: str) -> None:
    rewrite(gates_folder, lambda manifest: manifest["points"][1].pop(part))
    with pytest.raises(
        CheckpointError, match=f"does not hold what this release writes there .*{part}.*export it again"
    ):
        load_bundle(gates_folder)


def test_a_point_that_computes_something_else_fails_its_examples(folder: Path, gates_folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["points"][2]["router"].update(route=1))
    with pytest.raises(
        VerificationError, match="operating point subnet-00: example 0 took route subnet-01, but subnet-00"
    ):
        verify(folder)

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors["point.1.weight"] = -tensors["point.1.weight"]

    rewrite_tensors(gates_folder, "weights.safetensors", turn)
    with pytest.raises(VerificationError, match="operating point trial-1: example"):
        verify(gates_folder)


def test_points_need_different_names(supernet: Supernet, tmp_path: Path) -> None:
    twice = [OperatingPoint("a", FixedRouter(route), claims(0.5, 1.0)) for route in range(2)]
    with pytest.raises(ValueError, match=r"different names.*\['a', 'a'\]"):
        save(tmp_path / "twice", supernet, twice)
    assert not (tmp_path / "twice").exists()
