"""Recorded results of release 0.1.0: `python -m tests.release.recorded` writes data/*.json again
with the present code.

A change of these files is a change of behaviour: of stage keys, it makes every user's finished
stages run again. Change them on purpose, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsnet.data.images import ImageSet
from dsnet.data.settings import SplitSizes
from dsnet.data.sources import InMemorySource
from dsnet.data.splits import make_splits
from dsnet.families import family_names
from orchestration.config.loading import load_config
from orchestration.config.written import json_schema
from orchestration.prepare.preparation import Images, Prepared, load_images, prepare, stage_definitions
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.runs.stages import stage_record
from orchestration.supernets.members import draw_members
from tests.hostile import REPOSITORY
from tests.orchestration.samples import TIMES, call, results_in

DATA = Path(__file__).parent / "data"
RELEASE_RUN = "release"
"""Name of the run in data/run: seven gates on the front, all kinds of router in the space."""
STAGE_KEYS, SCHEMA, STUDY, FRONT = "stage_keys.json", "schema.json", "study.json", "front.json"
CPU = ("supernet.device=cpu", "measure.device=cpu")
SWEEPS = {"digits": (None, "paper"), "cifar10": (None, "smoke", "full", "resnet-smoke", "resnet", "routing", "paper")}
"""The examples of one supernet, with their presets; that of the digits is the release's own, in
data/, because it has another network today."""
NUM_CLASSES, SIZE = 10, 16


def copy_of_run(folder: Path) -> Path:
    """A copy of the recorded run that a test may change; returns its folder below `folder`/runs."""
    return Path(shutil.copytree(DATA / "run", folder / "runs" / RELEASE_RUN, symlinks=True))


def study_of_release(results: RunResults) -> list[dict[str, Any]]:
    """Parameters and values of all trials, in slot order, without what the clock measured."""
    return [
        {
            "slot": record.slot,
            "state": record.state,
            "params": dict(record.params),
            "metrics": {name: value for name, value in record.metrics.items() if not name.startswith(TIMES)},
        }
        for record in results.records
    ]


def schema() -> Any:
    """The JSON schema of sweep files; where its descriptions are broken into lines does not
    matter."""
    return _unbroken(json.loads(json.dumps(json_schema())))


def _unbroken(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: " ".join(item.split()) if key == "description" and isinstance(item, str) else _unbroken(item)
            for key, item in value.items()
        }
    return [_unbroken(item) for item in value] if isinstance(value, list) else value


def stage_keys() -> dict[str, dict[str, str]]:
    """Keys of the stages before verify, by "file" or "file --preset name", and of every supernet of
    the sweep of supernets."""
    found = {}
    for name, presets in SWEEPS.items():
        for preset in presets:
            title = name if preset is None else f"{name} --preset {preset}"
            found[title] = _keys(name, preset)
    return found | _member_keys()


def _keys(name: str, preset: str | None) -> dict[str, str]:
    config = load_config(
        (DATA if name == "digits" else REPOSITORY / "examples") / f"{name}.yaml",
        preset=preset,
        overrides=CPU,
        known_models=family_names(),
        environ={},
    ).config
    images = load_images(config) if name == "digits" else _like_cifar10(config.data.splits.model_dump())
    return _keys_of(prepare(config, images=images))


def _member_keys() -> dict[str, dict[str, str]]:
    name = "digits-supernets"
    config = load_config(
        REPOSITORY / "examples" / f"{name}.yaml", overrides=CPU, known_models=family_names(), environ={}
    ).config
    run = RunDir(Path("runs-that-are-not-there"), name)
    members = draw_members(config, run, load_images(config), warn=_refuse)
    return {f"{name}: {member.name}": _keys_of(member.prepared) for member in members if member.prepared is not None}


def _refuse(text: str) -> None:
    raise AssertionError(text)


def _keys_of(prepared: Prepared) -> dict[str, str]:
    keys: dict[str, str] = {}
    for definition in stage_definitions(prepared):
        keys[definition.name] = stage_record(definition, keys).key
    return keys


def _like_cifar10(sizes: Mapping[str, Any]) -> Images:
    """60,000 small images in the split of CIFAR-10: stage keys depend on the data, and these are
    the same everywhere."""
    count, num_test = 60_000, 10_000
    pixels = torch.arange(251, dtype=torch.uint8).repeat(count * 3 * SIZE * SIZE // 251 + 1)
    images = pixels[: count * 3 * SIZE * SIZE].view(count, 3, SIZE, SIZE)
    labels = torch.arange(count) % NUM_CLASSES
    names = [f"class-{number}" for number in range(NUM_CLASSES)]
    official = np.arange(count) >= count - num_test
    image_set = ImageSet.create("cifar10", images, labels, names, official)
    source = InMemorySource(image_set)
    splits = make_splits(labels.numpy(), official, SplitSizes(**sizes), 0, None)
    return Images(source, splits, source.tensor_data(splits))


def write() -> None:
    """Record everything but the run folder, which `dsnet-orch launch` made of the settings in
    data/run/sweep.yaml."""
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_of_run(Path(folder))
        study = study_of_release(results_in(Path(folder), RELEASE_RUN))
        front = json.loads(call(Path(folder), "pareto", RELEASE_RUN, "--json").out)
        del front["run"]  # its path
    contents = {STAGE_KEYS: stage_keys(), SCHEMA: schema(), STUDY: study, FRONT: front}
    for name, content in contents.items():
        (DATA / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
