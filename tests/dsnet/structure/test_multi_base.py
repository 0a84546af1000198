"""SP-Net: thresholds for the channels of several base networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsnet.errors import ConfigError
from dsnet.families import layout, rebuild
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.supernet import Supernet, restrict
from dsnet.settings import SettingError
from dsnet.space.cost import subnet_cost
from dsnet.structure.method import StructureProblem, Target, Trained, Trainings, Widths
from dsnet.structure.methods import check_structure, structure_method
from dsnet.structure.methods.uniform import Ladder
from dsnet.structure.order import no_order
from dsnet.structure.pruning import Pruning
from dsnet.structure.pruning_scores import pruning_scores
from dsnet.structure.search import SortedStart, sorted_start
from dsnet.structure.settings import BasesSettings, StructureSettings, without_unread
from tests.dsnet.cases import FURTHER_OPTIONS
from tests.dsnet.samples import random_images, random_labels, shaken, small_run, task
from tests.dsnet.structure.problems import find, masked_network, problem_of, toy, untrained

ONE = BasesSettings(widths=(1.0,))
STREAMS: dict[str, Any] = {
    "family": "tests.dsnet.nets:Stream",
    "options": {"streams": "ids", "step": 2},
    "norm": "private_affine",
}
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


def nearest_by_trial(
    problem: StructureProblem, scores: Mapping[int, Sequence[float]], target: float, base: Widths, left: Widths
) -> float:
    """The smallest distance to a target of all thresholds, each tried on its own."""
    scored = {group: values for group, values in scores.items() if group not in problem.fixed}
    num_channels = sum(base[group] for group in scored)
    found = []
    for threshold in [float("inf"), *(score for values in scored.values() for score in values)]:
        counts = {group: sum(score >= threshold for score in values) for group, values in scored.items()}
        widths = []
        for group, (width, most) in enumerate(zip(base, left, strict=True)):
            count = counts.get(group, width * sum(counts.values()) / num_channels)
            wanted = max(count, -(-width * problem.settings.min_share // 1))
            options = {*range(problem.settings.step, width, problem.settings.step), width}
            nearest = min(options, key=lambda option: (abs(option - wanted), -option))
            widths.append(width if group in problem.fixed else min(most, nearest))
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
    whole = problem.widest
    assert abs(problem.madds(widths) - target.madds) == nearest_by_trial(problem, scores, target.madds, whole, whole)
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
        further = STREAMS
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
        assert abs(row["madds"] - target.madds) == nearest_by_trial(
            result, scores, target.madds, problem.widest, problem.widest
        )
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


class Shaking:
    """Trains networks by adding random numbers to their scales, and keeps them."""

    def __init__(self, problem: StructureProblem) -> None:
        bases = structure_method("multi_base").bases(problem)
        self.networks = {base.name: untrained(problem).network(base.name).double() for base in bases}
        self.asked: list[Trainings] = []

    def train(self, trainings: Trainings) -> None:
        self.asked.append(trainings)
        for each in trainings.networks:
            self.networks[each.base.name] = shaken(deepcopy(each.start), len(self.asked))

    @property
    def trained(self) -> Trained:
        return Trained(self.networks.__getitem__)


def logits_of(network: Supernet) -> Tensor:
    """The logits of its widest sub-network, normalised by the batch."""
    with batch_statistics(network), torch.no_grad():
        return network(random_images(4).double(), network.subnets.at(network.spec.max_widths))


PADDED_RESNET = {"family": "ds_resnet", "options": FURTHER_OPTIONS["ds_resnet"]["padded"], "pin": "gate"}


def test_rounds_leave_fewer_and_fewer_channels_of_each_base(tmp_path: Path) -> None:
    """Every round is compared with the threshold found by trial, the network without the other
    channels, and the channels that are followed one by one."""
    bases = BasesSettings(widths=(0.75, 1.0), gamma_l1=0.01, rounds=3)
    problem = make_problem(targets=(0.2, 0.4), bases=bases, norm="private_affine")
    check_structure(problem)
    own = Shaking(problem)
    start = sorted_start(problem, own.networks["base_1"])
    found = find(problem, tmp_path, start=start, trained=own.trained, train=own.train)
    assert [[each.base.name for each in asked.networks] for asked in own.asked] == [
        [f"base_0.75_round_{number}", f"base_1_round_{number}"] for number in (1, 2)
    ]
    for base, target in zip(structure_method("multi_base").bases(problem), problem.targets, strict=True):
        before = restrict(own.networks[base.name], [0])
        whole = problem.madds(before.spec.max_widths)
        places = [list(range(width)) for width in before.spec.max_widths]
        for number in (1, 2, 3):
            scores = pruning_scores(before, "bn_gamma", 0, ())
            aim = whole * (target.madds / whole) ** (number / 3)
            if number < 3:
                training = next(e for e in own.asked[number - 1].networks if e.base.name.startswith(f"{base.name}_"))
                widths = training.start.spec.max_widths
            else:
                widths = found.subnets.at(found.subnets.members[target is problem.targets[1]].widths).widths
            listed = {group: values.tolist() for group, values in scores.items()}
            nearest = nearest_by_trial(problem, listed, aim, base.subnets.largest.widths, before.spec.max_widths)
            assert abs(problem.madds(widths) - aim) == pytest.approx(nearest)
            orders = [
                scores[group].argsort(descending=True, stable=True).tolist() if group in scores else list(range(width))
                for group, width in enumerate(before.spec.max_widths)
            ]
            places = [[own_places[place] for place in order] for own_places, order in zip(places, orders, strict=True)]
            if number < 3:
                kept = {group: order[: widths[group]] for group, order in enumerate(orders)}
                torch.testing.assert_close(logits_of(training.start), logits_of(masked_network(before, kept)))
                places = [own_places[:width] for own_places, width in zip(places, widths, strict=True)]
                assert training.base.run.train.gamma_l1 == 0.01
                before = own.networks[training.base.name]
    assert [list(order[: len(own_places)]) for order, own_places in zip(found.orders, places, strict=True)] == places
    torch.testing.assert_close(logits_of(found.supernet), logits_of(own.networks["base_1"]))


@pytest.mark.parametrize("family", ["ids", "padded"])
def test_rounds_prune_residual_streams(family: str, tmp_path: Path) -> None:
    further = STREAMS if family == "ids" else PADDED_RESNET
    problem = make_problem(
        **{**further, "norm": "private_stats"}, targets=(0.4,), bases=BasesSettings(widths=(1.0,), rounds=2)
    )
    check_structure(problem)
    own = Shaking(problem)
    start = sorted_start(problem, own.networks["base_1"])
    found = find(problem, tmp_path, start=start, trained=own.trained, train=own.train)
    ((training,),) = (asked.networks for asked in own.asked)
    left = training.start.spec.max_widths
    whole = found.supernet
    torch.testing.assert_close(logits_of(whole), logits_of(own.networks["base_1"]))
    with batch_statistics(whole), torch.no_grad():  # the order of the last round mixes only what was left
        sliced = whole(random_images(4).double(), whole.subnets.at(left))
    torch.testing.assert_close(sliced, logits_of(training.start))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "bases"),
    [
        ("resnet50", {"streams": "ids"}, ONE),
        ("vgg19_gap", {}, ONE),
        ("mobilenet_v1", {}, BasesSettings()),
        ("mobilenet_v2", {"streams": "ids"}, BasesSettings()),
    ],
)
def test_members_of_a_whole_network_meet_their_targets_and_are_that_network_without_the_other_channels(
    model: str, options: dict[str, Any], bases: BasesSettings, tmp_path: Path
) -> None:
    subnets = layout(model, task(image_size=32), options)
    settings = StructureSettings(method="multi_base", targets=(0.2, 0.5), step=4, bases=bases)
    problem = StructureProblem(subnets, settings, small_run(), 32)
    check_structure(problem)
    trained = untrained(problem)
    wide = trained.network("base_1")
    found = find(problem, tmp_path, start=SortedStart(wide, no_order(wide)), trained=trained)
    assert not found.summary["notes"]
    for target, row in zip(problem.targets, found.summary["subnets"], strict=False):
        assert row["madds"] == pytest.approx(target.madds, rel=0.01)
    images, (member, _) = random_images(4, 32), found.subnets.members
    kept = {group: list(found.orders[group][:width]) for group, width in enumerate(member.widths)}
    masked = masked_network(wide, kept)
    with batch_statistics(found.supernet), batch_statistics(masked), torch.no_grad():
        expected = masked(images, masked.subnets.at(problem.widest))
        logits = found.supernet(images, member)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01 * float(expected.std(0).max()))


def test_targets_of_one_base_lie_on_one_way_down(tmp_path: Path) -> None:
    """Their channels are those that the rounds have kept, and no round belongs to one of them
    alone."""
    problem = make_problem(targets=(0.2, 0.5, 1.0), bases=BasesSettings(widths=(1.0,), rounds=4))
    own = Shaking(problem)
    start = sorted_start(problem, own.networks["base_1"])
    found = find(problem, tmp_path, start=start, trained=own.trained, train=own.train)
    assert [asked.networks[0].base.name for asked in own.asked] == [f"base_1_round_{n}" for n in (1, 2, 3)]
    assert found.subnets.largest.widths == problem.widest
    sizes = [problem.madds(asked.networks[0].start.spec.max_widths) for asked in own.asked]
    middle = found.subnets.members[1].widths
    rounds = [line for line in scored_lines(tmp_path) if line["member"] == "0.5"]
    assert rounds[0]["round"] == sum(size >= problem.targets[1].madds for size in sizes)
    for asked in own.asked[rounds[0]["round"] :]:
        assert all(a <= b for a, b in zip(asked.networks[0].start.spec.max_widths, middle, strict=True))


def scored_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "choice"]


def test_later_trainings_are_counted_beforehand() -> None:
    problem = make_problem(targets=(0.3, 1.0), bases=BasesSettings(widths=(0.75, 1.0), rounds=3))
    method = structure_method("multi_base")
    later = method.later(problem)
    assert [base.name for base in later] == ["base_0.75_round_1", "base_0.75_round_2"], "a whole base needs none"
    assert len(method.passes(problem)) == 4
    assert not method.later(make_problem())
    train = method.bases(problem)[0].run.train
    longer = replace(problem, settings=replace(problem.settings, epochs=9))
    between = method.later(longer)[0].run.train
    assert (train.epochs, between.epochs) == (1, 3)
    assert between.warmup_epochs == pytest.approx(method.bases(longer)[0].run.train.warmup_epochs / 3)


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
        ({"score": "bn_gama"}, "score is 'bn_gama'; did you mean 'bn_gamma'"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_problem(**settings)


def test_bases_without_widths_have_room_for_their_targets_and_no_more_than_needed() -> None:
    problem = make_problem(targets=(0.2, 0.4, 0.9), bases=BasesSettings(), step=1)
    bases = structure_method("multi_base").bases(problem)
    assert bases[-1].subnets.largest.widths == problem.widest
    assert len(bases) == 3
    for base, target in zip(bases[:2], problem.targets, strict=False):
        assert problem.madds(base.subnets.largest.widths) >= 1.5 * target.madds
        narrower = Fraction(base.subnets.largest.name) - Fraction(1, 100)
        assert problem.madds(Ladder(problem).widths(narrower)) < 1.5 * target.madds
    all_large = make_problem(targets=(0.9, 1.0), bases=BasesSettings())
    assert [base.name for base in structure_method("multi_base").bases(all_large)] == ["base_1"]


def test_two_targets_never_get_the_same_sub_network(tmp_path: Path) -> None:
    problem = make_problem(targets=(0.5, 0.501), bases=ONE, step=4)
    smaller, larger = find(problem, tmp_path).subnets.members
    assert problem.madds(smaller.widths) < problem.madds(larger.widths)


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
