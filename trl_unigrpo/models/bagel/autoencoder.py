"""BAGEL's VAE: FLUX's, or a small one, between pixels and image tokens."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...images import mark_failed
from ..memory import fitting, free_memory


AUTOENCODER_WEIGHTS = "ae.safetensors"
TILE = 512  # pixels
ALL = 2**31

# diffusers' names on the left, those of the released file on the right.
_RENAMES = [
    (r"(en|de)coder\.mid_block\.resnets\.0\.", r"\1coder.mid.block_1."),
    (r"(en|de)coder\.mid_block\.resnets\.1\.", r"\1coder.mid.block_2."),
    (r"(en|de)coder\.mid_block\.attentions\.0\.group_norm\.", r"\1coder.mid.attn_1.norm."),
    (r"(en|de)coder\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1coder.mid.attn_1.\2."),
    (r"(en|de)coder\.mid_block\.attentions\.0\.to_out\.0\.", r"\1coder.mid.attn_1.proj_out."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"(en|de)coder\.conv_norm_out\.", r"\1coder.norm_out."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
]


class LatentCodec:
    """
    The way from images to image tokens and back. Not a module: the VAE is frozen, never part of what is trained or
    saved with the model's weights, and shared by all copies of a model.

    Args:
        vae: diffusers' `AutoencoderKL` or anything with its interface.
        config: the VAE's entry of the model's configuration.
        patch_size: side of the square of latents that makes one token.
        slice_size: images encoded or decoded at once; None for as many as fit into the memory that is free. Where not
            even one does, it is decoded in overlapping tiles of 512 pixels, which changes pixels a little.
    """

    def __init__(self, vae: Any, config: dict, patch_size: int = 1, slice_size: int | None = None):
        self.vae = vae.eval().requires_grad_(False)
        self.config = config
        self.patch_size = patch_size
        self.slice_size = slice_size

    def __deepcopy__(self, memo: dict) -> "LatentCodec":
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as tokens (B, N, p p C): the mean of the posterior, scaled."""
        vae = self.vae.to(pixels.device)
        slices = pixels.to(vae.dtype).split(self._slice(pixels.shape[-2] * pixels.shape[-1], pixels.device) or 1)
        mean = torch.cat([vae.encode(x).latent_dist.mode() for x in slices])
        latents = vae.config.scaling_factor * (mean - vae.config.shift_factor)
        p = self.patch_size
        batch, channels, height, width = latents.shape
        patches = latents.view(batch, channels, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels).float()

    def decode(self, tokens: Tensor, grid: tuple[int, int], output_type: str = "pil") -> list[Image.Image] | Tensor:
        """Decode tokens (B, N, p p C): PIL images, or ("pt") a tensor (B, 3, H, W) in [-1, 1] with gradient."""
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil' or 'pt'.")
        vae, p = self.vae.to(tokens.device), self.patch_size
        (height, width), channels = grid, tokens.shape[-1] // p**2
        patches = tokens.view(len(tokens), height, width, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        latents = patches.reshape(len(tokens), channels, height * p, width * p)
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        size = self._slice(height * width * (p * 2 ** (len(vae.config.block_out_channels) - 1)) ** 2, latents.device)
        if size == 0:
            decode_in_tiles(vae)
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_type == "pt"):
            pixels = torch.cat([vae.decode(x).sample for x in latents.split(size or 1)])
        if output_type == "pt":
            return pixels.float()
        arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        finite = pixels.isfinite().flatten(1).all(1).tolist()
        return mark_failed([Image.fromarray(array) for array in arrays], finite)

    def _slice(self, pixels: int, device: torch.device) -> int:
        """Say how many images of so many pixels fit at once, possibly 0."""
        if self.slice_size is not None:
            return self.slice_size
        # At full resolution the decoder holds about a dozen tensors of its smallest width.
        each = 12 * self.vae.config.block_out_channels[0] * pixels * self.vae.dtype.itemsize
        fits = fitting(free_memory(device), each)
        return ALL if fits is None else fits

    def save(self, folder: str | Path) -> None:
        """Write `ae.safetensors`, with the names of the released file."""
        state = self.vae.state_dict()
        if isinstance(self.vae, AutoencoderKL):
            state = {official: state[name] for name, official in official_names(self.vae).items()}
            # The released attention is written with 1 x 1 convolutions, diffusers' with linear layers.
            linear = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight$")
            state = {name: x[..., None, None] if linear.search(name) else x for name, x in state.items()}
        state = {name: x.contiguous().cpu() for name, x in state.items()}
        save_file(state, Path(folder) / AUTOENCODER_WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, file: str | Path, config: dict, patch_size: int) -> "LatentCodec":
        """
        Read `ae.safetensors`.

        Raises:
            ValueError: if its keys or shapes are not those of the configuration.
        """
        vae = build_vae(config)
        names = official_names(vae) if isinstance(vae, AutoencoderKL) else {name: name for name in vae.state_dict()}
        stored, target = load_file(file), vae.state_dict()
        problems = {
            "missing": set(names.values()) - set(stored),
            "left over": set(stored) - set(names.values()),
            # Sizes, not shapes: see `save`.
            "of another size": {
                official
                for name, official in names.items()
                if official in stored and stored[official].numel() != target[name].numel()
            },
        }
        if any(problems.values()):
            found = "; ".join(f"{kind}: {', '.join(sorted(keys)[:6])}" for kind, keys in problems.items() if keys)
            raise ValueError(
                f"{file} is not the VAE that `vae_config` describes: {found}. Check that the file is complete and "
                "that `config.json` belongs to it."
            )
        vae.load_state_dict({name: stored[official].reshape(target[name].shape) for name, official in names.items()})
        return cls(vae, config, patch_size)


def decode_in_tiles(vae: Any) -> None:
    """Let diffusers decode images larger than a tile in overlapping tiles, blended at their seams."""
    if isinstance(vae, AutoencoderKL) and not vae.use_tiling:
        vae.tile_sample_min_size = TILE
        vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
        vae.enable_tiling()


def build_vae(config: dict) -> Any:
    """Build the VAE of a configuration, with random weights."""
    if config.get("_class_name") == "PatchAutoencoderKL":
        from ..patch_autoencoder import PatchAutoencoderKL

        return PatchAutoencoderKL.from_config(config)
    widths = [config["ch"] * factor for factor in config["ch_mult"]]
    return AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["out_ch"],
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        scaling_factor=config["scale_factor"],
        shift_factor=config["shift_factor"],
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def official_names(vae: Any) -> dict[str, str]:
    """Return the name in the released file of every tensor of diffusers' module."""
    blocks = len(vae.config.block_out_channels)

    def rename(name: str) -> str:
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        # The released decoder counts its blocks from the full-size end.
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.", name)
        return re.sub(r"(up\.\d+)\.resnets\.(\d+)\.", r"\1.block.\2.", name).replace(".upsamplers.0.", ".upsample.")

    return {name: rename(name) for name in vae.state_dict()}
