"""Notes on rounds for watchers: words, scores and images of each sample.

Shapes: B trajectories of this process, R rounds.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..images import has_failed
from ..monitoring.events import Generation, RoundNote, Series
from ..monitoring.image_statistics import image_distance
from ..monitoring.thinking_alarms import plain_text
from .turn_checks import TURN_COLUMN


Told = tuple[list[RoundNote], Series]
"""Of one sample."""


def tell_rounds(
    walk: Any, first: int, texts: Sequence[Sequence[str]], rewards: Tensor, stood: Tensor, advantages: Tensor
) -> list[Told]:
    """
    Note what became of the rounds of a walk.

    Args:
        walk: see [`~trl_unigrpo.trainers.rounds.Walk`].
        first: place of this process' first sample in the generation batch.
        texts: B lists, one text a round.
        rewards: (B, R) of the images that stand after each round, NaN where there is none.
        stood: (B, R - 1) of the images that the later rounds begin with; (B, R) where the first begins with one, too.
        advantages: (B, R).
    """
    unknown = rewards.shape[1] - stood.shape[1]
    before = torch.cat([torch.full_like(rewards[:, :unknown], torch.nan), stood], 1)
    told = []
    for i, t in enumerate(walk.trajectories):
        sources, notes = list(walk.inputs[i].get("source_images") or []), []
        turns = walk.inputs[i].get(TURN_COLUMN) or ()
        origins = [None, *(places[i] if places[i] != first + i else None for places in walk.origins)]
        origins += [None] * len(t.rounds)
        begun = [_alone(sources), *walk.seen[i]]
        painted = walk.painted[i][: len(t.rounds)]
        for m, part in enumerate(t.rounds):
            numbers = _known(rewards[i, m]), _known(before[i, m]), advantages[i, m].item()
            change = _change(painted[m], begun[m])
            asked = turns[m] if m < len(turns) else ""
            notes.append(RoundNote(texts[i][m], *numbers, part.stopped, change, origins[m], asked))
        foreign = [None if n.origin is None else image for n, image in zip(notes, begun, strict=False)]
        told.append((notes, Series(sources, painted, foreign)))
    return told


def tell_edits(generation: Generation, rows: Sequence[dict[str, Any]]) -> list[Told]:
    """Note the only round of samples that edit; nothing where they have no source image."""
    if not any(row.get("source_images") for row in rows):
        return []
    told = []
    for place, (row, image) in enumerate(zip(rows, generation.images, strict=True), generation.first):
        sources = list(row["source_images"])
        reward, advantage = _known(generation.reward[place]), generation.advantages[place]
        change = _change(image, _alone(sources))
        note = RoundNote(plain_text(generation.thinking[place]), reward, None, advantage, change=change)
        told.append(([note], Series(sources, [image], [None])))
    return told


def with_rounds(generation: Generation, told: Sequence[Told]) -> Generation:
    """Add what this process tells of its samples to a generation of all processes, of which all tell or none."""
    if not told:
        return generation
    notes, series = zip(*told, strict=True)
    return replace(generation, rounds=gather_object(list(notes)), series=series)


def _alone(images: Sequence[Any]) -> Any:
    """Return the image that a first round begins with: of several, which are combined, none is."""
    return images[0] if len(images) == 1 else None


def _change(image: Any, before: Any) -> float | None:
    if image is None or before is None or has_failed(image) or has_failed(before):
        return None
    return image_distance(image, before)


def _known(value: Any) -> float | None:
    return None if value != value else float(value)
