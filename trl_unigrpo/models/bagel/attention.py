"""Attention of the two token streams of a Mixture-of-Transformers decoder.

A forward pass holds two contiguous streams instead of one interleaved sequence:

    und stream: [the contexts' text stream, U tokens | two markers of noisy copy 1 | ... | two markers of copy K]
    gen stream: [the contexts' image stream, G tokens | latents of copy 1, N tokens | ... | latents of copy K]

Attention is equivariant to the order of tokens once positions and visibility are explicit: contexts attend as their
table of segments says (plain causal where they are text alone, and then nothing is gathered); a noisy copy attends to
a prefix of its context and, fully, to itself; nobody else sees it.

Shapes: B samples, A query heads, V key heads, D head size, S = U + G context tokens, K copies.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, PreTrainedConfig

from .segments import Segments


ROWWISE_QUERIES = 512
"""Copies of at least so many tokens attend row by row where contexts are ragged: no mask, no padding."""


@dataclass
class Context:
    """
    Keys and values of encoded contexts, for any number of later velocities.

    Attributes:
        keys, values: one (B, V, S, D) tensor per layer, in the order of the segments, right-padded.
        lengths: true lengths of the B rows.
        positions: the B rotary positions of an image that follows.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[int]
    positions: list[int]

    def of(self, rows: Sequence[int]) -> "Context":
        """Take rows by their numbers. All of it, as it is, where each is wanted equally often, side by side."""
        count = len(self.lengths)
        if list(rows) == [row for row in range(count) for _ in range(len(rows) // count)]:
            return self
        index = torch.tensor(rows, device=self.keys[0].device)
        keys, values = ([x[index] for x in states] for states in (self.keys, self.values))
        return Context(keys, values, [self.lengths[row] for row in rows], [self.positions[row] for row in rows])

    @cached_property
    def placed(self) -> Tensor:
        """Positions and lengths, (2, B) on the device: moved there once, and not for every velocity."""
        return torch.tensor([self.positions, self.lengths], device=self.keys[0].device)


@dataclass
class Layout:
    """
    The table of who sees whom in one forward pass.

    Attributes:
        num_text: U, context tokens at the head of the und stream.
        segments: the contexts' table; None where `context` has them, or where text goes on from a cache.
        text_mask: (B, 1, U, past + U) True where text may look when there is no table; None for all of the past and
            causally itself.
        num_images: K, noisy copies in the two streams.
        visible: (B, K) tokens of its context that each copy sees.
        visible_there: the same on the device, which the mask of ragged copies needs.
        context: encoded contexts of the copies; None if they are those of this very pass.
        context_grad: whether the copies' gradient flows into the contexts' keys and values.
    """

    num_text: int
    segments: Segments | None = None
    text_mask: Tensor | None = None
    num_images: int = 0
    visible: Sequence[Sequence[int]] = ()
    visible_there: Tensor | None = None
    context: Context | None = None
    context_grad: bool = False

    @property
    def num_latents(self) -> int:
        """G, context tokens at the head of the gen stream."""
        return 0 if self.segments is None else self.segments.image_positions.shape[1]


def attention_kernels(config: PreTrainedConfig) -> AbstractContextManager:
    """Choose what computes attention: torch's choice of fused kernels, or plain products for "eager"."""
    return sdpa_kernel(SDPBackend.MATH) if getattr(config, "_attn_implementation", None) == "eager" else nullcontext()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute softmax attention of (B, A, S, D) queries over (B, V, S', D) keys; A is a multiple of V."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.shape[2] == 1 and not is_causal:
        # One token decodes: the heads of a group are so many queries of their key head, and nothing is repeated.
        queries = q[:, :, 0].unflatten(1, (-1, group))
        return F.scaled_dot_product_attention(queries, k, v, mask).flatten(1, 2)[:, :, None]
    if group > 1 and repeats_heads(q.device.type, computed_dtype(q), mask is not None):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=k.shape[1] != q.shape[1]
    )


def repeats_heads(device_type: str, dtype: torch.dtype, masked: bool) -> bool:
    """
    Say whether keys and values of grouped heads have to be repeated, for torch to find a fused kernel.

    On CUDA flash attention alone takes grouped heads, and it takes half precision without a mask. All else is left to
    the memory-efficient kernel, which knows no groups: without the repeat, plain products would write all scores.
    """
    return device_type == "cpu" or masked or dtype not in (torch.bfloat16, torch.float16)


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in: autocast's where it is on, which casts behind this call."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


Streams = tuple[Tensor, Tensor, Tensor]
"""Queries (B, A, S, D), keys and values (B, V, S, D)."""


def attend_streams(
    und: Streams, gen: Streams | None, layout: Layout, layer: int, past_key_values: Cache | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """
    Compute the attention of both streams.

    Returns:
        outputs (B, A, ., D) of each as they came; the contexts' keys and values, (B, V, S, D).
    """
    text, latents = layout.num_text, layout.num_latents
    order = None if layout.segments is None else layout.segments.order
    q, k, v = (x[:, :, :text] for x in und)
    if order is not None and gen is not None:
        q, k, v = (_ordered(torch.cat([x, y[:, :, :latents]], 2), order) for x, y in zip((q, k, v), gen, strict=True))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, layer)
        written = int(past_key_values.get_seq_length(layer))  # a static cache gives all of its room
        k, v = k[:, :, :written], v[:, :, :written]
    und_parts, gen_parts = [], []
    if text:
        out = _attend_contexts(q, k, v, layout)
        if order is not None:
            out = _ordered(out, order.argsort(1))
            gen_parts.append(out[:, :, text:])
        und_parts.append(out[:, :, :text])
    if layout.num_images and gen is not None:
        copies = [
            _per_copy(u[:, :, text:], g[:, :, latents:], layout.num_images) for u, g in zip(und, gen, strict=True)
        ]
        if layout.context is not None:
            seen = layout.context.keys[layer], layout.context.values[layer]
        else:
            seen = (k, v) if layout.context_grad else (k.detach(), v.detach())
        out = _attend_copies(copies, seen, layout).unflatten(0, (-1, layout.num_images)).transpose(1, 2)
        und_parts.append(out[:, :, :, :2].flatten(2, 3))  # (B, A, K, 2 + N, D)
        gen_parts.append(out[:, :, :, 2:].flatten(2, 3))
    return _joined(und_parts), _joined(gen_parts) if gen_parts else None, k, v


def _attend_contexts(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend from contexts to themselves: outputs (B, A, S, D)."""
    table, length = layout.segments, q.shape[2]
    if table is None or table.sees is None:
        return attend(q, k, v, layout.text_mask, is_causal=layout.text_mask is None and length > 1)
    place = torch.arange(length, device=q.device)
    if table.blocks is None:
        return attend(q, k, v, (place <= table.sees[..., None])[:, None])
    # Images at the same places in all rows: they see a whole prefix, and the text between them is causal.
    parts, done = [], 0
    for start, stop in [*table.blocks, (length, length)]:
        if start > done:
            mask = place[:start] <= place[done:start, None] if done else None
            parts.append(attend(q[:, :, done:start], k[:, :, :start], v[:, :, :start], mask, is_causal=not done))
        if stop > start:
            parts.append(attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
        done = stop
    return torch.cat(parts, 2)


def _attend_copies(copies: Sequence[Tensor], seen: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """
    Attend from each noisy copy to a prefix of its context and itself: outputs (B K, A, 2 + N, D).

    Args:
        copies: queries, keys and values of (B K, ., 2 + N, D).
        seen: keys and values (B, V, S, D) of the contexts.
        layout: with the lengths of the prefixes.
    """
    q, k, v = copies
    lengths, images = [length for row in layout.visible for length in row], layout.num_images

    def before(own: Tensor, context: Tensor, length: int) -> Tensor:
        return torch.cat([_repeat(context[:, :, :length], len(own) // len(context)), own], 2)

    longest = max(lengths)
    if min(lengths) == longest:
        return attend(q, before(k, seen[0], longest), before(v, seen[1], longest))
    if q.shape[2] >= ROWWISE_QUERIES:
        rows = [(slice(i, i + 1), slice(i // images, i // images + 1), length) for i, length in enumerate(lengths)]
        return torch.cat(
            [attend(q[i], before(k[i], seen[0][b], length), before(v[i], seen[1][b], length)) for i, b, length in rows]
        )
    assert layout.visible_there is not None
    mask = torch.arange(longest, device=q.device) < layout.visible_there.flatten()[:, None]
    mask = torch.cat([mask, mask.new_ones(len(q), q.shape[2])], 1)[:, None, None]
    return attend(q, before(k, seen[0], longest), before(v, seen[1], longest), mask)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """Put the tokens of each row of (B, A, S, D) in the order (B, S)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _per_copy(markers: Tensor, latents: Tensor, images: int) -> Tensor:
    """Join markers (B, A, 2 K, D) and latents (B, A, K N, D) copy by copy: (B K, A, 2 + N, D)."""
    parts = [x.unflatten(2, (images, -1)) for x in (markers, latents)]
    return torch.cat(parts, dim=3).transpose(1, 2).flatten(0, 1)


def _repeat(x: Tensor, times: int) -> Tensor:
    """Repeat each row: (B, ...) -> (B times, ...)."""
    return x if times == 1 else x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def causal_mask(attention_mask: Tensor, length: int, padded: bool | None = None) -> Tensor | None:
    """
    Say where the last `length` of S tokens may look: (B, 1, length, S), or None if plain causal attention says it all.

    Args:
        attention_mask: (B, S) True at real tokens.
        padded: whether there are others, where that is known; None looks, and waits for the device.
    """
    total = attention_mask.shape[1]
    if length == total or length == 1:
        padded = not bool(attention_mask.all()) if padded is None else padded
        if not padded:
            return None
    place = torch.arange(total, device=attention_mask.device)
    own = place[total - length :, None]
    # A padding token looks at itself, or its softmax would be empty.
    return ((place <= own) & attention_mask[:, None, :] | (place == own))[:, None]


def left_padded(context: Context) -> Context:
    """Move the context's padding to the left."""
    size = context.keys[0].shape[2]
    missing = size - torch.tensor(context.lengths, device=context.keys[0].device)
    place = (torch.arange(size, device=missing.device) - missing[:, None]).clamp(min=0)

    def shifted(x: Tensor) -> Tensor:
        return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    keys, values = ([shifted(x) for x in states] for states in (context.keys, context.values))
    return Context(keys, values, context.lengths, context.positions)
