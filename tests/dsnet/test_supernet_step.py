"""One step of Stage I against separate, naive forwards in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsnet.ema import frozen_copy
from dsnet.losses import smoothed_one_hot
from dsnet.space import Subnet
from dsnet.supernet import Supernet
from dsnet.training.supernet import MODES, StepPlan, supernet_step
from tests.dsnet.samples import random_images, random_labels, shaken, small_supernet

SMOOTHING = 0.1


def student_and_teacher() -> tuple[Supernet, Supernet]:
    """Two different supernets in float64, as after many steps."""
    student = small_supernet("ds_tiny", seed=0).double().train()
    teacher = frozen_copy(shaken(small_supernet("ds_tiny", seed=1), seed=7)).double()
    assert isinstance(teacher, Supernet)
    return student, teacher


def plan_of(supernet: Supernet, **changes: object) -> StepPlan:
    """The largest, both larger members as the random ones, the smallest."""
    subnets = supernet.subnets
    plan = StepPlan(subnets.largest, (subnets[1], subnets[2]), subnets[0], 1.0, frozenset())
    return replace(plan, **changes)  # type: ignore[arg-type]


def naive_step(
    student: Supernet, teacher: Supernet, images: Tensor, labels: Tensor, plan: StepPlan, mode: str
) -> dict[str, float]:
    """METHODS 3 line by line: one separate forward and backward for every sub-network; gradients accumulate."""
    hard = smoothed_one_hot(labels, 10, 0.0)
    losses: dict[str, float] = {}

    def probabilities(subnet: Subnet) -> Tensor:
        twin = frozen_copy(teacher)
        twin.train(subnet.name in plan.cold)
        with torch.no_grad():
            return torch.softmax(twin(images, subnet), 1)

    def learn(subnet: Subnet, target: Tensor) -> None:
        loss = -(target * torch.log_softmax(student(images, subnet), 1)).sum() / len(images)
        loss.backward()
        losses[subnet.name] = loss.item()

    with torch.no_grad():
        own = torch.softmax(student(images, plan.largest), 1)
    learn(plan.largest, smoothed_one_hot(labels, 10, SMOOTHING))
    for subnet in (*plan.randoms, plan.smallest):
        if mode == "none":
            learn(subnet, hard)
            continue
        soft = own if mode == "inplace_distillation" else probabilities(plan.largest)
        if mode == "ieb" and subnet == plan.smallest:
            soft = (soft + sum(probabilities(random) for random in plan.randoms)) / (1 + len(plan.randoms))
        learn(subnet, plan.soft_weight * soft + (1 - plan.soft_weight) * hard)
    return losses


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("soft_weight", [1.0, 0.3])
@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_shared_trunk_gradients_and_losses_equal_separate_forwards(
    mode: str, is_cold: bool, soft_weight: float
) -> None:
    student, teacher = student_and_teacher()
    naive_student = small_supernet("ds_tiny", seed=0).double().train()
    images, labels = random_images(6).double(), random_labels(6)
    cold = frozenset(subnet.name for subnet in student.subnets.all) if is_cold else frozenset[str]()
    plan = plan_of(student, cold=cold, soft_weight=soft_weight)
    losses = supernet_step(student, teacher, images, labels, plan, SMOOTHING, mode)
    expected = naive_step(naive_student, teacher, images, labels, plan, mode)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10)
    met, wanted = gradients(student), gradients(naive_student)
    assert met.keys() == wanted.keys() == dict(student.named_parameters()).keys()
    for name in met:
        scale = float(wanted[name].abs().max())
        assert float((met[name] - wanted[name]).abs().max()) <= 1e-10 * max(1.0, scale), name


def test_modes_teach_differently() -> None:
    losses = {}
    for mode in MODES:
        student, teacher = student_and_teacher()
        met = supernet_step(
            student, teacher, random_images(6).double(), random_labels(6), plan_of(student), SMOOTHING, mode
        )
        losses[mode] = tuple(met[f"subnet-{k:02d}"].item() for k in range(3))
    assert len(set(losses.values())) == len(MODES)
    # IEB teaches only the smallest from the ensemble; the random ones as IB does.
    assert losses["ib"][1:] == losses["ieb"][1:]
    assert losses["ib"][0] != losses["ieb"][0]


def test_trunk_statistics_are_updated_once_a_step() -> None:
    student, teacher = student_and_teacher()
    supernet_step(student, teacher, random_images(6).double(), random_labels(6), plan_of(student), SMOOTHING, "ib")
    smallest, largest = student.subnets[0], student.subnets.largest
    for subnet in (smallest, largest):
        assert int(student.batch_norms()[0].statistics(subnet.prefix(1))[2]) == 1
    last = student.batch_norms()[-1]
    assert [int(last.statistics(subnet.widths)[2]) for subnet in student.subnets.all] == [1, 1, 1, 1]


@pytest.mark.parametrize("mode", ["ib", "ieb"])
def test_the_teacher_is_left_as_it_was(mode: str) -> None:
    student, teacher = student_and_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for cold in (frozenset({"largest", "subnet-01"}), frozenset[str]()):
        plan = plan_of(student, cold=cold)
        supernet_step(student, teacher, random_images(6).double(), random_labels(6), plan, SMOOTHING, mode)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_cold_teacher_normalises_by_the_batch() -> None:
    images, labels = random_images(6).double(), random_labels(6)
    losses = []
    for shift in (0.0, 100.0):
        student, teacher = student_and_teacher()
        for name, buffer in teacher.named_buffers():
            if ".mean_" in name:
                buffer.add_(shift)  # nonsense that a cold teacher must not look at
        plan = plan_of(student, cold=frozenset({"largest"}))
        losses.append(supernet_step(student, teacher, images, labels, plan, SMOOTHING, "ib")["subnet-00"].item())
    assert losses[0] == losses[1]


def test_a_set_without_random_members_trains_in_every_mode() -> None:
    for mode in MODES:
        student, teacher = student_and_teacher()
        losses = supernet_step(
            student, teacher, random_images(4).double(), random_labels(4), plan_of(student, randoms=()), SMOOTHING, mode
        )
        assert list(losses) == ["largest", "subnet-00"]
