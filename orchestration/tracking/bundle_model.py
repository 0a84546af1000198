"""MLflow's model of a bundle, as code: MLflow copies this file beside the bundle and runs it when
the model is loaded, so that nothing is pickled.

It is never imported by other modules, and must stay small: a copy that was logged by this release
also runs with later ones.
"""

from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH_SIZE = 64


class BundleModel(PythonModel):
    """A bundle that answers arrays of images with a table."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle among the model's artifacts, with the model's `device`, `engine`,
        `precision` and `threads`."""
        import dsnet  # late, because this file is also run where the model is logged, without torch

        self._bundle = dsnet.load_bundle(context.artifacts["bundle"], **context.model_config)

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Classify images.

        Args:
            context: not used; the bundle is open.
            model_input: uint8 [N, C, H, W], pixels in 0..255, of the bundle's image shape.
            params: for a bundle with several operating points, at most one of `point` (a name),
                `budget_madds` (million MAdds) and `budget_latency` (ms at batch 1); None: the point
                at which the bundle begins.

        Returns:
            A row for each image: `class`, `probability` (0..1), `route` and `madds`.

        Raises:
            ConfigError: several of the parameters are given.
            NotFoundError: no operating point has this name or is within this budget.
        """
        import torch

        given = {name: value for name, value in (params or {}).items() if value is not None}
        bundle = self._bundle
        if given:
            bundle = bundle.at(
                given.get("point"), madds_m=given.get("budget_madds"), latency_ms=given.get("budget_latency")
            )
        parts = []
        with torch.inference_mode():
            for start in range(0, len(model_input), BATCH_SIZE):
                pixels = torch.tensor(model_input[start : start + BATCH_SIZE])
                parts.append(_table(bundle, bundle(pixels.to(bundle.device))))
        columns = {"class": "str", "probability": "float64", "route": "str", "madds": "int64"}
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({}, columns=list(columns)).astype(columns)


def _table(bundle: Any, found: Any) -> pd.DataFrame:
    """The predictions for one batch, a row for each image."""
    return pd.DataFrame(
        {
            "class": [bundle.class_names[label] for label in found.classes.tolist()],
            "probability": found.probabilities.amax(1).double().cpu().numpy(),
            "route": [bundle.route_names[route] for route in found.routes.tolist()],
            "madds": found.madds.cpu().numpy(),
        }
    )


mlflow.models.set_model(BundleModel())
