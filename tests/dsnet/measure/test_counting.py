"""MAdds in the conventions of publications: their printed numbers, and hooks on a sub-network."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from dsnet.deploy.materialize import materialize_head
from dsnet.families import Task, create
from dsnet.measure.counting import ALL_LAYERS, PRODUCTS, Counting, module_madds
from dsnet.network.plain import OwnOptions, make_plain

IMAGE = (3, 224, 224)


@pytest.mark.parametrize(
    ("model", "options", "counting", "madds_m", "params_m"),
    [
        ("resnet50", (), ALL_LAYERS, 4121.9, 25.56),
        ("vgg19_gap", (), ALL_LAYERS, 19559.6, 20.54),
        ("mobilenet_v1", (), PRODUCTS, 568.7, 4.23),
        ("mobilenet_v2", (("width", 1.3),), PRODUCTS, 509.4, 5.39),
        ("mobilenet_v2", (("width", 0.75),), PRODUCTS, 209.1, 2.64),
    ],
)
def test_the_networks_of_sp_net_have_the_published_numbers(
    model: str, options: OwnOptions, counting: Counting, madds_m: float, params_m: float
) -> None:
    with torch.device("meta"):
        plain = make_plain(model, 1000, 3, 0, options)
    assert round(module_madds(plain, IMAGE, counting) / 1e6, 1) == madds_m
    assert round(sum(parameter.numel() for parameter in plain.parameters()) / 1e6, 2) == params_m


def test_a_sub_network_is_counted_as_hooks_on_its_layers_count_it() -> None:
    net = create("mobilenet_v2", Task(10, 3, 32), {"width": 0.75}).eval()
    plain = materialize_head(net, net.subnets[1]).train()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    counted: Counter[str] = Counter()

    def note(layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        match layer:
            case nn.Conv2d():
                counted["products"] += result.numel() * layer.weight[0].numel()
            case nn.Linear():
                counted["products"] += layer.weight.numel()
            case nn.BatchNorm2d():
                counted["norm"] += result.numel()
            case nn.ReLU6():
                counted["activation"] += result.numel()

    hooks = [layer.register_forward_hook(note) for layer in plain.modules()]
    plain.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    plain.train()
    products = module_madds(plain, (3, 32, 32))
    assert products == counted["products"] > 0
    for kind in ("norm", "activation"):
        assert module_madds(plain, (3, 32, 32), Counting(**{kind: 3})) - products == 3 * counted[kind] > 0
    pooled = module_madds(plain, (3, 32, 32), Counting(pooling=1)) - products
    assert pooled == plain.get_submodule("classifier.1").in_features  # one pixel is left of 32
    assert plain.training
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
