"""Heads, which map features to a score per option: the published linear head without bias, or a
small perceptron. Both compute in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

TIMED_UNITS = 32
"""Hidden units of the perceptrons that are timed: the default of `gate.perceptron.hidden_units`. At
these sizes the time depends on the number of operations called, not on the number of units."""


@dataclass(frozen=True)
class Head:
    """A head of one or two layers; it computes in float64 from float32 inputs, so that the same
    features give the same route wherever it is evaluated."""

    weight: Float64[Tensor, "choices inputs"]
    """float64 [R, hidden] of the last of two layers, or [R, D] of a single one."""
    bias: Float64[Tensor, " choices"] | None = None
    """float64 [R]; None = no bias."""
    inner_weight: Float64[Tensor, "inputs features"] | None = None
    """float64 [hidden, D] of the first of two layers, which is followed by a ReLU; None for a
    single layer."""
    inner_bias: Float64[Tensor, " inputs"] | None = None
    """float64 [hidden]; None for a single layer."""

    def __call__(self, features: Float[Tensor, "batch features"]) -> Float64[Tensor, "batch choices"]:
        """Scores of features, [B, D] -> float64 [B, R]."""
        device = features.device
        x = features.double()
        if self.inner_weight is not None and self.inner_bias is not None:
            x = torch.addmm(self.inner_bias.to(device), x, self.inner_weight.to(device).T).relu_()
        weight = self.weight.to(device).T
        return x @ weight if self.bias is None else torch.addmm(self.bias.to(device), x, weight)

    def lead(
        self,
        features: Float[Tensor, "batch features"],
        offset: Float64[Tensor, " choices"],
        sizes: Float[Tensor, "batch features"] | None = None,
    ) -> Float64[Tensor, " batch"]:
        """Lead of the best calibrated score over the second, divided by its sensitivity to errors
        of the features: float64 [B].

        If the features have independent errors of standard deviation e * `sizes`, the returned lead
        has an error of about e. Hidden units count as independent, and as if all were active, since
        an error may activate one. The lead is infinite for a single option and 0 for equal scores.

        Args:
            features: [B, D].
            offset: float64 [R], subtracted from the scores; +inf for an option that does not exist.
            sizes: [B, D] error of each feature per unit of e; None = the features' own magnitudes,
                so that e is a relative error.
        """
        scores = self(features) - offset.to(features.device)
        if scores.shape[1] == 1:
            return torch.full_like(scores[:, 0], torch.inf)
        best = scores.topk(2, dim=1)
        gap = best.values[:, 0] - best.values[:, 1]
        slope = (self.weight[best.indices[:, 0].cpu()] - self.weight[best.indices[:, 1].cpu()]).to(features.device)
        variance = (features if sizes is None else sizes).double().square()
        if self.inner_weight is not None:
            variance = variance @ self.inner_weight.to(features.device).square().T
        error = (slope.square() * variance).sum(1).sqrt()
        return torch.where(gap == 0, 0.0, gap / error)

    @property
    def madds(self) -> int:
        """MAdds for one image; biases are not counted."""
        return self.weight.numel() + (0 if self.inner_weight is None else self.inner_weight.numel())

    def tensors(self, prefix: str) -> dict[str, Shaped[Tensor, "*_"]]:
        """Its tensors by name, for `from_tensors`."""
        parts = {
            "weight": self.weight,
            "bias": self.bias,
            "inner_weight": self.inner_weight,
            "inner_bias": self.inner_bias,
        }
        return {prefix + name: value for name, value in parts.items() if value is not None}

    @classmethod
    def zeros(cls, num_options: int, num_features: int, units: int | None = None) -> Head:
        """A head with weights of zero: one layer, or two with `units` hidden units."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        if units is None:
            return cls(zeros(num_options, num_features))
        return cls(zeros(num_options, units), zeros(num_options), zeros(units, num_features), zeros(units))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], prefix: str) -> Head:
        """Rebuild a head from `tensors`.

        Raises:
            KeyError: the weight is missing.
        """
        names = ("bias", "inner_weight", "inner_bias")
        optional = {name: tensors[prefix + name].double() for name in names if prefix + name in tensors}
        return cls(tensors[prefix + "weight"].double(), **optional)
