"""Tracing of a plain module with `torch.fx`: its graph, with shape and MAdds of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dsnet.errors import ConfigError
from dsnet.wording import first_line


def trace(
    module: nn.Module,
    image: Float[Tensor, "batch channels height width"],
    concrete_args: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Trace a module into a graph with the shapes of all values, in eval mode.

    Args:
        module: the plain network; not changed.
        image: [B, C, H, W], an example.
        concrete_args: arguments of `forward` that are fixed.

    Raises:
        ConfigError: the module cannot be traced, or does not run on the image; the message has the
            line of the module.
    """
    was_training = module.training
    module.eval()  # also while it runs: norms would note statistics of the example
    try:
        return _with_shapes(module, image, concrete_args)
    finally:
        module.train(was_training)


def _with_shapes(module: nn.Module, image: Tensor, concrete_args: Mapping[str, Any] | None) -> fx.GraphModule:
    """See `trace`; the module is in eval mode."""
    try:
        graph = fx.symbolic_trace(module, concrete_args=dict(concrete_args) if concrete_args else None)
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__} cannot be traced: {first_line(error)}{_line_of(error, module)}; "
            "write it without control flow that depends on the values of tensors"
        ) from error
    for node in graph.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # which gives the same, and takes images of any memory format
    graph.recompile()
    try:
        with torch.no_grad(), redirect_stderr(StringIO()):  # torch prints the error that it raises
            _CountingShapes(graph).propagate(image)
    except Exception as error:
        reason = error.__cause__ or error  # torch wraps the module's own error in a long one
        raise ConfigError(
            f"{type(module).__name__} does not run on an image of {' x '.join(map(str, image.shape[1:]))}: {first_line(reason)}; "
            "choose another data.image_size, or another network"
        ) from error
    return graph


class _CountingShapes(ShapeProp):
    """Notes of every value its shape, and how many MAdds the node that makes it needs."""

    def propagate(self, *args: Any) -> Any:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused operation
        try:
            with FlopCounterMode(display=False, custom_mapping=FUSED) as self._counter:
                return super().propagate(*args)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def run_node(self, node: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(node)
        node.meta["madds"] = (self._counter.get_total_flops() - before) // 2
        return result


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""Operations that torch's counter of FLOPs takes for free, with their formulas: its
`custom_mapping`."""


def _line_of(error: BaseException, module: nn.Module) -> str:
    """The line of the user's code in which tracing ended, for a message."""
    found = ""
    trace_ = error.__traceback__
    while trace_ is not None:
        name = trace_.tb_frame.f_code.co_filename
        if f"{torch.__name__}/" not in name.replace("\\", "/") and "/dsnet/network/" not in name.replace("\\", "/"):
            found = f" ({name}:{trace_.tb_lineno})"
        trace_ = trace_.tb_next
    return found
