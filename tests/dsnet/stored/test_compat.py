"""Released checkpoints: read exactly or refused whole, and never executed. (The meaning of the
names is tested in test_parity.)"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsnet.errors import CheckpointError
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Evidence
from dsnet.stored.compat import load_dsnet_checkpoint, load_dsnet_gate
from dsnet.stored.compat.dsnet_release import HEAD
from dsnet.stored.compat.torch_files import read_torch_file
from tests.dsnet.samples import random_images
from tests.dsnet.stored.released import AVERAGED, NUM_CLASSES, RELEASED, SIZE, STUDENT, TEACHER, whole_checkpoint


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "model_best.pth.tar"
    torch.save(whole_checkpoint(), path)
    return path


def assert_equal_networks(met: Supernet, expected: Supernet) -> None:
    assert not met.training
    tensors = met.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(tensors[name], value), name


def message_of(source: Any, num_classes: int = NUM_CLASSES, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_dsnet_checkpoint(source, num_classes, **options)
    return str(error.value)


@pytest.mark.slow
@torch.no_grad()
def test_a_file_gives_the_logits_of_every_sub_network_exactly(checkpoint_file: Path) -> None:
    supernet, subnets = load_dsnet_checkpoint(checkpoint_file, NUM_CLASSES, image_size=SIZE)
    assert_equal_networks(supernet, STUDENT)
    assert subnets is supernet.subnets
    assert len(subnets) == 14
    assert subnets.largest.widths == (24, 88, 168, 264, 640, 1152)
    images = random_images(2, SIZE)
    for met, expected in zip(subnets.all, STUDENT.subnets.all, strict=True):
        assert torch.equal(supernet(images, met), STUDENT(images, expected))


@pytest.mark.slow
def test_the_averaged_weights_are_taken_where_asked(checkpoint_file: Path) -> None:
    supernet, _ = load_dsnet_checkpoint(str(checkpoint_file), NUM_CLASSES, ema=True, image_size=SIZE)
    assert_equal_networks(supernet, TEACHER)
    assert torch.equal(load_dsnet_gate(checkpoint_file, ema=True).weight, AVERAGED[HEAD].flatten(1).double())


@pytest.mark.slow
def test_a_legacy_file_gives_the_same(tmp_path: Path) -> None:
    torch.save(whole_checkpoint(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal_networks(load_dsnet_checkpoint(tmp_path / "old.pth", NUM_CLASSES, image_size=SIZE)[0], STUDENT)


@pytest.mark.slow
@pytest.mark.parametrize("source", [RELEASED, whole_checkpoint(), whole_checkpoint()["state_dict"]])
def test_a_state_dict_in_memory_gives_the_same_and_is_copied(source: Mapping[str, Any]) -> None:
    supernet, _ = load_dsnet_checkpoint(source, NUM_CLASSES, image_size=SIZE)
    assert_equal_networks(supernet, STUDENT)
    owned = {value.data_ptr() for value in RELEASED.values()}
    assert not owned & {value.data_ptr() for value in supernet.state_dict().values()}


def test_statistics_and_their_counts_come_from_the_entry_of_the_layers_width() -> None:
    supernet, subnets = load_dsnet_checkpoint(RELEASED, NUM_CLASSES, image_size=SIZE)
    norm = supernet.get_submodule("blocks.12.pointwise_norm")
    for k, subnet in enumerate((*subnets, subnets.largest)):
        entry = f"blocks.4.residual_blocks.0.bn2.aux_bn.{min(k, 13)}"
        mean, var, updates = norm.statistics(subnet.widths)  # type: ignore[operator]
        assert torch.equal(mean, RELEASED[f"{entry}.running_mean"])
        assert torch.equal(var, RELEASED[f"{entry}.running_var"])
        assert int(updates) == int(RELEASED[f"{entry}.num_batches_tracked"]) >= 100


def test_the_released_names_are_the_known_ones() -> None:
    assert len(RELEASED) == 838
    for name, shape in {
        "conv_stem.weight": (24, 3, 3, 3),
        "bn1.aux_bn.0.running_mean": (16,),
        "blocks.0.first_block.gate.conv_reduce.weight": (6, 24, 1, 1),
        "blocks.1.residual_blocks.0.bn1.aux_bn.1.bias": (168,),
        "blocks.3.first_block.gate.gate.0.weight": (4, 66, 1, 1),
        "blocks.3.residual_blocks.4.conv_pw.weight": (640, 640, 1, 1),
        "blocks.4.first_block.bn2.aux_bn.12.num_batches_tracked": (),
        "classifier.bias": (NUM_CLASSES,),
    }.items():
        assert tuple(RELEASED[name].shape) == shape


@pytest.mark.parametrize("num_routes", [1, 4, 14])
def test_the_gate_has_a_route_per_row_and_scores_by_the_head(num_routes: int) -> None:
    head = torch.randn((num_routes, 66, 1, 1), generator=torch.Generator().manual_seed(num_routes))
    source = {**RELEASED, HEAD: head}
    gate = load_dsnet_gate(source)
    assert gate.routes == tuple(range(num_routes))
    hidden = torch.rand((5, 66), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.conv2d(hidden[:, :, None, None], head).flatten(1)
    torch.testing.assert_close(gate.scores(hidden).float(), logits)
    assert torch.equal(gate.step(Evidence({"hidden": hidden}, len(hidden)), ()), logits.argmax(1))
    load_dsnet_checkpoint(source, NUM_CLASSES, image_size=SIZE)


@pytest.mark.parametrize("head", [None, torch.zeros(0, 66, 1, 1), torch.zeros(15, 66, 1, 1), torch.zeros(4, 65, 1, 1)])
def test_a_head_that_cannot_be_is_refused_by_both_readers(head: Tensor | None) -> None:
    source = {name: value for name, value in RELEASED.items() if name != HEAD}
    if head is not None:
        source[HEAD] = head
    assert HEAD in message_of(source)
    with pytest.raises(CheckpointError, match=r"gate\.gate\.0\.weight"):
        load_dsnet_gate(source)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_whatever_is_missing_unexpected_or_misshapen_is_listed_at_once(data: st.DataObject) -> None:
    own_rows = ("classifier.weight", HEAD)  # their first dimension is free; it has its own tests
    names = [name for name in RELEASED if name not in own_rows and RELEASED[name].ndim]
    picked = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=6, unique=True))
    missing, misshapen = picked[: len(picked) // 2], picked[len(picked) // 2 :]
    extra = data.draw(st.lists(st.from_regex(r"more\.[a-z]{1,5}", fullmatch=True), min_size=1, max_size=3, unique=True))
    source = {name: value for name, value in RELEASED.items() if name not in missing}
    source |= {name: RELEASED[name][:-1] for name in misshapen} | {name: torch.zeros(1) for name in extra}
    message = message_of({f"module.{name}": value for name, value in source.items()})
    parts = message.partition(": ")[2].partition(": ")[2].split("; ")
    assert sorted(parts) == sorted(
        [f"missing {name} {tuple(RELEASED[name].shape)}" for name in missing]
        + [f"unexpected {name}" for name in extra]
        + [
            f"{name} has shape {tuple(source[name].shape)}, expected {tuple(RELEASED[name].shape)}"
            for name in misshapen
        ]
    )


def test_values_that_are_no_weights_are_listed() -> None:
    broken = {
        "conv_stem.weight": [1.0],
        "classifier.bias": torch.zeros(NUM_CLASSES, dtype=torch.int64),
        "bn1.aux_bn.0.num_batches_tracked": torch.tensor(3.0),
        "bn1.aux_bn.0.running_mean": torch.zeros(16, device="meta"),
        "bn1.aux_bn.1.running_mean": torch.zeros(24).to_sparse(),
    }
    message = message_of({**RELEASED, **broken})
    parts = message.removeprefix("the given state dict: the tensors do not fit the released DS-MBNet: ").split("; ")
    assert {part.split()[0] for part in parts} == set(broken)


def test_a_name_with_and_without_the_prefix_is_refused() -> None:
    message = message_of({**RELEASED, "module.conv_stem.weight": torch.zeros(24, 3, 3, 3)})
    assert "conv_stem.weight is there twice" in message


def test_another_class_count_is_told_once_with_the_way_out() -> None:
    message = message_of(RELEASED, 1000)
    assert message.endswith(
        ": its classifier has 7 classes, but 1000 were asked for: leave out --classes (in Python: num_classes)"
    )
    assert ";" not in message
    fitting = {**RELEASED, "classifier.bias": torch.zeros(1000)}
    assert "classifier.bias has shape (1000,), expected (7,)" in message_of(fitting, 1000)


@pytest.mark.parametrize(
    "source",
    [RELEASED, {"state_dict": RELEASED}, {"state_dict": RELEASED, "state_dict_ema": None}],
)
def test_averaged_weights_that_are_absent_are_an_error(source: Mapping[str, Any]) -> None:
    message = message_of(source, ema=True)
    assert "holds no 'state_dict_ema'" in message
    assert "leave out --ema" in message


@pytest.mark.parametrize("source", [{"state_dict_ema": AVERAGED}, {"state_dict": 3}])
def test_a_checkpoint_without_weights_is_an_error(source: Mapping[str, Any]) -> None:
    assert "holds no 'state_dict' (but state_dict" in message_of(source)


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    assert "list.pth: holds no 'state_dict' (but list)" in message_of(tmp_path / "list.pth")
    assert "no such file" in message_of(tmp_path / "absent.pth")
    assert "is a folder; name the file in it" in message_of(tmp_path)
    for content, reason in (
        (b"", "is empty"),
        (b"some text", "is not a file of torch.save"),
        (b"PK\3\4", "is cut off or"),
    ):
        (tmp_path / "other.pth").write_bytes(content)
        message = message_of(tmp_path / "other.pth")
        assert message.startswith(f"{tmp_path}/other.pth: cannot be read: it {reason}")
        assert message.endswith("; fetch it again")


def test_the_classes_are_counted_where_nobody_tells_them() -> None:
    assert load_dsnet_checkpoint(RELEASED, image_size=SIZE)[0].spec.num_classes == NUM_CLASSES
    without = {name: value for name, value in RELEASED.items() if not name.startswith("classifier.")}
    with pytest.raises(CheckpointError, match=r"missing classifier\.weight .*missing classifier\.bias"):
        load_dsnet_checkpoint(without)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    names = ["conv_stem.weight", "bn1.aux_bn.0.running_var", "classifier.bias", HEAD]
    for name in names:
        assert f"NaN or infinity in {name}: " in message_of({**RELEASED, name: torch.full_like(RELEASED[name], value)})
    message = message_of({**RELEASED, **{name: torch.full_like(RELEASED[name], value) for name in names}})
    assert " and 1 more: " in message
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_dsnet_gate({**RELEASED, HEAD: torch.full_like(RELEASED[HEAD], value)})


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", ["beside", "in the arguments", "among the weights"])
def test_code_in_a_file_is_refused_by_name_and_does_not_run(tmp_path: Path, is_zip: bool, place: str) -> None:
    trap = Malicious(tmp_path / "sprung")
    content: dict[str, Any] = {"state_dict": {"conv_stem.weight": torch.zeros(1)}}
    if place == "beside":
        content["optimizer"] = trap
    elif place == "in the arguments":
        content["args"] = argparse.Namespace(lr=trap)
    else:
        content["state_dict"]["bn1"] = trap
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=is_zip)
    message = message_of(tmp_path / "evil.pth")
    assert "evil.pth: it asks to run" in message
    assert "mkdir" in message
    assert "state_dict" in message
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap was real


def test_reading_a_file_allows_nothing_afterwards(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "one.pth")
    assert set(read_torch_file(tmp_path / "one.pth")) == {"args"}
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, is_zip: bool) -> None:
    torch.save(
        {"state_dict": {"a": torch.arange(9.0), "b": torch.zeros(2, 2)}},
        tmp_path / "whole.pth",
        _use_new_zipfile_serialization=is_zip,
    )
    content = (tmp_path / "whole.pth").read_bytes()
    for size in {0, 1, len(content) - 1, *range(2, len(content), 37)}:
        (tmp_path / "cut.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pth: (cannot be read: it is|it asks to run)"):
            read_torch_file(tmp_path / "cut.pth")
