"""Ways of getting sub-networks at equal cost: budgets, random widths, a run in pieces, and the
report from stored results."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.regime_runs import WORK, begin, do_jobs, record_path
from benchmarks.structure import main
from benchmarks.structure_report import load_results, make_report
from benchmarks.structure_runs import (
    ARMS,
    BASELINE,
    CONTROL,
    SCALES,
    Images,
    Job,
    Trainer,
    jobs,
    load_split_images,
    random_widths,
    uniform_set,
)
from dsnet.errors import PreflightError
from dsnet.files import atomic_write_json, read_json
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.structure.method import EPOCHS, TOLERANCE
from dsnet.structure.methods import structure_method

TINY = replace(
    SCALES["quick"],
    sizes={"train": 120, "gate": 60, "val": 60, "test": 100},
    train=replace(SCALES["quick"].train, epochs=7, batch_size=120),
    levels=2,
)


@pytest.fixture(scope="module")
def images() -> Images:
    return load_split_images(TINY, None)


@pytest.fixture
def trainer(images: Images, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv(ALLOW_IMPORTS, "1")
    return Trainer(TINY, images, torch.device("cpu"))


def silent(text: str) -> None:
    del text


def stop_after(number: int) -> Callable[[], bool]:
    asked = iter([False] * number)
    return lambda: next(asked, True)


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "search": {name: value for name, value in record["search"].items() if name != "seconds"}}


@pytest.mark.slow
def test_every_way_costs_the_same_to_15_percent_and_pieces_give_the_same_numbers(
    tmp_path: Path, trainer: Trainer, images: Images
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    # Trainable noise takes 96 passes, which alone are more than this small budget.
    todo = jobs([name for name in ARMS if not name.startswith("progressive") or name.endswith("no_noise")], (0,))
    begin(whole, TINY, images)
    assert do_jobs(whole, todo, trainer, say=silent) == []
    for job in todo:
        record = read_json(record_path(whole, job))
        spent = record["spent_madds"]
        assert spent["total"] == pytest.approx(record["budget_madds"], rel=0.15), job.name
        assert spent["total"] == spent["bases"] + spent["search"] + spent["training"]
        assert [row["name"] for row in record["subnets"]] == ["0.52", "1"]
    begin(pieces, TINY, images)
    autoslim, alone = Job("autoslim", 0), Job("alone", 0)
    sp_net = Job("sp_net", 0)
    stops = ((autoslim, 1), (autoslim, 6), (autoslim, 11), (alone, 12), (sp_net, 2), (sp_net, 7))
    for job, number in stops:
        assert do_jobs(pieces, [job], trainer, should_stop=stop_after(number), say=silent) == [job]
    folder = pieces / WORK / autoslim.name
    assert (folder / "structure" / "structure.json").is_file()
    assert list((folder / "joint").glob("epoch-*.json"))  # stopped before, in and after the search
    for job in (autoslim, alone, sp_net):
        assert do_jobs(pieces, [job], trainer, say=silent) == []
        assert without_times(read_json(record_path(pieces, job))) == without_times(read_json(record_path(whole, job)))
    searched = read_json(record_path(whole, Job("autoslim", 0)))
    assert min(searched["spent_madds"][part] for part in ("bases", "search")) > 0
    assert searched["search"]["candidates"] > 0
    pruned = {
        name: read_json(record_path(whole, Job(name, 0))) for name in ("sp_net", "sp_net_one_shot", "sp_net_fresh")
    }
    spent = {name: each["spent_madds"]["bases"] for name, each in pruned.items()}
    assert spent["sp_net"] == spent["sp_net_fresh"] > 0 < spent["sp_net_one_shot"]
    widths = {name: [row["widths"] for row in each["subnets"]] for name, each in pruned.items()}
    assert widths["sp_net"] == widths["sp_net_fresh"]
    assert pruned["sp_net"]["subnets"] != pruned["sp_net_fresh"]["subnets"]
    for each in pruned.values():
        assert [row["madds"] for row in each["subnets"]] == [row["madds"] for row in each["search"]["subnets"]]
    assert read_json(record_path(whole, Job(BASELINE, 0)))["spent_madds"]["search"] == 0


def test_random_widths_meet_the_targets_and_differ_by_seed(trainer: Trainer) -> None:
    trainer = replace(trainer, scale=SCALES["digits"])
    problem = trainer.problem(ARMS["autoslim"], 0)
    for target in problem.targets:
        drawn = random_widths(problem, target, random.Random(1))
        assert abs(problem.madds(drawn) - target.madds) <= TOLERANCE * target.madds
        assert all(width in options for width, options in zip(drawn, problem.options(None), strict=True))
    members = [trainer.problem(ARMS["random"], seed).settings.widths for seed in (0, 0, 1)]
    assert members[0] == members[1] != members[2]


def test_one_ratio_meets_the_targets_of_the_scales_to_a_percent(trainer: Trainer) -> None:
    for name in ("digits", "quick"):
        problem = replace(trainer, scale=SCALES[name]).problem(ARMS[BASELINE], 0)
        for target, member in zip(problem.targets, uniform_set(problem), strict=True):
            assert problem.madds(member.widths) == pytest.approx(target.madds, rel=TOLERANCE), name


@pytest.mark.parametrize("name", ["digits", "quick"])
def test_the_bases_of_sp_net_cost_somewhat_more_than_their_targets(name: str, trainer: Trainer) -> None:
    problem = replace(trainer, scale=SCALES[name]).problem(ARMS["sp_net"], 0)
    bases = structure_method("multi_base").bases(problem)
    for target, base in zip(problem.targets, bases, strict=True):
        madds = problem.madds(base.subnets.largest.widths)
        assert madds == problem.madds(problem.widest) if target.name == "1" else 1.1 < madds / target.madds < 2
        assert base.run.train.gamma_l1 == 1e-5
        assert base.run.train.epochs == max(1, round(EPOCHS * problem.run.train.epochs))
    run = problem.run
    assert (run.regime, run.train.soft_weight, run.bootstrapping.trust) == (ARMS[CONTROL].regime, 0.9, "full")


def record(arm: str, seed: int, top1: Sequence[float], **others: Any) -> dict[str, Any]:
    rows = [
        {"name": name, "target_madds": 10.0 * k + 10, "madds": 10 * k + 10, "val": value, "top1": value}
        for k, (name, value) in enumerate(zip(("0.5", "1"), top1, strict=True))
    ]
    own = {"arm": arm, "seed": seed, "epochs": 5, "budget_madds": 2e12, "num_test_images": 100}
    own["spent_madds"] = {"bases": 0.0, "search": 0.2e12, "training": 1.9e12, "total": 2.1e12}
    return {**own, "subnets": rows, **others}


def stored(folder: Path, records: Sequence[Mapping[str, Any]], images: Images) -> Path:
    begin(folder, TINY, images)
    for each in records:
        atomic_write_json(record_path(folder, Job(each["arm"], each["seed"])), each)
    return folder


def test_the_report_says_no_difference_where_the_interval_holds_0(
    tmp_path: Path, images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    even, better = (0.50, 0.52, 0.48), (0.60, 0.621, 0.579)
    folder = stored(
        tmp_path,
        [
            *(record(BASELINE, seed, (value, 0.7)) for seed, value in enumerate(even)),
            *(
                record("autoslim", seed, (value, 0.7 + shift))
                for seed, (value, shift) in enumerate(zip(better, (0.1, -0.1, 0.02), strict=True))
            ),
            record("random", 0, (0.4, 0.7)),
            record(CONTROL, 0, (0.5, 0.6)),
            record("sp_net", 0, (0.55, 0.58)),
            record("s_net", 0, (0.4, 0.7), error="the loss is not finite"),
        ],
        images,
    )
    assert main(["report", "--folder", str(folder)]) == 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(text)
    lines = [line for line in text.splitlines() if line.startswith("| autoslim | 3")]
    assert "50.0" not in lines[0]
    assert "| +10.0 ±0.2 |" in lines[1]
    assert "| no difference (+0.7 ±" in lines[1]
    assert "| random | 1 | -10.0 (1 seed) |" in text
    assert "| autoslim | 5 | 0.00 | 0.10 | 0.95 | 1.050 |" in text
    assert "| sp_net | 1 | +5.0 (1 seed) | -12.0 (1 seed) |" in text  # to uniform_ib
    assert "| sp_net | 1 | +5.0 (1 seed) | -2.0 (1 seed) |" in text  # to s_net_kd
    assert f"| {CONTROL} | {ARMS[CONTROL].label} |" in text
    assert "the loss is not finite" in text
    assert "autoslim" in (folder / "figure.html").read_text(encoding="utf-8")
    headline = make_report(load_results(folder)).headline
    assert headline.estimate.value == pytest.approx(-100 * (0.1 + 0.02 / 3) / 2)


def test_a_report_needs_runs(tmp_path: Path, images: Images) -> None:
    with pytest.raises(PreflightError, match="no runs"):
        load_results(tmp_path)
    folder = stored(tmp_path, [record("random", 0, (0.4, 0.7))], images)
    with pytest.raises(PreflightError, match="no seed in common"):
        make_report(load_results(folder))
