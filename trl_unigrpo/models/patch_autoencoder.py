"""A small variational autoencoder whose encoder cuts the image into patches, with `AutoencoderKL`'s interface."""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


class PatchAutoencoderKL(ModelMixin, ConfigMixin):
    """
    Encodes every square of `spatial_compression_ratio` pixels into one latent vector of its own, by convolutions whose
    kernels are as wide as their strides. Its decoder looks a little around. Orders of magnitude cheaper than
    `AutoencoderKL`, for images simple enough.

    As in `AutoencoderKL`, `encode` and `decode` speak of raw latents z; the flow works on
    `scaling_factor * (z - shift_factor)`, and it is up to the caller to convert.

    Args:
        in_channels: channels of the images read.
        out_channels: channels of the images written.
        latent_channels: numbers per latent position.
        block_out_channels: width of each block of the encoder, first to last; the decoder has them in reverse.
        strides: downsampling of each block. Their product is `spatial_compression_ratio`.
        scaling_factor: one over the standard deviation of z over the training data.
        shift_factor: the mean of z over the training data.

    Example:
        >>> vae = PatchAutoencoderKL()
        >>> z = vae.encode(torch.zeros(1, 3, 48, 48)).latent_dist.mode()
        >>> z.shape, vae.decode(z).sample.shape
        (torch.Size([1, 8, 3, 3]), torch.Size([1, 3, 48, 48]))
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 8,
        block_out_channels: tuple[int, ...] = (48, 72, 96),
        strides: tuple[int, ...] = (4, 2, 2),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        if len(block_out_channels) != len(strides) or not strides:
            raise ValueError(
                f"block_out_channels={tuple(block_out_channels)} and strides={tuple(strides)} must have the same "
                "length, at least 1: one width and one stride per block"
            )
        widths = list(block_out_channels)
        encoder: list[nn.Module] = []
        for width_in, width, stride in zip([in_channels, *widths[:-1]], widths, strides, strict=True):
            encoder += [nn.Conv2d(width_in, width, stride, stride), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(widths[-1], 2 * latent_channels, 1))

        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 1), nn.SiLU()]
        for width_in, width, stride in zip(widths[:0:-1], widths[-2::-1], strides[:0:-1], strict=True):
            decoder += [nn.ConvTranspose2d(width_in, width, stride, stride), nn.SiLU()]
        decoder += [nn.Conv2d(widths[0], widths[0], 3, 1, 1), nn.SiLU()]
        self.decoder = nn.Sequential(*decoder, nn.ConvTranspose2d(widths[0], out_channels, strides[0], strides[0]))

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent position, along one side."""
        return math.prod(self.config["strides"])

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """
        Return the posterior over raw latents.

        Args:
            x: images (B, in_channels, H, W) in [-1, 1], H and W multiples of `spatial_compression_ratio`.
            return_dict: whether to return an output object instead of a tuple.

        Returns:
            `latent_dist`, a diagonal Gaussian over (B, latent_channels, H / ratio, W / ratio).
        """
        ratio, height, width = self.spatial_compression_ratio, *x.shape[-2:]
        if height % ratio or width % ratio:
            raise ValueError(
                f"an image of {height} x {width} pixels can't be cut into patches of {ratio} x {ratio}: resize it to "
                f"multiples of {ratio}"
            )
        posterior = DiagonalGaussianDistribution(self.encoder(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """
        Decode raw latents to images.

        Args:
            z: raw latents (B, latent_channels, h, w).
            return_dict: whether to return an output object instead of a tuple.

        Returns:
            `sample` (B, out_channels, h * ratio, w * ratio), about [-1, 1], not clipped.
        """
        sample = self.decoder(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images (B, in_channels, H, W), through the mean of the posterior or a sample of it."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)
