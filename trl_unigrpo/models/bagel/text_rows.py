"""Rows of text between TRL's padded layout and the model's own, where every row begins at the left.

Shapes: B text rows of T tokens, R >= B rows of at most L tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..contract import ContextRow


@dataclass
class TextRows:
    """
    Rows moved to the left, where neither positions nor the causal mask need to know of padding.

    Attributes:
        rows: tokens of the R rows, on the CPU.
        start: (B,) where each text row began.
        width: T of the layout that they came in.
    """

    rows: list[Tensor]
    start: Tensor
    width: int

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> "TextRows":
        """Read (B, T) tokens; the real ones of each row stand side by side."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        ids, real = torch.stack([input_ids, mask]).cpu()  # both at once: the host waits for each copy
        rows = [row[known] for row, known in zip(ids, real.bool(), strict=True)]
        return cls(rows, mask.argmax(1), input_ids.shape[1])

    def followed(self, contexts: Sequence[ContextRow]) -> "TextRows":
        """
        Let the rows say what R contexts say, and what they say beyond it.

        Args:
            contexts: the first B are what the text rows say, and what may follow: such as the token that closes a
                thinking that ran out of length.
        """
        rows = [
            context.ids if text is None else torch.cat([context.ids, text[len(context) :]])
            for context, text in zip_longest(contexts, self.rows)
        ]
        return replace(self, rows=rows)

    def with_images(self, images: Sequence[Sequence[Any]]) -> list[ContextRow]:
        """Give the R rows as contexts, with the images that their placeholders stand for; none if there are none."""
        return [ContextRow(row, shown) for row, shown in zip(self.rows, images or [()] * len(self.rows), strict=True)]

    def back(self, hidden: Tensor, text_index: Tensor | None) -> Tensor:
        """
        Hidden states (B, T, H) in the layout that the rows came in.

        Args:
            hidden: (R, U, H) of the text stream.
            text_index: (R, L) place of every token in it; None where it is the tokens' own.
        """
        hidden = hidden[: len(self.start)]
        if text_index is not None:
            index = text_index[: len(self.start), :, None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
        place = torch.arange(self.width, device=hidden.device) - self.start[:, None]
        place = place.clamp(0, hidden.shape[1] - 1)
        return hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
