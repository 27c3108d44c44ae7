"""From images to a pipeline's latents, which text-to-image pipelines only know the other way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


DIGIT_BASE = 16
"""Positions are read in digits of this base: small enough to survive bfloat16."""


@dataclass
class LatentMap:
    """
    The change that a pipeline makes to its latents before it hands them to the VAE: number j of those it hands over is
    `scale[j] * latents[source[j]] + shift[j]`, a rearrangement and a change of units.

    Attributes:
        source: (D,) indices.
        scale, shift: (D,).
        shape: (*latent) of one image's latents.
        vae_shape: of what the VAE gets for one image.
    """

    source: Tensor
    scale: Tensor
    shift: Tensor
    shape: tuple[int, ...]
    vae_shape: tuple[int, ...]

    @classmethod
    def of(cls, painter: Any, image_size: tuple[int, int]) -> "LatentMap":
        """
        Find the map out, by handing over latents whose numbers say where they came from.

        Raises:
            ValueError: if the pipeline does something else to its latents, or has no VAE.
        """
        shape = painter.latent_shape(image_size)
        size = torch.Size(shape).numel()

        def handed(numbers: Tensor) -> Tensor:
            return painter.vae_input(numbers.view(1, *shape), image_size)[0].double().cpu()

        zero = handed(torch.zeros(size))
        if zero.numel() != size:
            raise ValueError(f"{painter.name} hands {zero.numel()} numbers to its VAE, but its latents have {size}.")
        shift, unit = zero.flatten(), handed(torch.ones(size)).flatten() - zero.flatten()
        index, place = torch.zeros(size, dtype=torch.long), 1
        while place < size:
            digits = (torch.arange(size) // place) % DIGIT_BASE
            index += ((handed(digits.float()).flatten() - shift) / unit).round().long() * place
            place *= DIGIT_BASE
        if not torch.equal(index.sort().values, torch.arange(size)):
            raise ValueError(f"{painter.name} mixes its latents before it decodes them: images can't be encoded.")
        return cls(index, unit, shift, shape, tuple(zero.shape))

    def latents(self, handed: Tensor) -> Tensor:
        """Return latents (B, *latent), float32, that would be handed to the VAE as (B, *vae_shape)."""
        numbers = (handed.flatten(1).double() - self.shift.to(handed.device)) / self.scale.to(handed.device)
        latents = torch.empty_like(numbers)
        latents[:, self.source.to(handed.device)] = numbers
        return latents.view(len(handed), *self.shape).float()
