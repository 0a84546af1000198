"""SP-Net: thresholds for the channels of several base networks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.errors import ConfigError
from dsnet.families import rebuild
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.supernet import Supernet
from dsnet.settings import SettingError
from dsnet.space.cost import subnet_cost
from dsnet.structure.method import StructureProblem, Target, Trained
from dsnet.structure.methods import check_structure, structure_method
from dsnet.structure.methods.multi_base import Pruning
from dsnet.structure.pruning_scores import pruning_scores
from dsnet.structure.search import sorted_start
from dsnet.structure.settings import BasesSettings, StructureSettings, without_unread
from tests.dsnet.samples import random_images, random_labels
from tests.dsnet.structure.problems import find, problem_of, toy, untrained

ONE = BasesSettings(widths=(1.0,))
PATH = "tests.dsnet.structure.test_multi_base"


@pytest.fixture(autouse=True)
def allow_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_IMPORTS, "1")


def firsts(network: Supernet, batches: object, seed: int) -> dict[int, list[float]]:
    """A score of a user: the first channels of every group matter most."""
    return {number: [-float(n) for n in range(group.max_width)] for number, group in enumerate(network.spec.groups)}


def short(network: Supernet, batches: object, seed: int) -> dict[int, list[float]]:
    """A score of a user that lacks channels."""
    return {0: [1.0]}


def nearest_by_trial(problem: StructureProblem, scores: dict[int, list[float]], target: float) -> float:
    """The smallest distance to a target of all thresholds, each tried on its own."""
    everything = [score for values in scores.values() for score in values]
    found = []
    for threshold in [float("inf"), *everything]:
        share = Fraction(sum(score >= threshold for score in everything), len(everything))
        widths = []
        for group, whole in enumerate(problem.widest):
            values = scores.get(group)
            count = share * whole if values is None else sum(score >= threshold for score in values)
            wanted = max(count, -(-whole * problem.settings.min_share // 1))
            options = {*range(problem.settings.step, whole, problem.settings.step), whole}
            widths.append(min(options, key=lambda option: (abs(option - wanted), -option)))
        found.append(abs(problem.madds(widths) - target))
    return min(found)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.73, 1.0])
def test_the_bisection_gives_the_nearest_of_all_thresholds(step: int, share: float) -> None:
    problem = toy(7, 12, 10, method="multi_base", targets=(share,), bases=ONE, step=step, score="weight_l1")
    generator = torch.Generator().manual_seed(step)
    scores = {
        group: torch.rand(width, generator=generator, dtype=torch.float64).pow(group + 1).tolist()
        for group, width in enumerate(problem.widest)
    }
    target = Target("t", share * problem.madds(problem.widest))
    widths = Pruning.of(problem, problem.widest, scores).nearest(target)
    assert abs(problem.madds(widths) - target.madds) == nearest_by_trial(problem, scores, target.madds)
    assert share < 1 or widths == problem.widest


def test_equal_scores_are_ranked_by_group_and_channel_and_a_group_without_scores_follows() -> None:
    problem = toy(4, 4, 8, method="multi_base", targets=(0.5,), bases=ONE, score="weight_l1")
    pruning = Pruning.of(problem, problem.widest, {1: [1.0] * 4, 0: [1.0, 2.0, 1.0, 1.0]})
    assert [pruning.kept(number)[:2] for number in (0, 1, 3, 5)] == [(1, 1), (1, 1), (3, 1), (4, 1)]
    assert [pruning.kept(number)[2] for number in (0, 4, 8)] == [1, 4, 8]


def make_problem(**settings: Any) -> StructureProblem:
    return problem_of(
        **{"method": "multi_base", "targets": (0.3, 0.5), "bases": BasesSettings(widths=(0.75, 1.0)), **settings}
    )


def test_only_numbers_of_channels_leave_a_narrow_base(tmp_path: Path) -> None:
    problem = make_problem()
    trained = untrained(problem)
    narrow, wide = trained.network("base_0.75"), trained.network("base_1")
    start = sorted_start(problem, wide)
    first = find(problem, tmp_path / "a", start=start, trained=trained)

    def changed(name: str) -> Supernet:
        """The same scales, other filters, and other values of channels that the base lacks."""
        if name == "base_1":
            return wide
        other = rebuild(narrow.subnets)
        kept = {key: value for key, value in narrow.state_dict().items() if value.ndim == 1}
        other.load_state_dict({**other.state_dict(), **kept})
        return other.eval()

    again = find(problem, tmp_path / "b", start=start, trained=Trained(changed))
    assert (again.subnets, again.orders) == (first.subnets, first.orders)
    for name, value in first.supernet.state_dict().items():
        assert torch.equal(again.supernet.state_dict()[name], value)


@pytest.mark.parametrize("family", ["ds_tiny", "tests.dsnet.nets:Residual", "ids"])
def test_sorting_changes_nothing_of_the_widest_and_puts_high_scores_first(family: str, tmp_path: Path) -> None:
    further: dict[str, Any] = {"family": family, "pin": "gate", "norm": "private_affine"}
    if family == "ids":
        further = {
            "family": "tests.dsnet.nets:Stream",
            "options": {"streams": "ids", "step": 2},
            "norm": "private_affine",
        }
    problem = make_problem(**further, bases=ONE)
    check_structure(problem)
    (base,) = structure_method("multi_base").bases(problem)
    wide = untrained(problem).network(base.name).double()
    found = find(problem, tmp_path, start=sorted_start(problem, wide), trained=Trained(lambda name: wide))
    images = random_images(4).double()
    with batch_statistics(wide), batch_statistics(found.supernet), torch.no_grad():
        expected = wide(images, wide.subnets.at(problem.widest))
        torch.testing.assert_close(
            found.supernet(images, found.supernet.subnets.at(problem.widest)),
            expected,
            rtol=0,
            atol=1e-9 * float(expected.abs().max()),
        )
    scores = pruning_scores(wide, "bn_gamma", 0, ())
    assert found.summary["order"] == "bn_gamma"
    for group, values in scores.items():
        if group not in problem.fixed:
            ranked = values[list(found.orders[group])]
            assert bool((ranked[:-1] >= ranked[1:]).all())


@pytest.mark.parametrize("order", ["none", "random"])
def test_targets_are_met_by_the_channels_that_the_writers_of_a_stream_keep(order: str, tmp_path: Path) -> None:
    problem = make_problem(
        family="tests.dsnet.nets:Stream",
        options={"streams": "ids", "step": 2},
        bases=ONE,
        step=1,
        order=order,
        min_share=0.2,
    )
    wide = untrained(problem).network("base_1")
    found = find(problem, tmp_path, start=sorted_start(problem, wide), trained=Trained(lambda name: wide))
    spec = found.supernet.spec
    assert any(group.ids for group in spec.groups)
    result = replace(problem, subnets=found.subnets)
    scores = {group: values.tolist() for group, values in pruning_scores(wide, "bn_gamma", 0, ()).items()}
    for target, subnet, row in zip(problem.targets, found.subnets, found.summary["subnets"], strict=False):
        assert row["madds"] == subnet_cost(spec, subnet, problem.image_size).madds
        assert abs(row["madds"] - target.madds) == nearest_by_trial(result, scores, target.madds)
        assert row["madds"] != problem.madds(subnet.widths)


@pytest.mark.parametrize("score", ["weight_l1", "taylor", "random", "noise", f"{PATH}:firsts"])
def test_any_score_prunes(score: str, tmp_path: Path) -> None:
    problem = make_problem(score=score)
    check_structure(problem)
    trained = replace(untrained(problem), batches=lambda: [(random_images(16), random_labels(16))])
    start = sorted_start(problem, trained.network("base_1"))
    found = find(problem, tmp_path, start=start, trained=trained)
    for target, row in zip(problem.targets, found.summary["subnets"], strict=False):
        assert abs(row["madds"] / target.madds - 1) < 0.2
    if score.endswith("firsts"):
        assert all(order == tuple(range(len(order))) for order in found.orders)


def test_a_base_is_a_share_of_the_channels_and_all_start_as_the_sweep_does() -> None:
    problem = make_problem(step=1, bases=BasesSettings(widths=(0.75, 1.0), gamma_l1=0.01))
    narrow, wide = structure_method("multi_base").bases(problem)
    assert [narrow.name, wide.name] == ["base_0.75", "base_1"]
    assert narrow.subnets.largest.widths == tuple(round(0.75 * width) for width in problem.widest)
    assert wide.subnets.largest.widths == problem.widest
    assert not narrow.follows
    assert narrow.run.train.gamma_l1 == wide.run.train.gamma_l1 == 0.01
    assert (narrow.run.regime.teacher, narrow.run.regime.widths) == ("none", "all")


def test_settings_that_no_other_method_reads_leave_no_trace_in_its_records() -> None:
    plain = asdict(StructureSettings(method="uniform", targets=(0.5,)))
    assert set(plain) - set(without_unread(json.loads(json.dumps(plain)))) == {"bases", "score", "progressive"}
    own = asdict(StructureSettings(method="multi_base", targets=(0.5,), bases=ONE))
    assert set(own) - set(without_unread(own)) == {"progressive"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": (0.5,)}, r"bases.widths has 2 widths for 1 target: .*\[1.0\]"),
        ({"targets": ()}, "method is multi_base, which makes one sub-network per target"),
        ({"method": "uniform"}, "bases is set, but method uniform does not read it: choose method multi_base"),
        ({"method": "uniform", "bases": BasesSettings(), "score": "noise"}, "score is set, but method uniform"),
        ({"score": "bn_gama"}, "score is 'bn_gama'; did you mean 'bn_gamma'"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_problem(**settings)


@pytest.mark.parametrize(
    ("widths", "message"),
    [((0.5,), "must contain 1.0"), ((1.0, 1.0), "a width stands twice"), ((1.5,), r"widths\[0\] is 1.5")],
)
def test_base_widths_that_cannot_be(widths: tuple[float, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        BasesSettings(widths=widths)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": (0.9, 1.0)}, "0.9 is .* but the base of width 0.75.* use a wider base"),
        ({"targets": (0.3, 0.31), "min_share": 0.9}, "0.3 is .* the base of width 0.75.* lower min_share"),
        ({"norm": "group_norm"}, "this network has GroupNorm.*use another supernet.train.bn"),
        ({"score": f"{PATH}:missing"}, "cannot be imported"),
        ({"score": f"{PATH}:PATH"}, "is no function"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_structure(make_problem(**settings))


def test_a_network_without_batch_norm_needs_another_score() -> None:
    with pytest.raises(ConfigError, match="no BatchNorm: use weight_l1, taylor or noise"):
        check_structure(toy(8, 8, method="multi_base", targets=(0.5,), bases=ONE))
    problem = toy(8, 8, method="multi_base", targets=(0.5,), bases=ONE, score="weight_l1")
    check_structure(problem)
    assert structure_method("multi_base").bases(problem)[0].run.train.gamma_l1 == 0


def test_a_function_that_lacks_channels_is_refused(tmp_path: Path) -> None:
    problem = make_problem(score=f"{PATH}:short")
    with pytest.raises(ConfigError, match=r"needs 6 finite scores, one per channel, but has \[1\]"):
        find(problem, tmp_path)
