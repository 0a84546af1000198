"""Start weights: where they are found, what is taken from them, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsnet.data.training_images import InMemoryImages
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import layout, rebuild
from dsnet.files import atomic_write_json, file_sha256
from dsnet.network.supernet import Supernet
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import save_checkpoint, save_supernet
from dsnet.training.settings import TrainSettings
from dsnet.training.start import Start, apply_start, check_start, first_weights, lay_out, load_start, relayout
from dsnet.training.supernet import train_supernet
from dsnet.training.supernet_run import SupernetRun
from tests.dsnet.cases import FAMILIES
from tests.dsnet.samples import (
    NORMALIZATION,
    SMALL_OPTIONS,
    random_images,
    random_labels,
    random_pixels,
    shaken,
    small_run,
    small_set,
    task,
)


def stored(folder: Path, subnets: SubnetSet | None = None, seed: int = 0, run: SupernetRun | None = None) -> Supernet:
    """A supernet saved as `final` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    net = shaken(rebuild(subnets if subnets is not None else small_set("ds_tiny")), seed).eval()
    save_supernet(folder / "final", net, {"run": (run or small_run()).to_json(), "step": 7})
    return net


def same_tensors(supernet: Supernet, start: Start) -> bool:
    state = supernet.state_dict()
    return state.keys() == start.tensors.keys() and all(torch.equal(state[name], start.tensors[name]) for name in state)


@pytest.mark.parametrize("named", ["final", "final.json", "final.safetensors", "."])
def test_a_checkpoint_is_found_by_its_stem_its_files_and_its_folder(tmp_path: Path, named: str) -> None:
    net = stored(tmp_path)
    start = load_start(tmp_path / named)
    assert same_tensors(net, start)
    assert start.subnets == net.subnets
    assert start.normalization == NORMALIZATION
    assert start.sha256 == file_sha256(tmp_path / "final.safetensors")
    assert start.origin() == {"file": "final.safetensors", "sha256": start.sha256}


def test_the_output_folder_and_its_environment_variable_lead_to_the_supernet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = stored(tmp_path / "out" / "supernet")
    monkeypatch.setenv("WHERE", str(tmp_path))
    assert same_tensors(net, load_start(Path("$WHERE/out")))


def test_a_run_folder_leads_to_what_its_manifest_names_and_else_to_the_newest_supernet(tmp_path: Path) -> None:
    older, newer = stored(tmp_path / "supernet" / "aaaa", seed=1), stored(tmp_path / "supernet" / "bbbb", seed=2)
    (tmp_path / "supernet" / "unfinished").mkdir()
    os.utime(tmp_path / "supernet" / "aaaa" / "final.json", (1, 1))
    assert same_tensors(newer, load_start(tmp_path))
    atomic_write_json(tmp_path / "manifest.json", {"stages": {"supernet": {"dir": "supernet/aaaa"}}})
    assert same_tensors(older, load_start(tmp_path))
    atomic_write_json(tmp_path / "manifest.json", {"stages": {"supernet": {"dir": "supernet/unfinished"}}})
    assert same_tensors(newer, load_start(tmp_path))


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_of_an_epoch_s_checkpoint_the_kept_weights_are_taken(tmp_path: Path, weights: str) -> None:
    run = small_run(weights=weights, train=TrainSettings(epochs=1, batch_size=16), recalibration_images=0)
    images = InMemoryImages(random_pixels(32, 8), random_labels(32), run.augmentation)
    net = rebuild(layout("ds_tiny", task(image_size=8), SMALL_OPTIONS["ds_tiny"]))
    assert train_supernet(net, images, run, folder=tmp_path) is not None
    final = load_start(tmp_path)
    epoch = load_start(tmp_path / "epoch-00001.json")
    assert epoch.tensors.keys() == final.tensors.keys()
    assert all(torch.equal(value, final.tensors[name]) for name, value in epoch.tensors.items())
    assert epoch.sha256 != final.sha256


def test_where_nothing_is_finished_the_error_lists_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "epoch-00001.json").touch()
    with pytest.raises(CheckpointError, match=r"no finished checkpoint.*final\.json.*supernet/final\.json"):
        load_start(tmp_path)
    with pytest.raises(CheckpointError, match=r"no finished checkpoint.*nothing\.json"):
        load_start(tmp_path / "nothing")


def test_a_file_without_a_supernet_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", {"x": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"other\.json: holds no supernet"):
        load_start(tmp_path / "other")
    stored(tmp_path)
    with (tmp_path / "final.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_start(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_layouts_take_every_tensor(tmp_path: Path, family: str) -> None:
    subnets = small_set(family)
    net = stored(tmp_path, subnets)
    taken = rebuild(subnets, torch.Generator().manual_seed(9))
    assert apply_start(taken, load_start(tmp_path)) == []
    x = random_images(2)
    assert all(torch.equal(taken.eval()(x, subnet), net(x, subnet)) for subnet in subnets.all)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_class_count_leaves_the_classifier_alone_fresh(tmp_path: Path, family: str) -> None:
    stored(tmp_path, small_set(family))
    taken = rebuild(small_set(family, num_classes=4), torch.Generator().manual_seed(9))
    before = {name: value.clone() for name, value in taken.state_dict().items()}
    start = load_start(tmp_path)
    fresh = apply_start(taken, start)
    assert len(fresh) == 2
    tensors = taken.state_dict()
    assert all(tensors[name].shape[0] == 4 for name in fresh)
    for name, value in taken.state_dict().items():
        assert torch.equal(value, before[name] if name in fresh else start.tensors[name]), name


def test_a_subset_takes_its_own_statistics_and_a_superset_says_which_are_missing(tmp_path: Path) -> None:
    whole = small_set("ds_tiny")
    few = replace(whole, members=whole.members[:2])
    net = stored(tmp_path / "whole", whole)
    taken = rebuild(few)
    assert apply_start(taken, load_start(tmp_path / "whole")) == []
    x = random_images(2)
    assert all(torch.equal(taken.eval()(x, subnet), net(x, subnet)) for subnet in few.all)

    stored(tmp_path / "few", few)
    taken = rebuild(whole)
    fresh = apply_start(taken, load_start(tmp_path / "few"))
    left_out = whole.members[2]
    missing = {"_".join(map(str, left_out.prefix(depth))) for depth in range(1, len(left_out.widths) + 1)}
    assert fresh
    assert all(name.rpartition(".")[2].partition("_")[2] in missing for name in fresh)


def test_what_does_not_fit_is_told_in_short_and_nothing_is_copied(tmp_path: Path) -> None:
    stored(tmp_path, layout("ds_tiny", task(), {"width": 1.0, "num_routes": 3}))
    start = load_start(tmp_path)
    tensors = {name: value for name, value in start.tensors.items() if name != "stem.weight"}
    start = replace(start, tensors={**tensors, "extra.weight": torch.zeros(1)})
    taken = rebuild(layout("ds_tiny", task(), {"width": 0.5, "num_routes": 3}))
    before = {name: value.clone() for name, value in taken.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        apply_start(taken, start)
    message = str(caught.value)
    assert "missing stem.weight" in message
    assert "unexpected extra.weight" in message
    assert " has shape " in message
    assert message.startswith(f"supernet.init_from: {tmp_path}/final holds ds_tiny with ")
    assert message.index("Use the model") < message.index("missing stem.weight")
    assert " more tensors" in message
    assert len(message) < 800 + len(str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in taken.state_dict().items())


@pytest.mark.parametrize(("made", "wanted"), [("private_stats", "private_affine"), ("private_affine", "private_stats"),
                                              ("private_stats", "group_norm"), ("group_norm", "private_stats")])  # fmt: skip
def test_another_normalisation_is_not_taken_for_the_same(tmp_path: Path, made: str, wanted: str) -> None:
    options = SMALL_OPTIONS["ds_tiny"]
    stored(tmp_path, layout("ds_tiny", task(), options, made))
    with pytest.raises(CheckpointError, match=r"missing|unexpected"):
        apply_start(rebuild(layout("ds_tiny", task(), options, wanted)), load_start(tmp_path))


@pytest.mark.parametrize("model", ["checkpoint", "ds_tiny"])
def test_images_of_another_number_of_channels_are_one_sentence(tmp_path: Path, model: str) -> None:
    stored(tmp_path)
    options = {} if model == "checkpoint" else SMALL_OPTIONS[model]
    with pytest.raises(ConfigError) as caught:
        lay_out(model, replace(task(), in_channels=1), options, None, load_start(tmp_path))
    assert str(caught.value) == (
        "supernet.init_from: the network reads images of 3 channel(s), but the data has 1; choose another checkpoint or other data"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_start_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    net = stored(tmp_path)
    with torch.no_grad():
        net.get_parameter("classifier.bias")[0] = value
    save_supernet(tmp_path / "final", net, {"run": small_run().to_json()})
    with pytest.raises(CheckpointError, match=r"supernet\.init_from: .*final: NaN or infinity in classifier\.bias: "):
        load_start(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_laid_out_for_another_task_equals_the_family_s_own_layout(family: str) -> None:
    there = small_set(family, num_classes=10, image_size=16)
    assert relayout(there, task(4, 24)) == small_set(family, num_classes=4, image_size=24)
    with pytest.raises(ConfigError, match=r"3 channel.*has 1"):
        relayout(there, replace(task(), in_channels=1))


def test_model_checkpoint_takes_the_stored_network_as_it_is(tmp_path: Path) -> None:
    net = stored(tmp_path)
    start = load_start(tmp_path)
    assert lay_out("checkpoint", task(), {}, None, start) == net.subnets
    assert lay_out("checkpoint", task(), {}, "private_stats", start) == net.subnets
    assert lay_out("ds_tiny", task(), SMALL_OPTIONS["ds_tiny"], None, start) == net.subnets
    with pytest.raises(ConfigError, match=r"supernet\.options.*remove width"):
        lay_out("checkpoint", task(), {"width": 1.0}, None, start)
    with pytest.raises(ConfigError, match=r"'group_norm'.*'private_stats'"):
        lay_out("checkpoint", task(), {}, "group_norm", start)
    with pytest.raises(ConfigError, match="init_from is not set"):
        lay_out("checkpoint", task(), {}, None, None)


def test_first_weights_repeat_with_the_seed_and_follow_the_start(tmp_path: Path) -> None:
    net = stored(tmp_path)
    one, fresh = first_weights(net.subnets, 3)
    again, _ = first_weights(net.subnets, 3)
    other, _ = first_weights(net.subnets, 4)
    assert fresh == list(one.state_dict())
    assert torch.equal(one.classifier.weight, again.classifier.weight)  # type: ignore[arg-type]
    assert not torch.equal(one.classifier.weight, other.classifier.weight)  # type: ignore[arg-type]
    taken, fresh = first_weights(net.subnets, 3, load_start(tmp_path))
    assert fresh == []
    assert torch.equal(taken.classifier.weight, net.classifier.weight)  # type: ignore[arg-type]


def test_untrained_tensors_are_never_handed_on(tmp_path: Path) -> None:
    stored(tmp_path)
    start = load_start(tmp_path)
    kept, trained = (small_run(train=TrainSettings(epochs=epochs)) for epochs in (0, 1))
    classifier, statistics = ["classifier.weight", "classifier.bias"], ["stem_norm.mean_4", "stem_norm.updates_4"]
    check_start(trained, None, list(start.tensors), 10)
    check_start(trained, start, [*classifier, *statistics], 4)
    check_start(kept, start, statistics, 10)
    check_start(replace(kept, recalibration_images=0), start, [], 10)
    with pytest.raises(ConfigError, match=r"epochs is 0.*init_from names no weights"):
        check_start(kept, None, list(start.tensors), 10)
    with pytest.raises(ConfigError, match=r"epochs is 0.*does not have the 4 classes of the data"):
        check_start(kept, start, classifier, 4)
    with pytest.raises(ConfigError, match=r"images is 0.*lacks"):
        check_start(replace(kept, recalibration_images=0), start, statistics, 10)
    with pytest.raises(ConfigError, match=r"images is 0.*1 epochs"):
        check_start(replace(trained, recalibration_images=0), start, [], 10)


def test_0_epochs_hand_the_start_weights_on_bit_for_bit(tmp_path: Path) -> None:
    net = stored(tmp_path / "there")
    run = small_run(train=TrainSettings(epochs=0, batch_size=16), recalibration_images=0)
    images = InMemoryImages(random_pixels(32), random_labels(32), run.augmentation)
    first, _ = first_weights(net.subnets, run.seed, load_start(tmp_path / "there"))
    assert train_supernet(first, images, run, folder=tmp_path / "here") is not None
    assert same_tensors(net, load_start(tmp_path / "here"))
