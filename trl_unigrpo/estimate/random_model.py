"""A BAGEL of given sizes with random weights, made on the device it runs on: for measurements without a checkpoint."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..models.bagel.autoencoder import LatentCodec, build_vae
from ..models.bagel.configuration import BagelConfig
from ..models.bagel.layers import BagelPositionTable, BagelRMSNorm
from ..models.bagel.modeling import BagelForUnifiedGeneration


def random_bagel(
    config: BagelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
) -> BagelForUnifiedGeneration:
    """
    Make a model as `from_pretrained` would give it, filled with noise layer by layer, so that no more than one layer
    is ever held twice.

    Args:
        dtype: of the weights; the VAE is float32.
        quantization: of the experts' linear layers, None, "nf4" or "nf4-double"; needs bitsandbytes.
    """
    with torch.device("meta"):
        model = BagelForUnifiedGeneration(config)
    std = config.llm_config.initializer_range
    targets = re.compile(model.default_lora_targets("both")) if quantization else None
    for name, module in list(model.named_modules()):
        for key, value in list(module._parameters.items()):
            if value is not None:
                filled = _filled(module, key, value, std, device, dtype)
                setattr(module, key, nn.Parameter(filled, requires_grad=quantization is None))
        if isinstance(module, BagelPositionTable):
            module.pos_embed = torch.zeros(module.pos_embed.shape, device=device, dtype=dtype)
            module.reset()
        if targets is not None and targets.fullmatch(name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _nf4(module, quantization == "nf4-double", dtype, device))
    if quantization:
        model.is_loaded_in_4bit = True  # where PEFT looks
    with torch.device(device):
        model.codec = LatentCodec(build_vae(config.vae_config), config.vae_config, config.latent_patch_size)
    return model


def _filled(module: nn.Module, key: str, value: Tensor, std: float, device: Any, dtype: torch.dtype) -> Tensor:
    if key == "bias":
        return torch.zeros(value.shape, device=device, dtype=dtype)
    if isinstance(module, BagelRMSNorm):
        return torch.ones(value.shape, device=device, dtype=dtype)
    return torch.empty(value.shape, device=device, dtype=dtype).normal_(std=std)


def _nf4(linear: nn.Module, double: bool, dtype: torch.dtype, device: Any) -> nn.Module:
    import bitsandbytes as bnb

    assert isinstance(linear, nn.Linear)
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    layer.bias = linear.bias
    return layer.to(device)
