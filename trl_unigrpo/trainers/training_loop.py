"""The training loop of all trainers: over where a run is finished, and never over without an update."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler

from .dataset_checks import too_few_rows
from .whole_checkpoints import WholeCheckpoints


class EpochsInOrder(Sampler[int]):
    """
    A sampler that draws each epoch's order from where its generator was left, and begins in a later epoch as if those
    before had passed.

    Args:
        sampler: to be iterated once an epoch.
        epoch: gives the number of the epoch that begins, from 0.
    """

    def __init__(self, sampler: Sampler[int], epoch: Callable[[], int]):
        self.sampler, self.epoch = sampler, epoch
        self._begun = 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(self._begun, self.epoch()):
            deque(self.sampler, maxlen=0)  # drawn, and thrown away
        self._begun = self.epoch() + 1
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class TrainingLoop(WholeCheckpoints):
    """The hook of transformers' loop where its batches come from."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """
        Take the batches of an optimizer step from the loader.

        Raises:
            ValueError: if there are none for the first step. What a stream holds is known here at the earliest.
        """
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed
            self.control.should_training_stop = True
            return [], None
        try:
            batches, number = super().get_batch_samples(*args, **kwargs)
        except OSError:
            self.save_unsaved()
            raise
        if not batches and self.state.global_step == 0:
            raise ValueError(f"train_dataset ended before the first optimizer step: {too_few_rows(self.args)}")
        return batches, number
