"""One step of Stage I against separate, naive forwards in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor, nn

from dsnet.families import create, rebuild
from dsnet.network.prefix_tree import by_prefix
from dsnet.network.supernet import Supernet
from dsnet.space.entry_gate import with_entry_gate
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet, subnet_at
from dsnet.space.width_space import WidthSpace
from dsnet.training.losses import smoothed_one_hot, soft_cross_entropy
from dsnet.training.settings import Teacher
from dsnet.training.step import StepPlan, StepRules, supernet_step
from tests.dsnet.cases import FAMILIES, FURTHER_OPTIONS, TRACED, Case
from tests.dsnet.samples import random_images, random_labels, shaken, small_set, small_supernet, task, without_dropout

SMOOTHING = 0.1

TEACHERS = get_args(Teacher)


def student_and_teacher(family: str = "ds_tiny") -> tuple[Supernet, Supernet]:
    """Two different supernets in float64, as after many steps."""
    student = small_supernet(family, seed=0).double().train()
    teacher = shaken(small_supernet(family, seed=1), seed=7).double().requires_grad_(False)
    return student, teacher


def step(
    student: Supernet, teacher: Supernet | None, plan: StepPlan, kind: str, count: int = 6, **further: Any
) -> dict[str, Tensor]:
    """The step under test, on the same images every time."""
    rules = StepRules(teacher=kind, smoothing=SMOOTHING, **further)
    return supernet_step(student, teacher, random_images(count).double(), random_labels(count), plan, rules)


def plan_of(supernet: Supernet, **changes: object) -> StepPlan:
    """The largest, both larger members as the random ones, the smallest."""
    subnets = supernet.subnets
    plan = StepPlan(subnets.largest, (subnets[1], subnets[2]), subnets[0], 1.0, frozenset())
    return replace(plan, **changes)  # type: ignore[arg-type]


def naive_step(
    student: Supernet,
    teacher: Supernet,
    images: Tensor,
    labels: Tensor,
    plan: StepPlan,
    kind: str,
    trust: str = "full",
    temperature: float = 1.0,
    shown: Tensor | None = None,
) -> dict[str, float]:
    """docs/methods.md, section 3, line by line; `shown` is what the teacher sees instead.

    One separate forward and backward for every sub-network; gradients accumulate.
    """
    hard = smoothed_one_hot(labels, 10, SMOOTHING)
    losses: dict[str, float] = {}

    def answer(subnet: Subnet) -> Tensor:
        """[2, B, C]: at temperature 1, and at that of the loss."""
        twin = copy.deepcopy(teacher)
        twin.train(subnet.name in plan.cold)
        with torch.no_grad():
            logits = twin(images if shown is None else shown, subnet)
        return torch.stack([torch.softmax(logits / t, 1) for t in (1.0, temperature)])

    def learn(subnet: Subnet, hard: Tensor, soft: Tensor | None = None, share: Tensor | float = 0.0) -> None:
        logits = student(images, subnet)
        if soft is None or temperature == 1.0:
            target = hard if soft is None else share * soft + (1 - share) * hard
            told = -(target * torch.log_softmax(logits, 1))
        else:
            told = (1 - share) * -(hard * torch.log_softmax(logits, 1))
            told = told + share * temperature**2 * -(soft * torch.log_softmax(logits / temperature, 1))
        loss = told.sum() / len(images)
        loss.backward()
        losses[subnet.name] = loss.item()

    if kind == "inplace":
        with torch.no_grad():
            logits = student(images, plan.largest)
        own = torch.stack([torch.softmax(logits / t, 1) for t in (1.0, temperature)])
    learn(plan.largest, hard)
    for subnet in (*plan.randoms, plan.smallest):
        if kind == "none":
            learn(subnet, hard)
            continue
        soft = own if kind == "inplace" else answer(plan.largest)
        if kind == "ema_ensemble" and subnet == plan.smallest:
            soft = (soft + sum(answer(random) for random in plan.randoms)) / (1 + len(plan.randoms))
        # One share per image: how likely the teacher finds the image's label.
        share = plan.soft_weight * (soft[0][range(len(labels)), labels, None] if trust == "label_probability" else 1.0)
        learn(subnet, hard, soft[1], share)
    return losses


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}


LOSSES = [(0.3, "label_probability"), (0.3, "full"), (1.0, "full")]
"""Weight of the teacher's answer, and trust in it. The loss knows no family: one family sees all of
them, also by the statistics of the batch, and the others the one in which every term counts."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "is_cold", "soft_weight", "trust"),
    [
        (family, is_cold, *loss)
        for family in FAMILIES
        for is_cold in ((False, True) if family == "ds_tiny" else (False,))
        for loss in (LOSSES if family == "ds_tiny" else LOSSES[:1])
    ],
)
@pytest.mark.parametrize("kind", TEACHERS)
def test_shared_trunk_gradients_and_losses_equal_separate_forwards(
    family: str, kind: str, is_cold: bool, soft_weight: float, trust: str
) -> None:
    student, teacher = student_and_teacher(family)
    naive_student = small_supernet(family, seed=0).double().train()
    cold = frozenset(subnet.name for subnet in student.subnets.all) if is_cold else frozenset[str]()
    plan = plan_of(student, cold=cold, soft_weight=soft_weight)
    for net in (student, naive_student, teacher):
        without_dropout(net)
    losses = step(student, teacher, plan, kind, trust=trust)
    expected = naive_step(naive_student, teacher, random_images(6).double(), random_labels(6), plan, kind, trust)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10)
    met, wanted = gradients(student), gradients(naive_student)
    assert met.keys() == wanted.keys()
    assert (
        wanted.keys() == dict(student.named_parameters()).keys() or family == "ds_resnet"
    )  # its last gates may be unused
    for name in met:
        scale = float(wanted[name].abs().max())
        assert float((met[name] - wanted[name]).abs().max()) <= 1e-10 * max(1.0, scale), name


def _tiny(*stems: int) -> SubnetSet:
    """Members of DS-Tiny with these widths before its gate, under an entry gate."""
    own = small_set("ds_tiny")
    members = [Subnet(each.name, (stem, *each.widths[1:])) for stem, each in zip(stems, own, strict=True)]
    return with_entry_gate(SubnetSet(own.spec, tuple(members), own.teacher))


@pytest.mark.parametrize(
    ("make", "num_gates"),
    [
        (lambda: _tiny(2, 4, 4), 2),
        (lambda: _tiny(2, 3, 4), 1),
        (lambda: Case("", TRACED[0], FURTHER_OPTIONS[TRACED[0]]["two gates"], None).subnets(), 2),
    ],
    ids=["entry and own gate", "entry in place of the own gate", "entry and inside a plain network"],
)
def test_a_step_with_gates_elsewhere_has_the_gradients_of_separate_forwards(
    make: Callable[[], SubnetSet], num_gates: int
) -> None:
    student = without_dropout(shaken(rebuild(make()))).double().train()
    assert len(student.spec.gates) == num_gates
    naive_student, teacher = copy.deepcopy(student), copy.deepcopy(student).eval()
    plan = plan_of(student)
    losses = step(student, teacher, plan, "ema", trust="label_probability")
    expected = naive_step(
        naive_student, teacher, random_images(6).double(), random_labels(6), plan, "ema", "label_probability"
    )
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10)
    met, wanted = gradients(student), gradients(naive_student)
    assert met.keys() == wanted.keys() == dict(student.named_parameters()).keys()
    for name in met:
        torch.testing.assert_close(met[name], wanted[name], rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "soft_weight"), [(0.5, 0.9), (4.0, 0.0), (4.0, 1.0)])
@pytest.mark.parametrize("trust", ["full", "label_probability"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_soft_labels_of_another_temperature_equal_the_formula(
    kind: str, trust: str, soft_weight: float, temperature: float
) -> None:
    student, teacher = student_and_teacher()
    naive_student = small_supernet(seed=0).double().train()
    plan = plan_of(student, soft_weight=soft_weight)
    losses = step(student, teacher, plan, kind, trust=trust, temperature=temperature)
    images, labels = random_images(6).double(), random_labels(6)
    expected = naive_step(naive_student, teacher, images, labels, plan, kind, trust, temperature)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10)
    met, wanted = gradients(student), gradients(naive_student)
    assert met.keys() == wanted.keys()
    for name in met:
        torch.testing.assert_close(met[name], wanted[name], rtol=1e-8, atol=1e-10)


def test_teachers_teach_differently() -> None:
    losses = {}
    for kind in TEACHERS:
        student, teacher = student_and_teacher()
        met = step(student, teacher, plan_of(student), kind)
        losses[kind] = tuple(met[f"subnet-{k:02d}"].item() for k in range(3))
    assert len(set(losses.values())) == len(TEACHERS)
    # The ensemble teaches only the smallest; the random ones learn as with in-place bootstrapping.
    assert losses["ema"][1:] == losses["ema_ensemble"][1:]
    assert losses["ema"][0] != losses["ema_ensemble"][0]


def test_trunk_statistics_are_updated_once_a_step() -> None:
    student, teacher = student_and_teacher()
    step(student, teacher, plan_of(student), "ema")
    smallest, largest = student.subnets[0], student.subnets.largest
    for subnet in (smallest, largest):
        assert int(student.batch_norms()[0].statistics(subnet.prefix(1))[2]) == 1
    last = student.batch_norms()[-1]
    assert [int(last.statistics(subnet.widths)[2]) for subnet in student.subnets.all] == [1, 1, 1, 1]


@pytest.mark.parametrize("norm", ["private_stats", "recalibrate", "private_affine"])
def test_running_statistics_of_the_tails_equal_those_of_separate_forwards(norm: str) -> None:
    """Also where the narrower ones' were taken from the widest's batch statistics."""
    nets = [create("ds_tiny", task(), norm=norm, seed=0).double().train() for _ in range(2)]
    teacher = student_and_teacher()[1]
    plan = plan_of(nets[0])
    step(nets[0], None, plan, "none")
    naive_step(nets[1], teacher, random_images(6).double(), random_labels(6), plan, "none")
    met, wanted = (dict(net.named_buffers()) for net in nets)
    trunk_depth = nets[0].spec.num_prefix_groups(0)
    compared = 0
    for name, value in wanted.items():
        if name.rpartition(".")[2].count("_") > trunk_depth:  # a prefix that reaches beyond the gate
            torch.testing.assert_close(met[name], value, rtol=1e-9, atol=1e-12)
            compared += int(".updates_" in name and int(value) == (norm != "recalibrate"))
    assert compared >= 4 * 3


@pytest.mark.parametrize("kind", ["ema", "ema_ensemble"])
def test_the_teacher_is_left_as_it_was(kind: str) -> None:
    student, teacher = student_and_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for cold in (frozenset({"largest", "subnet-01"}), frozenset[str]()):
        plan = plan_of(student, cold=cold)
        step(student, teacher, plan, kind)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_cold_teacher_normalises_by_the_batch() -> None:
    losses = []
    for shift in (0.0, 100.0):
        student, teacher = student_and_teacher()
        for name, buffer in teacher.named_buffers():
            if ".mean_" in name:
                buffer.add_(shift)  # wrong values, which a teacher with few updates must not use
        plan = plan_of(student, cold=frozenset({"largest"}))
        losses.append(step(student, teacher, plan, "ema")["subnet-00"].item())
    assert losses[0] == losses[1]


def test_a_set_without_random_members_trains_with_every_teacher() -> None:
    for kind in TEACHERS:
        student, teacher = student_and_teacher()
        assert list(step(student, teacher, plan_of(student, randoms=()), kind, count=4)) == ["largest", "subnet-00"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_set_of_one_member_takes_a_plain_step(family: str, kind: str) -> None:
    """One forward and backward with the labels: the same gradients and statistics as the network on
    its own, to the bit."""
    blueprint = small_supernet(family, seed=0)
    only = SubnetSet(blueprint.spec, (blueprint.subnets.largest,))
    nets = [type(blueprint)(blueprint.spec, only, torch.Generator().manual_seed(0)).train() for _ in range(2)]
    for net in nets:
        without_dropout(net)
    images, labels = random_images(6), random_labels(6)
    plan = StepPlan(only.largest, (), only[0], 1.0, frozenset())
    rules = StepRules(teacher=kind, smoothing=SMOOTHING, trust="label_probability")
    losses = supernet_step(nets[0], copy.deepcopy(nets[0]), images, labels, plan, rules)
    hard = smoothed_one_hot(labels, 10, SMOOTHING)
    loss = soft_cross_entropy(nets[1](images, only[0]), hard)
    loss.backward()
    assert losses.keys() == {only[0].name}
    assert torch.equal(losses[only[0].name], loss.detach())
    met, wanted = gradients(nets[0]), gradients(nets[1])
    assert met.keys() == wanted.keys()
    assert all(torch.equal(met[name], wanted[name]) for name in met)
    assert all(torch.equal(x, y) for x, y in zip(nets[0].buffers(), nets[1].buffers(), strict=True))


def test_a_teacher_that_knows_nothing_leaves_the_labels_and_a_sure_one_replaces_them() -> None:
    """The share of the soft label is the probability that the teacher gives to the label: here 0 or
    1."""
    student, _ = student_and_teacher()
    labels = random_labels(6)
    losses = {}
    for name, bias in (("wrong", -1e3), ("right", 1e3)):
        sure = FixedTeacher(student, torch.eye(10, dtype=torch.float64)[labels] * bias)
        for trust in ("full", "label_probability"):
            fresh, _ = student_and_teacher()
            losses[name, trust] = step(fresh, cast(Supernet, sure), plan_of(fresh), "ema", trust=trust)[
                "subnet-00"
            ].item()
    fresh, _ = student_and_teacher()
    with_labels = step(fresh, None, plan_of(fresh), "none")["subnet-00"].item()
    assert losses["wrong", "label_probability"] == pytest.approx(with_labels, rel=1e-12)
    assert losses["wrong", "full"] != pytest.approx(with_labels, rel=1e-3)
    assert losses["right", "label_probability"] == pytest.approx(losses["right", "full"], rel=1e-12)


class FixedTeacher:
    """A teacher that gives the same logits for every input."""

    def __init__(self, like: Supernet, logits: Tensor) -> None:
        self.spec = like.spec
        self.logits = logits

    def batch_norms(self) -> list[nn.Module]:
        return []

    def __call__(self, images: Tensor, subnet: Subnet) -> Tensor:
        return self.logits


def test_gradients_go_on_from_what_was_there() -> None:
    twice, once = student_and_teacher()[0], student_and_teacher()[0]
    teacher = student_and_teacher()[1]
    for _ in range(2):
        step(twice, teacher, plan_of(twice), "ema")
    step(once, teacher, plan_of(once), "ema")
    for name, gradient in gradients(once).items():
        torch.testing.assert_close(gradients(twice)[name], 2 * gradient, rtol=1e-9, atol=1e-12)


def test_a_micro_batch_counts_for_its_share() -> None:
    whole, share = student_and_teacher()[0], student_and_teacher()[0]
    images, labels = random_images(6).double(), random_labels(6)
    for net, scale in ((whole, 1.0), (share, 0.25)):
        rules = StepRules(teacher="inplace", smoothing=SMOOTHING, scale=scale)
        losses = supernet_step(net, None, images, labels, plan_of(net), rules)
        assert losses["largest"] > 0
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(share)[name], 0.25 * gradient, rtol=1e-9, atol=1e-12)


def test_bf16_gives_nearly_the_same_gradients_and_keeps_them_in_float32() -> None:
    nets = [small_supernet(seed=0).train() for _ in range(2)]
    teacher = small_supernet(seed=1).requires_grad_(False)
    found = []
    for net, precision in zip(nets, ("float32", "bf16"), strict=True):
        rules = StepRules(teacher="ema", smoothing=SMOOTHING, precision=precision)
        losses = supernet_step(net, teacher, random_images(32), random_labels(32), plan_of(net), rules)
        found.append(torch.cat([gradient.flatten() for gradient in gradients(net).values()]))
        assert all(loss.dtype == torch.float32 for loss in losses.values())
    exact, rounded = found
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_sub_networks_that_are_not_declared_take_part_as_any_other(family: str, kind: str) -> None:
    """Random ones and the smallest of widths that no set holds; beside layers that they share with
    a declared one, statistics of the largest alone are updated. The teacher normalises them by the
    batch."""
    student, teacher = student_and_teacher(family)
    naive_student = small_supernet(family, seed=0).double().train()
    for net in (student, naive_student, teacher):
        without_dropout(net)
    space, generator = WidthSpace(0.3, 1), torch.Generator().manual_seed(2)
    *randoms, smallest = (
        subnet_at(student.spec, space.draw(lambda n: int(torch.randint(n, (), generator=generator)), student.spec))
        for _ in range(3)
    )
    assert student.subnets.names.isdisjoint(subnet.name for subnet in (*randoms, smallest))
    cold = frozenset(subnet.name for subnet in (*randoms, smallest))
    plan = plan_of(student, randoms=tuple(randoms), smallest=smallest, cold=cold, soft_weight=0.3)
    images, labels = random_images(6).double(), random_labels(6)
    losses = step(student, teacher, plan, kind)
    expected = naive_step(naive_student, teacher, images, labels, plan, kind)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10)
    met, wanted = gradients(student), gradients(naive_student)
    assert met.keys() == wanted.keys()
    for name in met:
        scale = float(wanted[name].abs().max())
        assert float((met[name] - wanted[name]).abs().max()) <= 1e-10 * max(1.0, scale), name
    shared: set[tuple[int, ...]] = set()
    for norm in student.batch_norms():
        shared = {norm.key_of(subnet.widths) for subnet in (*randoms, smallest)}
        for key in set(norm.keys()) - shared:
            assert int(norm.statistics(key)[2]) == int(key == norm.key_of(student.subnets.largest.widths))
    assert not student.batch_norms() or shared.isdisjoint(norm.keys())  # of the last layer


def test_first_layers_run_once_for_declared_and_undeclared_sub_networks_together() -> None:
    """Also where the widest of those that share the features is not declared."""
    nets = [without_dropout(small_supernet("ds_tiny", seed=0)).double().train() for _ in range(2)]
    smallest, spec = nets[0].subnets[0], nets[0].spec
    wider = subnet_at(spec, (*smallest.prefix(2), *(width - 1 for width in spec.max_widths[2:])))
    plan = plan_of(nets[0], randoms=(wider,), smallest=smallest)
    assert len(by_prefix(nets[0], plan.smaller, 0)) == 1
    step(nets[0], None, plan, "none")
    naive_step(nets[1], nets[1], random_images(6).double(), random_labels(6), plan, "none")
    met, wanted = (dict(net.named_buffers()) for net in nets)
    depth = spec.num_prefix_groups(0)
    for name, value in wanted.items():
        if name.rpartition(".")[2].count("_") > depth:  # a prefix that reaches beyond the gate
            torch.testing.assert_close(met[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", ["tied", "all"])
def test_a_step_of_sliced_kernels_equals_separate_forwards(combine: str) -> None:
    options = {"width": 0.5, "num_routes": 3, "kernels": [3, 5], "combine": combine}
    nets = [create("ds_tiny", task(), options, seed=0).double().train() for _ in range(3)]
    plan = plan_of(nets[0])
    losses = step(nets[0], nets[2], plan, "ema")
    images, labels = random_images(6).double(), random_labels(6)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        naive_step(nets[1], nets[2], images, labels, plan, "ema"), abs=1e-10
    )
    for name, gradient in gradients(nets[1]).items():
        torch.testing.assert_close(gradients(nets[0])[name], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["ema", "ema_ensemble"])
def test_a_teacher_with_a_view_of_its_own_answers_to_that_view(kind: str) -> None:
    student, teacher = student_and_teacher()
    naive_student = small_supernet("ds_tiny", seed=0).double().train()
    plan = plan_of(student)
    images, shown, labels = random_images(6).double(), random_images(6, seed=9).double(), random_labels(6)
    rules = StepRules(teacher=kind, smoothing=SMOOTHING)
    losses = supernet_step(student, teacher, images, labels, plan, rules, shown)
    expected = naive_step(naive_student, teacher, images, labels, plan, kind, shown=shown)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-10)
    for name, gradient in gradients(naive_student).items():
        torch.testing.assert_close(gradients(student)[name], gradient, rtol=1e-8, atol=1e-10)
