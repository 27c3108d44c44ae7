"""The table of segments: how texts and clean images of a batch become two streams with positions and visibility.

A context is a row of token ids in which one placeholder stands for each image. A segment is one of

    segment             expert           positions                        sees
    text of n tokens    text             r .. r + n - 1, then r += n      everything before it and itself, causally
    image for the       markers: text,   r for every token, then r += 1   everything before it and itself, fully
      image expert      latents: image
    image for the       text             r for every token, then r += 1   everything before it and itself, fully
      text expert

In the order of these segments every token sees the tokens up to some place, its own for text and its segment's last
for images: one number per token says it all, and a prefix of a context is a prefix of its tokens.

Shapes: B rows, L ids, U tokens of the text stream, G of the image stream, S = U + G, C numbers per latent, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...trajectory import Trajectory
from ..contract import ContextRow


@dataclass
class ContextImage:
    """
    A finished image in a context, as its two readers see it; either may be missing.

    Attributes:
        latents: (h w, C) clean latents, for the image expert.
        grid: (h, w) of the latents.
        features: (M, H) embedded patches of the vision tower, for the text expert.
    """

    latents: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    features: Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents is None and self.features is None:
            raise ValueError("A ContextImage needs latents, features, or both.")
        if self.latents is not None and len(self.latents) != self.grid[0] * self.grid[1]:
            raise ValueError(f"{len(self.latents)} latents do not fill a grid of {self.grid[0]} x {self.grid[1]}.")

    def kept(self) -> "ContextImage":
        """Bring it to the CPU, where it waits for the contexts that show it."""
        latents, features = (None if x is None else x.cpu() for x in (self.latents, self.features))
        return replace(self, latents=latents, features=features)


@dataclass
class Segments:
    """
    The streams of a batch of contexts. Rows are padded on the right; nothing real sees padding.

    The table is made on the CPU, and [`moved`] as a whole.

    Attributes:
        ids: (B, U) tokens of the text stream, markers included; 0 where `features` go.
        positions: (B, U) rotary positions of the text stream.
        image_positions: (B, G) those of the image stream.
        prefix_lengths: for each row L + 1 numbers: tokens that the first 0 .. L ids make.
        prefix_positions: for each row L + 1 numbers: the position that follows the first 0 .. L ids.
        text_index: (B, L) place in the text stream of every id.
        features: (row, start, (M, H)) embeddings that replace those of the text stream.
        latents: (row, start, (N, C), grid) of the image stream.
        order: (B, S) for each place in the segments' order its index into [text stream | image stream]; None if there
            is no image stream, where the order is the stream's own.
        sees: (B, S) in that order, the last place that each token sees; None if each sees up to itself.
        blocks: places (start, stop) of the image segments, where all rows have them at the same places; else None.
    """

    ids: Tensor
    positions: Tensor
    image_positions: Tensor
    prefix_lengths: list[list[int]]
    prefix_positions: list[list[int]]
    text_index: Tensor | None = None
    features: list[tuple[int, int, Tensor]] = field(default_factory=list)
    latents: list[tuple[int, int, Tensor, tuple[int, int]]] = field(default_factory=list)
    order: Tensor | None = None
    sees: Tensor | None = None
    blocks: list[tuple[int, int]] | None = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [lengths[-1] for lengths in self.prefix_lengths]

    def moved(self, device: torch.device, *others: Tensor) -> tuple["Segments", list[Tensor]]:
        """Move the table, and other whole numbers beside it, in one copy: the host waits for each that it makes."""
        names = ("ids", "positions", "image_positions", "text_index", "order", "sees")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        parts = [*own.values(), *others]
        copied = torch.cat([part.flatten() for part in parts]).to(device).split([part.numel() for part in parts])
        moved = [x.view(part.shape) for x, part in zip(copied, parts, strict=True)]
        return replace(self, **dict(zip(own, moved, strict=False))), moved[len(own) :]


def text_segments(rows: Sequence[Tensor]) -> Segments:
    """The table of rows of text alone, the ids of each on the CPU."""
    ids = pad_sequence(list(rows), batch_first=True)
    positions = torch.arange(ids.shape[1]).expand(len(rows), -1)
    counts = [list(range(len(row) + 1)) for row in rows]
    return Segments(ids, positions, positions[:, :0], counts, counts)


def segments(rows: Sequence[ContextRow], placeholder: int, markers: tuple[int, int]) -> Segments:
    """
    The table of any rows.

    Args:
        rows: ids, and one [`ContextImage`] for each `placeholder` among them, in order.
        markers: ids of the tokens before and behind an image.

    Raises:
        ValueError: if a row has more or fewer images than placeholders.
    """
    if not any(row.images for row in rows):
        for row in rows:
            _check(row, placeholder)
        return text_segments([row.ids for row in rows])
    layouts = [_RowLayout(row, placeholder, markers) for row in rows]
    text, image, index = (max(map(len, x)) for x in zip(*((r.ids, r.gen, r.text_index) for r in layouts), strict=True))

    def padded(values: list[list[int]], width: int) -> Tensor:
        return torch.tensor([row + [0] * (width - len(row)) for row in values], dtype=torch.long)

    orders, sees = [], []
    for r in layouts:
        order = [i if stream == 0 else text + i for stream, i in r.order]
        rest = [*range(len(r.ids), text), *range(text + len(r.gen), text + image)]
        orders.append(order + rest)
        sees.append(r.sees + list(range(len(order), text + image)))
    blocks = layouts[0].blocks if all(r.blocks == layouts[0].blocks for r in layouts) else None
    return Segments(
        ids=padded([r.ids for r in layouts], text),
        positions=padded([r.positions for r in layouts], text),
        image_positions=padded([r.gen for r in layouts], image),
        prefix_lengths=[r.prefix_lengths for r in layouts],
        prefix_positions=[r.prefix_positions for r in layouts],
        text_index=padded([r.text_index for r in layouts], index),
        features=[(i, start, x) for i, r in enumerate(layouts) for start, x in r.features],
        latents=[(i, start, x, grid) for i, r in enumerate(layouts) for start, x, grid in r.latents],
        order=torch.tensor(orders) if image else None,
        sees=torch.tensor(sees),
        blocks=blocks,
    )


class _RowLayout:
    """One row of the table, unpadded."""

    def __init__(self, row: ContextRow, placeholder: int, markers: tuple[int, int]):
        _check(row, placeholder)
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.gen: list[int] = []  # positions of the image stream
        self.order: list[tuple[int, int]] = []  # (stream, index)
        self.sees: list[int] = []
        self.blocks: list[tuple[int, int]] = []
        self.text_index: list[int] = []
        self.prefix_lengths, self.prefix_positions = [0], [0]
        self.features: list[tuple[int, Tensor]] = []
        self.latents: list[tuple[int, Tensor, tuple[int, int]]] = []
        self.position, images = 0, iter(row.images)
        for token in row.ids.tolist():
            self.text_index.append(len(self.ids))
            if token != placeholder:
                self._text(token, self.position)
                self.sees.append(len(self.order) - 1)
                self.position += 1
            else:
                image = next(images)
                if image.latents is not None:
                    self._block(markers, image.latents, image.grid)
                if image.features is not None:
                    self._block(markers, image.features, None)
            self.prefix_lengths.append(len(self.order))
            self.prefix_positions.append(self.position)

    def _text(self, token: int, position: int) -> None:
        self.order.append((0, len(self.ids)))
        self.ids.append(token)
        self.positions.append(position)

    def _block(self, markers: tuple[int, int], content: Tensor, grid: tuple[int, int] | None) -> None:
        start = len(self.order)
        self._text(markers[0], self.position)
        if grid is None:
            self.features.append((len(self.ids), content))
            for _ in content:
                self._text(0, self.position)
        else:
            self.latents.append((len(self.gen), content, grid))
            self.order += [(1, len(self.gen) + i) for i in range(len(content))]
            self.gen += [self.position] * len(content)
        self._text(markers[1], self.position)
        stop = len(self.order)
        self.sees += [stop - 1] * (stop - start)
        self.blocks.append((start, stop))
        self.position += 1


def _check(row: ContextRow, placeholder: int) -> None:
    wanted = int((row.ids == placeholder).sum())
    if wanted != len(row.images):
        raise ValueError(
            f"A context has {wanted} image placeholders (token {placeholder}) and {len(row.images)} images: give one "
            "image per placeholder, in order."
        )


def guided_trajectory(trajectory: Trajectory, branch: str, placeholder: int) -> Trajectory:
    """
    Reduce a trajectory to the part that a branch of guidance sees, as one without texts.

    Raises:
        ValueError: where the branch needs the system message, and the trajectory does not say which it is.
    """
    if branch == "image":
        prompt_ids = [token for token in trajectory.prompt_ids if token != placeholder]
        return replace(trajectory, prompt_ids=prompt_ids, images=[], rounds=[])
    if trajectory.system_ids is None:
        raise ValueError(
            "Guidance needs to know which part of a prompt is its system message: set `Trajectory.system_ids`, to an "
            "empty list for a prompt without one."
        )
    prompt_ids = [*trajectory.system_ids, *[placeholder] * len(trajectory.images)]
    return replace(trajectory, prompt_ids=prompt_ids, rounds=[])
