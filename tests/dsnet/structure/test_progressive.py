"""The progressive search: its parts one by one, and the chain that they give together."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.errors import ConfigError
from dsnet.families import rebuild
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.supernet import Supernet
from dsnet.settings import SettingError
from dsnet.space.spec import ChannelGroup, Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure import noise
from dsnet.structure.method import TOLERANCE, Score, StructureProblem, Widths
from dsnet.structure.methods import check_structure, structure_method
from dsnet.structure.methods.progressive import EXCHANGES, NEAR, Ranking
from dsnet.structure.noise import noise_tolerances
from dsnet.structure.order import transfer
from dsnet.structure.pruning_scores import channel_importances, pruning_scores
from dsnet.structure.search import TRACE, SortedStart, Structure, find_structure, sorted_start
from dsnet.structure.settings import ProgressiveSettings, StructureSettings, without_unread
from dsnet.training.settings import Regime
from tests.dsnet.samples import random_images, random_labels
from tests.dsnet.structure.problems import CountingScorer, InventedTraining, invented, problem_of, toy

METHOD = structure_method("progressive")


def make_problem(family: str = "tests.dsnet.nets:Residual", **settings: Any) -> StructureProblem:
    parts = {name: settings.pop(name) for name in ("ranking", "threshold", "reselection") if name in settings}
    own = {"progressive": ProgressiveSettings(**{"ranking": "weight_l1", **parts})}
    return problem_of(family, **{"method": "progressive", "targets": (0.4, 0.7, 1.0), "levels": 5, **own, **settings})


def landscape(seed: int) -> CountingScorer:
    """A scorer by a function that rises with the widths, at another rate for each group, and has
    ripples."""

    def score(widths: Sequence[int]) -> Score:
        rates, ripples = random.Random(seed), random.Random(repr((seed, tuple(widths))))
        return Score(
            sum(round(rates.uniform(20, 100) * math.log2(1 + width)) for width in widths) + ripples.randrange(20), 5000
        )

    return CountingScorer(of=score)


@dataclass(frozen=True)
class Run:
    """A finished search and everything that it asked for."""

    problem: StructureProblem
    start: SortedStart
    found: Structure
    invention: InventedTraining
    lines: Sequence[Mapping[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The members from the smallest target."""
        rows: list[dict[str, Any]] = self.found.summary["subnets"][: len(self.problem.targets)]
        return rows

    @property
    def way(self) -> list[Widths]:
        """The sub-networks of the way: each has no channel that the one before it lacks."""
        way = [self.problem.widest]
        for line in self.lines:
            if line["kind"] == "choice":
                if line["member"] or any(map(int.__gt__, line["widths"], way[-1])):
                    break
                way.append(tuple(line["widths"]))
        return way

    @property
    def ranking(self) -> Ranking:
        """The importance of the channels in the order of the search, from the start's weights."""
        whole = transfer(self.start.supernet, self.start.supernet.subnets)
        scores = pruning_scores(whole, self.problem.settings.progressive.ranking, self.problem.seed, ())
        orders = self.found.orders
        return Ranking.of(
            self.problem, {group: values[list(orders[group])].tolist() for group, values in scores.items()}
        )


def run(problem: StructureProblem, folder: Path, scorer: CountingScorer | None = None, **further: Any) -> Run:
    check_structure(problem)
    invention = InventedTraining(problem)
    (base,) = METHOD.bases(problem)
    start = sorted_start(problem, invention.trained.network(base.name))
    facilities = invention.facilities(scorer or CountingScorer())
    found = find_structure(problem, start, facilities, folder=folder, trained=invention.trained, **further)
    assert found is not None
    lines = [json.loads(line) for line in (folder / TRACE).read_text().splitlines()]
    return Run(problem, start, found, invention, lines)


def logits(supernet: Supernet, widths: Widths) -> torch.Tensor:
    with batch_statistics(supernet), torch.no_grad():
        return supernet(random_images(4), supernet.subnets.at(widths))


# The way.


def test_the_group_whose_channels_matter_least_for_their_madds_loses_a_step() -> None:
    """By hand, for two 3x3 convolutions on 8 x 8 pixels: without one channel of the first,
    3 * 9 * 64 + 4 * 9 * 64 = 4032 MAdds are saved, of the second 4 * 9 * 64 + 64 + 10 = 2378. The
    first keeps 27 of 27 + last, the second 12 of 14."""
    problem = toy(4, 4, method="progressive", targets=(0.5,))
    options = problem.options(None)
    equal = 27 * ((14 / 12) ** (4032 / 2378) - 1)
    for last, expected in ((equal + 0.01, (4, 3)), (equal - 0.01, (3, 4))):
        ranking = Ranking.of(problem, {0: [9.0, 9.0, 9.0, last], 1: [5.0, 4.0, 3.0, 2.0]})
        assert ranking.next(options, (4, 4)) == expected, last
    assert ranking.next(options, (1, 4)) == (1, 3)
    assert ranking.next(options, (1, 1)) is None
    followed = Ranking.of(problem, {0: [4.0, 3.0, 2.0, 1.0]})
    assert followed.between(1, 2, 4) == pytest.approx(math.log(2)), "the mean for a group without scores"


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("ranking", ["weight_l1", "bn_gamma"])
def test_every_step_of_the_way_is_the_best_of_all_removals_whatever_the_scores(
    ranking: str, levels: int | None, tmp_path: Path
) -> None:
    problem = make_problem(ranking=ranking, levels=levels)
    made = run(problem, tmp_path, landscape(1))
    options, importances = problem.options(levels), made.ranking.importances
    for widths, following in pairwise(made.way):
        ratios = []
        for group, possible in enumerate(options):
            for less in possible:
                smaller = (*widths[:group], less, *widths[group + 1 :])
                if less < widths[group] and not any(less < between < widths[group] for between in possible):
                    saved = problem.madds(widths) - problem.madds(smaller)
                    kept = math.fsum(importances[group][:less]) / math.fsum(importances[group][: widths[group]])
                    ratios.append((-math.log(kept) / saved, smaller))
        assert math.isclose(min(ratios)[0], dict(map(reversed, ratios))[following])  # type: ignore[arg-type]
    assert problem.madds(made.way[-1]) < (1 - NEAR) * problem.targets[0].madds <= problem.madds(made.way[-3])


def test_noise_that_a_channel_tolerates_is_what_it_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "STEPS", 4)
    problem = make_problem()
    network = InventedTraining(problem).trained.network("us_net")
    batches = [(random_images(8), random_labels(8))]
    expected = noise_tolerances(network, batches, problem.seed)
    for group, values in channel_importances(network, "noise", problem.seed, batches).items():
        torch.testing.assert_close(values, torch.log1p(torch.exp(-2 * expected[group])) / 2)


def test_a_kernel_keeps_its_size() -> None:
    problem = toy(8, 8, method="progressive", targets=(0.5, 1.0))
    spec = replace(problem.spec, groups=(*problem.spec.groups, ChannelGroup("size", 5, kind="kernel")))
    with_kernel = replace(problem, subnets=SubnetSet(spec, (Subnet("all", (8, 8, 5)),)))
    assert with_kernel.options(None)[2] == (1, 3, 5)
    check_structure(with_kernel)
    assert METHOD.num_candidates(with_kernel) == METHOD.num_candidates(problem)
    (base,) = METHOD.bases(with_kernel)
    assert base.run.width_space is not None
    assert base.run.width_space.options(base.subnets.spec)[2] == (5,)


# The members.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reselection", [False, True])
def test_the_members_are_a_chain_near_the_targets(reselection: bool, seed: int, tmp_path: Path) -> None:
    problem = make_problem(targets=(0.35, 0.5, 0.7, 0.9), step=1, levels=8, reselection=reselection, threshold=None)
    made = run(problem, tmp_path, landscape(seed))
    members = [tuple(row["widths"]) for row in made.rows]
    for smaller, larger in pairwise([*members, problem.widest]):
        assert smaller != larger
        assert all(map(int.__le__, smaller, larger))
    for target, row in zip(problem.targets, made.rows, strict=True):
        away = abs(row["madds"] / target.madds - 1)
        notes = [note for note in made.found.summary["notes"] if note.startswith(f"{target.name}:")]
        assert len(notes) == (away > TOLERANCE)
        assert all(("within 2 %" in note) == (away <= NEAR) for note in notes)
        if not reselection:
            others = [each for each in made.way if abs(problem.madds(each) / target.madds - 1) <= NEAR]
            correct = {tuple(line["widths"]): line["num_correct"] for line in made.lines if line["kind"] == "candidate"}
            best = max((correct[each], -problem.madds(each)) for each in others or [tuple(row["widths"])])
            assert (correct[tuple(row["widths"])], -row["madds"]) == best


def test_a_target_between_the_steps_of_the_way_gets_the_nearest_sub_network_within_the_chain(tmp_path: Path) -> None:
    problem = make_problem("ds_resnet", targets=(0.3, 0.5, 1.0), pin="gate", step=2, levels=4, reselection=False)
    made = run(problem, tmp_path, landscape(0))
    smallest, middle, widest = (tuple(row["widths"]) for row in made.rows)
    assert widest == problem.widest
    missed = {
        target.name: min(abs(problem.madds(each) / target.madds - 1) for each in made.way) for target in problem.targets
    }
    assert any(away > NEAR for away in missed.values()), "the way alone would miss a target"
    options = problem.options(problem.settings.levels)
    bounds = {"0.3": (tuple(widths[0] for widths in options), middle), "0.5": (smallest, widest)}
    for target, row in zip(problem.targets[:2], made.rows, strict=False):
        own, (below, above) = tuple(row["widths"]), bounds[target.name]
        assert row["holdout_top1"] is not None
        if missed[target.name] <= NEAR:
            assert own in made.way
            continue
        away = abs(row["madds"] / target.madds - 1)
        possible = [
            abs(problem.madds((*own[:group], width, *own[group + 1 :])) / target.madds - 1)
            for group, widths in enumerate(options)
            for width in widths
            if below[group] <= width <= above[group] and (*own[:group], width, *own[group + 1 :]) not in (below, above)
        ]
        assert away <= NEAR or away == min(possible), "a change of one group would come nearer"


@pytest.mark.parametrize("seed", range(3))
def test_reselection_never_lowers_the_accuracy_and_stays_near_the_target(seed: int, tmp_path: Path) -> None:
    without, with_it = (
        run(
            make_problem("ds_resnet", pin="gate", step=1, levels=None, reselection=each),
            tmp_path / str(each),
            landscape(seed),
        )
        for each in (False, True)
    )
    assert with_it.way == without.way
    assert with_it.lines[1 : len(without.lines) - 3] == without.lines[1:-3], "the same search up to the members"
    for target, before, after in zip(with_it.problem.targets, without.rows, with_it.rows, strict=True):
        assert after["holdout_top1"] >= before["holdout_top1"]
        assert after["widths"] == before["widths"] or after["holdout_top1"] > before["holdout_top1"]
        assert abs(after["madds"] - target.madds) <= max(NEAR * target.madds, abs(before["madds"] - target.madds))
    assert any(after["widths"] != before["widths"] for before, after in zip(without.rows, with_it.rows, strict=True))
    assert with_it.rows[-1]["widths"] == list(with_it.problem.widest)


def test_an_exchange_moves_one_step_of_a_group_for_as_many_of_another_as_cost_about_the_same() -> None:
    problem = toy(6, 5, 4, method="progressive", targets=(0.5,))
    options, own, low, high = problem.options(None), (4, 3, 3), (2, 1, 1), (6, 5, 4)
    drawn = random.Random(0)
    ranking = Ranking.of(problem, {group: [drawn.random() for _ in range(6 - group)] for group in range(3)})

    def alone(group: int, width: int) -> int:
        return abs(problem.madds(own) - problem.madds((*own[:group], width, *own[group + 1 :])))

    def balance(widths: Widths, one: int, other: int) -> float:
        return abs(alone(one, widths[one]) - alone(other, widths[other]))

    allowed = [each for each in product(*options) if all(a <= b <= c for a, b, c in zip(low, each, high, strict=True))]
    expected = set()
    for giver, taker in permutations(range(3), 2):
        pairs = [
            each
            for each in allowed
            if each[giver] < own[giver]
            and each[taker] > own[taker]
            and each[3 - giver - taker] == own[3 - giver - taker]
        ]
        for single in (
            [each for each in pairs if each[giver] == own[giver] - 1],
            [each for each in pairs if each[taker] == own[taker] + 1],
        ):
            expected.add(min(single, key=lambda each: balance(each, giver, taker)))

    def lost(widths: Widths) -> float:
        given = zip(ranking.importances, widths, own, strict=True)
        return math.fsum(sum(values[new:old]) - sum(values[old:new]) for values, new, old in given)

    assert len(expected) == EXCHANGES
    assert list(ranking.exchanges(options, own, low, high)) == sorted(expected, key=lost)


# Fine-tuning.


@pytest.mark.parametrize("threshold", [None, 0.0, 0.004, 0.02])
def test_the_network_is_fine_tuned_when_too_much_is_lost_since_the_last_time(
    threshold: float | None, tmp_path: Path
) -> None:
    problem = make_problem(threshold=threshold, reselection=False)
    made = run(problem, tmp_path)
    expected, reference = [], invented(problem.widest).num_correct
    for widths in made.way[1:]:
        correct = invented(widths).num_correct
        if threshold is not None and reference - correct > round(1000 * threshold):
            expected.append(widths)
            reference = correct  # the scores know nothing of the network
    assert [each.base.subnets[0].widths for each in made.invention.asked] == expected
    assert (len(expected) > 0) == (threshold is not None)
    assert made.way == run(make_problem(threshold=None), tmp_path / "other", landscape(3)).way
    assert METHOD.num_candidates(problem) >= made.found.summary["candidates"]


def test_a_fine_tuning_goes_on_with_the_present_weights_and_its_network_scores_from_then_on(tmp_path: Path) -> None:
    made = run(make_problem(threshold=0.0), tmp_path)
    asked, used = made.invention.asked, made.invention.used
    assert len(asked) > 2
    assert len(used) == len(asked) + 1, "the sorted network scores first"
    for number, (training, before) in enumerate(zip(asked, used[:-1], strict=True), start=1):
        base = training.base
        assert base.name == f"tuning_{number}"
        assert base.run.regime == Regime(widths="all", num_random=0, teacher="inplace", norm="recalibrate")
        assert (base.run.train.epochs, base.run.train.warmup_epochs) == (1, 0.25)
        assert base.run.bootstrapping.soft_ramp_epochs == 0
        assert [each.widths for each in base.subnets.all][1:] == [made.problem.widest]
        for widths in (each.widths for each in base.subnets.all):
            assert torch.equal(logits(training.start, widths), logits(before, widths))
    assert len({each.base.run.seed for each in asked}) == len(asked)
    last = used[-1]
    for subnet in made.found.subnets.all:
        assert torch.equal(logits(made.found.supernet, subnet.widths), logits(last, subnet.widths))
    scored = [line["kind"] for line in made.lines]
    after = len(scored) - scored[::-1].index("scored_by")
    compared = {tuple(line["widths"]) for line in made.lines[after:] if line["kind"] == "candidate"}
    assert {tuple(row["widths"]) for row in made.rows} <= compared, "all members are compared by the last network"


def test_the_expected_fine_tunings_become_cheaper_and_none_is_expected_without_a_threshold() -> None:
    problem = make_problem(threshold=0.02)
    later = METHOD.later(problem)
    assert [base.name for base in later] == [f"tuning_{number}" for number in range(1, 6)]
    madds = [problem.madds(base.subnets[0].widths) for base in later]
    assert madds == sorted(madds, reverse=True)
    assert madds[-1] == pytest.approx(problem.targets[0].madds, rel=0.1)
    assert not METHOD.later(make_problem(threshold=None))
    assert METHOD.passes(make_problem(ranking="noise"))[0][0] == "noise"


# The order of the channels.


def test_channels_are_sorted_by_the_ranking_and_the_widest_stays_the_same(tmp_path: Path) -> None:
    made = run(make_problem(threshold=None), tmp_path)
    assert made.found.summary["order"] == "weight_l1"
    widest = made.problem.widest
    torch.testing.assert_close(
        logits(made.found.supernet, widest), logits(made.start.supernet, widest), rtol=1e-4, atol=1e-5
    )
    for importances in made.ranking.importances:
        assert list(importances) == sorted(importances, reverse=True)
    other = run(make_problem(threshold=None, ranking="random"), tmp_path / "other")
    assert other.found.orders != made.found.orders


def test_weights_from_a_fresh_start_get_the_same_order(tmp_path: Path) -> None:
    problem = make_problem(threshold=0.0)
    fresh = rebuild(problem.subnets).eval()
    made = run(problem, tmp_path, fresh=fresh)
    torch.testing.assert_close(
        logits(made.found.supernet, problem.widest), logits(fresh, problem.widest), rtol=1e-4, atol=1e-5
    )
    assert made.found.orders == run(problem, tmp_path / "other").found.orders


@pytest.mark.parametrize("order", ["random", "weight_l1"])
def test_another_order_of_the_settings_stays(order: str, tmp_path: Path) -> None:
    problem = make_problem(ranking="bn_gamma", order=order, threshold=None)
    made = run(problem, tmp_path)
    assert made.found.orders == made.start.orders
    assert made.found.summary["order"] == order
    assert not made.invention.used


def test_groups_of_group_norm_keep_their_order_and_lose_their_last_channels(tmp_path: Path) -> None:
    problem = make_problem(norm="group_norm", threshold=0.0)
    made = run(problem, tmp_path)
    assert made.found.orders == tuple(tuple(range(width)) for width in problem.widest)
    assert made.found.summary["order"] == "none"
    assert {each.base.run.regime.norm for each in made.invention.asked} == {"group_norm"}


def test_writers_of_a_stream_with_channels_of_their_own(tmp_path: Path) -> None:
    problem = problem_of(
        "tests.dsnet.nets:Stream",
        options={"streams": "ids", "step": 2},
        method="progressive",
        targets=(0.4, 0.7),
        progressive=ProgressiveSettings(ranking="weight_l1", threshold=0.0),
    )
    made = run(problem, tmp_path)
    spec = made.found.supernet.spec
    writers = [number for number, group in enumerate(spec.groups) if group.ids]
    assert writers
    assert all(spec.groups[number].ids == made.found.orders[number] for number in writers)
    assert made.invention.asked
    for subnet in made.found.subnets.all:
        assert torch.equal(logits(made.found.supernet, subnet.widths), logits(made.invention.used[-1], subnet.widths))


# Settings.


def test_the_parts_leave_no_trace_in_records_of_other_methods() -> None:
    own = asdict(StructureSettings(method="progressive", targets=(0.5,)))
    assert set(own) - set(without_unread(json.loads(json.dumps(own)))) == {"bases", "score"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ()}, "method is progressive, which makes one sub-network per target"),
        ({"ranking": "noisy"}, "progressive.ranking is 'noisy'.*noise"),
        ({"threshold": 1.0}, "progressive.threshold is 1.0, but must be at least 0 and below 1 or null"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_problem(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"norm": "group_norm", "ranking": "bn_gamma"},
            "ranking is bn_gamma, but .* no BatchNorm: use noise, weight_l1",
        ),
        ({"targets": (0.001,)}, "no sub-network has .* the nearest"),
        ({"levels": 1}, "no sub-network has"),
        ({"levels": 2, "targets": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}, "6 targets, but .* leave only 5"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_structure(make_problem(**settings))
