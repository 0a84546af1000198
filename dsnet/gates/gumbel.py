"""Choices that are hard in the forward pass and soft in the backward pass: the straight-through
Gumbel-softmax (arXiv 1611.01144)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Float32[Tensor, "*_"]:
    """Standard Gumbel noise, float32 and finite, on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    tiny = torch.finfo(uniform.dtype).tiny
    exponential = -torch.log(uniform.clamp_min(tiny))
    return -torch.log(exponential.clamp_min(tiny))


def straight_through(
    logits: Float[Tensor, "batch choices"], noise: Float[Tensor, "batch choices"], temperature: float
) -> Float[Tensor, "batch choices"]:
    """Weights [B, K] whose value is exactly the one-hot argmax of p = softmax((logits + noise) /
    temperature), with the gradient of p.

    Args:
        logits: [B, K]; -inf for an option that cannot be chosen, which gets neither weight nor
            gradient.
        noise: [B, K]; zeros for no noise.
        temperature: above 0.
    """
    p = ((logits + noise) / temperature).softmax(1)
    hard = torch.zeros_like(p).scatter_(1, p.detach().argmax(1, keepdim=True), 1.0)
    return hard + (p - p.detach())  # in this order: the bracket is exactly zero, so that no weight is rounded
