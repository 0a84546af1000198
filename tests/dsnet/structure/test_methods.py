"""Every structure method: its members, its checks, and that its trace is replayed exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsnet.data.training_images import InMemoryImages
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import rebuild
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.network.batchnorm import batch_statistics
from dsnet.settings import SettingError
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet
from dsnet.stored.checkpoint import load_supernet
from dsnet.structure.method import (
    TOLERANCE,
    Candidate,
    Choice,
    Found,
    Score,
    StructureMethod,
    StructureProblem,
    Trained,
    Trainings,
    Widths,
)
from dsnet.structure.methods import check_structure, method_names, register, structure_method
from dsnet.structure.scoring import HoldOutScorer, split_holdout
from dsnet.structure.search import TRACE, Facilities, find_structure, load_structure, save_structure, sorted_start
from dsnet.structure.settings import BasesSettings, ProgressiveSettings, StructureSettings
from dsnet.training.start import Start, first_weights, load_start
from dsnet.training.supernet import train_supernet
from dsnet.training.supernet_run import SupernetRun
from tests.dsnet.cases import KERNEL_OPTIONS, KERNELS
from tests.dsnet.samples import NORMALIZATION, random_images, random_labels, random_pixels, small_run
from tests.dsnet.structure.problems import (
    NET,
    CountingScorer,
    InventedTraining,
    find,
    invented,
    network,
    problem_of,
    toy,
    way_down,
)

OWN = "tests.dsnet.structure.own_method:Halves"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "declared": {},
    "uniform": {"targets": (0.3, 0.6, 1.0)},
    "list": {"widths": {"small": (4, 8, 4, 8), "wide": (6, 16, 8, 12)}},
    "greedy": {"targets": (0.4, 0.6), "levels": 4},
    "multi_base": {"targets": (0.4, 0.6), "bases": BasesSettings(widths=(0.8, 1.0))},
    "progressive": {"targets": (0.4, 0.6), "levels": 4, "progressive": ProgressiveSettings(ranking="weight_l1")},
    OWN: {},
}
"""Settings for every registered method, and for one of a user; a new method needs a line here."""


@pytest.fixture(autouse=True)
def allow_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_IMPORTS, "1")


def test_every_registered_method_is_tested() -> None:
    assert set(method_names()) | {OWN} == set(SETTINGS)


def result(method: StructureMethod, problem: StructureProblem, start: Any = None) -> Found:
    """The result of a method, without a trace."""
    if method.bases(problem) and start is None and problem.spec.family != "toy":
        start = network(problem, problem.spec.family)
    invention = InventedTraining(problem)
    facilities = invention.facilities(CountingScorer())
    search, answer = method.find(problem, start, invention.trained), None
    while True:
        try:
            event = next(search) if answer is None else search.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(event, Trainings):
            facilities.train(event)
        answer = [invented(each.widths) for each in event] if isinstance(event, Sequence) else ()


@pytest.mark.parametrize("name", SETTINGS)
class TestAnyMethod:
    """What holds for every method."""

    def problem(self, name: str) -> StructureProblem:
        return problem_of(method=name, **SETTINGS[name])

    def test_its_members_have_the_names_that_it_said_and_fit(self, name: str) -> None:
        method, problem = structure_method(name), self.problem(name)
        check_structure(problem)
        found = result(method, problem)
        assert tuple(member.name for member in found.members) == method.member_names(problem)
        for subnet in found.members:
            problem.spec.check(subnet)
        has_widest = problem.widest in {member.widths for member in found.members}
        assert (found.teacher is None) == has_widest
        assert found.teacher is None or found.teacher == Subnet("largest", problem.widest)
        assert method.description.endswith(".")

    def test_its_members_meet_their_targets_or_it_says_so(self, name: str) -> None:
        problem = self.problem(name)
        found = result(structure_method(name), problem)
        for target, member in zip(problem.targets, found.members, strict=False):
            is_near = abs(problem.madds(member.widths) - target.madds) <= TOLERANCE * target.madds
            assert is_near != any(note.startswith(f"{target.name}:") for note in found.notes)

    def test_pinned_before_the_gate_all_members_agree(self, name: str) -> None:
        if name in ("declared", "list"):
            return  # as written
        problem = problem_of("ds_tiny", method=name, pin="gate", **SETTINGS[name])
        shared = problem.spec.num_prefix_groups(0)
        assert shared == 2
        check_structure(problem)
        for member in result(structure_method(name), problem).members:
            assert member.widths[:shared] == problem.widest[:shared]

    def test_heads_and_blocks_are_counted_one_by_one_and_choices_kept(self, name: str) -> None:
        if name in ("declared", "list", OWN):
            return  # as written
        further = {"score": "weight_l1"} if name == "multi_base" else {}
        options = {"patch": 4, "dim": 24, "heads": 3, "depth": 5, "mlp_ratio": 2, "slices": ["heads", "mlp", "depth"]}
        settings = {**SETTINGS[name], **further, "targets": (0.5, 0.8), "step": 8, "min_share": 0.1, "pin": "gate"}
        problem = problem_of("ds_vit", options=options, method=name, **settings)
        check_structure(problem)
        found = result(structure_method(name), problem, rebuild(problem.subnets).eval())
        possible = problem.options(None)
        for member in found.members:
            problem.spec.check(member)
            assert all(width in own for width, own in zip(member.widths, possible, strict=True))
        changed = {
            group.kind
            for member in found.members
            for group, width in zip(problem.spec.groups, member.widths, strict=True)
            if width < group.max_width
        }
        assert changed & {"heads", "depth"}
        assert "slice" not in changed, "the part of the stream is not among slices"
        if name == "progressive":
            assert "depth" not in changed, "no score says how much a block matters"

    def test_the_same_trace_and_result_after_a_kill_at_any_line_and_with_any_number_of_scorers(
        self, name: str, tmp_path: Path
    ) -> None:
        is_quick = name in ("declared", "list")
        problem = self.problem(name) if is_quick else problem_of("ds_tiny", method=name, pin="gate", **SETTINGS[name])
        start = sorted_start(problem, network(problem, problem.spec.family))
        whole = CountingScorer()
        first = find(problem, tmp_path / "whole", whole, start=start)
        lines = (tmp_path / "whole" / TRACE).read_text().splitlines(keepends=True)
        scored = [json.loads(line)["kind"] == "candidate" for line in lines]
        assert sum(scored) == len(whole.asked) == first.summary["candidates"]
        for kept in range(len(lines) + 1):
            folder = tmp_path / str(kept)
            folder.mkdir()
            torn = lines[kept][:-3] if kept < len(lines) else ""
            (folder / TRACE).write_text("".join(lines[:kept]) + torn)
            scorer = CountingScorer(num_workers=1 + 2 * (kept % 2))
            again = find(problem, folder, scorer, start=start)
            assert scorer.asked == whole.asked[sum(scored[:kept]) :]
            assert (folder / TRACE).read_text().splitlines(keepends=True) == lines
            assert (again.subnets, again.orders, again.summary) == (first.subnets, first.orders, first.summary)

    def test_a_stop_leaves_what_is_known(self, name: str, tmp_path: Path) -> None:
        problem = self.problem(name)
        start = sorted_start(problem, network(problem))
        first = find(problem, tmp_path / "whole", start=start)
        if not first.summary["candidates"]:
            return
        calls = iter(range(1, 10_000))
        invention = InventedTraining(problem)
        stopped = find_structure(
            problem,
            start,
            invention.facilities(CountingScorer()),
            folder=tmp_path / "stopped",
            should_stop=lambda: next(calls) == 3,
            trained=invention.trained,
        )
        assert stopped is None
        rest = CountingScorer()
        again = find(problem, tmp_path / "stopped", rest, start=start)
        assert len(rest.asked) == first.summary["candidates"] - 2
        assert again.summary == first.summary

    def test_another_search_does_not_take_its_trace(self, name: str, tmp_path: Path) -> None:
        problem = self.problem(name)
        find(problem, tmp_path)
        for other in (
            replace(problem, run=replace(problem.run, seed=99)),
            replace(problem, settings=replace(problem.settings, holdout=0.2)),
        ):
            with pytest.raises(CheckpointError, match=r"line 1: was written by another search .* remove the file"):
                find(other, tmp_path)
        with pytest.raises(CheckpointError, match="another search"):
            find(problem, tmp_path, start=sorted_start(problem, network(problem, seed=5)))

    def test_training_can_start_from_what_it_leaves(self, name: str, tmp_path: Path) -> None:
        problem = self.problem(name)
        found = find(problem, tmp_path)
        save_structure(tmp_path, found)
        read = load_structure(tmp_path)
        assert (read.subnets, read.orders, read.summary) == (found.subnets, found.orders, found.summary)
        start = load_start(tmp_path)
        assert isinstance(start, Start)
        supernet, fresh = first_weights(start.subnets, 1, start)
        assert not fresh
        for name_, value in found.supernet.state_dict().items():
            assert torch.equal(supernet.state_dict()[name_], value)


# Single methods.


def test_declared_changes_nothing(tmp_path: Path) -> None:
    problem = problem_of()
    net = network(problem)
    found = find(problem, tmp_path, start=sorted_start(problem, net))
    assert found.subnets == problem.subnets
    tensors = found.supernet.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("widths", [(16, 24, 32), (8, 24, 40), (5, 7, 31)])
@pytest.mark.parametrize("step", [1, 4])
def test_uniform_is_the_nearest_of_all_ratios(widths: tuple[int, ...], step: int) -> None:
    problem = toy(*widths, method="uniform", step=step, min_share=0.2, targets=(0.23, 0.4, 0.51, 0.77, 0.98))
    options = problem.options(None)
    tried = {
        tuple(min(reversed(each), key=lambda width: abs(1000 * width - ratio * each[-1])) for each in options)
        for ratio in range(1001)
    }
    assert len(tried) > 5
    for target, member in zip(problem.targets, result(structure_method("uniform"), problem).members, strict=True):
        best = min(abs(problem.madds(each) - target.madds) for each in tried)
        assert abs(problem.madds(member.widths) - target.madds) == pytest.approx(best)


def test_targets_in_millions_are_the_same_as_shares() -> None:
    shares = problem_of(method="uniform", targets=(0.5,))
    millions = problem_of(method="uniform", targets_m=(0.5 * shares.madds(shares.widest) / 1e6,))
    first, second = (result(structure_method("uniform"), problem).members[0] for problem in (shares, millions))
    assert first.widths == second.widths
    assert (first.name, second.name) == ("0.5", f"{millions.settings.targets_m[0]:g}M")


def test_a_list_is_named_by_its_share_of_madds() -> None:
    problem = problem_of(method="list", widths=((4, 8, 4, 8), problem_of().widest))
    found = result(structure_method("list"), problem)
    assert [member.name for member in found.members] == [f"{problem.share(problem.madds((4, 8, 4, 8))):.2g}", "1"]
    assert found.teacher is None


GREEDY = {"method": "greedy", "min_share": 0.25, "targets": (0.25, 0.5, 0.75, 1.0)}


@pytest.mark.parametrize("widths", [(4, 6, 8), (9, 5, 7)])
def test_every_step_of_greedy_is_the_best_removal_and_ties_go_to_the_lower_group(widths: tuple[int, ...]) -> None:
    problem = toy(*widths, **GREEDY)
    way = way_down(problem)
    chosen: list[Widths] = []
    tried: list[list[Widths]] = []
    search = structure_method("greedy").find(problem, None, Trained())  # type: ignore[arg-type] # it reads scores alone
    answer: list[Score] | tuple[()] | None = None
    while True:
        try:
            event = next(search) if answer is None else search.send(answer)
        except StopIteration as end:
            found = end.value
            break
        if isinstance(event, Choice):
            chosen += [] if event.member else [event.widths]
            answer = ()
        else:
            tried.append([each.widths for each in event])
            answer = [invented(each.widths) for each in event]
    assert chosen == way[1 : len(chosen) + 1]
    for current, candidates in zip(way, tried, strict=False):
        assert all(sum(map(abs, map(int.__sub__, current, each))) == 1 for each in candidates)
        assert len(candidates) == sum(
            width > options[0] for width, options in zip(current, problem.options(None), strict=True)
        )
    for target, member in zip(problem.targets, found.members, strict=True):
        nearest = min(abs(problem.madds(each) - target.madds) for each in way)
        assert abs(problem.madds(member.widths) - target.madds) == pytest.approx(nearest)
    assert found.members[-1].widths == problem.widest
    assert found.teacher is None


def test_greedy_leaves_out_steps_that_save_nothing() -> None:
    """The widths of a block that does not run have no influence."""
    options: dict[str, Any] = {"patch": 4, "dim": 24, "heads": 3, "depth": 4, "gates": [1]}
    options |= {"slices": ["heads", "depth"], "ratios": [0.3, 1.0]}
    settings: dict[str, Any] = {"min_share": 0.3, "levels": None, "pin": "gate"}
    problem = problem_of("ds_vit", options=options, method="greedy", targets=(0.46,), **settings)
    check_structure(problem)
    depth = [group.kind for group in problem.spec.groups].index("depth")

    def score(widths: Widths) -> Score:  # blocks matter least: they are left out first
        return Score(900 + 5 * sum(widths[depth + 1 :]) - widths[depth], 1000)

    search = structure_method("greedy").find(
        problem, rebuild(problem.subnets).eval(), InventedTraining(problem).trained
    )
    answer: Sequence[Score] = ()
    chosen: list[int] = []
    event = next(search)
    while True:
        if isinstance(event, Choice):
            chosen += [event.madds] if not event.member else []
            answer = ()
        else:
            assert isinstance(event, Sequence)
            assert all(each.madds < (chosen[-1] if chosen else problem.madds(problem.widest)) for each in event)
            answer = [score(each.widths) for each in event]
        try:
            event = search.send(answer)
        except StopIteration:
            break
    assert len(chosen) > 2
    assert chosen == sorted(set(chosen), reverse=True)


TOKENS: Mapping[str, Any] = {"patch": 4, "dim": 24, "heads": 3, "depth": 3, "gates": [1], "mlp_ratio": 2}
DIMENSIONS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "heads and hidden channels": (
        "ds_vit",
        {**TOKENS, "slices": ["heads", "mlp"]},
        {"pin": "gate", "step": 8, "targets": (0.6, 0.8)},
    ),
    "kernels of a family": ("ds_tiny", {"num_routes": 3, "kernels": [3, 5, 7]}, {"pin": "gate", "step": 8}),
    "kernels of a plain network": (KERNELS, KERNEL_OPTIONS, {"step": 2}),
}
"""Networks with further dimensions than channels: a family, its options, and settings of the
search."""


@pytest.mark.parametrize("name", DIMENSIONS)
def test_greedy_steps_through_heads_hidden_channels_and_kernels(name: str, tmp_path: Path) -> None:
    """Every step is the best removal of one step of one group, whatever the group counts; the
    members lie on one way down, on which each dimension was narrowed."""
    family, options, settings = DIMENSIONS[name]
    problem = problem_of(family, options=options, method="greedy", **{"targets": (0.35, 0.7), "levels": 4, **settings})
    check_structure(problem)
    scorer = CountingScorer(of=lambda widths: _by_size(problem, widths))
    found = find(problem, tmp_path, scorer, start=sorted_start(problem, rebuild(problem.subnets).eval()))
    possible, way = problem.options(4), [problem.widest]
    asked = list(scorer.asked)
    while asked:
        candidates = [
            (*way[-1][:group], sizes[sizes.index(way[-1][group]) - 1], *way[-1][group + 1 :])
            for group, sizes in enumerate(possible)
            if way[-1][group] > sizes[0]
        ]
        assert asked[: len(candidates)] == candidates
        way.append(max(candidates, key=lambda widths: _by_size(problem, widths).num_correct))
        asked = asked[len(candidates) :]
    members = [member.widths for member in found.subnets]
    assert all(member in way for member in members)
    narrowed = {
        group.kind for group, width in zip(problem.spec.groups, members[0], strict=True) if width < group.max_width
    }
    assert narrowed == {
        group.kind for group, sizes in zip(problem.spec.groups, possible, strict=True) if len(sizes) > 1
    }


def _by_size(problem: StructureProblem, widths: Widths) -> Score:
    """A score that falls with the squared share that is missing of every group."""
    missing = sum((1 - width / whole) ** 2 for width, whole in zip(widths, problem.widest, strict=True))
    return Score(round(10_000 * (1 - missing / len(widths))), 10_000)


def test_two_equal_scores_remove_the_lower_group() -> None:
    problem = toy(4, 4, 4, method="greedy", targets=(0.9,))
    search = structure_method("greedy").find(problem, None, Trained())  # type: ignore[arg-type]
    candidates = next(search)
    assert not isinstance(candidates, Choice)
    assert [each.widths for each in candidates] == [(3, 4, 4), (4, 3, 4), (4, 4, 3)]
    choice = search.send([Score(5, 10), Score(7, 10), Score(7, 10)])
    assert isinstance(choice, Choice)
    assert choice.widths == (4, 3, 4)


def test_the_regret_of_greedy_against_the_best_sub_network_of_its_size() -> None:
    """On this landscape the way down loses at most 7 of 1000 images to the best sub-network that
    costs no more."""
    problem = toy(4, 6, 8, **{**GREEDY, "targets": (0.3, 0.5, 0.8)})
    everything = list(product(*problem.options(None)))
    for member in result(structure_method("greedy"), problem).members:
        allowed = [each for each in everything if problem.madds(each) <= problem.madds(member.widths)]
        best = max(invented(each).num_correct for each in allowed)
        assert 0 <= best - invented(member.widths).num_correct <= 7
        assert len(allowed) > 10


def test_two_targets_that_are_passed_in_one_step_get_members_of_their_own() -> None:
    problem = toy(4, 4, 4, method="greedy", targets=(0.61, 0.62, 0.63, 0.64))
    members = result(structure_method("greedy"), problem).members
    assert len({member.widths for member in members}) == 4
    madds = [problem.madds(member.widths) for member in members]
    assert madds == sorted(madds)


def test_greedy_trains_a_universally_slimmable_network_first() -> None:
    problem = problem_of(method="greedy", targets=(0.5,), levels=3, min_share=0.25)
    (base,) = structure_method("greedy").bases(problem)
    assert base.name == "us_net"
    assert (base.run.regime.widths, base.run.regime.teacher, base.run.regime.num_random) == ("sandwich", "inplace", 2)
    assert base.run.train == replace(problem.run.train, epochs=1, warmup_epochs=0.25)
    assert base.run.width_space is not None
    assert base.run.width_space.options(base.subnets.spec) == problem.options(3)
    assert [subnet.widths for subnet in base.subnets.all] == [problem.widest]
    assert (base.subnets.spec.norm, base.run.regime.norm) == ("recalibrate", "recalibrate")
    given = replace(problem, settings=replace(problem.settings, epochs=3))
    assert structure_method("greedy").bases(given)[0].run.train.epochs == 3
    pinned = problem_of("ds_tiny", method="greedy", targets=(0.5,), pin="gate")
    (base,) = structure_method("greedy").bases(pinned)
    assert base.run.width_space is not None
    assert base.run.width_space.options(base.subnets.spec) == pinned.options(10)
    assert not structure_method("uniform").bases(problem)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "uniform"}, r"method is uniform, .* set supernet.structure.targets"),
        ({"method": "greedy"}, r"method is greedy, .* there is none: set supernet.structure.targets"),
        ({"method": "greedy", "targets": (0.5,), "targets_m": (3.0,)}, "remove one of them"),
        ({"method": "uniform", "targets": (0.5, 0.5)}, r"\[0.5, 0.5\], in which a value stands twice"),
        (
            {"targets": (0.5,)},
            r"targets is set, but method declared reads no targets: choose .* \(uniform, greedy, multi_base, progressive\)",
        ),
        ({"method": "list", "widths": ((1, 2),), "targets_m": (0.5,)}, "targets_m is set, but method list"),
        ({"method": "list"}, "no widths: set supernet.structure.widths"),
        ({"widths": ((4, 4),)}, "widths is set, but method declared does not read it: choose method list"),
        ({"method": "list", "widths": {"a": (4, 0)}}, r"widths.a\[1\] is 0, but must be at least 1"),
        ({"method": "list", "widths": {"a": 4}}, "widths.a is 4, but must be a list"),
        ({"method": "uniform", "targets": (0.5, 1.5)}, r"targets\[1\] is 1.5"),
        ({"order": "gamma"}, "order is 'gamma'.*bn_gamma"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"levels": 0}, "levels is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_one_error_with_a_way_out(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        StructureSettings(**settings)


BOTTLENECK = {"depth": 50, "width": 0.125, "ratios": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "",
            {"method": "uniform", "targets": (0.01, 0.5)},
            r"targets: no sub-network has .* \(0.01\); the nearest possible one has .* M, a share of 0\.\d+",
        ),
        (
            "",
            {"method": "greedy", "targets_m": (900.0,)},
            r"targets_m: no sub-network has 900 M MAdds \(900M\); the nearest .* a share of 1:",
        ),
        (
            "",
            {"method": "uniform", "targets": (0.5,), "step": 12},
            "step is 12, but channel group 'stem' has only 8 channels: use a step of at most 8",
        ),
        (
            "",
            {"method": "uniform", "targets": (0.5, 0.5001)},
            r"'0.5' and '0.5001' are the same sub-network, with widths \[.*remove one target",
        ),
        (
            "",
            {"method": "list", "widths": {"a": (4, 8)}},
            "'a' has 2 widths, but .* has 4 channel groups; the channel groups with their widths are stem 8,",
        ),
        ("", {"method": "list", "widths": {"a": (4, 8, 99, 8)}}, "'a': width 99 of channel group"),
        (
            "",
            {"method": "list", "widths": {"a": (4, 8, 4, 8), "b": (4, 8, 4, 8)}},
            "'a' and 'b' are the same sub-network.*remove one of them",
        ),
        (
            "",
            {"method": "list", "widths": {"largest": (4, 8, 4, 8)}},
            "'largest' is the name of the sub-network with all channels",
        ),
        ("", {"method": "list", "widths": ((4, 8, 4, 80),)}, "'number 0': width 80"),
        (
            "",
            {"method": "greedy", "targets": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "levels": 2},
            "6 targets, but its step and levels leave only 5",
        ),
        (
            "",
            {"method": "greedy", "targets": (0.5,), "norm": "group_norm", "order": "taylor"},
            "order is taylor, but this network has GroupNorm",
        ),
        (
            "ds_tiny",
            {"method": "uniform", "targets": (0.5,)},
            r"agree on the channel groups before gate 'gate0' \(stem, stage0\).*supernet.structure.pin to gate",
        ),
        (
            "ds_tiny",
            {"method": "list", "widths": {"a": (4, 8, 8, 8), "b": (4, 10, 8, 9)}},
            r"a and b have 8 and 10 channels of group 'stage0' \(number 1\)",
        ),
        (
            "bottleneck",
            {"method": "greedy", "targets": (0.5,), "pin": "gate"},
            r"method greedy: .*'stage0.inner', but not up to 'stage0.stream'.*streams padded",
        ),
        (
            "bottleneck",
            {
                "method": "list",
                "widths": {"a": (8, 8, 32, 16, 64, 32, 128, 64, 256), "b": (8, 8, 16, 16, 64, 32, 128, 64, 256)},
            },
            "method list: .*'stage0.inner'",
        ),
        (
            "pinned",
            {"method": "uniform", "targets": (0.5,), "pin": "gate", "order": "bn_gamma"},
            "bn_gamma, but this network has no BatchNorm",
        ),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_anything_is_trained(
    family: str, settings: dict[str, Any], message: str
) -> None:
    norm = settings.pop("norm", None)
    if family == "bottleneck":
        problem = problem_of("ds_resnet", options=BOTTLENECK, **settings)
    elif family == "pinned":
        problem = toy(4, 4, **{**settings})
    else:
        problem = problem_of(**({"family": family} if family else {}), norm=norm, **settings)
    with pytest.raises(ConfigError, match=message):
        check_structure(problem)


def test_a_list_of_equal_costs_needs_names() -> None:
    equal = ((14, 22), (1, 310))
    problem = toy(14, 310, method="list", widths=equal)
    assert problem.madds(equal[0]) == problem.madds(equal[1])
    with pytest.raises(ConfigError, match=r"two sub-networks have equal MAdds.*write a mapping with a name for each"):
        check_structure(problem)
    check_structure(toy(14, 310, method="list", widths={"one": equal[0], "other": equal[1]}))
    with pytest.raises(ConfigError, match="'number 0' and 'number 1' are the same sub-network"):
        check_structure(toy(4, 4, method="list", widths=((2, 3), (2, 3))))


def test_a_network_without_free_channels_has_nothing_to_choose() -> None:
    problem = toy(4, 4, method="uniform", targets=(1.0,))
    groups = tuple(replace(group, pinned="attention") for group in problem.spec.groups)
    spec = replace(problem.spec, groups=groups)
    pinned = replace(problem, subnets=replace(problem.subnets, spec=spec))
    with pytest.raises(ConfigError, match="every channel group of toy keeps all channels"):
        check_structure(pinned)


def test_unknown_methods_and_unusable_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown method 'gredy'; did you mean 'greedy'\\? known: declared, greedy"):
        structure_method("gredy")
    for path, message in (
        ("tests.dsnet.structure.own_method:Nothing", "cannot be imported"),
        ("tests.dsnet.structure.own_method:Subnet", "is no class that inherits"),
        ("tests.dsnet.structure.own_method:Abstract", "cannot be used"),
    ):
        with pytest.raises(ConfigError, match=message):
            structure_method(path)
    monkeypatch.delenv(ALLOW_IMPORTS)
    with pytest.raises(
        ConfigError, match=r"runs code of yours; allow that with DSNET_ALLOW_IMPORTS=1 .*--allow-imports"
    ):
        structure_method(OWN)


def test_a_name_belongs_to_one_method() -> None:
    declared = type(structure_method("declared"))
    assert register(declared) is declared
    with pytest.raises(ValueError, match="'declared' already"):
        register(type("Other", (declared,), {}))


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    problem = problem_of(method="greedy", targets=(0.6,), levels=3)
    start = sorted_start(problem, network(problem))
    find(problem, tmp_path, start=start)
    lines = (tmp_path / TRACE).read_text().splitlines()
    for place, line, message in (
        (1, "[]", "line 2: is no JSON object"),
        (1, lines[1].replace('"num_correct"', '"num"'), "line 2: holds no score"),
        (2, lines[1], "line 3: was written by another search"),
        (len(lines), lines[1], f"line {len(lines) + 1}: was written by another search"),
    ):
        (tmp_path / TRACE).write_text("\n".join([*lines[:place], line, *lines[place + 1 :]]) + "\n")
        with pytest.raises(CheckpointError, match=message):
            find(problem, tmp_path, start=start)


def test_a_scorer_that_gives_too_little_is_noticed(tmp_path: Path) -> None:
    problem = problem_of(method="greedy", targets=(0.6,))
    start = sorted_start(problem, network(problem))

    def short(candidates: list[Candidate]) -> list[Score]:
        return [Score(1, 2)]

    with pytest.raises(ValueError, match="gave 1 scores for 4 candidates"):
        find_structure(problem, start, Facilities(short), folder=tmp_path)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "order", "options"),
    [
        ("ds_tiny", "bn_gamma", None),
        (NET, "bn_gamma", None),
        ("ds_vit", "weight_l1", None),
        ("ds_tiny", "bn_gamma", {"width": 0.5, "num_routes": 3, "kernels": [3, 5]}),
        (KERNELS, "weight_l1", KERNEL_OPTIONS),
    ],
)
def test_from_a_base_to_the_joint_training(
    family: str, order: str, options: Mapping[str, Any] | None, tmp_path: Path
) -> None:
    """The whole stage in one process: hold-out, base, order, search, and the start weights of the
    set."""
    problem = problem_of(
        family,
        "private_affine",
        options,
        method="greedy",
        targets=(0.4, 0.7),
        levels=3,
        pin="gate",
        order=order,
        holdout=0.25,
    )
    pixels, labels = random_pixels(64), random_labels(64)
    kept, held = split_holdout(np.arange(64), labels.numpy(), problem.settings.holdout, problem.seed)
    check_structure(problem)
    (base,) = structure_method("greedy").bases(problem)
    assert SupernetRun.from_json(json.loads(json.dumps(base.run.to_json()))) == base.run
    images = InMemoryImages(pixels[kept], labels[kept], base.run.augmentation)
    stem = train_supernet(first_weights(base.subnets, base.run.seed)[0], images, base.run, folder=tmp_path / "us_net")
    assert stem is not None
    start = sorted_start(problem, load_supernet(stem)[0])
    scorer = HoldOutScorer(start.supernet, pixels[held], labels[held], NORMALIZATION)
    facilities = Facilities(lambda some: (scorer.score(each.widths) for each in some))
    found = find_structure(problem, start, facilities, folder=tmp_path)
    assert found is not None
    assert [subnet.name for subnet in found.subnets.all] == ["0.4", "0.7", "largest"]
    assert found.subnets.spec == problem.spec
    assert found.summary["madds"] > 0
    assert all(0 <= row["holdout_top1"] <= 1 for row in found.summary["subnets"][:2])
    again = find_structure(problem, start, Facilities(CountingScorer()), folder=tmp_path)  # all from the trace
    assert again is not None
    assert again.summary == found.summary
    # Joint training begins with the sorted weights of the base, or with the weights of the sweep.
    with batch_statistics(found.supernet), batch_statistics(start.supernet), torch.no_grad():
        inputs = NORMALIZATION.apply(pixels[:8])
        for subnet in found.subnets.all:
            expected = start.supernet(inputs, start.supernet.subnets.at(subnet.widths))
            torch.testing.assert_close(found.supernet(inputs, subnet), expected)
    fresh = find_structure(
        problem,
        start,
        Facilities(CountingScorer()),
        folder=tmp_path,
        fresh=first_weights(problem.subnets, problem.seed)[0],
    )
    assert fresh is not None
    assert fresh.subnets == found.subnets
    assert not torch.equal(*(next(net.supernet.parameters()) for net in (fresh, found)))
    save_structure(tmp_path / "result", found)
    joint = first_weights(found.subnets, 3, load_start(tmp_path / "result"))[0]
    run = small_run(regime=replace(problem.run.regime, norm="private_affine"))
    assert train_supernet(joint, InMemoryImages(pixels, labels, run.augmentation), run, folder=tmp_path / "joint")


@pytest.mark.parametrize("order", ["weight_l1", "random"])
def test_a_stream_whose_writers_are_sorted_each_in_its_own_way_is_found_stored_and_read(
    order: str, tmp_path: Path
) -> None:
    problem = problem_of(
        "tests.dsnet.nets:Stream",
        options={"streams": "ids", "step": 2},
        method="uniform",
        targets=(0.3, 1.0),
        order=order,
    )
    start = sorted_start(problem, rebuild(problem.subnets).eval())
    found = find(problem, tmp_path, start=start)
    spec = found.supernet.spec
    writers = [number for number, group in enumerate(spec.groups) if group.ids]
    assert {spec.groups[number].name for number in writers} >= {"stem", "branch_0", "down"}
    assert all(spec.groups[number].ids == found.orders[number] for number in writers)
    assert min(by_madds := [row["madds"] for row in found.summary["subnets"]]) > problem.madds(found.subnets[0].widths)
    assert by_madds == [subnet_cost(spec, subnet, problem.image_size).madds for subnet in found.subnets]
    images = random_images(2)
    widest = found.supernet.subnets.at(spec.max_widths)
    plain = rebuild(problem.subnets).train()
    torch.testing.assert_close(found.supernet.train()(images, widest), plain(images, widest), rtol=1e-4, atol=1e-4)
    save_structure(tmp_path, found)
    again = load_structure(tmp_path)
    assert again.supernet.spec == spec
    for subnet in found.supernet.subnets:
        assert torch.equal(again.supernet.train()(images, subnet), found.supernet(images, subnet))
