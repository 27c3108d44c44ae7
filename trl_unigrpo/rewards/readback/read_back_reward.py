"""The reward: the mean log-likelihood of a prompt behind the image that was painted for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from PIL import Image
from torch import Tensor

from ...messages import user_text
from ..common import ImageReward, PerImage, Scores, check_images
from .reading import READ_BACK, Reader, Reading


SELF = "self"
JUDGES = ("reference", "policy")


class ReadBackReward(ImageReward, PerImage):
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
        places = self._legible(prompts)
        found = self.reader.read([images[place] for place in places], [prompts[place] for place in places])
        return self._logged(self._readings(found, places, len(prompts)), columns.get("log_extra"))

    @property
    def per_image(self) -> bool:
        """True behind an endpoint: a reader in this process would read beside the model that paints."""
        kind = type(self)
        own = kind.__call__ is ReadBackReward.__call__ and kind.score is ReadBackReward.score
        return own and hasattr(self._reader, "read_async")

    async def answers(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        images: Sequence[Image.Image] = (),
        **columns: Any,
    ) -> list[Any]:
        """Read some images behind an endpoint; returns the reading of each, or None."""
        check_images(images, len(prompts))
        texts = list(map(user_text, prompts))
        places, reader = self._legible(texts), cast(Any, self.reader)
        found = await reader.read_async([images[place] for place in places], [texts[place] for place in places])
        return self._readings(found, places, len(texts))

    def scores(
        self,
        answers: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> Scores:
        scores = self._logged(answers, log_extra)
        self._breaker.observe(scores, self.last_error, log_metric)
        return scores

    def _legible(self, prompts: Sequence[str]) -> list[int]:
        """Find the places of the prompts that are not empty."""
        places = [place for place, prompt in enumerate(prompts) if prompt.strip()]
        if len(places) < len(prompts):
            self.last_error = f"The prompt of row {min({*range(len(prompts))} - {*places})} is empty."
        return places

    def _readings(self, found: Sequence[Reading | None], places: Sequence[int], count: int) -> list[Reading | None]:
        """Put readings at their places among so many images."""
        readings: list[Reading | None] = [None] * count
        for place, reading in zip(places, found, strict=True):
            readings[place] = reading
        if None in found:
            self.last_error = self.reader.last_error
        return readings

    def _logged(
        self, readings: Sequence[Reading | None], log_extra: Callable[[str, list[Any]], None] | None
    ) -> Scores:
        """Log the readings of a batch, and give their scores."""
        if log_extra is not None:
            column = READ_BACK if self.__name__ == type(self).__name__ else f"{READ_BACK} {self.__name__}"
            log_extra(column, [None if reading is None else reading.to_json() for reading in readings])
        return [None if reading is None else reading.score for reading in readings]
