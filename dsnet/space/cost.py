"""Analytic cost of a sub-network, MAdds and parameters, from the spec alone (without torch).

MAdds are multiply-accumulates of one image (1 MAC = 2 FLOPs). As usual in the field, convolutions,
linear layers, the products of self-attention and pooling (C*H*W of its input) count; norms,
activations, softmax, biases and element-wise products do not. Slimming heads are not included: a
route's dynamic cost is its sub-network's plus `gate_madds` (docs/methods.md, sections 2 and 4).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsnet.image_size import ImageSize, height_and_width, shorter_side
from dsnet.space.spec import IMAGE, Op, Pair, Subnet, SupernetSpec


@dataclass(frozen=True)
class Cost:
    """Cost of one sub-network at one image size."""

    madds: int
    """MAdds of one image."""
    params: int
    """Number of parameters, including the affine pairs of norms, without running statistics."""
    segments: tuple[int, ...]
    """MAdds before the first gate, between the gates and after the last gate; they sum to
    `madds`."""

    @property
    def trunk_madds(self) -> int:
        """MAdds that every route costs before the first gate decides."""
        return self.segments[0]


def subnet_cost(spec: SupernetSpec, subnet: Subnet, image_size: ImageSize) -> Cost:
    """Cost of `subnet` on images of a size.

    Raises:
        ValueError: the sub-network does not fit the supernet, or the size is below 1.
    """
    segments = [0] * (len(spec.gates) + 1)
    params = 0
    for op, (madds, own_params) in zip(spec.ops, op_costs(spec, subnet, image_size), strict=True):
        segments[op.segment] += madds
        params += own_params
    return Cost(sum(segments), params, tuple(segments))


def op_costs(spec: SupernetSpec, subnet: Subnet, image_size: ImageSize) -> list[tuple[int, int]]:
    """MAdds of one image and number of parameters of every operation of the spec, in its order.

    Raises:
        ValueError: the sub-network does not fit the supernet, or the size is below 1.
    """
    spec.check(subnet)
    if shorter_side(image_size) < 1:
        raise ValueError(f"image_size is {image_size}, but must be at least 1 pixel high and wide")
    sizes = {IMAGE: height_and_width(image_size)}
    costs = []
    for op in spec.ops:
        size = sizes[op.reads]
        if not op.runs(subnet.widths):
            sizes[op.name] = size
            costs.append((0, 0))
            continue
        sizes[op.name] = _output_size(op, size)
        num_in = op.input_width(spec, subnet.widths)
        is_traced_depthwise = op.kind == "depthwise" and op.parts
        num_out = (
            num_in * op.divisions if is_traced_depthwise else op.out_repeat * spec.width_of(op.out_group, subnet.widths)
        )
        taps = _taps(op, spec, subnet)
        costs.append((_madds(op, taps, (num_in, num_out), size, sizes[op.name]), _params(op, taps, num_in, num_out)))
    return costs


def shared_params(spec: SupernetSpec, subnets: Iterable[Subnet]) -> int:
    """Parameters of the smallest supernet that holds all of `subnets`, with every group at its
    widest among them.

    Private affine pairs (`norm="private_affine"`) count once per prefix of widths.
    """
    members = tuple(subnets)
    widest = tuple(max(widths) for widths in zip(*(subnet.widths for subnet in members), strict=True))
    union = Subnet("union", widest)
    total = subnet_cost(spec, union, spec.image_size).params
    if spec.norm == "private_affine":
        for op in spec.ops:
            if op.has_norm:
                prefixes = {subnet.prefix(op.out_group + 1) for subnet in members}
                total += 2 * (sum(prefix[-1] for prefix in prefixes) - widest[op.out_group])
            elif op.kind == "norm":
                sizes = {
                    tuple(each.widths[group] for group in op.depends): op.input_width(spec, each.widths)
                    for each in members
                }
                total += 2 * (sum(sizes.values()) - op.input_width(spec, union.widths))
    return total


def pooling_madds(spec: SupernetSpec, subnet: Subnet, gate: int, image_size: ImageSize) -> int:
    """MAdds of pooling the input of a gate's attention once (C*H*W), on the path of `subnet`.

    Raises:
        ValueError: the spec has no op with the name of the gate's attention.
    """
    sizes = {IMAGE: height_and_width(image_size)}
    for op in spec.ops:
        size = sizes[op.reads]
        if op.name == spec.gates[gate].attention:
            return op.input_width(spec, subnet.widths) * size[0] * size[1]
        sizes[op.name] = _output_size(op, size) if op.runs(subnet.widths) else size
    raise ValueError(_no_attention(spec, gate))


def evidence_channels(spec: SupernetSpec, subnet: Subnet, gate: int) -> int:
    """Number of channels of what a gate's evidence is computed from, on the path of `subnet`.

    Raises:
        ValueError: the spec has no op with the name of the gate's attention.
    """
    for op in spec.ops:
        if op.name == spec.gates[gate].attention:
            return op.input_width(spec, subnet.widths)
    raise ValueError(_no_attention(spec, gate))


def _no_attention(spec: SupernetSpec, gate: int) -> str:
    own = spec.gates[gate]
    return f"gate {own.name!r} names attention {own.attention!r}, which {spec.family} does not have"


def gate_madds(hidden: int, num_routes: int) -> int:
    """MAdds of a slimming head: the hidden vector times one row per route."""
    return hidden * num_routes


def _output_size(op: Op, size: Pair) -> Pair:
    if op.window is not None:
        return op.window.output_size(size)
    if op.kind in ("pool", "linear"):
        return 1, 1
    if op.kind == "tokens":
        return size[0] * size[1] + 1, 1
    return -(-size[0] // op.stride), -(-size[1] // op.stride)


def _madds(op: Op, taps: int, channels: Pair, size_in: Pair, size_out: Pair) -> int:
    """MAdds of one image; `channels` are the numbers of input and output channels."""
    num_in, num_out = channels
    pixels_in, pixels_out = size_in[0] * size_in[1], size_out[0] * size_out[1]
    match op.kind:
        case "conv" | "grouped":
            return taps * (num_in // op.divisions) * num_out * pixels_out
        case "depthwise":
            return taps * num_in * op.divisions * pixels_out
        case "attention":
            return num_in * pixels_in + (op.divisions + 1) * op.hidden * num_in
        case "pool" | "maxpool":
            return num_in * pixels_in
        case "linear":
            return num_in * num_out
        case "mixing":
            return 2 * num_in * pixels_in**2
        case "norm" | "scale" | "tokens" | "fixed":
            return op.fixed_madds


def _taps(op: Op, spec: SupernetSpec, subnet: Subnet) -> int:
    """Number of weights of one filter per input channel."""
    if op.kernel_group is not None:
        return spec.width_of(op.kernel_group, subnet.widths) ** 2
    return op.kernel**2 if op.window is None else op.window.kernel[0] * op.window.kernel[1]


def _params(op: Op, taps: int, num_in: int, num_out: int) -> int:
    further = (2 * num_out if op.has_norm else 0) + (num_out if op.has_bias else 0)
    match op.kind:
        case "conv":
            return taps * num_in * num_out + further
        case "grouped":
            return taps * (num_in // op.divisions) * num_out + further
        case "depthwise":
            return taps * num_in * op.divisions + further
        case "attention":
            return (op.divisions + 1) * op.hidden * num_in + op.hidden + num_in
        case "pool" | "maxpool" | "mixing" | "fixed":
            return op.fixed_params
        case "linear":
            return num_in * num_out + (num_out if op.has_bias or not op.parts else 0)
        case "norm" | "scale" | "tokens":
            return num_in * (2 if op.kind == "norm" else op.divisions)
