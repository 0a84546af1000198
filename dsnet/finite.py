"""Check of weights for NaN and infinity, which would otherwise be noticed only much later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from dsnet.errors import CheckpointError

_NUM_NAMED = 3


def check_finite(where: str, tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> None:
    """Check that tensors hold no NaN or infinity.

    Args:
        where: the place of the tensors, for the message.
        tensors: tensors by name; integer tensors always pass.

    Raises:
        CheckpointError: some hold NaN or infinity; the message names the first ones and counts the
            rest.
    """
    broken = [
        name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        more = f" and {len(broken) - _NUM_NAMED} more" if len(broken) > _NUM_NAMED else ""
        raise CheckpointError(
            f"{where}: NaN or infinity in {', '.join(broken[:_NUM_NAMED])}{more}: the training that wrote it diverged, or "
            "the file is damaged; use another checkpoint"
        )
