"""Attention of the two token streams of a Mixture-of-Transformers decoder.

A forward pass holds two contiguous streams instead of one interleaved sequence:

    und stream: [text, T tokens | two markers of image 1 | ... | two markers of image K]      U = T + 2 K
    gen stream: [latents of image 1, N tokens | ... | latents of image K]                     G = K N

Attention is equivariant to the order of tokens once positions and visibility are explicit, so nothing is gathered or
scattered: text attends causally to text; image k attends to the whole context and, fully, to itself; nobody else sees
image k.

Shapes: B samples, A query heads, V key heads, D head size, L context tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache


@dataclass
class Context:
    """
    Keys and values of encoded contexts, for any number of later velocities.

    Attributes:
        keys, values: one (B, V, L, D) tensor per layer, right-padded.
        lengths: (B,) true lengths.
        mask: (B, L) True at real tokens, or None if no row is padded.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    mask: Tensor | None


@dataclass
class Layout:
    """
    Who sees whom in one forward pass.

    Attributes:
        num_text: T, text tokens at the head of the und stream.
        num_images: K, images in the two streams.
        text_mask: (B, 1, T, S) True where text may look, or None for plain causal attention over S = T keys.
        context_mask: (B, L) True at the context tokens that the images see, or None for all of them.
        context: encoded context of the images; None if it is the text of this very pass.
        context_grad: whether the images' gradient flows into the text's keys and values.
    """

    num_text: int
    num_images: int = 0
    text_mask: Tensor | None = None
    context_mask: Tensor | None = None
    context: Context | None = None
    context_grad: bool = False


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Softmax attention of (B, A, S, D) queries over (B, V, S', D) keys; A is a multiple of V."""
    if k.shape[1] != q.shape[1] and (mask is not None or q.device.type == "cpu"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=k.shape[1] != q.shape[1]
    )


def attend_streams(
    und: tuple[Tensor, Tensor, Tensor],
    gen: tuple[Tensor, Tensor, Tensor] | None,
    layout: Layout,
    layer: int,
    past_key_values: Cache | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """
    Attention outputs of both streams, (B, A, U, D) and (B, A, G, D), and the text's keys and values.

    Args:
        und, gen: queries (B, A, U or G, D), keys and values (B, V, U or G, D) of each stream.
    """
    num_text, images = layout.num_text, layout.num_images
    text_k, text_v = (x[:, :, :num_text] for x in und[1:])
    if past_key_values is not None:
        text_k, text_v = past_key_values.update(text_k, text_v, layer)
    outputs = []
    if num_text:
        plain = layout.text_mask is None
        outputs.append(
            attend(und[0][:, :, :num_text], text_k, text_v, layout.text_mask, is_causal=plain and num_text > 1)
        )
    if gen is None:
        return outputs[0], None, text_k, text_v

    if layout.context is not None:
        context_k, context_v = layout.context.keys[layer], layout.context.values[layer]
    else:
        context_k, context_v = (text_k, text_v) if layout.context_grad else (text_k.detach(), text_v.detach())
    # One row of a bigger batch per image: its markers and its latents, over its context and itself.
    q, k, v = (_per_image(u[:, :, num_text:], g, images) for u, g in zip(und, gen, strict=True))
    k, v = (torch.cat([_repeat(c, images), x], dim=2) for c, x in ((context_k, k), (context_v, v)))
    mask = None
    if layout.context_mask is not None:
        own = layout.context_mask.new_ones(len(q), q.shape[2])
        mask = torch.cat([_repeat(layout.context_mask, images), own], dim=1)[:, None, None]
    out = attend(q, k, v, mask).unflatten(0, (-1, images)).transpose(1, 2)  # (B, A, K, 2 + N, D)
    outputs.append(out[:, :, :, :2].flatten(2, 3))
    return torch.cat(outputs, dim=2), out[:, :, :, 2:].flatten(2, 3), text_k, text_v


def _per_image(markers: Tensor, latents: Tensor, images: int) -> Tensor:
    """(B, A, 2 K, D) and (B, A, K N, D) -> (B K, A, 2 + N, D)."""
    parts = [x.unflatten(2, (images, -1)) for x in (markers, latents)]
    return torch.cat(parts, dim=3).transpose(1, 2).flatten(0, 1)


def _repeat(x: Tensor, times: int) -> Tensor:
    """(B, ...) -> (B times, ...), each row repeated."""
    return x if times == 1 else x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)
