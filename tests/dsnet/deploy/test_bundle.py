"""Bundles: a loaded one computes the same as the saved one, and every tampering is detected."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dsnet
from dsnet.data.photos import PhotoDecoder
from dsnet.deploy.bundle import (
    MANIFEST,
    Bundle,
    BundleContents,
    check_bundle_examples,
    check_bundle_files,
    load_bundle,
    save_bundle,
    score_bundle,
)
from dsnet.deploy.engines import TORCH
from dsnet.errors import CheckpointError, ConfigError, DataError, DsnetError, PreflightError, VerificationError
from dsnet.files import file_sha256, own_digest
from dsnet.measure.evaluate import build_routing_table
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Evidence, Router
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.gate import GateRouter
from dsnet.routing.table_routing import run_on_table
from dsnet.space.cost import subnet_cost
from dsnet.stored.checkpoint import load_tensors, save_tensors
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    random_labels,
    random_pixels,
    random_router,
    small_supernet,
    tensor_data,
    three_gate_supernet,
)
from tests.shapes import unchecked_shapes

CLASSES = tuple(f"class{index}" for index in range(10))
CLAIMS = {"val": {"top1": 0.5, "madds_m": 0.25}, "data": {"name": "digits"}}


def gate(supernet: Supernet, routes: tuple[int, ...] = (0, 2)) -> GateRouter:
    """A gate that uses all of its routes."""
    images = NORMALIZATION.apply(random_pixels(64, supernet.spec.image_size, seed=6))
    hidden = supernet.trunk(images, supernet.subnets[0]).hidden.detach().double()
    weight = torch.randn((len(routes), hidden.shape[1]), generator=torch.Generator().manual_seed(2)).double()
    return GateRouter(weight, (hidden @ weight.T).mean(0), routes)


def save(
    folder: Path,
    supernet: Supernet | None = None,
    router: Router | None = None,
    claims: Mapping[str, Any] = CLAIMS,
    **changes: Any,
) -> Path:
    """Save a bundle; returns its folder."""
    supernet = supernet if supernet is not None else small_supernet()
    fields: dict[str, Any] = {
        "supernet": supernet,
        "router": router if router is not None else gate(supernet),
        "normalization": NORMALIZATION,
        "class_names": CLASSES,
        "examples": random_pixels(16, supernet.spec.image_size),
    }
    save_bundle(folder, BundleContents(**{**fields, **changes}), claims=claims, gate_yaml="gate: for people\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "bundle")
    return tmp_path / "bundle"


def verify(folder: Path) -> int:
    """Everything that `dsnet-orch verify` does without data."""
    bundle = load_bundle(folder)
    check_bundle_files(bundle)
    return check_bundle_examples(bundle)


@pytest.mark.parametrize(("cut_weights", "fold_bn"), [(True, True), (True, False), (False, False)])
def test_a_loaded_bundle_answers_as_the_supernet_that_was_saved(folder: Path, cut_weights: bool, fold_bn: bool) -> None:
    supernet = small_supernet()
    router = gate(supernet)
    bundle = load_bundle(folder, cut_weights=cut_weights, fold_bn=fold_bn)
    pixels = random_pixels(12, seed=5)
    answer = bundle(pixels)
    with torch.no_grad():
        images = NORMALIZATION.apply(pixels)
        hidden = supernet.trunk(images, supernet.subnets[0]).hidden
        routes = router.step(Evidence({"hidden": hidden}, len(images)), ())
        for row, route in enumerate(routes.tolist()):
            subnet = supernet.subnets[route]
            logits = supernet(images[row : row + 1], subnet)[0]
            torch.testing.assert_close(answer.probabilities[row], logits.softmax(0), rtol=1e-5, atol=1e-5)
            assert int(answer.classes[row]) == int(logits.argmax())
            assert bundle.route_names[int(answer.routes[row])] == subnet.name
            madds = subnet_cost(supernet.spec, subnet, 16).madds + hidden.shape[1] * len(router.routes)
            assert int(answer.madds[row]) == madds
    assert len(set(routes.tolist())) == 2
    assert bundle.class_names == CLASSES
    assert bundle.image_shape == (3, 16, 16)
    assert bundle.claims == CLAIMS
    assert bundle.normalization == NORMALIZATION


SUPERNETS: dict[str, Callable[[], Supernet]] = {"one gate": small_supernet, "three gates": three_gate_supernet}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPERNETS)
@pytest.mark.parametrize("kind", ROUTER_KINDS)
@pytest.mark.parametrize("leave_out", [(), (1,)])
def test_a_bundle_of_every_router_answers_as_the_routing_table_says(
    tmp_path: Path, name: str, kind: str, leave_out: tuple[int, ...]
) -> None:
    supernet, data = SUPERNETS[name](), tensor_data(40)
    pixels = data.images("val")
    recalibrate(supernet, [NORMALIZATION.apply(pixels)])  # without it all images give the same confidence
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    router = random_router(kind, table, routes=[k for k in range(table.num_routes) if k not in leave_out])
    save(tmp_path / "bundle", supernet, router, examples=pixels[:16])
    assert verify(tmp_path / "bundle") == 16
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.net.router.kind == kind
    assert bundle.route_names == tuple(table.routes[k] for k in router.routes)
    answer, run = bundle(pixels), run_on_table(router, table)
    clear = ~run.is_tie
    assert clear.sum() > 30
    assert len(set(run.routes.tolist())) > 1
    names = np.array(bundle.route_names)[answer.routes.numpy()]
    assert names[clear].tolist() == np.array(table.routes)[run.routes[clear]].tolist()
    assert answer.madds.numpy()[clear].tolist() == run.madds[clear].tolist()
    assert answer.classes.numpy()[clear].tolist() == table.predicted[clear, run.routes[clear]].tolist()


def test_a_gates_bundle_of_an_earlier_release_is_read(folder: Path, tmp_path: Path) -> None:
    # Written by hand, field by field, as the release that had gates only wrote it.
    supernet, router = small_supernet(), gate(small_supernet())
    now = json.loads((folder / MANIFEST).read_text())
    old = tmp_path / "old"
    old.mkdir()
    tensors = {
        name: value for name, value in load_tensors(folder / "weights.safetensors").items() if "router" not in name
    }
    tensors |= {"router.weight": router.weight, "router.offset": router.offset}
    files = {"weights.safetensors": save_tensors(old / "weights.safetensors", tensors)}
    with torch.no_grad():
        images = NORMALIZATION.apply(random_pixels(16))
        scores = supernet.trunk(images, supernet.subnets[0]).hidden.double() @ router.weight.T - router.offset
        routes = scores.argmax(1)
        logits = [supernet(images[i : i + 1], supernet.subnets[(0, 2)[int(k)]])[0] for i, k in enumerate(routes)]
    examples = {"images": random_pixels(16), "routes": routes, "logits": torch.stack(logits)}
    files["examples.safetensors"] = save_tensors(old / "examples.safetensors", examples)
    manifest = {
        "schema_version": 1,
        "kind": "dsnet-bundle",
        "spec": now["spec"],
        "subnets": now["subnets"],
        "router": {"kind": "gate", "routes": [0, 1]},
        "normalization": now["normalization"],
        "class_names": list(CLASSES),
        "image_shape": [3, 16, 16],
        "claims": CLAIMS,
        "files": files,
    }
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    (old / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    assert verify(old) == 16
    pixels = random_pixels(12, seed=5)
    for ours, theirs in zip(load_bundle(old)(pixels), load_bundle(folder)(pixels), strict=True):
        assert torch.equal(ours, theirs)


def test_a_bundle_holds_only_the_routes_in_use(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.route_names == ("subnet-00", "subnet-02")
    stored = load_tensors(folder / "weights.safetensors")
    assert not any("largest" in name for name in stored)
    assert len(stored) < len(small_supernet().state_dict())


def test_an_untouched_bundle_verifies(folder: Path) -> None:
    assert verify(folder) == 16
    names = {path.name for path in folder.iterdir()}
    assert names == {MANIFEST, "weights.safetensors", "examples.safetensors", "gate.yaml"}
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_an_empty_batch_gives_empty_answers(folder: Path) -> None:
    answer = load_bundle(folder)(random_pixels(4)[:0])
    assert [tuple(value.shape) for value in answer] == [(0,), (0, 10), (0,), (0,)]


@pytest.mark.parametrize(
    ("images", "met"),
    [
        (torch.zeros(2, 3, 16, 16), "float32"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), r"\[2, 1, 16, 16\]"),
        (torch.zeros(2, 3, 16, 15, dtype=torch.uint8), r"\[2, 3, 16, 15\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), r"\[3, 16, 16\]"),
    ],
)
def test_another_type_or_shape_is_refused_with_both_named(folder: Path, images: torch.Tensor, met: str) -> None:
    message = rf"takes uint8 images \[B, 3, 16, 16\], but got .*{met}"
    with unchecked_shapes(), pytest.raises(DsnetError, match=message):
        load_bundle(folder)(images)


def test_scores_equal_a_loop(folder: Path) -> None:
    bundle = load_bundle(folder)
    images, labels = random_pixels(30, seed=8), random_labels(30)
    answers = [bundle(images[row : row + 1]) for row in range(30)]
    met = score_bundle(bundle, images, labels, batch_size=7)
    right = sum(int(answer.classes) == int(label) for answer, label in zip(answers, labels, strict=True))
    assert met["top1"] == right / 30
    assert met["madds_m"] == pytest.approx(sum(int(answer.madds) for answer in answers) / 30e6)


def flip(name: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)

    return tamper


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return tamper


def exchange_weights_with_their_hash(folder: Path) -> None:
    """Exchange the weights and their hash, as an attacker would who forgets the hash of the
    manifest."""
    path = folder / "weights.safetensors"
    tensors = load_tensors(path)
    tensors["supernet.stem.weight"] *= 2.0
    digest = save_tensors(path, tensors)
    edit(lambda manifest: manifest["files"].update({"weights.safetensors": digest}))(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(flip("weights.safetensors"), id="weights byte"),
        pytest.param(flip("examples.safetensors"), id="examples byte"),
        pytest.param(flip("gate.yaml"), id="gate.yaml byte"),
        pytest.param(flip(MANIFEST), id="manifest byte"),
        pytest.param(remove("weights.safetensors"), id="no weights"),
        pytest.param(remove("examples.safetensors"), id="no examples"),
        pytest.param(remove("gate.yaml"), id="no gate.yaml"),
        pytest.param(remove(MANIFEST), id="no manifest"),
        pytest.param(edit(lambda m: m.update(schema_version=2)), id="version"),
        pytest.param(edit(lambda m: m.update(kind="cake")), id="kind"),
        pytest.param(edit(lambda m: m["claims"]["val"].update(top1=0.99)), id="claim"),
        pytest.param(edit(lambda m: m["class_names"].reverse()), id="class names"),
        pytest.param(edit(lambda m: m["normalization"]["mean"].reverse()), id="normalization"),
        pytest.param(edit(lambda m: m["router"]["routes"].reverse()), id="routes"),
        pytest.param(edit(lambda m: m["router"].update(kind="cascade")), id="router kind"),
        pytest.param(edit(lambda m: m.pop("spec")), id="no spec"),
        pytest.param(edit(lambda m: m.pop("sha256")), id="no digest"),
        pytest.param(lambda folder: (folder / MANIFEST).write_text("[]"), id="no object"),
        pytest.param(lambda folder: (folder / MANIFEST).write_text("{"), id="torn manifest"),
        pytest.param(exchange_weights_with_their_hash, id="weights with their hash"),
    ],
)
def test_every_tampering_is_noticed(folder: Path, tamper: Callable[[Path], None]) -> None:
    tamper(folder)
    with pytest.raises((CheckpointError, VerificationError), match="bundle"):
        verify(folder)


def with_examples(folder: Path, **tensors: torch.Tensor) -> None:
    """Replace stored tensors of the examples, consistently."""
    path = folder / "examples.safetensors"
    digest = save_tensors(path, {**load_tensors(path), **tensors})
    edit(lambda manifest: manifest["files"].update({path.name: digest}))(folder)
    rehash(folder)


def test_a_bundle_without_examples_is_no_crash(tmp_path: Path) -> None:
    save(tmp_path / "bundle", examples=random_pixels(16)[:0])
    assert verify(tmp_path / "bundle") == 0


def test_a_bundle_whose_examples_have_no_images_or_others_is_refused(folder: Path) -> None:
    stored = load_tensors(folder / "examples.safetensors")
    for images in (None, random_pixels(4)[:, :, :8]):
        tensors = {name: value for name, value in stored.items() if name != "images"}
        if images is not None:
            tensors["images"] = images.contiguous()
        sha256 = save_tensors(folder / "examples.safetensors", tensors)
        edit(lambda m, sha256=sha256: m["files"].update({"examples.safetensors": sha256}))(folder)
        rehash(folder)
        with pytest.raises(
            VerificationError, match=r"examples\.safetensors: holds .* but the bundle takes \[3, 16, 16\]"
        ):
            verify(folder)


@pytest.mark.parametrize(
    "shape",
    [[3, 10**9, 10**9], [3, 16], [1, 16, 16], [3, 0, 16], [3, 16.5, 16], [3, "16", 16], "3", 3, [3, 16, 10**30]],
    ids=str,
)
def test_an_impossible_shape_of_images_is_refused_when_the_bundle_is_loaded(folder: Path, shape: object) -> None:
    edit(lambda m: m.update(image_shape=shape))(folder)
    rehash(folder)
    with pytest.raises(CheckpointError, match=r"bundle\.json.* export (it|the bundle) again"):
        load_bundle(folder)


def test_a_recorded_route_holds_where_rounding_decides_and_its_logits_must_still_agree(tmp_path: Path) -> None:
    supernet = small_supernet()
    router = gate(supernet)
    # Two equal rows: both routes score alike on every image, so that rounding alone would decide.
    tied = GateRouter(router.weight[:1].repeat(2, 1), router.offset[:1].repeat(2), router.routes)
    pixels, folder = random_pixels(4), tmp_path / "bundle"
    save(folder, supernet, tied, examples=pixels)
    stored = load_tensors(folder / "examples.safetensors")
    other = 1 - stored["routes"]
    with torch.no_grad():
        ran = [
            supernet(NORMALIZATION.apply(pixels[row : row + 1]), supernet.subnets[router.routes[int(route)]])[0]
            for row, route in enumerate(other)
        ]
    with_examples(folder, routes=other, logits=torch.stack(ran))
    assert verify(folder) == 4
    with_examples(folder, logits=stored["logits"])
    with pytest.raises(VerificationError, match="logits of example 0"):
        verify(folder)


@pytest.mark.slow
def test_a_recorded_route_behind_an_undecided_confidence_holds_whether_it_stopped_or_went_on(tmp_path: Path) -> None:
    supernet, pixels, folder = small_supernet(), random_pixels(1), tmp_path / "bundle"
    with torch.no_grad():
        logits = [supernet(NORMALIZATION.apply(pixels), supernet.subnets[route]) for route in (0, 2)]
    confidence = float(logits[0].softmax(1).max())
    for beside, is_tie in ((1e-7, True), (1e-2, False)):
        for threshold in (confidence - beside, confidence + beside):
            save(folder, supernet, CascadeRouter(0, 2, threshold), examples=pixels)
            recorded = int(load_tensors(folder / "examples.safetensors")["routes"][0])
            assert recorded == int(threshold > confidence)
            assert verify(folder) == 1
            with_examples(folder, routes=torch.tensor([1 - recorded]), logits=logits[1 - recorded])
            if is_tie:
                assert verify(folder) == 1
                continue
            with pytest.raises(VerificationError, match=r"took route subnet-0\d, but subnet-0\d was recorded"):
                verify(folder)


def rehash(folder: Path) -> None:
    """Make the manifest consistent again, as after an export by hand."""
    edit(lambda m: m.update(sha256=own_digest(m)))(folder)


def test_a_consistent_bundle_that_computes_something_else_fails_its_examples(folder: Path) -> None:
    exchange_weights_with_their_hash(folder)
    rehash(folder)
    bundle = load_bundle(folder)
    check_bundle_files(bundle)
    with pytest.raises(VerificationError, match=r"example \d+|logits"):
        check_bundle_examples(bundle)


def test_a_consistent_bundle_with_swapped_routes_fails_its_examples(folder: Path) -> None:
    edit(lambda m: m["router"]["routes"].reverse())(folder)
    rehash(folder)
    with pytest.raises(VerificationError, match=r"took route subnet-0\d, but subnet-0\d was recorded"):
        check_bundle_examples(load_bundle(folder))


@pytest.mark.parametrize("name", ["spec", "subnets", "router", "normalization", "class_names", "image_shape", "files"])
def test_a_consistent_but_incomplete_manifest_is_a_checkpoint_error(folder: Path, name: str) -> None:
    edit(lambda m: m.pop(name))(folder)
    rehash(folder)
    with pytest.raises(CheckpointError, match="export it again"):
        load_bundle(folder)


@pytest.mark.parametrize("router", [{"kind": "cake"}, {"routes": [0, 1]}, {"kind": "cascade", "first": 0, "second": 1}])
def test_a_router_that_cannot_be_rebuilt_is_a_checkpoint_error(folder: Path, router: dict[str, Any]) -> None:
    edit(lambda m: m.update(router=router))(folder)
    rehash(folder)
    with pytest.raises(CheckpointError, match=r"bundle\.json: .* cannot be rebuilt.*export it again"):
        load_bundle(folder)


def test_a_folder_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no bundle here .* `dsnet-orch export RUN"):
        load_bundle(tmp_path)


def test_saving_again_replaces_the_whole_bundle(folder: Path) -> None:
    (folder / "old-notes.txt").write_text("of the older bundle")
    save(folder, claims={"val": {"top1": 0.75}})
    assert load_bundle(folder).claims == {"val": {"top1": 0.75}}
    assert verify(folder) == 16
    assert not (folder / "old-notes.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_a_failed_save_leaves_the_old_bundle_and_nothing_else(folder: Path) -> None:
    before = {path.name: file_sha256(path) for path in folder.iterdir()}
    with pytest.raises(ValueError, match="Out of range float"):
        save(folder, claims={"val": {"top1": float("nan")}})
    assert {path.name: file_sha256(path) for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_a_bundle_that_lost_its_manifest_is_written_again(tmp_path: Path) -> None:
    folder = save(tmp_path / "bundle")
    (folder / "bundle.json").unlink()
    (folder / "notes.txt").write_text("mine")
    save(folder)
    assert dsnet.load_bundle(folder).operating_points


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"dear")
    with pytest.raises(PreflightError, match="exists already and is not a bundle"):
        save(tmp_path / "photos")
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == b"dear"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert verify(tmp_path / "empty") == 16


POISONED = """
import sys
for name in ("yaml", "ruamel", "ruamel.yaml", "ray", "mlflow", "optuna", "pydantic", "cloudpickle", "dill"):
    sys.modules[name] = None
import pickle
import torch
import dsnet

def refuse(*args, **kwargs):
    raise AssertionError("a bundle was unpickled")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
bundle = dsnet.load_bundle(sys.argv[1])
sys.modules["pickle"] = None
answer = bundle(torch.zeros((2, 3, 16, 16), dtype=torch.uint8))
print(tuple(answer.probabilities.shape))
"""


@pytest.mark.slow
def test_a_bundle_loads_without_yaml_and_pickle(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", POISONED, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 10)"


def test_the_package_offers_bundles_at_its_top() -> None:
    assert dsnet.load_bundle is load_bundle
    assert dsnet.Bundle is Bundle
    with pytest.raises(AttributeError, match="no attribute 'load_cake'"):
        _ = dsnet.load_cake


def photo(path: Path, seed: int, size: tuple[int, int] = (30, 50)) -> Path:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(path)
    return path


DECODER = PhotoDecoder.of_data("image_folder", tuple(random_pixels(1).shape[1:]))  # type: ignore[arg-type]


@pytest.fixture
def photo_bundle(tmp_path: Path) -> Bundle:
    save(tmp_path / "with-photos", photos=DECODER)
    return load_bundle(tmp_path / "with-photos")


def test_photos_are_answered_as_their_decoded_pixels_are_alone_and_in_company(
    photo_bundle: Bundle, tmp_path: Path
) -> None:
    side = DECODER.image_size
    files = [photo(tmp_path / f"{seed}.png", seed, (side, side + seed % 3)) for seed in range(20)]
    expected = photo_bundle(torch.stack([DECODER(file) for file in files]))
    together = photo_bundle.predict(files, batch_size=8)
    assert [answer.file for answer in together] == files
    for index, answer in enumerate(together):
        label = int(expected.classes[index])
        assert answer.class_name == photo_bundle.class_names[label]
        assert answer.probability == pytest.approx(float(expected.probabilities[index, label]), rel=1e-5)
        assert answer.route == photo_bundle.route_names[int(expected.routes[index])]
        assert answer.madds == int(expected.madds[index])
        alone = photo_bundle.predict(files[index])
        assert (alone.class_name, alone.route, alone.madds) == (answer.class_name, answer.route, answer.madds)
        assert alone.probability == pytest.approx(answer.probability, rel=1e-5)
    assert len({answer.route for answer in together}) > 1


def test_a_photo_that_cannot_be_read_is_an_error_or_told_and_left_out(photo_bundle: Bundle, tmp_path: Path) -> None:
    good, bad = photo(tmp_path / "good.png", 1), tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        photo_bundle.predict([good, bad])
    told: list[Path] = []
    answers = photo_bundle.predict([bad, good], on_error=lambda file, error: told.append(file))
    assert [answer.file for answer in answers] == [good]
    assert told == [bad]
    with pytest.raises(DataError, match="is a folder"):
        photo_bundle.predict(tmp_path)


def test_a_bundle_of_an_earlier_release_decodes_by_what_it_says_of_its_data_or_says_that_it_cannot(
    tmp_path: Path,
) -> None:
    data = {"name": "image_folder", "crop_fraction": 0.875}
    save(tmp_path / "old", claims={"data": data})
    old = load_bundle(tmp_path / "old")
    assert "photos" not in old.manifest
    assert old.photo_decoder == PhotoDecoder.of_data("image_folder", old.image_shape, 0.875)
    save(tmp_path / "older", claims={})
    with pytest.raises(DsnetError, match="has no record of how photos are decoded"):
        load_bundle(tmp_path / "older").predict("a.png")


def test_a_printed_bundle_is_five_lines_with_router_routes_input_claims_and_call(tmp_path: Path) -> None:
    test = {"top1": 0.9512, "top1_interval": [0.93, 0.97], "madds_m": 12.345, "num_images": 300}
    save(tmp_path / "knee", claims={"val": {"top1": 0.5, "madds_m": 0.25}, "test": test})
    lines = str(load_bundle(tmp_path / "knee")).splitlines()
    assert len(lines) == 5
    assert lines[0] == "knee: a ds_tiny classifier of 10 classes: class0, class1, class2, class3, class4, ... class9"
    assert lines[1].startswith("router  gate, which chooses among 2 routes: ")
    assert "M MAdds" in lines[1]
    assert lines[3] == "claims  top-1 95.1 % [95 %: 93.0, 97.0] at 12.35 M MAdds a photo, on test (300 images)"
    assert "bundle.predict(" in lines[4]


HOSTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("host", HOSTS)
def test_a_bundle_works_whatever_the_program_around_has_set(tmp_path: Path, host: str) -> None:
    supernet = small_supernet()
    folder = save(tmp_path / "bundle", supernet, router=gate(supernet))
    pixels = random_pixels(6)
    expected = load_bundle(folder, engine=TORCH)(pixels)
    with HOSTS[host]():
        found = load_bundle(folder, engine=TORCH)(pixels)
    assert found.routes.tolist() == expected.routes.tolist()
    assert torch.equal(found.probabilities, expected.probabilities)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "photos",
    [Image.new("L", (9, 9)), np.zeros((9, 9), np.uint8), torch.zeros(2, 3), b"content", 3, [Image.new("L", (9, 9))]],
)
def test_what_is_no_file_is_refused_with_the_call_that_takes_it(photo_bundle: Bundle, photos: Any) -> None:
    message = r"takes files, but got \w+; for a PIL image: bundle\(bundle\.photo_decoder\.of_photo\("
    with pytest.raises(DsnetError, match=message):
        photo_bundle.predict(photos)


def test_the_call_that_a_refused_pil_image_is_told_gives_the_answer_for_its_file(
    photo_bundle: Bundle, tmp_path: Path
) -> None:
    file = photo(tmp_path / "a.png", 3, (20, 30))
    bundle, image = photo_bundle, Image.open(file)
    answer = bundle(bundle.photo_decoder.of_photo(image.convert("RGB"))[None])
    assert bundle.class_names[int(answer.classes[0])] == bundle.predict(file).class_name


def test_an_on_error_that_is_no_function_is_refused(photo_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"on_error must be a function .* but is 'skip'"):
        photo_bundle.predict(["a.png"], on_error="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "gpu"}, ConfigError, "device is 'gpu', but must be cpu, cuda or cuda:NUMBER"),
        ({"threads": 0}, ConfigError, "threads must be a whole number from 1, or None, but is 0"),
        ({"threads": "2"}, ConfigError, "threads must be a whole number from 1, or None, but is '2'"),
        (
            {"device": "cuda"},
            PreflightError,
            "device is cuda, but torch sees no GPU here; load the bundle with device='cpu'",
        ),
    ],
)
def test_a_wrong_argument_is_no_damaged_bundle(
    folder: Path, arguments: dict[str, Any], error: type[DsnetError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message) as raised:
        load_bundle(folder, **arguments)
    assert not isinstance(raised.value, CheckpointError)


def test_a_gpu_that_is_not_there_is_refused_with_their_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PreflightError, match="device is cuda:2, but torch sees 2 GPUs here, numbered from 0"):
        load_bundle(folder, device="cuda:2")


def test_further_formats_stay_in_an_equal_bundle_alone(folder: Path) -> None:
    (folder / "static").mkdir()
    save(folder)
    assert (folder / "static").is_dir()
    save(folder, claims={**CLAIMS, "val": {"top1": 0.6, "madds_m": 0.25}})
    assert not (folder / "static").exists()
    (folder / "static").mkdir()
    (folder / MANIFEST).unlink()
    save(folder)
    assert not (folder / "static").exists()


def test_images_that_are_no_tensor_or_elsewhere_are_refused(tmp_path: Path) -> None:
    supernet = small_supernet()
    bundle = load_bundle(save(tmp_path / "bundle", supernet, router=gate(supernet)))
    message = r"takes a tensor of pixels, but got str; for files: bundle\.predict"
    with unchecked_shapes(), pytest.raises(DsnetError, match=message):
        bundle("photo.jpg")  # type: ignore[arg-type]
    with unchecked_shapes(), pytest.raises(DsnetError, match=r"got ndarray; bundle\(torch\.from_numpy\(array\)\)"):
        bundle(random_pixels(2).numpy())  # type: ignore[arg-type]
    with pytest.raises(
        DsnetError, match=r"runs on cpu, but the images are on meta; move them with images\.to\('cpu'\)"
    ):
        bundle(random_pixels(2).to("meta"))
