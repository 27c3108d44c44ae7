"""Weights that were published for other code: open_clip's names, and heads on image embeddings."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# open_clip multiplies by these from the right, a linear layer by its transpose.
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_IGNORED = {"attn_mask"}  # a constant that some checkpoints carry


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Rename the weights of an open_clip CLIP to the names of transformers' `CLIPModel`.

    Raises:
        ValueError: for a name that is none of open_clip's CLIP with a vision transformer.
    """
    mapped: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name in _TOP:
            mapped[_TOP[name]] = tensor
        elif name in _TRANSPOSED:
            mapped[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif match := _BLOCK.fullmatch(name):
            tower = "vision_model" if match[1] else "text_model"
            layer, part = f"{tower}.encoder.layers.{match[2]}", match[3]
            module, _, kind = part.rpartition(".")
            if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = part.removeprefix("attn.in_proj_")
                for projection, rows in zip("qkv", tensor.chunk(3), strict=True):
                    mapped[f"{layer}.self_attn.{projection}_proj.{kind}"] = rows.contiguous()
            elif module in _IN_BLOCK:
                mapped[f"{layer}.{_IN_BLOCK[module]}.{kind}"] = tensor
            else:
                raise ValueError(f"Weight {name!r}: expected one of open_clip's CLIP with a vision transformer.")
        elif name not in _IGNORED:
            raise ValueError(f"Weight {name!r}: expected one of open_clip's CLIP with a vision transformer.")
    return mapped


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """
    Read the tensors of a safetensors file, or of a checkpoint of torch, unpacked from `state_dict` if they are inside
    one.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}: expected weights as .safetensors, .pth or .pt.")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def linear_head(state: dict[str, Tensor]) -> nn.Sequential:
    """
    Build the linear layers of a head, one after the other, in the order of the numbers in their names.

    LAION's aesthetic heads are such: one layer, or several without anything between them but dropout.

    Args:
        state: `weight` and `bias`, or `<anything>.<number>.weight` and `.bias`; weights (out, in).

    Raises:
        ValueError: if that is not what it has, if sizes don't fit, or if the last layer gives more than one number.
    """
    names = sorted(
        {name.rpartition(".")[0] for name in state},
        key=lambda prefix: [int(number) for number in re.findall(r"\d+", prefix)],
    )
    layers, width = [], None
    for prefix in names:
        weight, bias = (state.get(f"{prefix}.{kind}" if prefix else kind) for kind in ("weight", "bias"))
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"Layer {prefix!r} of the head: expected a weight (out, in) and a bias (out).")
        if width is not None and weight.shape[1] != width:
            raise ValueError(
                f"Layer {prefix!r} of the head takes {weight.shape[1]} numbers, the one before gives {width}."
            )
        width = weight.shape[0]
        layer = nn.Linear(weight.shape[1], width)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if width != 1:
        raise ValueError(f"The head gives {width} numbers: expected 1.")
    return nn.Sequential(*layers)
