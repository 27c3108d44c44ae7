"""The sizes of the images that are trained and evaluated, and what is refused of them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ..image_sizes import Size, plain_size, read_sizes


if TYPE_CHECKING:
    ImageSizes: TypeAlias = int | str | list[Any] | tuple[Any, ...]
else:  # what a command line reads several of
    ImageSizes = str


@dataclass
class SizesConfig:
    r"""
    Options of [`UniGRPOConfig`] and [`ReFLConfig`] for the sizes of images.

    A size is the side of a square, `512`, or height and width, `[384, 640]` or `"384x640"`; two numbers are never two
    squares. Several are a list of sizes, `[[512, 512], [384, 640]]` or `["512x512", "384x640"]`, on the command line
    `--image_size 512x512 384x640`.

    Parameters:
        > Parameters that control the sizes of images

        image_size (`int` or `list`, *optional*, defaults to `1024`):
            Size of the images, in pixels. Of a list each group has one, drawn by the seed; a size that is in it twice
            comes twice as often. Edited images have about as many pixels as the square, and their source's shape.
        eval_image_size (`int` or `list`, *optional*):
            The same in evaluation; by default as in training. Of a list each prompt has the same in each evaluation.
    """

    image_size: ImageSizes = field(
        default=1024,
        metadata={
            "help": "Side of square images, or height and width such as 384x640, in pixels; several sizes: one is "
            "drawn for each group. Paper: 1024.",
            "nargs": "+",
        },
    )
    eval_image_size: ImageSizes | None = field(
        default=None, metadata={"help": "The same in evaluation. None: image_size.", "nargs": "+"}
    )

    def sizes(self, training: bool) -> list[Size]:
        """List the sizes (height, width) of the images of training, or of evaluation."""
        own = training or self.eval_image_size is None
        return read_sizes(self.image_size) if own else read_sizes(self.eval_image_size, "eval_image_size")


def check_sizes(config: Any) -> None:
    """Write sizes in one form, whichever they were given in; ValueError for what is none."""
    for name in ("image_size", "eval_image_size"):
        if (value := getattr(config, name)) is not None:
            sizes = read_sizes(value, name)
            setattr(config, name, plain_size(sizes[0]) if len(sizes) == 1 else [list(size) for size in sizes])


def check_micro_batches(config: Any) -> None:
    """Raise ValueError where images of several sizes could not be dealt into micro-batches of one size each."""
    batch, group = config.per_device_train_batch_size, config.num_generations or 1
    if len(config.sizes(training=True)) > 1 and config.flow_weight > 0 and group % batch:
        raise ValueError(
            f"per_device_train_batch_size={batch} does not divide num_generations={group}: with several sizes "
            f"(image_size={config.image_size}) images of one update have one size, their group's. Choose one that "
            f"does, such as {largest_divisor(group, batch)}."
        )


def largest_divisor(number: int, most: int) -> int:
    """Give the largest divisor of a number that is at most so large."""
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)
