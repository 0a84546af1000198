"""Start weights from the state dict of a plain network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import Task, layout
from dsnet.network.plain import make_plain
from dsnet.training.start import first_weights, lay_out, load_start
from tests.dsnet.cases import TRACED

MODEL = TRACED[0]
TASK = Task(10, 3, 16)


def state(num_classes: int = 10, seed: int = 5) -> dict[str, torch.Tensor]:
    return make_plain(MODEL, num_classes, 3, seed).state_dict()


def saved(folder: Path, content: Any, name: str = "net.pth") -> Path:
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("norm", ["private_stats", "private_affine", "recalibrate"])
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@torch.no_grad()
def test_the_widest_gives_the_logits_of_the_source(name: str, norm: str, tmp_path: Path) -> None:
    start = load_start(saved(tmp_path, state(), name))
    supernet, fresh = first_weights(layout(MODEL, TASK, None, norm), 0, start)
    assert fresh == []
    plain = make_plain(MODEL, 10, 3, 5).eval()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    supernet.eval()
    torch.testing.assert_close(supernet(x, supernet.subnets.largest), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module."])
def test_usual_wrappers_of_a_state_dict_are_taken_off(wrap: str, tmp_path: Path) -> None:
    own = state()
    content = {f"module.{name}": value for name, value in own.items()} if wrap == "module." else {wrap: own, "epoch": 3}
    start = load_start(saved(tmp_path, content))
    supernet, _ = first_weights(layout(MODEL, TASK), 0, start)
    assert torch.equal(supernet.get_parameter("body.fc.weight"), own["fc.weight"])


def test_other_classes_keep_a_fresh_classifier(tmp_path: Path) -> None:
    start = load_start(saved(tmp_path, state(num_classes=7)))
    supernet, fresh = first_weights(layout(MODEL, TASK), 0, start)
    assert fresh == ["body.fc.weight", "body.fc.bias"]
    plain, _ = first_weights(layout(MODEL, TASK), 0)
    assert torch.equal(supernet.get_parameter("body.fc.weight"), plain.get_parameter("body.fc.weight"))
    assert torch.equal(supernet.get_parameter("body.stem.weight"), state(7)["stem.weight"])


def test_weights_that_do_not_fit_are_listed_by_kind(tmp_path: Path) -> None:
    own = state()
    own["extra.weight"] = torch.zeros(3)
    del own["bn.weight"]
    own["stem.weight"] = torch.zeros(8, 1, 3, 3)
    start = load_start(saved(tmp_path, own))
    with pytest.raises(CheckpointError) as error:
        first_weights(layout(MODEL, TASK), 0, start)
    for text in (
        "Residual (1 tensor missing, 1 unexpected, 1 of another shape",
        "missing bn.weight (8,)",
        "unexpected extra.weight (3,)",
        "stem.weight has shape (8, 1, 3, 3), expected (8, 3, 3, 3)",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds an empty mapping, not a state dict"),
        ([1, 2], "holds list, not a state dict"),
        ({"epoch": 3}, "holds a mapping with epoch"),
        ({"fc.weight": torch.full((2, 2), float("nan"))}, "fc.weight"),
        (make_plain, "could execute code; save the state dict alone"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_start(saved(tmp_path, content))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, state())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as a state dict"):
        load_start(path)


def test_a_supernet_that_is_not_a_plain_network_is_refused(tmp_path: Path) -> None:
    start = load_start(saved(tmp_path, state()))
    with pytest.raises(ConfigError, match="is not one; name the network itself"):
        first_weights(layout("ds_tiny", TASK), 0, start)
    with pytest.raises(ConfigError, match="name the network itself"):
        lay_out("checkpoint", TASK, {}, start=start)
