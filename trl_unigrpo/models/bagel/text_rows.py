"""Rows of text between TRL's padded layout and the model's own, where every row begins at the left.

Shapes: B text rows of T tokens, R >= B rows of L tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import ContextRow
from .segments import padded


@dataclass
class TextRows:
    """
    Rows moved to the left, where neither positions nor the causal mask need to know of padding.

    Attributes:
        ids: (R, L) tokens; what lies behind a row's length is of no meaning.
        lengths: of the R rows.
        start: (B,) where each text row began.
        width: T of the layout that they came in.
    """

    ids: Tensor
    lengths: list[int]
    start: Tensor
    width: int

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, contexts: Sequence[ContextRow] = ()) -> "TextRows":
        """
        Args:
            input_ids, attention_mask: (B, T), the real tokens of each row side by side.
            contexts: R rows, of which the first B are what the text rows say, and what may follow: such as the token
                that closes a thinking that ran out of length.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        start, lengths = attention_mask.long().argmax(1), attention_mask.sum(1).tolist()
        lengths += [0] * (len(contexts) - len(lengths))
        if contexts:
            lengths = [max(pair) for pair in zip(lengths, map(len, contexts), strict=True)]
        column = torch.arange(max(lengths), device=input_ids.device)
        ids = input_ids.gather(1, (start[:, None] + column).clamp(max=input_ids.shape[1] - 1))
        if contexts:
            context, known = padded([row.ids for row in contexts], len(column), ids.device)
            more = ids.new_zeros(len(contexts) - len(ids), ids.shape[1])
            ids = torch.where(known, context, torch.cat([ids, more]) if len(more) else ids)
        return cls(ids, lengths, start, input_ids.shape[1])

    def with_images(self, images: Sequence[Sequence[Any]]) -> list[ContextRow]:
        """Give the R rows as contexts, with the images that their placeholders stand for."""
        rows = zip(self.ids.cpu(), self.lengths, images, strict=True)
        return [ContextRow(row[:length], shown) for row, length, shown in rows]

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
