"""The cost of any VAE that a configuration can name, counted on tensors without data."""

import json
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..image_sizes import Size
from ..models.bagel.autoencoder import build_vae
from ..models.bagel.configuration import BagelConfig


def vae_parameters(config: BagelConfig) -> int:
    """Count the parameters of the whole VAE."""
    return _counted(json.dumps(config.vae_config, sort_keys=True))


@cache
def _counted(vae_config: str) -> int:
    """Count for a configuration in JSON, once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_vae(json.loads(vae_config)).parameters())


def vae_decode(config: BagelConfig, image_size: Size) -> tuple[int, int]:
    """Count the FLOPs of decoding one image, and the numbers in the largest input of one of its layers."""
    sides = [side // config.vae_downsample for side in image_size]
    shape = (1, config.latent_channels // config.latent_patch_size**2, *sides)
    return _decode(json.dumps(config.vae_config, sort_keys=True), shape)


@cache
def _decode(vae_config: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Count for a configuration in JSON and the shape of its latents; once, as advice asks for it again and again."""
    with torch.device("meta"):
        vae, latents = build_vae(json.loads(vae_config)), torch.empty(shape)
    largest = 0

    def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, inputs[0].numel())

    for module in vae.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(measure)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return counter.get_total_flops(), largest
