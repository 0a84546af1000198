"""A supernet on its way to workers: its weights as numpy arrays in the object store, so that no
worker reads a file of the driver's machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.network.supernet import Supernet, state_for_saving
from dsnet.stored.checkpoint import supernet_from, supernet_meta

PREFIX = "supernet/"
"""Beginning of the names of its arrays, beside which a search has others."""


@dataclass(frozen=True)
class SentNetwork:
    """The specification and the sub-networks of a supernet whose weights are among some arrays; it
    can be pickled."""

    meta: Mapping[str, Any]

    @classmethod
    def of(cls, supernet: Supernet) -> SentNetwork:
        """Describe a supernet."""
        return cls(supernet_meta(supernet))

    def build(self, arrays: Mapping[str, NDArray[Any]]) -> Supernet:
        """The supernet in eval mode, on the CPU, with weights of its own.

        Raises:
            CheckpointError: the arrays do not fit the specification.
        """
        tensors = {
            name.removeprefix(PREFIX): torch.from_numpy(np.array(array))
            for name, array in arrays.items()
            if name.startswith(PREFIX)
        }
        return supernet_from(tensors, self.meta, "the network that the driver sent")


def network_arrays(supernet: Supernet) -> dict[str, NDArray[Any]]:
    """The weights of a supernet as the arrays that `SentNetwork.build` reads."""
    return {f"{PREFIX}{name}": tensor.numpy() for name, tensor in state_for_saving(supernet).items()}
