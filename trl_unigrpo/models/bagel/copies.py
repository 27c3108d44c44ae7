"""Noisy copies of images beside their contexts: which row of a packed forward holds which step.

Shapes: S steps, R rows, K copies a row, N tokens of C numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...trajectory import Steps
from ..contract import ContextRow


@dataclass
class Copies:
    """
    The noisy copies of a packed forward. Rows with fewer copies than others are filled with zeros that nobody reads.

    Attributes:
        contexts: R contexts.
        visible: (R, K) ids, from its context's start, that each copy sees.
        states: (S, N, C) the steps' states, which are the copies.
        timesteps: (R, K) their times, on the CPU.
        image_size: (height, width) in pixels.
        place: (2, S) row and column of each step's copy, on the CPU.
    """

    contexts: list[ContextRow]
    visible: list[list[int]]
    states: Tensor
    timesteps: Tensor
    image_size: tuple[int, int]
    place: Tensor

    def latents(self, place: Tensor) -> Tensor:
        """Give the copies (R, K, N, C), by their places on the states' device."""
        empty = self.states.new_zeros(*self.timesteps.shape, *self.states.shape[1:])
        return empty.index_put(tuple(place), self.states)

    def of(self, rows: Sequence[int]) -> tuple[Tensor, "Copies"]:
        """Give the numbers (S',) of the steps in some rows, and their copies, in rows that are numbered anew."""
        numbers = {row: number for number, row in enumerate(rows)}
        steps = torch.tensor([step for step, row in enumerate(self.place[0].tolist()) if row in numbers]).long()
        row, column = self.place[:, steps]
        width = int(column.max()) + 1 if len(steps) else 0
        return steps, Copies(
            contexts=[self.contexts[i] for i in rows],
            visible=[self.visible[i][:width] for i in rows],
            states=self.states[steps.to(self.states.device)],
            timesteps=self.timesteps[list(rows), :width],
            image_size=self.image_size,
            place=torch.stack([torch.tensor([numbers[i] for i in row.tolist()]).long(), column]),
        )


@dataclass
class _Row:
    """One row in the making: its context, and for each of its copies the step and the ids that it sees."""

    context: ContextRow
    steps: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)

    def take(self, context: ContextRow, steps: Sequence[int]) -> None:
        self.steps += steps
        self.visible += [len(context)] * len(steps)


def lay_out(steps: Steps, texts: Sequence[Tensor]) -> Copies:
    """
    Place the steps' copies behind their contexts.

    A row stands for the text row of its number and holds the longest of the contexts there that say what it says;
    images whose context is a beginning of that are painted in the same row, others get rows of their own behind those
    of the texts.

    Args:
        texts: for each text row its tokens, on the CPU; none where only its number counts.
    """
    rows = [_Row(ContextRow(torch.empty(0, dtype=torch.long))) for _ in texts]
    extra: list[tuple[int, _Row]] = []
    of_image: dict[int, list[int]] = {}
    for step, image in enumerate(steps.image.tolist()):
        of_image.setdefault(image, []).append(step)
    contexts = {image: steps.images[image].context for image in of_image}
    for image in sorted(of_image, key=lambda image: -len(contexts[image])):  # stable: equal ones stay in order
        context, number = contexts[image], int(steps.row[of_image[image][0]])
        own, hosts = rows[number], [rows[number], *(row for at, row in extra if at == number)]
        host = next((row for row in hosts if row.steps and begins(row.context, context)), None)
        if host is None:
            host = own if not own.steps and agree(texts[number], context) else _Row(context)
            host.context = context
            if host is not own:
                extra.append((number, host))
        host.take(context, of_image[image])
    return _filled([*rows, *(row for _, row in extra)], steps)


def agree(text: Tensor, context: ContextRow) -> bool:
    """Say whether one of a text and a context is the beginning of the other."""
    both = min(len(text), len(context))
    return torch.equal(text[:both], context.ids[:both])


def begins(whole: ContextRow, part: ContextRow) -> bool:
    """Say whether a context is the beginning of another: the same ids, and the same images among them."""
    same_ids = len(part) <= len(whole) and torch.equal(whole.ids[: len(part)], part.ids)
    same_images = all(a is b for a, b in zip(whole.images, part.images, strict=False))
    return same_ids and same_images and len(part.images) <= len(whole.images)


def _filled(rows: list[_Row], steps: Steps) -> Copies:
    width = max(len(row.steps) for row in rows)
    at = torch.zeros(2, len(steps), dtype=torch.long)
    for number, row in enumerate(rows):
        for column, step in enumerate(row.steps):
            at[:, step] = torch.tensor([number, column])
    return Copies(
        contexts=[row.context for row in rows],
        visible=[row.visible + [0] * (width - len(row.visible)) for row in rows],
        states=steps.x,
        timesteps=steps.t.new_zeros(len(rows), width).index_put(tuple(at), steps.t),
        image_size=steps.image_size,
        place=at,
    )
