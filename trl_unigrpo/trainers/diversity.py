"""Advantages that pay good images more, the less they resemble the others of their prompt.

Shapes: N images, groups of G side by side; F numbers of an image's features.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import has_failed
from ..monitoring.image_statistics import thumbnail


ImageFeatures = Callable[[list[Image.Image]], Tensor]
"""A function that gives features (N, F) of N images, such as the embeddings of a vision model."""


def features_of(images: Sequence[Image.Image], describe: ImageFeatures | None = None) -> Tensor:
    """
    Describe images in float32: (N, F), NaN for a failed one.

    Args:
        describe: gives the features; by default 8 x 8 thumbnails, such that their distance is the root mean square of
            what the colours of two images differ by, in [0, 1].
    """
    if describe is None:
        thumbnails = np.stack([thumbnail(image) for image in images])
        features = torch.from_numpy(thumbnails / math.sqrt(thumbnails.shape[1]))
    else:
        with torch.no_grad():
            features = torch.as_tensor(describe(list(images)))
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"image_features gave a tensor of shape {(*features.shape,)} for {len(images)} images: expected one row "
            "of features for each image."
        )
    failed = torch.tensor([has_failed(image) for image in images], device=features.device)
    return features.float().masked_fill(failed[:, None], torch.nan)


def isolation(features: Tensor, group_size: int) -> Tensor:
    """
    Measure how far each image (N,) stands from the nearest other one of its group, by the Euclidean distance of their
    features.

    Args:
        features: (N, F); a failed image has NaN. It has no distance, and is nobody's nearest.
        group_size: G.

    Returns:
        (N,); NaN for a failed image, and for one without another that is whole.
    """
    groups = features.double().unflatten(0, (-1, group_size))
    distances = torch.linalg.vector_norm(groups[:, :, None] - groups[:, None], dim=-1)
    oneself = torch.eye(group_size, dtype=torch.bool, device=features.device)
    nearest = distances.masked_fill(oneself | distances.isnan(), torch.inf).amin(2).flatten()
    return nearest.masked_fill(nearest.isinf(), torch.nan)


def diverse_advantages(advantages: Tensor, apart: Tensor, weight: float, group_size: int) -> Tensor:
    """
    Share the positive advantages A of each group among its images by their isolation d:

        A_i * (1 - w + w * d_i / d_mean)   where A_i > 0,    A_i elsewhere,    d_mean = sum_+ A_j d_j / sum_+ A_j

    Only what is good is paid for being different, and nothing is paid for being different and bad. d_mean is the mean
    over the positive advantages A, weighted by them, so that their sum, and with it the group's mean, stays what it
    is. Where all good images are alike, or none has a distance, nothing changes.

    Source: diversity-aware advantage shaping, GARDO (arXiv 2512.24138), eq. 8, which has w = 1 and d_i itself for
    d_i / d_mean, with the cosine distance.

    Args:
        advantages: (N,).
        apart: (N,) d, see [`isolation`]; an advantage without one is left as it is.
        weight: w in [0, 1].
        group_size: G.
    """
    values, apart = (x.double().unflatten(0, (-1, group_size)) for x in (advantages, apart))
    counted = (values > 0) & ~apart.isnan()
    paid, apart = values.where(counted, 0.0), apart.where(counted, 0.0)
    mean = (paid * apart).sum(1, keepdim=True) / paid.sum(1, keepdim=True)
    shared = counted & (mean > 0)
    factor = torch.where(shared, 1 - weight + weight * apart / mean, 1.0)
    return (values * factor).flatten().to(advantages.dtype)
