"""The training loop of all trainers: over where a run is finished, and never over without an update."""

from typing import Any

from transformers import Trainer

from .dataset_checks import too_few_rows


class TrainingLoop(Trainer):
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
        batches, number = super().get_batch_samples(*args, **kwargs)
        if not batches and self.state.global_step == 0:
            raise ValueError(f"train_dataset ended before the first optimizer step: {too_few_rows(self.args)}")
        return batches, number
