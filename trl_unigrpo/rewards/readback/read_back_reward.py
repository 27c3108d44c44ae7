"""The reward: the mean log-likelihood of a prompt behind the image that was painted for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from ..common import ImageReward, Scores
from .reading import READ_BACK, Reader, Reading


SELF = "self"
JUDGES = ("reference", "policy")


class ReadBackReward(ImageReward):
    """
    Scores an image by how well its prompt can be read back from it: the mean over t = 2..T of log p(x_t | x_<t, image)
    of the prompt's tokens ("Read It Back", arXiv 2607.11886). No question, no label, no sampling.

    Scores are in (-inf, 0], and only those of one prompt can be compared: prompts have likelihoods of their own.

    ```python
    trainer = UniGRPOTrainer(model, reward_funcs=ReadBackReward(), ...)
    ```

    Args:
        reader: who reads: "self", the model that paints; the folder or hub id of an image-text-to-text model; or a
            [`Reader`] with settings of its own: a [`LocalReader`], an [`EndpointReader`].
        judge: of "self", the weights that read: "reference", those that training starts from, or "policy", those of
            the time, as published; a judge that is trained can drift with the policy.
        name, max_dead_batches: see [`ImageReward`].

    Raises:
        ValueError: if an argument is wrong.
    """

    def __init__(
        self,
        reader: str | Reader = SELF,
        *,
        judge: Literal["reference", "policy"] = "reference",
        name: str | None = None,
        max_dead_batches: int = 3,
    ):
        super().__init__(name, max_dead_batches)
        if judge not in JUDGES:
            raise ValueError(f"judge={judge!r}: expected 'reference' or 'policy'.")
        if judge != "reference" and reader != SELF:
            raise ValueError(f"judge={judge!r} is for reader='self'; another reader's weights are its own.")
        self.judge: str = judge
        self.reads_itself = reader == SELF
        self._reader: Reader | None = None if isinstance(reader, str) else reader
        if isinstance(reader, str) and not self.reads_itself:
            from .local_reader import LocalReader

            self._reader = LocalReader(reader)  # made here, so that a wrong name is known at once

    @property
    def reader(self) -> Reader:
        """
        The one who reads.

        Raises:
            ValueError: for "self" where no model is known: only trainers and evaluations have one.
        """
        if self._reader is None:
            raise ValueError(
                "ReadBackReward reads by the model that paints, which only a trainer and `trl-unigrpo eval` know. "
                "Elsewhere name a reader: ReadBackReward('Qwen/Qwen3-VL-8B-Instruct')."
            )
        return self._reader

    def attach(self, reader: Reader) -> None:
        """Take the model that paints as the reader: trainers and evaluations bring it, for `reads_itself`."""
        self._reader = reader

    @property
    def differentiable(self) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """
        Score pixels (B, 3, H, W) in [0, 1], with a gradient to them, for ReFL: see [`LocalReader.differentiable`].

        Raises:
            TypeError: for a reader that gives no gradient: all but a [`LocalReader`].
        """
        found: Callable[[Tensor, Sequence[str]], Tensor] | None = getattr(self._reader, "differentiable", None)
        if found is None:
            name = "the model that paints" if self._reader is None else f"its {type(self._reader).__name__}"
            raise TypeError(
                f"ReadBackReward reads by {name}, which gives no gradient to the pixels. ReFL needs a model in this "
                "process: ReadBackReward('Qwen/Qwen3-VL-8B-Instruct'), or a LocalReader."
            )
        return found

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any]) -> Scores:
        readings: list[Reading | None] = [None] * len(prompts)
        places = [place for place, prompt in enumerate(prompts) if prompt.strip()]
        if len(places) < len(prompts):
            self.last_error = f"The prompt of row {min({*range(len(prompts))} - {*places})} is empty."
        reader = self.reader
        found = reader.read([images[place] for place in places], [prompts[place] for place in places])
        for place, reading in zip(places, found, strict=True):
            readings[place] = reading
        if None in found:
            self.last_error = reader.last_error
        log_extra: Callable[[str, list[Any]], None] | None = columns.get("log_extra")
        if log_extra is not None:
            column = READ_BACK if self.__name__ == type(self).__name__ else f"{READ_BACK} {self.__name__}"
            log_extra(column, [None if reading is None else reading.to_json() for reading in readings])
        return [None if reading is None else reading.score for reading in readings]
