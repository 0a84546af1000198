"""Vision transformer supernets: what each dimension slices, costs, options, and pretrained weights.

The properties that all families share are tested with all of them (tests/dsnet/cases.py).
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet.data.digits import load_digits
from dsnet.deploy.materialize import materialize
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import Task, create, layout, rebuild
from dsnet.families.vit import VitSupernet
from dsnet.network.axes import take
from dsnet.network.slicing import gradients_added_in_place
from dsnet.network.supernet import restrict, state_for_saving
from dsnet.network.vit_weights import resized_positions, sorted_by_importance
from dsnet.space.cost import op_costs, subnet_cost
from dsnet.space.entry_gate import with_entry_gate
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet, subnet_at
from dsnet.stored.checkpoint import save_checkpoint
from dsnet.training.optimization import make_optimizer
from dsnet.training.settings import TrainSettings
from dsnet.training.start import first_weights, lay_out, load_start
from dsnet.training.step import StepPlan, StepRules, supernet_step
from tests.dsnet.plain_vits import TimmVit, TorchvisionVit, with_older_names
from tests.dsnet.samples import SMALL_OPTIONS, random_images, random_labels, shaken, small_supernet, task
from tests.dsnet.space.test_cost import counted_madds

FAMILY = "ds_vit"
OPTIONS = SMALL_OPTIONS[FAMILY]
DEIT_TINY_PARAMS = 5_717_416
"""Published: 5.7 M."""


def vit(seed: int = 0, **options: Any) -> VitSupernet:
    """A small network in double precision, every parameter of which is away from its initial
    value."""
    supernet = shaken(create(FAMILY, task(), {**OPTIONS, **options}, seed=seed), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in supernet.gates:  # type: ignore[attr-defined]
            gate.expand.weight.copy_(0.3 * torch.randn(gate.expand.weight.shape, generator=generator))
    assert isinstance(supernet, VitSupernet)
    return supernet.double().eval()


def changed(supernet: VitSupernet, **kinds: int) -> Subnet:
    """The widest sub-network with other widths of all groups of some kinds after the gate."""
    spec = supernet.spec
    start = spec.num_prefix_groups(0)
    widths = [
        kinds.get(group.kind if group.kind != "channels" else "mlp", group.max_width)
        if number >= start
        else group.max_width
        for number, group in enumerate(spec.groups)
    ]
    return subnet_at(spec, widths)


def numbered(supernet: VitSupernet, name: str) -> int:
    return [group.name for group in supernet.spec.groups].index(name)


def masked_logits(supernet: VitSupernet, subnet: Subnet, images: Tensor) -> Tensor:
    """The full network with masks in place of slices: every block computes with all channels, heads
    and hidden channels, and what a sub-network lacks is multiplied by zero."""
    state, spec = supernet.state_dict(), supernet.spec
    head_channels, size = supernet.plan.head_channels, spec.max_widths[0]
    patch = supernet.plan.patch
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def mask(kept: int, whole: int) -> Tensor:
        return (torch.arange(whole) < kept).double()

    def norm(x: Tensor, name: str, kept: Tensor) -> Tensor:
        count = kept.sum()
        mean = (x * kept).sum(-1, keepdim=True) / count
        variance = ((x - mean).square() * kept).sum(-1, keepdim=True) / count
        return (x - mean) / (variance + 1e-6).sqrt() * (state[f"{name}.weight"] * kept) + state[f"{name}.bias"] * kept

    for block in range(supernet.plan.depth):
        if block in supernet.plan.gates:
            gate = f"gates.{supernet.plan.gates.index(block)}"
            seen = torch.cat([x[:, 0], x.mean(1)], 1)
            hidden = torch.relu(F.linear(seen, state[f"{gate}.reduce.weight"], state[f"{gate}.reduce.bias"]))
            x = (
                x
                * (1 + torch.tanh(F.linear(hidden, state[f"{gate}.expand.weight"], state[f"{gate}.expand.bias"])))[
                    :, None
                ]
            )
        if block - supernet.plan.gates[-1] >= subnet.widths[numbered(supernet, "depth")]:
            break
        name = f"blocks.{block}"
        widths = {part: subnet.widths[numbered(supernet, f"{name}.{part}")] for part in ("embed", "heads", "mlp")}
        kept = mask(widths["embed"], size)
        qkv = F.linear(norm(x, f"{name}.norm1", kept), state[f"{name}.attn.qkv.weight"], state[f"{name}.attn.qkv.bias"])
        q, k, v = qkv.chunk(3, -1)
        mixed = []
        for head, (a, b, c) in enumerate(zip(*(part.split(head_channels, -1) for part in (q, k, v)), strict=True)):
            scores = (a @ b.transpose(1, 2) / head_channels**0.5).softmax(-1)
            mixed.append(scores @ c * float(head < widths["heads"]))
        y = torch.cat(mixed, -1)
        x = x + kept * F.linear(y, state[f"{name}.attn.proj.weight"], state[f"{name}.attn.proj.bias"])
        hidden = F.gelu(
            F.linear(norm(x, f"{name}.norm2", kept), state[f"{name}.mlp.fc1.weight"], state[f"{name}.mlp.fc1.bias"])
        )
        hidden = hidden * mask(widths["mlp"], hidden.shape[-1])
        x = x + kept * F.linear(hidden, state[f"{name}.mlp.fc2.weight"], state[f"{name}.mlp.fc2.bias"])
    y = norm(x[:, 0], "norm", torch.ones(size, dtype=torch.float64))
    return F.linear(y, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize(
    "kinds",
    [{}, {"slice": 7}, {"heads": 1}, {"mlp": 5}, {"depth": 1}, {"slice": 9, "heads": 2, "mlp": 11, "depth": 2}],
    ids=str,
)
@torch.no_grad()
def test_a_slice_is_the_masked_full_network(kinds: dict[str, int]) -> None:
    supernet, images = vit(), random_images(3).double()
    subnet = changed(supernet, **kinds)
    met, expected = supernet(images, subnet), masked_logits(supernet, subnet, images)
    torch.testing.assert_close(met, expected, rtol=1e-9, atol=1e-9)
    if kinds:
        whole = masked_logits(supernet, changed(supernet), images)
        assert not torch.allclose(whole, met, rtol=1e-3)


@torch.no_grad()
def test_oblong_images_are_sliced_cut_and_counted() -> None:
    size = (8, 20)
    supernet = shaken(create(FAMILY, task(image_size=size), OPTIONS)).double().eval()
    assert supernet.state_dict()["pos_embed"].shape == (1, 1 + 2 * 5, 24)
    images = random_images(2, size).double()
    for subnet in supernet.subnets.all:
        met = supernet(images, subnet)
        plain = materialize(supernet, subnet)
        torch.testing.assert_close(plain(images), met, rtol=1e-9, atol=1e-9)
        cost = subnet_cost(supernet.spec, subnet, size)
        assert counted_madds(lambda plain=plain: plain(images[:1])) == cost.madds
        assert sum(parameter.numel() for parameter in plain.parameters()) == cost.params
    with pytest.raises(ValueError, match=r"images have 20 x 8 pixels, but this network has positions for 8 x 20"):
        supernet(images.transpose(2, 3), supernet.subnets[0])


@torch.no_grad()
def test_idle_channels_pass_a_block_unchanged_to_the_bit() -> None:
    supernet = vit().float()
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    subnet = changed(supernet, slice=7)
    after = supernet._run(1, x, subnet)
    assert torch.equal(after[..., 7:], x[..., 7:])
    assert not (after[..., :7] == x[..., :7]).any()
    plain = supernet._cut_blocks(1, subnet)(x)
    assert torch.equal(plain[..., 7:], x[..., 7:])


@torch.no_grad()
def test_a_block_that_does_not_run_is_the_identity_and_costs_nothing() -> None:
    supernet, images = vit(), random_images(2).double()
    shallow, whole = changed(supernet, depth=1), changed(supernet)
    expected = supernet(images, shallow)
    costs = {
        op.name: cost
        for op, cost in zip(supernet.spec.ops, op_costs(supernet.spec, shallow, 16), strict=True)
        if op.name.startswith(("blocks.2.", "blocks.3."))
    }
    assert len(costs) == 14
    assert set(costs.values()) == {(0, 0)}
    for block in supernet.blocks[2:]:
        for layer in (block.attn["proj"], block.mlp["fc2"]):  # type: ignore[union-attr, index]
            layer.weight.zero_()  # type: ignore[union-attr, operator]
            layer.bias.zero_()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(supernet(images, whole), expected, rtol=1e-12, atol=1e-12)
    narrow = list(shallow.widths)
    narrow[-3:] = 2, 1, 3
    assert torch.equal(supernet(images, subnet_at(supernet.spec, narrow)), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_of_a_slice_are_those_of_the_plain_network(in_place: bool) -> None:
    supernet, images, labels = vit(), random_images(4).double(), random_labels(4)
    subnet = changed(supernet, slice=9, heads=2, mlp=11, depth=2)
    plain = materialize(supernet, subnet).train().requires_grad_(True)
    F.cross_entropy(plain(images), labels).backward()
    with gradients_added_in_place() if in_place else nullcontext():
        F.cross_entropy(supernet.train()(images, subnet), labels).backward()
    axes = supernet.axes()
    names = {id(value): name for name, value in supernet.named_parameters()}
    assert len(names) == len(list(supernet.parameters()))
    compared = 0
    for name, value in plain.named_parameters():
        own = _own_name(name)
        whole = supernet.get_parameter(own).grad
        assert whole is not None
        assert value.grad is not None
        torch.testing.assert_close(take(whole, axes.get(own, ()), subnet.widths), value.grad, rtol=1e-9, atol=1e-10)
        rest = whole.abs().sum() - take(whole, axes.get(own, ()), subnet.widths).abs().sum()
        assert float(rest) == pytest.approx(0.0, abs=1e-9), own
        compared += 1
    assert compared == 3 * 12 + 4 + 4 + 4


def _own_name(name: str) -> str:
    """The name in the supernet of a parameter of a cut network with its gate after the first
    block."""
    name = re.sub(r"^trunk\.0\.patches\.", "patch_embed.proj.", name)
    name = name.replace("trunk.0.class_token", "cls_token").replace("trunk.0.positions", "pos_embed")
    name = re.sub(r"^trunk\.2\.", "gates.0.", name)
    name = re.sub(r"^tail\.1\.", "", name)
    name = re.sub(r"^trunk\.1\.blocks\.0\.", "blocks.0.", name)
    name = re.sub(r"^tail\.0\.blocks\.(\d+)\.", lambda found: f"blocks.{int(found[1]) + 1}.", name)
    name = re.sub(r"\.(qkv|proj)\.(?=weight|bias)", r".attn.\1.", name) if name.startswith("blocks") else name
    return re.sub(r"\.(fc[12])\.", r".mlp.\1.", name)


def test_equal_seeds_give_equal_weights_and_the_global_generator_is_not_asked() -> None:
    before = torch.get_rng_state()
    first, again, other = (create(FAMILY, task(), OPTIONS, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    drawn = [name for name, value in first.items() if value.any() and not (value == 1).all()]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    assert len(drawn) == 4 * 4 + 5


@torch.no_grad()
def test_a_gate_is_initially_the_identity() -> None:
    supernet = create(FAMILY, task(), OPTIONS).eval()
    output = supernet.trunk(random_images(2), supernet.subnets[0])
    assert torch.equal(output.features, output.gate_input)
    assert output.hidden.any()


def test_the_widest_has_the_published_parameters_and_madds_of_deit_tiny() -> None:
    subnets = layout(FAMILY, Task(1000, 3, 224))
    cost, gate = subnet_cost(subnets.spec, subnets.largest, 224), subnets.spec.gates[0]
    own = dict(zip((op.name for op in subnets.spec.ops), op_costs(subnets.spec, subnets.largest, 224), strict=True))
    assert cost.params - own[gate.attention][1] == DEIT_TINY_PARAMS
    tokens, dim = 197, 192
    block = tokens * dim * (3 * dim + dim + 8 * dim) + 2 * tokens**2 * dim
    assert cost.madds - own[gate.attention][0] == 196 * 768 * dim + 12 * block + 1000 * dim
    assert gate.num_prefix_groups == 1 + 3 * 4
    assert subnets.spec.layout["patch"] == 16
    assert own[gate.attention] == (tokens * dim + 3 * gate.hidden * dim, 3 * gate.hidden * dim + gate.hidden + dim)


def test_weight_decay_leaves_biases_norms_the_class_token_and_positions_alone() -> None:
    supernet = small_supernet(FAMILY)
    plain = materialize(supernet, supernet.subnets[0])
    for net, tokens in ((supernet, {"cls_token", "pos_embed"}), (plain, {"trunk.0.class_token", "trunk.0.positions"})):
        optimizer = make_optimizer(net, TrainSettings(weight_decay=0.25))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        kept = {name for name, p in net.named_parameters() if decay[id(p)] == 0}
        assert tokens <= kept
        assert kept - tokens == {name for name, p in net.named_parameters() if p.ndim == 1}


# ---- groups and options


def test_the_kinds_of_the_groups_and_what_json_leaves_out() -> None:
    spec = layout(FAMILY, task(), {**OPTIONS, "slices": ["heads", "mlp"]}).spec
    kinds = {group.name.rpartition(".")[2]: group.kind for group in spec.groups}
    assert kinds == {"stream": "channels", "embed": "slice", "heads": "heads", "mlp": "channels", "depth": "depth"}
    assert {group.name.rpartition(".")[2] for group in spec.groups if group.is_fixed} == {"stream", "embed", "depth"}
    stored = spec.to_json()
    assert stored["groups"][0] == {"name": "stream", "max_width": 24, "choices": (24,)}
    assert set(stored["groups"][3]) == {"name", "max_width"}
    assert SupernetSpec.from_json(json.loads(json.dumps(stored))) == spec
    with pytest.raises(
        ValueError, match=r"width 20 of channel group 'blocks.0.embed' must be one of 24; the nearest is 24"
    ):
        subnet_at(spec, (24, 20, *spec.max_widths[2:]))
    stored["groups"][1]["kind"] = "lungs"
    with pytest.raises(CheckpointError, match="is of kind 'lungs'; known: channels, kernel, heads, depth, slice"):
        SupernetSpec.from_json(stored)
    with pytest.raises(ValueError, match=r"has the choices \[3, 2\], but they must rise and end with 3"):
        replace(spec, groups=(replace(spec.groups[2], choices=(3, 2)),))


def test_routes_are_ratios_or_written() -> None:
    subnets = layout(
        FAMILY, task(image_size=32), {"dim": 96, "depth": 6, "gates": [2], "route_heads": [1, 1, 2, 3], "step": 16}
    )
    last = [subnet.widths[-4:] for subnet in subnets]
    names = [subnet.name for subnet in subnets]
    assert names == ["0.25", "0.5", "0.75", "1"]
    assert [widths[1:] for widths in last] == [(32, 1, 96), (48, 1, 192), (80, 2, 288), (96, 3, 384)]
    depth = [group.kind for group in subnets.spec.groups].index("depth")
    assert [subnet.widths[depth] for subnet in subnets] == [1, 2, 3, 4]
    assert subnets.teacher is None
    narrow = layout(FAMILY, task(image_size=32), {"dim": 96, "depth": 6, "trunk": 0.5, "slices": ["embed"]})
    assert narrow[0].widths[:4] == (96, 48, 3, 384)
    assert narrow.teacher is not None
    assert narrow.teacher.widths == narrow.spec.max_widths


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (128, 16), (96, 8), (64, 8), (32, 4), (28, 4), (16, 2), (8, 2)])
def test_a_patch_that_is_not_written_fits_the_images(size: int, patch: int) -> None:
    assert layout(FAMILY, task(image_size=size), {"dim": 24, "depth": 2}).spec.layout["patch"] == patch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patch": 16},
            "patch is 16, but images of 30 x 30 pixels cannot be divided .*: use images of 32 x 32 pixels, or patch 15",
        ),
        ({"patch": 7}, "use images of 28 x 28 pixels, or patch 6"),
        ({"patch": 0}, "patch is 0, but must be a whole number of pixels in 1..512, or null"),
        ({"dim": 100, "heads": 3}, "dim is 100, which 3 heads do not divide: use heads 2, or dim 99"),
        ({"heads": 0}, "heads is 0, but must be a whole number in 1..64"),
        ({"depth": 1}, "depth is 1, but must be a whole number in 2..64"),
        ({"gates": [12]}, r"gates is \[12\], but must be rising numbers of blocks in 1..11, such as \[4\]"),
        ({"gates": [3, 2]}, "must be rising numbers"),
        ({"gates": []}, "a gate stands after so many blocks"),
        ({"ratios": [1.0, 0.5]}, "ratios is .* but must rise"),
        ({"ratios": []}, "must be a list of numbers"),
        ({"slices": ["kernel"]}, "slices is .* must be a list of dimensions: embed, heads, mlp, depth"),
        (
            {"route_heads": [1, 2, 3, 4]},
            r"route_heads is \[1, 2, 3, 4\], but must be a list of 4 whole numbers in 1..3",
        ),
        ({"route_depth": [1, 2]}, "route_depth is .* a list of 4 whole numbers in 1..8, one for each of ratios"),
        ({"route_embed": [8, 16, 24, 32], "slices": ["mlp"]}, "slices does not have embed: add it there"),
        ({"slices": ["heads"], "ratios": [0.9, 1.0]}, "the routes 0.9 and 1 are the same sub-network"),
        ({"gates": [1, 2, 3, 4, 5, 6], "paths": "all"}, "makes 4096 sub-networks; at most 1024"),
        ({"mlp_ratio": True}, "mlp_ratio is True"),
        ({"step": 0}, "step is 0"),
    ],
)
def test_bad_options_are_refused_with_what_works(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"supernet.options of ds_vit: .*{message}"):
        layout(FAMILY, task(image_size=30), {"patch": 2, **options})


def test_images_that_no_usual_patch_divides_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"images of 33 x 33 pixels cannot be divided .*: use images of 34 x 34 pixels, or write patch",
    ):
        layout(FAMILY, task(image_size=33))
    supernet = small_supernet(FAMILY)
    with pytest.raises(ValueError, match="images have 20 x 20 pixels, but this network has positions for 16 x 16"):
        supernet(random_images(1, 20), supernet.subnets[0])


@torch.no_grad()
def test_members_that_differ_before_the_gate_get_an_entry_gate() -> None:
    own = layout(FAMILY, task(), OPTIONS)
    narrow = list(own[1].widths)
    narrow[1:4] = 10, 1, 7
    several = with_entry_gate(SubnetSet(own.spec, (Subnet("narrow", tuple(narrow)), *own.members), own.teacher))
    assert [gate.name for gate in several.spec.gates] == ["entry", "gate0"]
    supernet, images = shaken(rebuild(several)).eval(), random_images(1)
    for subnet in several.all:
        met = supernet(images, subnet)
        torch.testing.assert_close(materialize(supernet, subnet)(images), met, rtol=1e-5, atol=1e-5)
        cost = subnet_cost(several.spec, subnet, 16)
        assert counted_madds(lambda subnet=subnet: supernet(images, subnet)) == cost.madds
        assert cost.trunk_madds == 3 * 16 * 16
    alone = rebuild(SubnetSet(own.spec, (own[1],))).eval()
    alone.load_state_dict(supernet.state_dict())
    assert torch.equal(alone(images, own[1]), supernet(images, own[1]))


# ---- other images and classes, pretrained weights


def stored(folder: Path, supernet: VitSupernet) -> Path:
    meta = {"spec": supernet.spec.to_json(), "subnets": supernet.subnets.to_json()}
    save_checkpoint(folder / "final", state_for_saving(supernet), meta)
    return folder / "final"


@torch.no_grad()
def test_a_stored_supernet_starts_one_for_other_images_and_classes(tmp_path: Path) -> None:
    source = vit().float()
    start = load_start(stored(tmp_path, source))
    subnets = lay_out("checkpoint", Task(7, 3, 24), {}, start=start)
    assert subnets == layout(FAMILY, Task(7, 3, 24), OPTIONS)
    supernet, fresh = first_weights(subnets, 0, start)
    assert fresh == ["classifier.weight", "classifier.bias"]
    state, before = supernet.state_dict(), source.state_dict()
    assert torch.equal(state["pos_embed"], resized_positions(before["pos_embed"], (4, 4), (6, 6)))
    assert torch.equal(state["pos_embed"][:, 0], before["pos_embed"][:, 0])
    others = set(state) - {"pos_embed", *fresh}
    assert all(torch.equal(state[name], before[name]) for name in others)
    assert supernet(random_images(2, 24), supernet.subnets[0]).shape == (2, 7)
    with pytest.raises(
        ConfigError,
        match=r"ds_vit: patch is 4, but images of 30 x 30 pixels .* use images of 32 x 32 pixels, or patch 3",
    ):
        lay_out("checkpoint", Task(7, 3, 30), {}, start=start)


def test_positions_of_another_grid_follow_its_shape() -> None:
    draw = torch.Generator().manual_seed(0)
    positions = torch.randn(1, 1 + 3 * 5, 4, generator=draw)
    larger = resized_positions(positions, (3, 5), (6, 10))
    assert larger.shape == (1, 61, 4)
    turned = torch.cat([positions[:, :1], positions[:, 1:].unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)], 1)
    other = resized_positions(turned, (5, 3), (10, 6))[:, 1:].unflatten(1, (10, 6)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(other, larger[:, 1:])
    even = positions[:, :1].expand(-1, 16, -1)
    torch.testing.assert_close(resized_positions(even, (3, 5), (2, 4)), positions[:, :1].expand(-1, 9, -1))
    assert resized_positions(positions, (3, 5), (3, 5)) is positions


SHAPE = {"patch": 4, "dim": 24, "heads": 3, "depth": 4}
PLAIN = {"timm": TimmVit, "torchvision": TorchvisionVit, "torchvision, released": TorchvisionVit}


def plain_of(name: str, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(3)
    plain = PLAIN[name]((16, 16), **SHAPE, hidden=48, num_classes=num_classes)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return plain.eval()


def saved(folder: Path, name: str, plain: nn.Module) -> Path:
    state = plain.state_dict()
    torch.save(with_older_names(state) if name.endswith("released") else state, folder / "vit.pth")
    return folder / "vit.pth"


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_weights_of_a_plain_vit_load_and_are_sorted(name: str, tmp_path: Path) -> None:
    plain, images = plain_of(name), random_images(4)
    start = load_start(saved(tmp_path, name, plain))
    supernet, fresh = first_weights(layout(FAMILY, task(), OPTIONS), 0, start)
    assert fresh == []
    supernet.eval()
    met, expected = supernet(images, supernet.subnets.largest), plain(images)
    torch.testing.assert_close(met, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1
    for block in supernet.blocks:  # type: ignore[attr-defined]
        fc1, fc2 = block.mlp["fc1"].weight, block.mlp["fc2"].weight
        hidden = fc1.double().abs().sum(1) * fc2.double().abs().sum(0)
        values, proj = block.attn["qkv"].weight[48:].double().abs(), block.attn["proj"].weight.double().abs()
        heads = values.reshape(3, -1).sum(1) * proj.T.reshape(3, -1).sum(1)
        assert (hidden.diff() <= 0).all()
        assert (heads.diff() <= 0).all()


@torch.no_grad()
def test_sorting_changes_the_order_and_not_the_answers() -> None:
    supernet, images = vit(), random_images(3).double()
    before = supernet.state_dict()
    after = sorted_by_importance(before, 4, supernet.plan.head_channels)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name.rpartition(".")[0].split(".", 2)[2] for name in moved} == {
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    }
    other = rebuild(supernet.subnets).double().eval()
    other.load_state_dict(after)
    widest, narrow = changed(supernet), changed(supernet, heads=1, mlp=9)
    torch.testing.assert_close(other(images, widest), supernet(images, widest), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(other(images, narrow), supernet(images, narrow), rtol=1e-3)
    again = sorted_by_importance(after, 4, supernet.plan.head_channels)
    assert all(torch.equal(value, again[name]) for name, value in after.items())


@torch.no_grad()
def test_weights_of_other_classes_and_image_sizes_load(tmp_path: Path) -> None:
    plain = plain_of("timm", num_classes=3)
    start = load_start(saved(tmp_path, "timm", plain))
    supernet, fresh = first_weights(layout(FAMILY, task(image_size=32), OPTIONS), 0, start)
    assert fresh == ["classifier.weight", "classifier.bias"]
    assert isinstance(plain, TimmVit)
    torch.testing.assert_close(supernet.state_dict()["pos_embed"], resized_positions(plain.pos_embed, (4, 4), (8, 8)))
    assert torch.equal(supernet.state_dict()["norm.weight"], plain.norm.weight)
    larger = TimmVit((32, 32), **SHAPE, hidden=48, num_classes=3).eval()
    state = {**plain.state_dict(), "pos_embed": resized_positions(plain.pos_embed, (4, 4), (8, 8))}
    larger.load_state_dict(state)
    subnets = layout(FAMILY, Task(3, 3, 32), OPTIONS)
    supernet = first_weights(subnets, 0, start)[0].eval()
    images = random_images(2, 32)
    torch.testing.assert_close(supernet(images, subnets.largest), larger(images), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = plain_of("timm").state_dict()
    state["reg_token"] = torch.zeros(1, 1, 24)
    torch.save(state, tmp_path / "vit.pth")
    start = load_start(tmp_path / "vit.pth")
    with pytest.raises(
        CheckpointError, match=r"does not fit supernet.model ds_vit .*unexpected reg_token \(1, 1, 24\)"
    ):
        first_weights(layout(FAMILY, task(), OPTIONS), 0, start)
    with pytest.raises(CheckpointError, match=r"missing blocks.4.norm1.weight \(24,\)"):
        first_weights(layout(FAMILY, task(), {**OPTIONS, "depth": 6}), 0, start)
    torch.save({**plain_of("timm").state_dict(), "pos_embed": torch.zeros(1, 14, 24)}, tmp_path / "vit.pth")
    start = load_start(tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 14, 24\), expected \(1, 17, 24\)"):
        first_weights(layout(FAMILY, task(), OPTIONS), 0, start)


def test_a_distilled_deit_is_refused_with_the_reason_and_what_works(tmp_path: Path) -> None:
    state = {**plain_of("timm").state_dict(), "dist_token": torch.zeros(1, 1, 24), "head_dist.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "deit.pth")
    start = load_start(tmp_path / "deit.pth")
    with pytest.raises(
        CheckpointError,
        match=r"deit\.pth is a distilled DeiT: it has a second class token \(dist_token\).*use the weights of the same network "
        r"without distillation \(in timm deit_tiny_patch16_224",
    ):
        first_weights(layout(FAMILY, task(), OPTIONS), 0, start)


# ---- training


@pytest.mark.slow
def test_it_learns_the_digits() -> None:
    digits = load_digits()
    images, labels = (digits.images.float() - 78) / 96, digits.labels
    options = {"patch": 4, "dim": 48, "heads": 3, "depth": 3, "mlp_ratio": 2, "ratios": [0.5, 1.0]}
    supernet = create(FAMILY, Task(10, 1, 8), options).train()
    subnets = supernet.subnets
    train = TrainSettings(optimizer="adamw", lr=4e-3, weight_decay=0.05)
    optimizer, draw = make_optimizer(supernet, train), torch.Generator().manual_seed(0)
    plan = StepPlan(subnets.largest, (), subnets[0], 0.0, frozenset())
    rules = StepRules(teacher="none", smoothing=0.1)
    for _ in range(60):
        rows = torch.randint(1400, (64,), generator=draw)
        optimizer.zero_grad(set_to_none=True)
        supernet_step(supernet, None, images[rows], labels[rows], plan, rules)
        optimizer.step()
    supernet.eval()
    with torch.no_grad():
        for subnet in subnets:
            right = (supernet(images[1400:], subnet).argmax(1) == labels[1400:]).float().mean()
            assert float(right) > 0.7, subnet.name


def test_a_smaller_supernet_has_no_block_that_does_not_run() -> None:
    supernet = vit()
    shallow = changed(supernet, depth=2)
    both = rebuild(SubnetSet(supernet.spec, (shallow, changed(supernet, depth=1))))
    both.load_state_dict(supernet.state_dict())
    small = restrict(both, [0, 1])
    assert [len(net.blocks) for net in (both, small)] == [4, 3]  # type: ignore[arg-type]
    images = random_images(2)
    with torch.no_grad():
        assert torch.equal(small.eval()(images, small.subnets[0]), both.eval()(images, shallow))
