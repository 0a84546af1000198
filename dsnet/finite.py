"""Weights that hold NaN or infinity: nothing can be computed with them, and what is made of them says so only much later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsnet.errors import CheckpointError

_NUM_NAMED = 3


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that hold NaN or infinity.

    Args:
        where: what the message calls their place.
        tensors: by name; those of whole numbers are finite.

    Raises:
        CheckpointError: it names the first of them and counts the rest.
    """
    broken = [
        name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        more = f" and {len(broken) - _NUM_NAMED} more" if len(broken) > _NUM_NAMED else ""
        raise CheckpointError(
            f"{where}: NaN or infinity in {', '.join(broken[:_NUM_NAMED])}{more}: the training that wrote it went wrong, or the "
            "file is damaged; take another checkpoint"
        )
