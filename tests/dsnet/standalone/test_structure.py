"""`python -m dsnet.training` with a choice of sub-networks: the same results however often it is
interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.errors import ConfigError, NonFiniteLossError, StoppedError
from dsnet.files import file_sha256, read_json
from dsnet.standalone.output_folder import OutputFolder
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.standalone.stages import run_standalone
from dsnet.stored.checkpoint import load_supernet
from dsnet.structure.search import load_structure

CONFIG: dict[str, Any] = {
    "seed": 5,
    "data": {"name": "digits", "limit": 90},
    "supernet": {
        "model": "ds_tiny",
        "options": {"width": 0.5, "num_routes": 3},
        "train": {"epochs": 2, "batch_size": 24, "lr": 0.05},
        "structure": {
            "method": "greedy",
            "targets": [0.4, 0.7],
            "step": 16,
            "pin": "gate",
            "holdout": 0.2,
            "epochs": 1,
        },
    },
    "measure": {"repeats": 1, "warmup": 0, "batch_sizes": [1], "group_sizes": [1]},
}


def config(**structure: Any) -> StandaloneConfig:
    supernet = {**CONFIG["supernet"], "structure": {**CONFIG["supernet"]["structure"], **structure}}
    return StandaloneConfig.from_json(json.loads(json.dumps({**CONFIG, "supernet": supernet})))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The number of threads decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("at-once") / "out"
    assert run_standalone(config(), out, device="cpu").is_done("table")
    return out


def results(out: Path) -> Mapping[str, Any]:
    lines = [json.loads(line) for line in (out / "structure" / "trace.jsonl").read_text().splitlines()]
    files = ("structure/structure.safetensors", "supernet/final.safetensors", "measure/subnets.json")
    return {
        "trace": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        **{name: file_sha256(out / name) for name in files},
    }


class StopAt:
    """Returns True from the n-th call on."""

    def __init__(self, question: int) -> None:
        self.left = question

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_the_supernet_has_what_was_found_and_starts_from_it(at_once: Path) -> None:
    chosen = load_structure(at_once / "structure")
    trained, meta = load_supernet(at_once / "supernet" / "final")
    assert trained.subnets == chosen.subnets
    assert trained.subnets.teacher is not None, "no target is the whole network"
    assert meta["run"]["origin"]["sha256"] == file_sha256(at_once / "structure" / "structure.safetensors")
    assert [row["name"] for row in read_json(at_once / "measure" / "subnets.json")["subnets"]] == [
        "0.4",
        "0.7",
        "largest",
    ]
    assert list(OutputFolder(at_once).manifest()["stages"]) == ["structure", "supernet", "measure", "table"]


@pytest.mark.parametrize("every", [2, 7])
def test_calls_that_are_stopped_again_and_again_end_with_the_same_bits(
    at_once: Path, tmp_path: Path, every: int
) -> None:
    assert stopped_again_and_again(tmp_path / "out", every) > 1
    assert results(tmp_path / "out") == results(at_once)


def stopped_again_and_again(out: Path, first: int, **structure: Any) -> int:
    """Run to the end with calls of which each is stopped a little later than the one before;
    returns how many were stopped."""
    num_calls = 0
    while True:
        try:
            run_standalone(config(**structure), out, device="cpu", should_stop=StopAt(first + num_calls))
            return num_calls
        except StoppedError:
            num_calls += 1


MULTI_BASE: dict[str, Any] = {"method": "multi_base", "step": 4, "bases": {"widths": [0.75, 1.0], "gamma_l1": 0.001}}


def test_a_pruning_that_is_stopped_in_any_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    own = {**MULTI_BASE, "bases": {**MULTI_BASE["bases"], "rounds": 2}}
    run_standalone(config(**own), whole, device="cpu")
    assert stopped_again_and_again(out, 2, **own) > 1
    assert results(out) == results(whole)
    found = load_structure(whole / "structure")
    assert [subnet.name for subnet in found.subnets.members] == ["0.4", "0.7"]
    for name in ("base_0.75", "base_1"):
        first, second = (
            read_json(whole / "structure" / "bases" / each / "final.json")["run"] for each in (name, f"{name}_round_1")
        )
        assert first["train"]["gamma_l1"] == second["train"]["gamma_l1"] == 0.001
        assert first["origin"] == {}


@pytest.mark.slow
def test_a_progressive_search_that_is_stopped_in_any_fine_tuning_ends_with_the_same_bits(tmp_path: Path) -> None:
    own = {"ranking": "taylor", "threshold": 0.0}
    progressive = {"method": "progressive", "progressive": own, "epochs": 12, "holdout": 0.4, "step": 8}
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_standalone(config(**progressive), whole, device="cpu")
    assert stopped_again_and_again(out, 9, **progressive) > 5
    assert results(out) == results(whole)
    tunings = sorted((whole / "structure" / "bases").glob("tuning_?"))
    assert len(tunings) > 1
    for number, folder in enumerate(tunings, start=1):
        supernet, meta = load_supernet(folder / "final")
        start, _ = load_supernet(folder.with_name(f"tuning_{number}-start"))
        assert meta["run"]["regime"]["teacher"] == "inplace"
        assert any(not torch.equal(value, start.state_dict()[name]) for name, value in supernet.named_parameters())
    found = load_structure(whole / "structure")
    for name, value in found.supernet.named_parameters():
        assert torch.equal(value, supernet.state_dict()[name]), "training goes on with the last network"


@pytest.mark.slow
def test_a_base_that_diverges_is_named_after_the_others_are_trained(tmp_path: Path) -> None:
    diverging = config(**{**MULTI_BASE, "epochs": 2})
    diverging = replace(
        diverging,
        supernet=replace(diverging.supernet, train=replace(diverging.supernet.train, lr=1e6, optimizer="sgd")),
    )
    with pytest.raises(NonFiniteLossError, match=r"base_0.75: .*; base_1: .*lower supernet.train.lr"):
        run_standalone(diverging, tmp_path / "out", device="cpu")
    assert not OutputFolder(tmp_path / "out").is_done("structure")


def test_another_choice_needs_another_folder(at_once: Path) -> None:
    with pytest.raises(ConfigError, match=r"supernet\.structure\.targets"):
        run_standalone(config(targets=[0.4, 0.8]), at_once, device="cpu")


def test_a_supernet_of_a_choice_that_was_made_again_is_trained_again(at_once: Path, tmp_path: Path) -> None:
    folder = OutputFolder(Path(shutil.copytree(at_once, tmp_path / "out")))
    manifest = folder.manifest()
    manifest["stages"]["supernet"]["structure"] = "0" * 64
    folder.manifest_path.write_text(json.dumps(manifest))
    assert folder.is_done("structure")
    assert not folder.is_done("supernet")
    assert not folder.is_done("measure")


def test_a_target_that_no_sub_network_has_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nearest"):
        run_standalone(config(targets=[0.001, 1.0]), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "structure").exists()
