"""Data-parallel training with two real processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dsnet.data.training_images import InMemoryImages
from dsnet.families import create
from dsnet.network.supernet import Supernet
from dsnet.training.settings import TrainSettings
from dsnet.training.step import StepPlan, StepRules, supernet_step
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from dsnet.training.workers import DistributedWorkers, SingleWorker
from tests.dsnet.samples import random_images, random_labels, random_pixels, small_run, small_supernet, task

pytestmark = pytest.mark.slow


def _step_gradients(images: torch.Tensor, labels: torch.Tensor, workers: DistributedWorkers | SingleWorker) -> dict:
    student, teacher = small_supernet(seed=0).train(), small_supernet(seed=1)
    subnets = student.subnets
    plan = StepPlan(subnets.largest, (subnets[1],), subnets[0], 1.0, frozenset())
    supernet_step(student, teacher, images, labels, plan, StepRules(teacher="ema", smoothing=0.1))
    workers.average_gradients(student.parameters())
    return {name: p.grad for name, p in student.named_parameters()}


def _fresh() -> Supernet:
    return create("ds_tiny", task(image_size=8), {"width": 0.5, "num_routes": 3}, seed=4)


def _train(net: Supernet, folder: Path, workers: DistributedWorkers, **callbacks: Any) -> Path | None:
    run = small_run(train=TrainSettings(epochs=2, batch_size=16, lr=0.05))
    data = InMemoryImages(random_pixels(32, 8), random_labels(32), run.augmentation)
    return train_supernet(net, data, run, folder=folder, workers=workers, callbacks=TrainingCallbacks(**callbacks))


def _after(steps: int) -> Callable[[], bool]:
    """A `should_stop` that returns True after a number of calls."""
    count = itertools.count(1)
    return lambda: next(count) > steps


def _votes(workers: DistributedWorkers, rank: int) -> list[bool]:
    """The votes of five steps: the first process asks to stop in the second step, the other one in
    the fourth."""
    heard = []
    parameter = torch.nn.Parameter(torch.ones(2))
    for step in range(5):
        heard.append(workers.agree_to_stop(step == 1 + 2 * rank))
        parameter.grad = torch.full((2,), float(rank))
        workers.average_gradients([parameter])
        assert parameter.grad.tolist() == [0.5, 0.5]
    workers.agree_to_stop(False)  # so that the last vote is received
    return heard


@contextmanager
def _counted(module: Any, name: str) -> Iterator[list[None]]:
    """Count the calls of a function."""
    calls: list[None] = []
    function = getattr(module, name)

    def counting(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        return function(*arguments, **keywords)

    setattr(module, name, counting)
    try:
        yield calls
    finally:
        setattr(module, name, function)


def _worker(rank: int, folder: str) -> None:
    """The work of each of the two processes; results are written to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        workers = DistributedWorkers()
        images, labels = random_images(8), random_labels(8)
        gradients = _step_gradients(images[rank::2], labels[rank::2], workers)
        votes = _votes(workers, rank)
        net = _fresh()
        with _counted(dist, "all_reduce") as calls:
            final = _train(net, Path(folder) / "training", workers)
        _train(_fresh(), Path(folder) / "resumed", workers, should_stop=_after(2))
        _train(_fresh(), Path(folder) / "resumed", workers)
        stopped = _train(_fresh(), Path(folder) / "stopped", workers, should_stop=lambda: rank == 1)
        torch.save(
            {
                "gradients": gradients,
                "votes": votes,
                "all_reduces": len(calls),
                "trained": dict(net.named_parameters()),
                "final": str(final),
                "stopped": str(stopped),
            },
            f"{folder}/rank{rank}.pt",
        )
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(_worker, args=(str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_averaged_gradients_are_the_mean_of_what_each_half_gives_alone(results: tuple[Path, list[dict]]) -> None:
    """Each process normalises by its own half of the batch, so this is what data-parallel BatchNorm
    training means."""
    images, labels = random_images(8), random_labels(8)
    halves = [_step_gradients(images[rank::2], labels[rank::2], SingleWorker()) for rank in range(2)]
    first, second = (result["gradients"] for result in results[1])
    assert first.keys() == halves[0].keys()
    for name in first:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-5, atol=1e-6)


def test_all_hear_a_wish_to_stop_at_the_next_step(results: tuple[Path, list[dict]]) -> None:
    assert [result["votes"] for result in results[1]] == [[False, False, True, False, True]] * 2


def test_a_step_has_one_all_reduce_and_an_epoch_one_more(results: tuple[Path, list[dict]]) -> None:
    num_steps, num_epochs = 4, 2
    assert [result["all_reduces"] for result in results[1]] == [num_steps + num_epochs] * 2


def test_both_processes_hold_equal_parameters_and_the_first_alone_writes(results: tuple[Path, list[dict]]) -> None:
    folder, (first, second) = results
    for name, parameter in first["trained"].items():
        assert torch.equal(parameter, second["trained"][name]), name
    assert first["final"] == str(folder / "training" / "final")
    assert second["final"] == "None"
    assert len((folder / "training" / "curves.jsonl").read_text().splitlines()) == 4


def test_several_processes_resume_bit_identically(results: tuple[Path, list[dict]]) -> None:
    """Float buffers are averaged at every epoch's end, so that one checkpoint holds the state of
    all."""
    folder, _ = results
    assert not list((folder / "resumed").glob("epoch-*-step-*"))  # in the middle of an epoch they differ
    finals = [(folder / name / "final.safetensors").read_bytes() for name in ("training", "resumed")]
    assert finals[0] == finals[1]


def test_one_process_that_wants_to_stop_stops_both(results: tuple[Path, list[dict]]) -> None:
    folder, both = results
    assert [result["stopped"] for result in both] == ["None", "None"]
    assert not list((folder / "stopped").glob("*.json"))


def test_a_single_worker_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    SingleWorker().average_gradients([parameter])
    assert torch.equal(parameter.grad, torch.full((2,), 3.0))
    assert (SingleWorker().agree_to_stop(True), SingleWorker().agree_to_stop(False)) == (True, False)
