"""Layers of BAGEL's decoder: two experts, chosen by the type of the token, share one attention.

Module names are those of the released checkpoint, so that its keys load unchanged; `_moe_gen` marks the image expert.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attention_kernels


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the positions."""


def head_size(config: Qwen2Config) -> int:
    """Return D, the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class BagelRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and scaled in the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class BagelMLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BagelAttention(nn.Module):
    """Projections of the two experts around one shared attention."""

    o_proj: nn.Linear
    o_proj_moe_gen: nn.Linear

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = head_size(config)
        width, query_width = config.hidden_size, config.num_attention_heads * self.head_dim
        key_width = (config.num_key_value_heads or config.num_attention_heads) * self.head_dim
        for suffix in ("", "_moe_gen"):
            self.add_module(f"q_proj{suffix}", nn.Linear(width, query_width))
            self.add_module(f"k_proj{suffix}", nn.Linear(width, key_width))
            self.add_module(f"v_proj{suffix}", nn.Linear(width, key_width))
            self.add_module(f"o_proj{suffix}", nn.Linear(query_width, width, bias=False))
            self.add_module(f"q_norm{suffix}", BagelRMSNorm(self.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", BagelRMSNorm(self.head_dim, config.rms_norm_eps))

    def project(self, x: Tensor, rotary: Rotary, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """
        Compute queries, keys and values (B, heads, S, D) of one stream; q and k normalised per head, then rotated.
        """
        q, k, v = (
            getattr(self, f"{name}_proj{suffix}")(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        q, k = getattr(self, f"q_norm{suffix}")(q), getattr(self, f"k_norm{suffix}")(k)
        return rotate(q, rotary), rotate(k, rotary), v

    def merge(self, heads: Tensor, suffix: str) -> Tensor:
        """Project the heads (B, A, S, D) of one stream back to (B, S, H)."""
        return getattr(self, f"o_proj{suffix}")(heads.transpose(1, 2).flatten(2))


class BagelLayer(GradientCheckpointingLayer):
    """
    One decoder layer over the two streams; returns the text's keys and values beside the streams.

    Under gradient checkpointing a cache passed by name would be dropped, and `generate` silently wrong: pass it by
    position.

    Attributes:
        compiled: what torch.compile makes of the parts around attention ("inductor"); None for nothing.
    """

    compiled: str | None = None
    mlp: BagelMLP
    mlp_moe_gen: BagelMLP
    input_layernorm: BagelRMSNorm
    input_layernorm_moe_gen: BagelRMSNorm
    post_attention_layernorm: BagelRMSNorm
    post_attention_layernorm_moe_gen: BagelRMSNorm

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.self_attn = BagelAttention(config, layer)
        for suffix in ("", "_moe_gen"):
            self.add_module(f"mlp{suffix}", BagelMLP(config))
            self.add_module(f"input_layernorm{suffix}", BagelRMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{suffix}", BagelRMSNorm(config.hidden_size, config.rms_norm_eps))

    def before(self, x: Tensor, rotary: Rotary, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what one stream brings to attention: queries, keys and values."""
        return self.self_attn.project(getattr(self, f"input_layernorm{suffix}")(x), rotary, suffix)

    def after(self, x: Tensor, heads: Tensor, suffix: str) -> Tensor:
        """Add what one stream takes from attention, and then its MLP's output."""
        x = x + self.self_attn.merge(heads, suffix)
        return x + getattr(self, f"mlp{suffix}")(getattr(self, f"post_attention_layernorm{suffix}")(x))

    def forward(
        self,
        und: Tensor,
        gen: Tensor | None,
        rotary_und: Rotary,
        rotary_gen: Rotary | None,
        attend: Callable[..., Any],
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Run both streams through the layer; `attend` is `attend_streams`, with the table of who sees whom."""
        before, after = compiled_parts(self.compiled) if self.compiled else (BagelLayer.before, BagelLayer.after)
        und_qkv, gen_qkv = before(self, und, rotary_und, ""), None
        if gen is not None and rotary_gen is not None:
            gen_qkv = before(self, gen, rotary_gen, "_moe_gen")
        with attention_kernels(self.self_attn.config):
            und_heads, gen_heads, keys, values = attend(
                und_qkv, gen_qkv, layer=self.self_attn.layer, past_key_values=past_key_values
            )
        und = after(self, und, und_heads, "")
        if gen is not None and gen_heads is not None:
            gen = after(self, gen, gen_heads, "_moe_gen")
        return und, gen, keys, values


@cache
def compiled_parts(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """
    Compile what a layer computes before and after attention, once for all layers of all sizes.

    Attention itself stays: it has kernels of its own, and a table of who sees whom that changes with every batch.
    """
    import torch._dynamo  # which takes its time

    # Two experts, with and without gradients, adapters and batches of one are each compiled.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    before, after = (
        torch.compile(part, backend=backend, dynamic=True) for part in (BagelLayer.before, BagelLayer.after)
    )
    return before, after


class BagelTimeEmbedder(nn.Module):
    """Embeds t in [0, 1], not scaled, by 128 cosines and 128 sines."""

    frequencies = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        scale = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angles = t.float()[..., None] * scale
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class BagelPositionTable(nn.Module):
    """
    Fixed embedding of each cell of a square grid, stored in the checkpoint.

    A buffer, not a frozen parameter: loading a checkpoint switches `requires_grad` on.
    """

    pos_embed: Tensor

    def __init__(self, side: int, width: int):
        super().__init__()
        self.side = side
        self.register_buffer("pos_embed", torch.zeros(side * side, width))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return (h w, width) embeddings of the first h rows and w columns, row by row."""
        rows, columns = (torch.arange(n, device=self.pos_embed.device) for n in grid)
        return self.pos_embed[(rows[:, None] * self.side + columns).flatten()]

    def reset(self) -> None:
        """Fill the table with sines and cosines of the row and of the column, half of the width each."""
        quarter = self.pos_embed.shape[1] // 4
        angles = torch.outer(
            torch.arange(self.side, dtype=torch.float64), 10_000.0 ** (-torch.arange(quarter) / quarter)
        )
        axis = torch.cat([angles.sin(), angles.cos()], dim=1)
        columns, rows = axis.repeat(self.side, 1), axis.repeat_interleave(self.side, dim=0)
        with torch.no_grad():
            self.pos_embed.copy_(torch.cat([columns, rows], dim=1))


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Compute cosines and sines (B, 1, S, D) of the rotary embedding at integer positions (B, S), in float32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    """Apply the rotary embedding to (B, heads, S, D), halves paired."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
