"""Check of labels against the classes, for the readers of all file formats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from dsnet.errors import DataError


def check_labels(labels: Shaped[np.ndarray, " images"], class_names: Sequence[str], where: str) -> None:
    """Check that every label is the index of a class.

    Args:
        labels: Whole numbers [N], of an integer type or as Python objects.
        class_names: Label k stands for class_names[k].
        where: The file, for the message.

    Raises:
        DataError: A label lies outside 0..len(class_names) - 1; the message names the first such
            row, from 0.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where}, row {row}: label {int(labels[row])} is outside 0..{len(class_names) - 1}; "
            "correct or remove the row, or fetch the file again"
        )
