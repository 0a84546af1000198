"""The complexity term of the loss of Stage II: the penalty on a gate's expected compute."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dsnet.gates.settings import ComplexityForm

PAPER_UNIT = 1e9
"""The published complexity term divides MAdds by this."""
PAPER_WIDEST = 565.4e6
"""MAdds of the published network's widest route."""


def complexity(
    expected_madds: Float[Tensor, ""], target_madds: float, max_madds: float, form: str
) -> Float[Tensor, ""]:
    """The complexity term of the loss of Stage II (docs/definitions.md, Target, losses,
    calibration).

    Args:
        expected_madds: mean expected MAdds of the batch, a scalar tensor.
        target_madds: the target in MAdds.
        max_madds: MAdds of the widest sub-network of the whole set.
        form: `hinge` relu(r - 1)^2, `quadratic` (r - 1)^2 with r = E/target; `paper` (E / (1e9 max
            / 565.4e6))^2; `paper_raw` (E / 1e9)^2.

    Raises:
        ValueError: unknown form.
    """
    ratio = expected_madds / target_madds
    match form:
        case "hinge":
            return torch.relu(ratio - 1.0) ** 2
        case "quadratic":
            return (ratio - 1.0) ** 2
        case "paper":
            return (expected_madds / (PAPER_UNIT * max_madds / PAPER_WIDEST)) ** 2
        case "paper_raw":
            return (expected_madds / PAPER_UNIT) ** 2
    raise ValueError(f"unknown complexity form {form!r}; known: {', '.join(get_args(ComplexityForm))}")
