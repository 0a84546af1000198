"""Exported bundles as logged models of MLflow, and as versions of a registered model.

A logged model is found again by the digest of its bundle, so that each bundle has one, however
often it is exported or written again. It becomes READY last: one that a killed process left
PENDING is completed.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import dsnet
from dsnet.deploy.layout import MANIFEST
from dsnet.dotted import flatten
from dsnet.files import read_object
from orchestration.tracking.protocol import TrackedBundle

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

MODEL_CODE: Final = Path(__file__).with_name("bundle_model.py")
"""The file that MLflow copies into every logged model."""
BUNDLE_TAG: Final = "bundle"
"""Tag of a logged model, and of a version of a registered model: the digest in bundle.json."""
FORMATS_TAG: Final = "formats"
"""Tag of a logged model: the further formats that its bundle holds, with commas."""
VERSIONS_TAG: Final = "mlflow.modelVersions"
"""Tag with which MLflow's page links a logged model to its registered versions."""
MODEL_CONFIG: Final = {"device": "cpu", "engine": "auto", "precision": "float32", "threads": None}
"""Arguments of `dsnet.load_bundle`; `mlflow.pyfunc.load_model(..., model_config=...)` can give
others."""


@dataclass(frozen=True)
class ModelPlace:
    """Where a logged model belongs."""

    experiment_id: str
    run_id: str
    """The run of the sweep."""


@dataclass(frozen=True)
class _Content:
    """What MLflow is told about a bundle."""

    digest: str
    image_shape: tuple[int, ...]
    params: Mapping[str, str]
    formats: frozenset[str]
    """Further formats, each a folder in the bundle."""
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> Self:
        manifest = read_object(path / MANIFEST)
        facts = {"family": manifest["spec"]["family"], "router": manifest["router"]["kind"]}
        claims = {name: manifest["claims"][name] for name in ("val", "test") if name in manifest["claims"]}
        numbers = {name: value for name, value in flatten(claims).items() if not isinstance(value, list)}
        return cls(
            digest=manifest["sha256"],
            image_shape=tuple(manifest["image_shape"]),
            params={name: str(value) for name, value in {**facts, **numbers}.items()},
            formats=frozenset(folder.name for folder in path.iterdir() if folder.is_dir() and folder.name[0] != "."),
            num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        )


def log_bundle(client: MlflowClient, place: ModelPlace, bundle: TrackedBundle) -> None:
    """Log a bundle as a model of a run, and register it if `bundle.register` says so; what is
    there already is not made again.

    Args:
        client: client of the store.
        place: experiment and run.
        bundle: the bundle.
    """
    content = _Content.of(bundle.path)
    model = _found(client, place, content.digest) or client.create_logged_model(
        place.experiment_id,
        name=bundle.name,
        source_run_id=place.run_id,
        tags={BUNDLE_TAG: content.digest},
        params=dict(content.params),
        model_type="dsnet-bundle",
    )
    outputs = client.get_run(place.run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        from mlflow.entities import LoggedModelOutput

        client.log_outputs(place.run_id, [LoggedModelOutput(model.model_id, step=0)])
    logged = {name for name in model.tags.get(FORMATS_TAG, "").split(",") if name}
    if str(model.status) != "READY" or not content.formats <= logged:
        _write_files(client, model, bundle.path, content)
        client.set_logged_model_tags(model.model_id, {FORMATS_TAG: ",".join(sorted(content.formats | logged))})
        client.finalize_logged_model(model.model_id, "READY")
    if bundle.register is not None:
        _register(client, model.model_id, bundle.register, content.digest)


def _found(client: MlflowClient, place: ModelPlace, digest: str) -> LoggedModel | None:
    """The run's logged model of a bundle, or None."""
    wanted = f"tags.{BUNDLE_TAG} = '{digest}' AND source_run_id = '{place.run_id}'"
    found = client.search_logged_models([place.experiment_id], wanted, max_results=1)
    return found[0] if found else None


def _write_files(client: MlflowClient, model: LoggedModel, bundle: Path, content: _Content) -> None:
    """Copy the bundle into the model's folder, then the files by which MLflow loads it.

    MLflow's own `save_model` would copy the bundle twice more, into temporary folders; so it writes
    its files without the bundle, and the entry of the bundle is added here.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    place = f"artifacts/{bundle.name}"  # the folder's name is that of a bundle's only operating point
    client.log_model_artifacts(model.model_id, str(bundle), place)
    described = Model(artifact_path=model.artifact_location, model_uuid=model.model_id, model_id=model.model_id)
    described.run_id = model.source_run_id
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # asks for an example of the input, which needs torch here
        folder = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(MODEL_CODE),
            signature=_signature(content.image_shape),
            pip_requirements=[f"dsnet-orch=={dsnet.__version__}"],
            model_config=dict(MODEL_CONFIG),
            mlflow_model=described,
        )
        described.flavors[mlflow.pyfunc.FLAVOR_NAME]["artifacts"] = {"bundle": {"path": place, "uri": place}}
        described.model_size_bytes = (described.model_size_bytes or 0) + content.num_bytes
        described.save(folder / "MLmodel")
        client.log_model_artifacts(model.model_id, str(folder))


def _signature(image_shape: tuple[int, ...]) -> ModelSignature:
    """Input, output and parameters of `BundleModel.predict`."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    columns = {"class": "string", "probability": "double", "route": "string", "madds": "long"}
    params = {"point": "string", "budget_madds": "double", "budget_latency": "double"}
    return ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *image_shape))]),
        Schema([ColSpec(kind, name) for name, kind in columns.items()]),
        ParamSchema([ParamSpec(name, kind, None) for name, kind in params.items()]),
    )


def _register(client: MlflowClient, model_id: str, name: str, digest: str) -> None:
    """Make the logged model a version of a registered model, unless this bundle is one already."""
    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        client.create_registered_model(name)
    found = client.search_model_versions(f"name = '{name}' AND tags.{BUNDLE_TAG} = '{digest}'", max_results=1)
    model = client.get_logged_model(model_id)
    # The location and not models:/ID, which MLflow would look up in the store of its global state.
    version = (
        found[0]
        if found
        else client.create_model_version(
            name, model.artifact_location, model.source_run_id, {BUNDLE_TAG: digest}, model_id=model_id
        )
    )
    known: list[dict[str, Any]] = json.loads(model.tags.get(VERSIONS_TAG, "[]"))
    entry = {"name": version.name, "version": version.version}
    if entry not in known:
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([*known, entry])})
