"""BAGEL's understanding tower: SigLIP's vision transformer on images of any aspect ratio, and the way to the decoder.

Module names are those of the released checkpoint, so that its keys load unchanged.

Shapes: N = h w patches of one image, P = 3 p p numbers in a patch of p x p pixels, W the tower's width, A heads of
size D. Any dimensions may stand before these.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN

from .attention import attention_kernels


UNDERSTANDING_MODULES = ("vit_model", "connector", "vit_pos_embed")
"""The parts of the model that read images; frozen unless asked otherwise."""


class BagelPerceptron(nn.Module):
    """Two linear layers: those inside the tower, and the connector from its width to the decoder's."""

    def __init__(self, width: int, inner: int, out: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.activation = ACT2FN[activation]
        self.fc2 = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class BagelVisionAttention(nn.Module):
    """Every patch of an image sees every other."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config, self.heads = config, config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in "qkv")
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (A, N, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        with attention_kernels(self.config):
            return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class BagelVisionLayer(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = BagelVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = BagelPerceptron(width, config.intermediate_size, width, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class BagelVisionEmbeddings(nn.Module):
    """Patches, linearly, and a learned embedding of their place."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding(positions)


class BagelVisionEncoder(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        # The configuration counts a last layer that BAGEL never uses and its checkpoint does not hold.
        self.layers = nn.ModuleList(BagelVisionLayer(config) for _ in range(config.num_hidden_layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class BagelVisionTransformer(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.embeddings = BagelVisionEmbeddings(config)
        self.encoder = BagelVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(patches, positions)))


class BagelVisionTower(nn.Module):
    """
    Reads images whose sides are multiples of the patch, up to `side` patches each; never resizes.

    Args:
        config: sizes; `num_hidden_layers` counts one layer more than there are.
        side: patches along one side that there is room for; the place of a patch is `row * side + column`.
    """

    def __init__(self, config: SiglipVisionConfig, side: int):
        super().__init__()
        self.patch_size, self.side = config.patch_size, side
        self.vision_model = BagelVisionTransformer(config)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Count the (h, w) patches of images (3, height, width); ValueError for a size that the tower can't read."""
        height, width = pixels.shape[-2:]
        unit, limit = self.patch_size, self.side
        if any(side % unit or not 0 < side <= unit * limit for side in (height, width)):
            raise ValueError(
                f"This model can't read an image of {height} x {width} pixels (height x width): each side must be a "
                f"multiple of {unit}, at most {unit * limit}. `BagelProcessor.vit_pixels` resizes to such a size."
            )
        return height // unit, width // unit

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features (N, W), row by row, of images (3, height, width) in [-1, 1]."""
        rows, columns = (torch.arange(n, device=pixels.device) for n in self.grid(pixels))
        positions = (rows[:, None] * self.side + columns).flatten()
        weight = self.vision_model.embeddings.patch_embedding.weight
        patches = patchify(pixels, self.patch_size).to(weight.device, weight.dtype)
        return self.vision_model(patches, positions.to(weight.device))


def patchify(pixels: Tensor, size: int) -> Tensor:
    """
    Cut images (3, height, width) into patches (N, P): row by row, the numbers of each in (row, column, channel) order.
    """
    *batch, channels, height, width = pixels.shape
    patches = pixels.reshape(*batch, channels, height // size, size, width // size, size)
    patches = patches.movedim((-5, -4, -3, -2, -1), (-1, -5, -3, -4, -2))  # (h, w, row, column, channel)
    return patches.reshape(*batch, -1, size * size * channels)
