"""Trial functions that do what a parameter says: work, raise, hang, or end their worker."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsnet.arithmetic import MKL_MODE, mkl_mode
from dsnet.errors import ConfigError
from search.study.runner import OneByOne, TrialOutcome, TrialSpec, outcome_from


class ScriptedTrials:
    """A trial function that does what the parameter `do` says; its folder counts attempts across
    processes.

    The folder is the one that `place` names when a trial begins, so that the tests of one runner
    have a folder each.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], place: Path) -> None:
        self._arrays = arrays
        self._place = place

    @property
    def _folder(self) -> Path:
        return Path(self._place.read_text(encoding="utf-8"))

    def __call__(self, spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        attempt = len(list(self._folder.glob(f"{spec.slot}-*")))
        (self._folder / f"{spec.slot}-{attempt}-{os.getpid()}").touch()
        action = getattr(self, f"_{spec.params.get('do', 'work')}")
        return action(spec, attempt)

    def _work(self, spec: TrialSpec, attempt: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        draw = np.random.default_rng(spec.seed).random()
        mean = float(self._arrays["ce"].mean())
        return {"top1": draw, "madds_m": mean + draw, "pid": os.getpid()}, {"weight": np.full(2, spec.slot)}

    def _raise(self, spec: TrialSpec, attempt: int) -> Any:
        raise ValueError("no route is right")

    def _fill(self, spec: TrialSpec, attempt: int) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/spilled")

    def _nan(self, spec: TrialSpec, attempt: int) -> Any:
        return {"top1": float("nan"), "madds_m": 1.0}, {}

    def _hang(self, spec: TrialSpec, attempt: int) -> Any:
        time.sleep(600)

    def _wait(self, spec: TrialSpec, attempt: int) -> Any:
        while not (self._folder / "go").exists():
            time.sleep(0.01)
        return self._work(spec, attempt)

    def _die_once(self, spec: TrialSpec, attempt: int) -> Any:
        return self._work(spec, attempt) if attempt else self._die(spec, attempt)

    def _stop_once(self, spec: TrialSpec, attempt: int) -> Any:
        if attempt == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return self._work(spec, attempt)

    def _die(self, spec: TrialSpec, attempt: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def _look(self, spec: TrialSpec, attempt: int) -> Any:
        import torch

        array = self._arrays["ce"]
        tensor_shares = torch.from_numpy(array.view()).data_ptr() == array.ctypes.data
        facts = {
            "owns_data": array.flags.owndata,
            "writeable": array.flags.writeable,
            "tensor_shares": tensor_shares,
            "torch_threads": torch.get_num_threads(),
            "omp_threads": int(os.environ["OMP_NUM_THREADS"]),
            "has_mkl_mode": MKL_MODE in os.environ or mkl_mode() is None,
            "in_shared_memory": _in_shared_memory(array),
            "sum": float(array.sum(dtype=np.float64)),
        }
        return facts, {}


def _in_shared_memory(array: np.ndarray) -> bool:
    """Whether the array's first byte lies in a mapping of the object store (plasma, a file of
    /dev/shm or of Ray's folder)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= array.ctypes.data < high:
            return "plasma" in path
    return False


class ScriptedCohort:
    """`ScriptedTrials` four at a time, in one program: `raise` is its trial's own failure, `spoil`
    raises out of the whole batch.

    A file `batch-0,1,2` in the folder says who ran beside whom.
    """

    lanes = 4

    def __init__(self, arrays: Mapping[str, np.ndarray], place: Path) -> None:
        self._trials = ScriptedTrials(arrays, place)
        self._place = place

    def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
        (
            Path(self._place.read_text(encoding="utf-8")) / ("batch-" + ",".join(str(spec.slot) for spec in specs))
        ).touch()
        if any(spec.params["do"] == "spoil" for spec in specs):
            raise RuntimeError("the program ended")
        return [outcome_from(self._trials, spec) for spec in specs]


def one_by_one(arrays: Mapping[str, np.ndarray], place: Path) -> OneByOne:
    """`ScriptedTrials`, one at a time."""
    return OneByOne(ScriptedTrials(arrays, place))


def refuse_to_build(arrays: Mapping[str, np.ndarray]) -> OneByOne:
    """Fails as a wrong setting does."""
    raise ConfigError("gate: unknown router 'mpl'")


def die_while_building(arrays: Mapping[str, np.ndarray]) -> OneByOne:
    """Ends the worker that builds it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def hang_while_building(arrays: Mapping[str, np.ndarray]) -> OneByOne:
    """Builds for longer than any test waits."""
    time.sleep(600)
    raise AssertionError("unreachable")
