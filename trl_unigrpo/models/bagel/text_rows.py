"""Rows of text between TRL's padded layout and the model's own, where every row begins at the left.

A row of several rounds may be read as several passages, each of which is a row of the model's own.

Shapes: B text rows of T tokens, P >= B passages, R >= P rows of at most L tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ...trajectory import Passage, Steps
from ..contract import ContextRow


@dataclass
class TextRows:
    """
    Rows moved to the left, where neither positions nor the causal mask need to know of padding.

    Attributes:
        rows: tokens of the R rows, on the CPU.
        start: (B,) where each text row began.
        width: T of the layout that they came in.
        images: of the passages that the first P rows are, in the model's own form; none where these are text rows.
        number: (row, round) -> the passage of a text row's round.
        place: (2, B, T) the passage, and the place in it, of every token that is read in one; None without passages.
    """

    rows: list[Tensor]
    start: Tensor
    width: int
    images: Sequence[Sequence[Any]] = field(default_factory=list)
    number: dict[tuple[int, int], int] = field(default_factory=dict)
    place: Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        passages: Sequence[Sequence[Passage]] | None = None,
    ) -> "TextRows":
        """
        Read (B, T) tokens; the real ones of each row stand side by side.

        Args:
            passages: for each row those that it is read as.

        Raises:
            ValueError: if a row is not what its passages say, or the beginning of that, where TRL blanks its end.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        ids, real = torch.stack([input_ids, mask]).cpu()  # both at once: the host waits for each copy
        rows = [row[known] for row, known in zip(ids, real.bool(), strict=True)]
        read = cls(rows, mask.argmax(1), input_ids.shape[1])
        return read if passages is None else read._as_passages(passages)

    def _as_passages(self, passages: Sequence[Sequence[Passage]]) -> "TextRows":
        place = torch.zeros(2, len(self.rows), self.width, dtype=torch.long)
        number: dict[tuple[int, int], int] = {}
        rows: list[Passage] = []
        for row, (at, own) in enumerate(zip(self.start.tolist(), passages, strict=True)):
            said, rounds = [token for passage in own for token in passage.ids[passage.repeated :]], 0
            if not torch.equal(torch.tensor(said[: len(self.rows[row])]), self.rows[row]):
                raise ValueError(
                    f"Text row {row} says something else than its passages: give each row those of its own trajectory."
                )
            for passage in own:
                stop = at + len(passage.ids) - passage.repeated
                place[0, row, at:stop] = len(rows)
                place[1, row, at:stop] = torch.arange(passage.repeated, len(passage.ids))
                number |= {(row, rounds + i): len(rows) for i in range(passage.rounds)}
                at, rounds = stop, rounds + passage.rounds
                rows.append(passage)
        ids, images = [torch.tensor(passage.ids) for passage in rows], [passage.images for passage in rows]
        return replace(self, rows=ids, images=images, number=number, place=place)

    def hosts(self, steps: Steps) -> Steps:
        """Let the `row` of steps be the passage that they belong to, where there are passages."""
        if self.place is None:
            return steps
        rows = zip(steps.row.tolist(), steps.round.tolist(), strict=True)
        return replace(steps, row=torch.tensor([self.number[place] for place in rows]))

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
        """
        Give the R rows as contexts, with the images that their placeholders stand for: a passage's own where it goes
        on behind what is given.
        """
        given, own = ([*some, *[()] * (len(self.rows) - len(some))] for some in (images, self.images))
        return [ContextRow(row, max(pair, key=len)) for row, *pair in zip(self.rows, given, own, strict=True)]

    def back(self, hidden: Tensor, text_index: Tensor | None) -> Tensor:
        """
        Hidden states (B, T, H) in the layout that the rows came in.

        Args:
            hidden: (R, U, H) of the text stream.
            text_index: (R, L) place of every token in it; None where it is the tokens' own.
        """
        if self.place is not None:
            row, place = self.place.to(hidden.device)
            return hidden[row, place if text_index is None else text_index[row, place]]
        hidden = hidden[: len(self.start)]
        if text_index is not None:
            index = text_index[: len(self.start), :, None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
        place = torch.arange(self.width, device=hidden.device) - self.start[:, None]
        place = place.clamp(0, hidden.shape[1] - 1)
        return hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
