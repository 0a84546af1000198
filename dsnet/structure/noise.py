"""How much noise each channel tolerates: a trainable amount of noise on the filters that write it.

This is a reconstruction: that filters are perturbed as W + alpha * std(W) * eta with a trainable
alpha per output channel, and that a channel which tolerates much noise matters little, is
published; the objective, the amounts and the steps are ours (docs/methods.md, section 9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.func import functional_call

from dsnet.errors import ConfigError
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.supernet import Supernet
from dsnet.seeds import derive_seed
from dsnet.structure.filters import Batches, filters, order_groups, why_kept, written_rows

STEPS = 48
"""Steps of Adam. Each runs the network twice on one batch, with a noise and with its opposite."""
LEARNING_RATE = 0.1
"""Of Adam, for the logarithm of alpha."""
START = 0.1
"""The alpha of every channel before the first step."""
PRICE = 1.0
"""Price of one nat per channel, in nats of the cross-entropy. At the optimum, noise that is small
raises the cross-entropy by half of it, however many channels the network has."""

Noise = Mapping[str, Float[Tensor, "_filters ..."]]
"""For every parameter with filters a number per weight."""


def noise_tolerances(supernet: Supernet, batches: Batches, seed: int = 0) -> dict[int, Float64[Tensor, " _channels"]]:
    """The logarithm of the amount of noise, alpha, that each channel tolerates.

    Adam minimises the expected `noise_loss` of the widest sub-network over alpha, which starts at
    `START`. Each of the `STEPS` steps takes the next batch, from the first one again after the
    last, and draws a noise, for which the loss is the mean over it and its opposite: what the noise
    adds to first order cancels out. The result is the mean over the second half of the steps.

    Args:
        supernet: the network; not changed.
        batches: normalised images with labels; they are all kept in memory.
        seed: seed of the noise, which depends on neither the device nor the number of threads.

    Returns:
        for every channel group log(alpha) of its channels. Channel groups that share one order
        share their alphas. Groups whose channels keep their order have no noise, and zeros here.

    Raises:
        ConfigError: there is no batch.
    """
    known = list(batches)
    if not known:
        raise ConfigError("supernet.structure.order noise needs at least one batch of images with labels")
    noisy = NoisyNetwork.of(supernet)
    log_alpha = noisy.log_alpha(START)
    optimizer = torch.optim.Adam([log_alpha], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", "noise"))
    total = torch.zeros_like(log_alpha, dtype=torch.float64)
    with batch_statistics(supernet), torch.enable_grad():
        for step, (images, labels) in enumerate(islice(cycle(known), STEPS)):
            log_alpha.grad = torch.zeros_like(log_alpha)
            for noise in _both_signs(noisy.drawn(generator)):
                loss = noise_loss(noisy, log_alpha, noise, images.to(log_alpha.device), labels.to(log_alpha.device))
                log_alpha.grad += torch.autograd.grad(loss, log_alpha)[0] / 2
            optimizer.step()
            if 2 * step >= STEPS:
                total += log_alpha.detach()
    return noisy.by_group(total / (STEPS - (STEPS + 1) // 2))


def noise_loss(
    noisy: NoisyNetwork,
    log_alpha: Float[Tensor, " amounts"],
    noise: Noise,
    images: Float[Tensor, "batch channels height width"],
    labels: Int64[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the widest sub-network with noise, plus `PRICE` times what its channels tell
    on average, in nats.

    A channel whose weights have the spread std and the noise alpha * std tells at most
    log(1 + alpha**-2) / 2 per weight, the capacity of a Gaussian channel. For small alpha that is
    -log(alpha); for large alpha it approaches 0, so that no alpha grows without end.
    """
    return (
        F.cross_entropy(noisy.logits(log_alpha, noise, images), labels) + PRICE * F.softplus(-2 * log_alpha).mean() / 2
    )


def _both_signs(noise: Noise) -> Iterator[Noise]:
    yield noise
    yield {name: -value for name, value in noise.items()}


@dataclass(frozen=True, eq=False)
class NoisyNetwork:
    """The widest sub-network of a supernet with noise on its filters.

    A weight w becomes w + alpha * std * eta, where alpha is that of the channel that its filter
    writes, and std the root mean square of the filter's weights: their standard deviation around 0,
    which a filter of one weight has too, and with which the scale of a filter before a BatchNorm
    makes no difference. A filter that several channels with orders of their own share gets the sum
    of their alphas.
    """

    supernet: Supernet
    num_amounts: int
    """Number of alphas: one per channel of every order group whose channels can move."""
    first: Mapping[int, int]
    """For a channel group whose channels can move the place of its first channel's alpha."""
    filters: Mapping[str, Float[Tensor, "_filters ..."]]
    """The parameters to which noise is added."""
    spread: Mapping[str, Float[Tensor, "_filters ..."]]
    """The std of every filter of a parameter, to be multiplied with its weights."""
    amounts: Mapping[str, Int64[Tensor, "_writers _filters"]]
    """For every filter of a parameter the places of the alphas whose sum it gets; `num_amounts` is
    the place of a zero."""

    @classmethod
    def of(cls, supernet: Supernet) -> NoisyNetwork:
        """The network of a supernet, whose tensors are read and never changed."""
        groups, count = supernet.spec.groups, 0
        first: dict[int, int] = {}
        for own in order_groups(supernet):
            if not any(why_kept(groups[group]) for group in own):
                first |= dict.fromkeys(own, count)
                count += max(groups[group].max_width for group in own)
        found, axes = {name: value.detach() for name, value in filters(supernet).items()}, supernet.axes()
        amounts = {}
        for name, value in found.items():
            axis = axes[name][0]
            assert axis is not None
            places: dict[int, Tensor] = {}
            for group, rows in written_rows(axis, groups):
                if group in first:
                    own_places = places.setdefault(first[group], torch.full((len(value),), count))
                    own_places[rows] = first[group] + torch.arange(len(rows))[:, None]
            if places:
                amounts[name] = torch.stack(list(places.values())).to(value.device)
        noisy = {name: found[name] for name in amounts}
        spread = {
            name: value.square().mean(tuple(range(1, value.ndim)), keepdim=True).sqrt() for name, value in noisy.items()
        }
        return cls(supernet, count, first, noisy, spread, amounts)

    def log_alpha(self, alpha: float) -> Float[Tensor, " amounts"]:
        """The logarithm of one alpha for all channels, to be trained."""
        like = next(self.supernet.parameters())
        return torch.full((self.num_amounts,), alpha, dtype=like.dtype, device=like.device).log_().requires_grad_()

    def drawn(self, generator: torch.Generator) -> Noise:
        """Standard normal numbers for all weights, drawn on the CPU."""
        return {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            for name, value in self.filters.items()
        }

    def weights(self, log_alpha: Float[Tensor, " amounts"], noise: Noise) -> dict[str, Float[Tensor, "_filters ..."]]:
        """The parameters with noise, by name."""
        alpha = F.pad(log_alpha.exp(), (0, 1))
        return {
            name: value
            + (alpha[self.amounts[name]].sum(0).reshape(self.spread[name].shape) * self.spread[name]) * noise[name]
            for name, value in self.filters.items()
        }

    def logits(
        self, log_alpha: Float[Tensor, " amounts"], noise: Noise, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """The logits of images with noise on the filters."""
        widest = self.supernet.subnets.at(self.supernet.spec.max_widths)
        logits: Tensor = functional_call(self.supernet, self.weights(log_alpha, noise), (images, widest))
        return logits

    def by_group(self, amounts: Float64[Tensor, " amounts"]) -> dict[int, Float64[Tensor, " _channels"]]:
        """One number per alpha as one per channel of every group, on the CPU; zeros where there is
        no noise."""
        return {
            number: torch.zeros(group.max_width, dtype=torch.float64)
            if number not in self.first
            else amounts[self.first[number] : self.first[number] + group.max_width].double().cpu()
            for number, group in enumerate(self.supernet.spec.groups)
        }
