"""A checkpoint in the form of the released DS-Net, made here."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsnet.families import Task, create
from dsnet.network.supernet import Supernet
from dsnet.stored.compat.dsnet_release import HEAD, published_names, published_shape
from tests.dsnet.samples import shaken

NUM_CLASSES, SIZE = 7, 32


def released_from(supernet: Supernet, seed: int) -> dict[str, Tensor]:
    """The supernet's tensors as a released state dict; statistics that the format shares take one
    of our values for both."""
    names = published_names(supernet)
    generator = torch.Generator().manual_seed(seed)
    released = {HEAD: torch.randn((4, 66, 1, 1), generator=generator)}
    for index, (name, value) in enumerate(supernet.state_dict().items()):
        if name.rpartition(".")[2].startswith("updates_"):
            value = torch.tensor(100 + index)
        released[names[name]] = value.detach().reshape(published_shape(name, value)).clone()
    own = supernet.state_dict()
    supernet.load_state_dict({name: released[names[name]].reshape(own[name].shape) for name in own})
    return released


def shaken_release(seed: int) -> tuple[Supernet, dict[str, Tensor]]:
    """A random DS-MBNet and its released form."""
    supernet = shaken(create("ds_mbnet", Task(NUM_CLASSES, 3, SIZE), seed=seed), seed).eval()
    return supernet, released_from(supernet, seed)


STUDENT, RELEASED = shaken_release(1)
TEACHER, AVERAGED = shaken_release(2)


def whole_checkpoint() -> dict[str, Any]:
    """The checkpoint that a training script of that time stores."""
    return {
        "epoch": 149,
        "arch": "slimmable_mbnet_v1_bn_uniform",
        "state_dict": {f"module.{name}": value for name, value in RELEASED.items()},
        "state_dict_ema": AVERAGED,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.08, "params": [0]}]},
        "args": argparse.Namespace(lr=0.08, mean=(0.5, 0.5), sched="cosine", bound=np.float64(0.25), resume=None),
        "version": 2,
        "metric": np.float32(74.6),
    }
