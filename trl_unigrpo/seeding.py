"""Random streams that depend on what they are for, not on how the work is batched or spread over processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


TRAIN, EVAL, WINDOW, THINK, CHOICE, SIZE = range(6)
"""Purposes of a stream: the first part of its key after the run's seed."""


def row_generator(*key: int) -> torch.Generator:
    """Make a generator of its own for a key of non-negative integers, such as (seed, purpose, step, row)."""
    low, high = np.random.SeedSequence(key).generate_state(2).tolist()
    return torch.Generator().manual_seed(high << 32 | low)


@contextmanager
def rewound_on_error(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Give random generators their states back when an error comes, so that the same can be drawn again."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        raise
