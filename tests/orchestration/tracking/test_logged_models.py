"""Bundles as logged models of MLflow, which answer like the bundle in another process, and the
images of a sweep as datasets; that each bundle has one model is tested in test_store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow.data
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.entities import LoggedModel
from mlflow.tracking import MlflowClient

import dsnet
from orchestration.pipeline.export import KNEE
from orchestration.runs.folder import mlflow_store_uri
from orchestration.tracking.datasets import dataset_inputs
from orchestration.tracking.logged_models import BUNDLE_TAG
from orchestration.tracking.rows import data_rows
from tests.orchestration.samples import Finished, call, problems_of_message, record_config

NUM_IMAGES = 70
"""More than the model classifies at once."""

USER = """
import sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
images = np.load(sys.argv[3])
model.predict(images).to_json(sys.argv[4])
assert model.predict(images[:0]).columns.tolist() == ["class", "probability", "route", "madds"]
from dsnet.errors import NotFoundError
try:
    model.predict(images, params={"budget_madds": 1e-6})
except NotFoundError as error:
    print(error)
try:
    mlflow.pyfunc.load_model(sys.argv[2], model_config={"precision": "int8", "threads": 1})
except Exception as error:
    print(error)
"""


def models_in(runs: Path, experiment: str = "tiny") -> list[LoggedModel]:
    client = MlflowClient(mlflow_store_uri(runs))
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_logged_models([found.experiment_id]))


def digest_of(bundle: Path) -> str:
    return str(json.loads((bundle / "bundle.json").read_text())["sha256"])


def random_images(bundle: dsnet.Bundle) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (NUM_IMAGES, *bundle.image_shape), dtype=torch.uint8, generator=generator)


@pytest.mark.slow
def test_the_model_that_a_launch_logged_answers_like_its_bundle_in_another_process_and_folder(
    finished: Finished, tmp_path: Path
) -> None:
    knee = finished.run.export_dir / KNEE
    (model,) = models_in(finished.run.root)
    assert (model.name, str(model.status)) == (knee.resolve().name, "READY")
    assert model.tags[BUNDLE_TAG] == digest_of(knee)
    files = Path(model.artifact_location.removeprefix("file://"))
    assert not list(files.rglob("*.pkl")), "nothing is pickled"
    copied = {path.name for path in (files / "artifacts" / knee.resolve().name).iterdir()}
    assert copied == {path.name for path in knee.iterdir()}

    bundle = dsnet.load_bundle(knee)
    images = random_images(bundle)
    np.save(tmp_path / "images.npy", images.numpy())
    arguments = [mlflow_store_uri(finished.run.root), model.model_uri, "images.npy", "answers.json"]
    command = [sys.executable, "-c", USER, *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr
    assert "no operating point costs at most 1e-06 M MAdds" in ended.stdout
    assert "precision int8" in ended.stdout, "model_config reaches load_bundle"
    assert "export it with dsnet-orch export RUN --format onnx_int8" in ended.stdout
    answers, expected = pd.read_json(tmp_path / "answers.json", dtype={"class": str}), bundle(images)
    assert answers["class"].tolist() == [bundle.class_names[label] for label in expected.classes]
    assert answers["route"].tolist() == [bundle.route_names[route] for route in expected.routes]
    assert answers["madds"].tolist() == expected.madds.tolist()
    highest = expected.probabilities.max(1).values
    assert answers["probability"].tolist() == pytest.approx(highest.tolist(), abs=1e-5)


def test_an_export_that_mlflow_does_not_take_is_complete_and_says_what_to_do(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    (folder / "runs" / "mlflow.db").write_text("this is no database, however long one looks at it")
    answer = call(folder, "export", "tiny")
    assert answer.code == 0, answer.err
    dsnet.load_bundle(Path(answer.out.strip()))
    assert "repeat this export to log them" in " ".join(answer.err.split())


def test_a_model_is_registered_only_where_a_run_is_tracked_and_under_a_name_that_mlflow_takes(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    answer = call(folder, "export", "tiny", "--register", "models/gate", "--out", "out")
    assert problems_of_message(answer, ["models/gate", "registered model"]) == []
    settings = folder / "runs" / "tiny" / "sweep.yaml"
    settings.write_text(settings.read_text().replace("mlflow: true", "mlflow: false"))
    record_config(settings)
    answer = call(folder, "export", "tiny", "--register", "gate", "--out", "out")
    assert problems_of_message(answer, ["--register gate", "--set tracking.mlflow=true"]) == []
    assert not (folder / "out").exists()


def test_the_splits_of_a_sweep_are_datasets_of_its_run(finished: Finished) -> None:
    client = MlflowClient(mlflow_store_uri(finished.run.root))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (row,) = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'")
    splits = json.loads(finished.run.splits_json.read_text())
    for split, num_images in splits["num_images"].items():
        (found,) = (used for used in row.inputs.dataset_inputs if used.tags[0].value == split)
        assert found.dataset.name == f"digits/{split}"
        assert json.loads(found.dataset.profile) == {"num_images": num_images, "num_classes": 10}
        features = json.loads(json.loads(found.dataset.schema)["mlflow_tensorspec"]["features"])
        assert features[0]["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 1, 8, 8]}
    assert len(row.inputs.dataset_inputs) == len(splits["num_images"])


def test_a_dataset_leads_to_the_folder_of_its_images(finished: Finished, tmp_path: Path) -> None:
    facts = finished.results.manifest["data"] | {"path": str(tmp_path / "my photos"), "name": "image_folder"}
    (tmp_path / "my photos").mkdir()
    for used in dataset_inputs(data_rows({"data": facts})):
        source = mlflow.data.get_source(used.dataset)
        assert Path(source.load()) == tmp_path / "my photos"
        assert facts["fingerprint"].startswith(used.dataset.digest)
    assert data_rows({"data_hashes": {}}) == [], "a run of an earlier release"
