"""Layers of a vision transformer on tokens [B, T, D]: blocks that are sliced, and what is never
sliced.

Dynamic idle slicing: the residual stream has D channels in every sub-network. A block normalises,
reads and writes the first of them, as many as its width says, and the others pass it unchanged. The
products of self-attention are written out, so that counters of operations see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dsnet.network.axes import Axes, Axis, Widths, prefixed
from dsnet.network.features import channel_means
from dsnet.network.supernet import TrunkOutput
from dsnet.network.traced import TracedLayerNorm, TracedLinear

EPS = 1e-6
"""Epsilon of LayerNorm, as in the well-known releases of ViT and DeiT."""


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each behind a LayerNorm and added to its input; sliced along
    its part of the stream, its heads and its hidden channels.

    Its tensors have the names that timm gives them.
    """

    def __init__(self, embed: Axis, heads: Axis, mlp: Axis, generator: torch.Generator) -> None:
        """Prepare a block with fresh weights.

        Args:
            embed: the channels of the stream that it reads and writes.
            heads: its heads, each repeated as often as it has channels.
            mlp: the hidden channels of the perceptron.
            generator: draws the weights.
        """
        super().__init__()
        ((_, self.head_channels, _),) = heads.parts
        threefold = Axis(heads.parts * 3)
        self.norm1 = _norm(embed)
        self.attn = nn.ModuleDict(
            {"qkv": _linear(embed, threefold, generator), "proj": _linear(heads, embed, generator)}
        )
        self.norm2 = _norm(embed)
        self.mlp = nn.ModuleDict({"fc1": _linear(embed, mlp, generator), "fc2": _linear(mlp, embed, generator)})

    def _layers(self) -> tuple[TracedLayerNorm | TracedLinear, ...]:
        """The layers in the order of `BlockLayers`."""
        return (
            self.norm1, self.attn["qkv"], self.attn["proj"], self.norm2, self.mlp["fc1"], self.mlp["fc2"],
        )  # type: ignore[return-value]  # fmt: skip

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], widths: Widths
    ) -> Float[Tensor, "batch tokens channels"]:
        """Run the block on its part of the stream, [B, T, e] -> [B, T, e]."""
        layers = BlockLayers(*(partial(layer, widths=widths) for layer in self._layers()))
        return run_block(x, layers, self_attention(layers.qkv(layers.norm1(x)), self.head_channels))

    def axes(self) -> Mapping[str, Axes]:
        """The axes of all tensors."""
        found: dict[str, Axes] = {}
        for name, layer in self.named_modules():
            if isinstance(layer, TracedLayerNorm | TracedLinear):
                found |= prefixed(name, layer.axes())
        return found

    def cut(self, widths: Widths) -> PlainBlock:
        """The slice of one sub-network as plain layers."""
        return PlainBlock([layer.cut(widths) for layer in self._layers()], self.head_channels)


class PlainBlock(nn.Module):
    """A block of a transformer of plain layers."""

    def __init__(self, layers: Sequence[nn.Module], head_channels: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj, self.norm2, self.fc1, self.fc2 = layers
        self.head_channels = head_channels
        self.is_fused = False
        """Whether attention is one operation of torch, which counters of operations do not see."""

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """[B, T, e] -> [B, T, e]."""
        layers = BlockLayers(self.norm1, self.qkv, self.proj, self.norm2, self.fc1, self.fc2)
        mix = fused_attention if self.is_fused else self_attention
        return run_block(x, layers, mix(layers.qkv(layers.norm1(x)), self.head_channels))


class TokenMap(Protocol):
    """A layer on tokens."""

    def __call__(self, x: Float[Tensor, "batch tokens channels"], /) -> Float[Tensor, "batch tokens out_channels"]:
        """[B, T, c] -> [B, T, c']."""
        ...


class BlockLayers(NamedTuple):
    """The layers of a block."""

    norm1: TokenMap
    qkv: TokenMap
    proj: TokenMap
    norm2: TokenMap
    fc1: TokenMap
    fc2: TokenMap


def run_block(
    x: Float[Tensor, "batch tokens channels"], layers: BlockLayers, mixed: Float[Tensor, "batch tokens heads"]
) -> Float[Tensor, "batch tokens channels"]:
    """A block of given layers behind its attention, whose result is `mixed`."""
    x = x + layers.proj(mixed)
    return x + layers.fc2(F.gelu(layers.fc1(layers.norm2(x))))


def self_attention(
    qkv: Float[Tensor, "batch tokens threefold"], head_channels: int
) -> Float[Tensor, "batch tokens channels"]:
    """Softmax attention of every head over all tokens.

    Args:
        qkv: [B, T, 3 * heads * head_channels]: queries, keys and values, each head by head.
        head_channels: channels of one head.

    Returns:
        [B, T, heads * head_channels].
    """
    queries, keys, values = _by_head(qkv, head_channels)
    weights = torch.softmax((queries * head_channels**-0.5) @ keys.transpose(2, 3), 3)
    return (weights @ values).transpose(1, 2).flatten(2)


def fused_attention(
    qkv: Float[Tensor, "batch tokens threefold"], head_channels: int
) -> Float[Tensor, "batch tokens channels"]:
    """The same as `self_attention`, in one operation of torch."""
    queries, keys, values = _by_head(qkv, head_channels)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def _by_head(qkv: Tensor, head_channels: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each [B, heads, T, head_channels]."""
    return qkv.unflatten(2, (3, -1, head_channels)).permute(2, 0, 3, 1, 4).unbind(0)


def run_blocks(
    x: Float[Tensor, "batch tokens channels"], blocks: Sequence[tuple[int, TokenMap]]
) -> Float[Tensor, "batch tokens channels"]:
    """Run blocks one after the other, each on the first channels of the stream.

    Args:
        x: [B, T, D]: the stream.
        blocks: for each block the number of channels that it reads and writes, and the block.
    """
    for width, run in groupby(blocks, key=lambda block: block[0]):
        is_whole = width == x.shape[2]
        active, idle = x if is_whole else x[..., :width], x[..., width:]
        for _, block in run:
            active = block(active)
        x = active if is_whole else torch.cat([active, idle], 2)
    return x


class PlainBlocks(nn.Module):
    """Plain blocks one after the other; see `run_blocks`."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[PlainBlock]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """[B, T, D] -> [B, T, D]."""
        return run_blocks(x, list(zip(self.widths, self.blocks, strict=True)))


class TokenGate(nn.Module):
    """A gate's attention on tokens: the hidden vector is a linear layer with ReLU of the class
    token and of the mean of all tokens, and the channels are weighted by 1 + tanh of another linear
    layer, which is initially 1."""

    def __init__(self, channels: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.reduce = plain_linear(2 * channels, hidden)
        self.expand = plain_linear(hidden, channels)
        nn.init.kaiming_normal_(self.reduce.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> TrunkOutput:
        """The output at the gate for the stream [B, T, D] before it."""
        hidden = F.relu(self.reduce(torch.cat([x[:, 0], channel_means(x)], 1)))
        scale = 1.0 + torch.tanh(self.expand(hidden))
        return TrunkOutput(x * scale[:, None], x, hidden)

    @staticmethod
    def axes(stream: Axis) -> Mapping[str, Axes]:
        """The axes of the parameters that have channels; `stream` are all of the stream's."""
        twofold = Axis(stream.parts * 2)
        return {"reduce.weight": (None, twofold), "expand.weight": (stream,), "expand.bias": (stream,)}


class PlainEmbedding(nn.Module):
    """Images as tokens; see `embedded`."""

    UNDECAYED = ("class_token", "positions")

    def __init__(
        self,
        patches: nn.Conv2d,
        class_token: Float[Tensor, "1 1 stream"],
        positions: Float[Tensor, "1 tokens stream"],
    ) -> None:
        super().__init__()
        self.patches = patches
        self.class_token = nn.Parameter(class_token)
        self.positions = nn.Parameter(positions)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens stream"]:
        """[B, C, H, W] -> [B, T, D]."""
        return embedded(images, self.patches, self.class_token, self.positions)


def embedded(
    images: Float[Tensor, "batch channels height width"],
    patches: nn.Module,
    class_token: Float[Tensor, "1 1 stream"],
    positions: Float[Tensor, "1 tokens stream"],
) -> Float[Tensor, "batch tokens stream"]:
    """The tokens of images: the class token, and one for each patch; each plus its position."""
    tokens = patches(images).flatten(2).transpose(1, 2)
    return torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], 1) + positions


class PlainHead(nn.Module):
    """The classifier on the class token."""

    def __init__(self, norm: nn.LayerNorm, classifier: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.classifier = classifier

    def forward(self, x: Float[Tensor, "batch tokens stream"]) -> Float[Tensor, "batch classes"]:
        """[B, T, D] -> logits [B, classes]."""
        return self.classifier(self.norm(x[:, 0]))


def plain_linear(num_in: int, num_out: int) -> nn.Linear:
    """A linear layer with a bias of zeros, whose weight is to be set; it draws no random
    numbers."""
    layer = skip_init(nn.Linear, num_in, num_out)
    nn.init.zeros_(layer.bias)
    return layer


def plain_norm(channels: int) -> nn.LayerNorm:
    """A LayerNorm over the channels of a token."""
    return nn.LayerNorm(channels, EPS)


def _norm(channels: Axis) -> TracedLayerNorm:
    return TracedLayerNorm(plain_norm(channels.max_size), channels)


def _linear(num_in: Axis, num_out: Axis, generator: torch.Generator) -> TracedLinear:
    """A sliced linear layer with weights as in the first ViT (Xavier)."""
    layer = TracedLinear(plain_linear(num_in.max_size, num_out.max_size), num_in, num_out)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    return layer
