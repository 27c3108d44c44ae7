"""Images that are not numbers: samples without a reward, counted, and an error if there are no others."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..images import has_failed
from ..monitoring.image_statistics import pixel_spread


def image_metrics(
    accelerator: Accelerator, images: Sequence[Image.Image], real: int | None = None
) -> dict[str, float]:
    """
    Measure the images that were painted on all processes.

    Args:
        real: how many of them count, by default all.

    Raises:
        ValueError: if none of them is a number.
    """
    failed = [has_failed(image) for image in images]
    own = torch.tensor([[*map(pixel_spread, images)], failed], dtype=torch.float32, device=accelerator.device)
    spread, share = accelerator.gather(own.T.contiguous())[:real].double().mean(0).tolist()
    if share == 1:
        raise ValueError(
            f"All {len(images)} images of a batch came out of the VAE as NaN or infinity. Mostly it overflows in half "
            "precision: give it bfloat16 or float32, as in pipeline.vae.to(torch.float32). If it has, the latents are "
            "broken: look at the run's alarms, and lower image_learning_rate."
        )
    if share:
        warnings.warn(
            "Some images came out of the VAE as NaN or infinity: they have no reward and don't count. The metric "
            "`images/not_finite` has their share. A VAE that overflows in half precision needs float32."
        )
    return {"images/pixel_std": spread, "images/not_finite": share}


def without_failed(
    arguments: Mapping[str, Any], known: Collection[int] = ()
) -> tuple[dict[str, Any], list[int] | None]:
    """
    Leave the failed images, and what belongs to them, out of the arguments of a reward function.

    Args:
        known: places of samples that are left out too, as their scores are known.

    Returns:
        The arguments, and the places of the samples that are left; None if all are.
    """
    images = arguments.get("images") or []
    places = [place for place, image in enumerate(images) if not has_failed(image) and place not in known]
    if len(places) == len(images):
        return dict(arguments), None
    left = {
        name: [value[place] for place in places] if isinstance(value, list) and len(value) == len(images) else value
        for name, value in arguments.items()
    }
    return left, places


def mask_failed(accelerator: Accelerator, rewards: Tensor, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Take the rewards (N, F) of all processes from the failed images; `rows` are this process' samples."""
    failed = torch.tensor([has_failed(row["images"]) for row in rows], device=rewards.device)
    return rewards.masked_fill(accelerator.gather(failed)[:, None], torch.nan)
