"""The images of a sweep as datasets of MLflow; no image is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.tracking.protocol import TrackedData

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

NUM_DIGEST_CHARACTERS = 36
"""MLflow takes no longer digest."""


def dataset_inputs(datasets: Sequence[TrackedData]) -> list[DatasetInput]:
    """Each split as a dataset with its context; the name says which split it is, because MLflow
    keeps one dataset for each name and digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    return [
        DatasetInput(
            Dataset(
                name=f"{data.source}/{data.split}",
                digest=data.digest[:NUM_DIGEST_CHARACTERS],
                source_type="code" if data.path is None else "local",
                source=json.dumps(_source(data)),
                schema=json.dumps(_schema(data)),
                profile=json.dumps({"num_images": data.num_images, "num_classes": data.num_classes}),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, data.split)],
        )
        for data in datasets
    ]


def _source(data: TrackedData) -> dict[str, Any]:
    """The location, or the name of the data set where the settings give no location."""
    if data.path is None:
        return {"tags": {"data.name": data.source}}
    return {"uri": Path(data.path).absolute().as_uri()}


def _schema(data: TrackedData) -> dict[str, Any]:
    """Types and shapes of images and labels."""
    import numpy as np
    from mlflow.data.schema import TensorDatasetSchema
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype(np.uint8), (-1, *data.image_shape))
    labels = TensorSpec(np.dtype(np.int64), (-1,))
    schema: dict[str, Any] = TensorDatasetSchema(Schema([images]), Schema([labels])).to_dict()
    return schema
