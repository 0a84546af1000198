"""A small supernet of tokens, as of a transformer: features are [batch, tokens, channels] or
[batch, channels], and norms see the channels of a token together."""

from __future__ import annotations

from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.space.spec import CLASSES, IMAGE, IMAGE_CHANNELS, ChannelGroup, GateSpec, Op, Subnet, SupernetSpec, Window
from dsnet.space.subnet_set import SubnetSet

MAX = (6, 8, 8, 8)
SIZE = 8


def token_set(*, pooled: bool) -> SubnetSet:
    """Every path through three gates, of which each chooses between two widths; `pooled`: the
    last gate reads one vector for each image."""
    gates = tuple(GateSpec(f"gate{number}", f"gate{number}", MAX[number], number + 1) for number in range(3))
    half = Window((1, 1), output=(SIZE // 2, SIZE // 2))
    ops = [Op("embed", "conv", IMAGE, IMAGE_CHANNELS, 0, window=Window((2, 2), (2, 2)), has_bias=True)]
    for number in range(3):
        ops.append(Op(f"gate{number}", "pool", "embed", number, number, segment=number, window=half))
        ops.append(Op(f"layer{number}", "conv", "embed", number, number + 1, segment=number + 1))
    ops.append(Op("classifier", "linear", "layer2", 3, CLASSES, segment=3))
    groups = tuple(ChannelGroup(f"layer{number - 1}" if number else "embed", width) for number, width in enumerate(MAX))
    spec = SupernetSpec("tokens", 10, 3, SIZE, groups, tuple(ops), gates, {"pooled": pooled}, norm="group_norm")
    paths = product((3, 8), (5, 8), (4, 8))
    return SubnetSet(spec, tuple(Subnet("-".join(map(str, path)), (6, *path)) for path in paths))


class Tokens(Supernet):
    """Patches as tokens, and layers of LayerNorm, linear map and ReLU, with a gate before each."""

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet) -> None:
        super().__init__(spec, subnets)
        draw = torch.Generator().manual_seed(1)
        self.embed = nn.Parameter(torch.randn(6, 3, 2, 2, generator=draw) / 3)
        self.maps = nn.ParameterList(
            nn.Parameter(torch.randn(width, before, generator=draw)) for before, width in pairwise(MAX)
        )
        self.scales = nn.ParameterList(nn.Parameter(1 + 0.3 * torch.randn(width, generator=draw)) for width in MAX[:3])
        self.classifier = nn.Parameter(torch.randn(spec.num_classes, MAX[3], generator=draw))

    def own_upto_gate(self, gate: int, x: Tensor, subnet: Subnet) -> TrunkOutput:
        """Embed the patches, or run the layer before the gate."""
        x = self._embedded(x) if gate == 0 else self._layer(gate - 1, x, subnet.widths[gate])
        if gate == 2 and self.spec.layout["pooled"]:
            x = x.mean(1)
        return TrunkOutput.pooled(x, MAX[gate])

    def own_head(self, features: Tensor, subnet: Subnet) -> Tensor:
        """The last layer, and the classifier on the mean of the tokens."""
        x = self._layer(2, features, subnet.widths[3])
        return F.linear(x.mean(1) if x.ndim == 3 else x, self.classifier[:, : x.shape[-1]])

    def _embedded(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.embed, stride=2).flatten(2).transpose(1, 2)

    def _layer(self, number: int, x: Tensor, width: int) -> Tensor:
        channels = x.shape[-1]
        x = F.layer_norm(x, (channels,), self.scales[number][:channels])
        return torch.relu(F.linear(x, self.maps[number][:width, :channels]))

    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """The same with fixed widths."""
        return _Fixed(self, lambda net, x: net.own_upto_gate(gate, x, subnet))

    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """The same with fixed widths."""
        return _Fixed(self, lambda net, x: net.own_head(x, subnet))


class _Fixed(nn.Module):
    """A segment at fixed widths, with the whole weights."""

    def __init__(self, net: Tokens, run: object) -> None:
        super().__init__()
        self.net = net
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self.net, x)  # type: ignore[operator]


def tokens(*, pooled: bool = False) -> Tokens:
    """The network in eval mode."""
    subnets = token_set(pooled=pooled)
    return Tokens(subnets.spec, subnets).eval()
