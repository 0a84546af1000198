"""Loss curves of a run: means between reports, and detection of non-finite losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from dsnet.errors import NonFiniteLossError
from dsnet.files import append_bytes, atomic_write_text
from dsnet.wording import subnet_phrase

UNDECLARED = "random_widths"
"""Name of the common curve of sub-networks that the set does not declare."""


class Reporter(Protocol):
    """Receiver of the loss curves of a training."""

    def on_curve(self, record: Mapping[str, Any]) -> None:
        """Receive a point of the loss curves: step, num_steps, epoch, time_ms, metrics."""
        ...


class SilentReporter:
    """Reporter that ignores the loss curves."""

    def on_curve(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Progress:
    """Progress of a training run."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole run."""
    epoch: float
    """Epochs done, including the fraction of the current one."""
    lr: float
    """Current learning rate."""


class Curves:
    """Averages losses between reports and finds the step and sub-network of the first non-finite
    loss."""

    def __init__(
        self, path: Path | None, reporter: Reporter, start_step: int, names: Collection[str] | None = None
    ) -> None:
        """Continue the curves of a run.

        Args:
            path: the file of the curves, from which rows after `start_step` are removed; None
                writes no file.
            reporter: receives every point.
            start_step: steps done.
            names: sub-networks that have a curve of their own; all others share `UNDECLARED`.
                None: every sub-network has one.
        """
        self._path = path
        self._reporter = reporter
        self._names = names
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        if path is not None:
            _keep_lines_upto(path, start_step)

    def add(self, step: int, losses: dict[str, Float[Tensor, ""]]) -> None:
        """Store a step's losses without reading them from the device."""
        self._pending.append((step, losses))

    def pending(self, at: Progress) -> list[tuple[int, dict[str, float]]]:
        """The losses since the last report as (step, name -> loss), for a checkpoint within an
        epoch.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        rows: dict[int, dict[str, float]] = {}
        for step, name, value in self._read(at):
            rows.setdefault(step, {})[name] = value
        return list(rows.items())

    def restore(self, pending: list[tuple[int, dict[str, float]]], device: torch.device) -> None:
        """Restore the result of `pending`, so that the next mean equals that of an uninterrupted
        run."""
        self._pending = [
            (step, {name: torch.tensor(loss, device=device) for name, loss in losses.items()})
            for step, losses in pending
        ]

    def flush(self, at: Progress) -> None:
        """Read and check the pending losses and report their means.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        if not self._pending:
            return
        sums: dict[str, list[float]] = {}
        for _, name, value in self._read(at):
            is_own = self._names is None or name in self._names
            sums.setdefault(name if is_own else UNDECLARED, []).append(value)
        self._pending.clear()
        metrics = {f"loss/{name}": sum(items) / len(items) for name, items in sums.items()}
        record = {
            "step": at.step,
            "num_steps": at.num_steps,
            "epoch": at.epoch,
            "time_ms": int(time.time() * 1000),
            "metrics": {**metrics, "epoch": at.epoch, "lr": at.lr},
        }
        if self._path is not None:
            append_bytes(self._path, f"{json.dumps(record)}\n".encode(), is_synced=False)
        self._reporter.on_curve(record)

    def _read(self, at: Progress) -> list[tuple[int, str, float]]:
        """Read all pending losses from the device at once: (step, sub-network, loss).

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        if not self._pending:
            return []
        rows = [(step, name, loss) for step, losses in self._pending for name, loss in losses.items()]
        values = torch.stack([loss for _, _, loss in rows]).tolist()
        for (step, name, _), value in zip(rows, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of {subnet_phrase(name)} is {value} at step {step}; lower supernet.train.lr (it was {at.lr:.3g} there), "
                    "raise supernet.train.warmup_epochs or set supernet.train.grad_clip"
                )
        return [(step, name, value) for (step, name, _), value in zip(rows, values, strict=True)]


def _keep_lines_upto(path: Path, step: int) -> None:
    """Remove the records after `step`, which an interrupted run wrote after its last checkpoint,
    and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    atomic_write_text(path, "".join(kept))
