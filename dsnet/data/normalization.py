"""Normalisation of pixels to network inputs, identical in training, in the routing table and in a
loaded bundle. Torch is imported when images are normalised: records of it are read without."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxtyping import Float32, UInt8

from dsnet.data.settings import LARGEST_PIXEL, WrittenNormalization
from dsnet.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NUM_VALUES = LARGEST_PIXEL + 1
_DIGITS = 9


@dataclass(frozen=True)
class Normalization:
    """Normalisation (pixel - mean) / std per channel, in units of pixel values (0..255).

    Python floats survive JSON unchanged, and `apply` is one subtraction and one division in
    float32, each correctly rounded: the same bundle gives bit-identical inputs.
    """

    mean: tuple[float, ...]
    """One per channel, 0..255."""
    std: tuple[float, ...]
    """One per channel, > 0."""

    def __post_init__(self) -> None:
        is_valid = (
            0 < len(self.mean) == len(self.std)
            and all(math.isfinite(value) for value in self.mean)
            and all(math.isfinite(value) and value > 0 for value in self.std)
        )
        if not is_valid:
            raise DataError(
                f"normalization needs one finite mean and one finite std > 0 per channel, "
                f"has mean {self.mean!r} and std {self.std!r}"
            )

    @classmethod
    def from_images(cls, images: UInt8[Tensor, "images channels height width"]) -> Normalization:
        """Mean and standard deviation of the training split, uint8 [N, C, H, W].

        Computed from integer histograms, so that the result does not depend on the order of a
        floating-point sum. A constant channel gets std 1.
        """
        moments = [_mean_and_std(channel) for channel in images.transpose(0, 1)]
        return cls(tuple(mean for mean, _ in moments), tuple(std for _, std in moments))

    @classmethod
    def from_written(cls, written: WrittenNormalization) -> Normalization:
        """The normalisation of a setting, whose values are for pixels in 0..1.

        Products are rounded to 9 digits behind the point, so that 0.485 gives 123.675.
        """
        mean, std = (
            tuple(round(value * LARGEST_PIXEL, _DIGITS) for value in values) for values in (written.mean, written.std)
        )
        return cls(mean, std)

    def in_words(self) -> str:
        """Mean and standard deviation for pixels in 0..1, for people."""
        mean, std = (" ".join(f"{value / LARGEST_PIXEL:.3g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"

    def apply(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float32[Tensor, "batch channels height width"]:
        """Normalise uint8 [B, C, H, W] to float32 on the same device.

        Raises:
            DataError: The images are not uint8 or have another number of channels.
        """
        import torch

        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise DataError(
                f"images must be uint8 [batch, {len(self.mean)}, height, width], "
                f"are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return (images.to(torch.float32) - mean) / std

    def to_json(self) -> dict[str, list[float]]:
        """A mapping for `json.dump`."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Normalization:
        """Rebuild a normalisation from the result of `to_json`.

        Raises:
            DataError: `mean` or `std` is missing, not a list of numbers, or out of range.
        """
        try:
            return cls(tuple(map(float, record["mean"])), tuple(map(float, record["std"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"normalization must be {{mean: [...], std: [...]}}, is {record!r}") from error


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C, 1, 1] on the device; cached, since a copy in every step would make the device
    wait for the host."""
    import torch

    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _mean_and_std(channel: Tensor) -> tuple[float, float]:
    import torch

    counts = torch.bincount(channel.flatten(), minlength=_NUM_VALUES).tolist()
    num_pixels = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    total_squares = sum(value * value * count for value, count in enumerate(counts))
    variance = (num_pixels * total_squares - total * total) / (num_pixels * num_pixels)  # exact up to this division
    return total / num_pixels, math.sqrt(variance) if variance > 0 else 1.0
