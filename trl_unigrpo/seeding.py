"""Random streams that depend on what they are for, not on how the work is batched or spread over processes."""

import numpy as np
import torch


TRAIN, EVAL, WINDOW, THINK = range(4)
"""Purposes of a stream: the first part of its key after the run's seed."""


def row_generator(*key: int) -> torch.Generator:
    """Make a generator of its own for a key of non-negative integers, such as (seed, purpose, step, row)."""
    low, high = np.random.SeedSequence(key).generate_state(2).tolist()
    return torch.Generator().manual_seed(high << 32 | low)
