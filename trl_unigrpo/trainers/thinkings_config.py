"""The options of what a group is made of, which images are trained, which are paid more, and what is refused."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ThinkingsConfig:
    r"""
    Options of [`UniGRPOConfig`] for groups of fewer thinkings than images, for images that nothing can be learnt from,
    and for groups whose images are to stay different.

    Parameters:
        > Parameters that control a group

        images_per_thinking (`int`, *optional*, defaults to `1`):
            Images painted of each thinking, K: a group is `num_generations` / K thinkings. Each is sampled and encoded
            once. The thinking is paid the mean of its K rewards beside the group's, an image its own beside that mean;
            with 1 both are paid the reward beside the group's. In evaluation each image has a thinking of its own.
        train_dead_images (`bool`, *optional*, defaults to `True`):
            Whether images whose advantage is 0, as in a group of equal rewards, are trained where they still have a
            gradient: by the regulariser, or DiffusionNFT's pull to the old policy. Where they have none they are left
            out anyway. False leaves them out always; the regulariser is then a mean over the others.
        diversity_weight (`float`, *optional*, defaults to `0.0`):
            How far, from 0 to 1, positive advantages are shared among the images of a group by how different each is:
            by its distance to the nearest other one (diversity-aware advantage shaping of GARDO, arXiv 2512.24138).
            Their sum stays the same. 0 leaves advantages as they are.
        diversity_experts (`str`, *optional*, defaults to `"text"`):
            Whose advantages are shared so: the `"text"`'s, so that thinkings stay different, or `"both"`, text and
            image.
    """

    images_per_thinking: int = field(
        default=1,
        metadata={"help": "Images painted of each thinking; divides num_generations. Paper: 1."},
    )
    train_dead_images: bool = field(
        default=True,
        metadata={"help": "Train images whose advantage is 0 where the regulariser, or 'nft', still has a gradient."},
    )
    diversity_weight: float = field(
        default=0.0,
        metadata={"help": "0 to 1: how far good images are paid by how different they are; 0: not at all. GARDO: 1."},
    )
    diversity_experts: str = field(
        default="text",
        metadata={"help": "Who is paid so: the 'text', or 'both', text and image."},
    )


def check_thinkings(config: Any) -> None:
    """Raise ValueError for several images of a thinking that groups or processes would cut, or that has no meaning."""
    check_diversity(config)
    each, group = config.images_per_thinking, config.num_generations
    if each < 1 or group % each:
        whole = [number for number in range(1, group + 1) if group % number == 0]
        raise ValueError(
            f"images_per_thinking={each} with num_generations={group}: expected one of {', '.join(map(str, whole))}, "
            "as a group is whole thinkings."
        )
    if each == 1:
        return
    rows = config.per_device_train_batch_size * config.steps_per_generation
    if rows % each:
        raise ValueError(
            f"images_per_thinking={each} with {rows} trajectories per process and generation: a thinking would be cut "
            f"in two. Make per_device_train_batch_size * steps_per_generation a multiple of {each}."
        )
    if not config.thinking:
        raise ValueError(
            f"images_per_thinking={each} with thinking=False: there are no thinkings. Leave it at 1: the images of a "
            "prompt share its context anyway."
        )
    if config.num_rounds > 1:
        raise ValueError(
            f"images_per_thinking={each} with num_rounds={config.num_rounds}: the images of one thinking would begin "
            "different rounds, which have no thinking in common. Set one of them to 1."
        )
    if each == group and config.text_weight > 0:
        raise ValueError(
            f"images_per_thinking={each} with num_generations={group}: a group of one thinking has none to compare it "
            "with. Lower images_per_thinking, or set text_weight=0."
        )


def check_diversity(config: Any) -> None:
    """Raise ValueError for a weight that is no share, and where it is not clear which images are to differ."""
    weight = config.diversity_weight
    if not 0 <= weight <= 1:
        raise ValueError(f"diversity_weight={weight}: expected a number from 0 (off) to 1.")
    if config.diversity_experts not in ("text", "both"):
        raise ValueError(f"diversity_experts={config.diversity_experts!r}: expected 'text' or 'both'.")
    if weight and config.diversity_experts == "text" and config.text_weight == 0:
        raise ValueError(
            f"diversity_weight={weight} with text_weight=0: the text that would be paid is not trained. Set "
            "diversity_experts='both', which pays the image so."
        )
    for name in ("num_rounds", "images_per_thinking"):
        if weight and getattr(config, name) > 1:
            raise ValueError(
                f"diversity_weight={weight} with {name}={getattr(config, name)}: images are compared within a group "
                f"whose trajectories have one thinking and one image each. Set {name}=1, or diversity_weight=0."
            )
