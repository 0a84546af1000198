"""Dimensions at equal budgets: the sub-networks of every arm, plain slicing of the stream, a run in
pieces, and the statistics of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.dimension_report import (
    WIDTH,
    ArmResults,
    accelerations,
    as_text,
    differences,
    load_results,
    make_report,
    make_sections,
)
from benchmarks.dimension_runs import (
    ACCELERATION,
    DEPTH,
    EMBED,
    KERNELS,
    SCALES,
    TIMES,
    VIT_ARMS,
    Cell,
    CellRunner,
    Part,
    arms_of,
    build,
    cells_of,
    groups_of,
    load_part,
    members_of,
    packed,
    unpacked,
)
from benchmarks.dimensions import main
from benchmarks.regime_runs import begin, do_jobs, record_path
from dsnet.deploy.materialize import materialize
from dsnet.errors import ConfigError, PreflightError
from dsnet.families import Task
from dsnet.files import read_json
from dsnet.space.cost import subnet_cost
from dsnet.training.train_cost import training_madds

PARTS = [(scale, name) for scale, parts in SCALES.items() for name in parts]
QUICK_VIT = SCALES["quick"]["vit"]


def task_of(part: Part) -> Task:
    return Task(10, 1, 8) if part.data == "digits" else Task(10, 3, 32)


@pytest.mark.parametrize(("scale", "name"), PARTS)
def test_arms_meet_the_same_budgets_in_their_own_dimensions(scale: str, name: str) -> None:
    part = SCALES[scale][name]
    task = task_of(part)
    sets = {arm: members_of(part, arms_of(part.family)[arm], task) for arm in arms_of(part.family)}
    ruler = sets[part.ruler]
    budgets = [subnet_cost(ruler.spec, subnet, task.image_size).madds for subnet in ruler]
    assert [ruler[number].widths[groups_of(ruler.spec)[part.ruler][0]] for number in range(len(part.ruler_widths))] == [
        *part.ruler_widths
    ]
    assert budgets == sorted(set(budgets))
    for arm, subnets in sets.items():
        own = arms_of(part.family)[arm]
        groups, widest = groups_of(subnets.spec), subnets[len(subnets) - 1].widths
        assert widest == ruler[len(ruler) - 1].widths
        allowed = {number for dimension in (*own.dimensions, *own.start) for number in groups[dimension]}
        for subnet, budget in zip(subnets, budgets, strict=True):
            madds = subnet_cost(subnets.spec, subnet, task.image_size).madds
            assert madds == pytest.approx(budget, rel=0.04), (arm, subnet)
            changed = {number for number, width in enumerate(subnet.widths) if width != widest[number]}
            assert changed <= allowed, (arm, subnet)


@pytest.mark.parametrize("name", ["mbnet", "vit", "tiny"])
def test_trainings_cost_the_same_to_5_percent(name: str) -> None:
    part = replace(SCALES["cpu"][name], data="digits", sizes=SCALES["quick"]["vit"].sizes)
    runner = CellRunner(part, load_part(part, None), torch.device("cpu"))
    task = task_of(SCALES["cpu"][name])
    costs = [
        training_madds(runner.run_of(arm, 0), members_of(part, arm, task), 600, task.image_size)
        for arm in arms_of(part.family).values()
    ]
    assert max(costs) / min(costs) <= 1.05


def test_both_narrows_kernels_and_channels() -> None:
    part = SCALES["cpu"]["tiny"]
    subnets = members_of(part, arms_of(part.family)["both"], task_of(part))
    kernels = groups_of(subnets.spec)[KERNELS]
    assert [subnet.widths[kernels[0]] for subnet in subnets] == [5, 5, 7]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_plain_slicing_drops_the_rest_of_the_stream(images: torch.Tensor) -> None:
    task = task_of(QUICK_VIT)
    idle, plain = (build(QUICK_VIT, VIT_ARMS[name], task, 0).eval() for name in (EMBED, "plain"))
    narrow, widest = plain.subnets
    assert [subnet.widths for subnet in plain.subnets] == [subnet.widths for subnet in idle.subnets]
    with torch.no_grad():
        torch.testing.assert_close(plain(images, widest), idle(images, idle.subnets[1]))
        own = plain(images, narrow)
        assert not torch.allclose(own, idle(images, idle.subnets[0]))
        for whole in (True, False):
            torch.testing.assert_close(
                materialize(plain, plain.subnets[int(whole)])(images), plain(images, plain.subnets[int(whole)])
            )
        kept = narrow.widths[groups_of(plain.spec)[EMBED][-1]]
        plain.classifier.weight[:, kept:] += 1  # type: ignore[operator, index]
        plain.norm.weight[kept:] += 1  # type: ignore[operator, index]
        torch.testing.assert_close(plain(images, narrow), own)
    saved = subnet_cost(idle.spec, narrow, 8).madds - subnet_cost(plain.spec, narrow, 8).madds
    assert saved == (widest.widths[0] - kept) * task.num_classes


def test_plain_slicing_refuses_blocks_of_several_widths(images: torch.Tensor) -> None:
    plain = build(QUICK_VIT, VIT_ARMS["plain"], task_of(QUICK_VIT), 0).eval()
    first = groups_of(plain.spec)[EMBED][0]
    widths = tuple(width - (number == first) for number, width in enumerate(plain.subnets[1].widths))
    with pytest.raises(AssertionError, match="different parts of the stream"):
        plain(images, plain.subnets.at(widths))


def silent(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four arms of the quick transformer."""
    root = tmp_path_factory.mktemp("dimensions")
    material = load_part(QUICK_VIT, None)
    begin(root / "vit", QUICK_VIT, material)
    todo = cells_of(QUICK_VIT, (0, 1), ("together", EMBED, "plain", DEPTH))
    assert do_jobs(root / "vit", todo, CellRunner(QUICK_VIT, material, torch.device("cpu")), say=silent) == []
    return root


def test_the_tables_fit_100_columns_and_agree_with_the_records(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= WIDTH
    assert "…" not in printed
    (part,) = load_results(folder)
    report = make_report([part])
    assert printed.startswith(as_text(make_sections([part])))
    assert 1 <= report.headline.estimate.value <= report.headline.goal
    rows = {(row.arm, row.name): row for row in part.rows}
    assert [row.arm for row in part.rows] == [name for name in ("together", EMBED, DEPTH, "plain") for _ in range(2)]
    record = read_json(record_path(folder / "vit", Cell(EMBED, 1)))
    for row in record["subnets"]:
        assert row["top1"] == unpacked(row["right"], record["num_test_images"]).mean()
    other = read_json(record_path(folder / "vit", Cell(EMBED, 0)))
    assert rows[EMBED, "1"].top1 == pytest.approx((record["subnets"][1]["top1"] + other["subnets"][1]["top1"]) / 2)
    assert rows["together", "1"].at_madds is None
    difference = rows["plain", "1"].at_madds
    assert difference is not None
    assert difference.value == pytest.approx(np.mean(rows["plain", "1"].by_seed))
    assert {row.ms for row in part.rows if row.name == "1"} == {rows["together", "1"].ms}  # one network, timed once
    assert read_json(folder / "report.json")["vit"]["seeds"][EMBED] == [0, 1]


def test_the_acceleration_is_that_of_the_stored_rounds(folder: Path) -> None:
    (part,) = load_results(folder)
    assert part.acceleration is not None
    (found,) = accelerations(part)
    madds, samples = part.acceleration["madds"], part.acceleration["batches"][0]["samples_ms"]
    medians = {name: np.median(ms) for name, ms in samples.items()}
    assert len(madds) == 4
    assert found["measured"].value == pytest.approx(medians["static widest"] / medians["dynamic"])
    assert found["ceiling"].value == pytest.approx(medians["static widest"] / medians["static cheapest"])
    assert found["of_madds"] == pytest.approx(madds[-1] / np.mean(madds))
    assert found["of_madds"] < madds[-1] / madds[0]


def test_finished_cells_are_skipped_and_others_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--scale", "quick", "--parts", "vit", "--arms", EMBED, "plain", "--folder", str(folder)]
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "vit" / "runs").iterdir()}
    assert main([*command, "--seeds", "0", "1"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "vit" / "runs").iterdir()} == before
    assert main([*command, "--seeds", "0", "2", "--max-seconds", "0"]) == 6
    assert "left: vit/" in capsys.readouterr().err


def test_a_training_in_pieces_gives_the_same_answers(folder: Path, tmp_path: Path) -> None:
    material = load_part(QUICK_VIT, None)
    begin(tmp_path, QUICK_VIT, material)
    runner, cell = CellRunner(QUICK_VIT, material, torch.device("cpu")), Cell("plain", 0)
    asked = iter([False, False])
    assert do_jobs(tmp_path, [cell], runner, should_stop=lambda: next(asked, True), say=silent) == [cell]
    assert do_jobs(tmp_path, [cell], runner, say=silent) == []
    pieces, whole = (read_json(record_path(root, cell)) for root in (tmp_path, folder / "vit"))
    assert pieces["subnets"] == whole["subnets"]


def test_a_folder_keeps_its_settings_and_an_empty_one_has_no_report(tmp_path: Path) -> None:
    material = load_part(QUICK_VIT, None)
    begin(tmp_path / "vit", QUICK_VIT, material)
    with pytest.raises(PreflightError, match="no finished cells"):
        load_results(tmp_path)
    with pytest.raises(ConfigError, match="rounds"):
        begin(tmp_path / "vit", replace(QUICK_VIT, rounds=4), material)


def test_measurements_come_first_and_seeds_one_after_the_other() -> None:
    names = [cell.name for cell in cells_of(QUICK_VIT, (0, 1), (EMBED, "plain"))]
    assert names == [TIMES, ACCELERATION, "embed-seed0", "plain-seed0", "embed-seed1", "plain-seed1"]
    assert Cell(ACCELERATION) not in cells_of(SCALES["quick"]["tiny"], (0,))


def arm_results(right: dict[int, np.ndarray], madds: Sequence[int], val: Sequence[float]) -> ArmResults:
    def record(answers: np.ndarray) -> dict[str, Any]:
        rows = [
            {"name": str(number), "madds": cost, "val": val[number], "right": packed(answers[:, number])}
            for number, cost in enumerate(madds)
        ]
        return {"subnets": rows, "num_test_images": len(answers)}

    return ArmResults({seed: record(answers) for seed, answers in right.items()})


def test_differences_are_paired_over_images_and_averaged_over_seeds() -> None:
    rng = np.random.default_rng(0)
    base = {seed: rng.random((203, 2)) < 0.5 for seed in (0, 1)}
    better = {seed: answers.copy() for seed, answers in base.items()}
    for answers in better.values():
        answers[np.flatnonzero(~answers[:, 0])[:20], 0] = True  # right on 20 more images
    madds = np.array([100.0, 200.0])
    line = arm_results(base, (100, 200), (0.4, 0.5))
    own = arm_results(better, (100, 200), (0.4, 0.5))
    low, wide = differences(own, madds, line, madds, (0, 1))
    assert low.value == pytest.approx(20 / 203)
    assert 0 < low.low < low.value < low.high < 0.16  # unpaired, the interval would be twice as wide
    assert (wide.value, wide.low, wide.high) == (0, 0, 0)
    assert not low.is_bound
    (middle, _) = differences(own, np.array([150.0, 200.0]), line, madds, (0, 1))
    shares = line.shares((0, 1)).mean(axis=0)
    assert middle.value == pytest.approx(own.shares((0, 1))[:, 0].mean() - shares.mean())
    (cheaper, _) = differences(own, np.array([50.0, 200.0]), line, madds, (0, 1))
    assert (cheaper.value, cheaper.is_bound) == (pytest.approx(20 / 203), True)
    assert cheaper.text().startswith("≥+9.9 [")


def test_answers_are_stored_exactly() -> None:
    right = np.random.default_rng(1).random(101) < 0.3
    assert (unpacked(packed(right), 101) == right).all()
