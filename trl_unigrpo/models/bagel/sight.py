"""Rows that show no image, computed apart from those that do: padded together, all would be as long as an image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import ContextRow


def by_sight(rows: Sequence[ContextRow]) -> list[list[int]]:
    """List the numbers of the rows that show no image, and of those that do, where there are such."""
    shows = [len(row.images) > 0 for row in rows]
    found = ([i for i, sees in enumerate(shows) if sees == wanted] for wanted in (False, True))
    return [some for some in found if some]


def together(
    groups: Sequence[Sequence[int]], parts: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """
    Put what was computed apart in the order of the rows.

    Args:
        groups: numbers of each part's rows, of R in all.
        parts: of each the text stream's hidden states (R', U', H), and the places in it (R', L') of the rows' tokens;
            None where these are their own.

    Returns:
        The same of all rows, (R, U, H) and (R, L).
    """
    if len(groups) == 1:
        return parts[0]
    order = torch.tensor([number for some in groups for number in some]).argsort().to(parts[0][0].device)
    width = max(hidden.shape[1] for hidden, _ in parts)
    places = [
        torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1) if index is None else index
        for hidden, index in parts
    ]
    length = max(index.shape[1] for index in places)
    hidden = torch.cat([F.pad(hidden, (0, 0, 0, width - hidden.shape[1])) for hidden, _ in parts])
    index = torch.cat([F.pad(index, (0, length - index.shape[1])) for index in places])
    return hidden[order], index[order]
