"""The part of a unified model that sees images: those it edits, its own of earlier rounds, those it reads."""

from collections.abc import Sequence
from typing import Any

from PIL import Image as PILImage
from torch import Tensor

from ..trajectory import Image


class SeesImages:
    """Mixin of [`~trl_unigrpo.models.contract.UnifiedModelMixin`]; by default a model sees none."""

    edits: bool = False
    """True where prompts may show source images to be edited: the model brings `source_image`."""

    @property
    def painter_name(self) -> str:
        """Name of the painting model, for messages."""
        return type(self).__name__

    @property
    def side_step(self) -> int:
        """Number of pixels that both sides of an image are multiples of."""
        return 16

    @property
    def longest_side(self) -> int | None:
        """Most pixels to a side; None where there is no limit."""
        return None

    @property
    def image_placeholder(self) -> int | None:
        """
        Token that stands for a finished image in what is read; None where texts are written without seeing them. A
        model that has one takes `images` in `generate`, for each row those that its placeholders stand for, and
        `passages` in `backbone` and `packed_forward`.
        """
        return None

    def source_image(self, image: PILImage.Image, image_size: tuple[int, int]) -> Any:
        """
        Show an image to the model, resized to `image_size`, in the form that `Trajectory.images` holds; on the CPU, of
        what a checkpoint can keep.
        """
        raise NotImplementedError(f"{self.painter_name} is text to image only: it takes no source images.")

    def read_images(self, images: Sequence[PILImage.Image]) -> list[Any]:
        """
        Read finished images, with a gradient to what reads them; in the form that `Trajectory.images` holds.

        Raises:
            ValueError: for a model that sees none, as it is by default.
        """
        raise ValueError(f"{type(self).__name__} paints from text alone: it can't be shown an image.")

    def observe(self, images: Sequence[Image], seen: Sequence[PILImage.Image], reencode: bool) -> list[Any]:
        """
        Give finished images in the form in which contexts show them, to be kept and shown again as they are. Asked of
        a model with an `image_placeholder`.

        Args:
            images: as they were painted.
            seen: the same, decoded.
            reencode: whether to encode what is seen, or (False) take the latents that were painted.
        """
        raise NotImplementedError

    def read_back(self, images: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """
        Compute the log-probs (T,) of each text's tokens behind an image each: how well it can be read off the image.

        Asked with no images too, by those who want to know whether the model can.

        Args:
            images: finished images as [`read_images`] gives them.
            texts: tokens, none of them a special one, as the model would write them after its own start marker.

        Raises:
            ValueError: for a model that reads no images, as it is by default.
        """
        raise ValueError(f"{type(self).__name__} reads no images, so that nothing can be read back from them.")
