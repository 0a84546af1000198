"""Options of the zoo's networks: the width of MobileNetV2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.errors import ConfigError
from dsnet.families import Task, get_family, layout
from dsnet.network.plain import make_plain, own_options
from dsnet.space.spec import SupernetSpec
from dsnet.training.start import first_weights, load_start

TASK = Task(10, 3, 32)
WIDTH = {"width": 0.75}


@torch.no_grad()
def test_the_widest_is_the_network_with_its_options_also_for_other_classes(tmp_path: Path) -> None:
    subnets = layout("mobilenet_v2", TASK, WIDTH)
    spec = SupernetSpec.from_json(subnets.spec.to_json())
    plain = make_plain("mobilenet_v2", 10, 3, 3, own_options(spec)).eval()
    assert plain.features[1].conv[1].out_channels == 16  # 12 is in the middle between 8 and 16
    assert plain.features[2].conv[2].out_channels == 24  # 18 is nearer to 16, which takes away over a tenth
    assert plain.features[-1][0].out_channels == 1280
    torch.save(plain.state_dict(), tmp_path / "net.pth")
    net = first_weights(subnets, 0, load_start(tmp_path / "net.pth"))[0].eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(images, net.subnets.largest), plain(images), rtol=1e-4, atol=1e-5)
    other = get_family("mobilenet_v2").for_task(spec, Task(7, 3, 32))
    assert (other.num_classes, other.groups, own_options(other)) == (7, spec.groups, own_options(spec))


def test_the_default_leaves_no_trace_and_other_networks_have_no_width() -> None:
    usual = layout("mobilenet_v2", TASK).spec
    assert layout("mobilenet_v2", TASK, {"width": 1}).spec.fingerprint == usual.fingerprint
    assert "options" not in usual.layout
    with pytest.raises(ConfigError, match="width: unknown option of resnet18"):
        layout("resnet18", TASK, WIDTH)


@pytest.mark.parametrize("width", [0.05, 5, "1.3", True])
def test_a_width_out_of_its_range_is_refused(width: Any) -> None:
    with pytest.raises(ConfigError, match=r"width is .*, but must be a number in 0.1..4"):
        layout("mobilenet_v2", TASK, {"width": width})
