"""A tiny BAGEL that sees source images, and rows that tell it to edit some."""

import numpy as np
from datasets import Dataset
from PIL import Image

from tests.helpers.tiny_unified import PROMPTS, tiny_bagel
from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration


PLACEHOLDER = 28
SIZES = ((8, 8), (6, 3), (20, 40), (9, 9))
"""(height, width) of the sources; the second and the third are painted with sides of 12 and 4 pixels."""
PAINTED = ((8, 8), (12, 4), (4, 12), (8, 8))


def tiny_editor(eyes: bool = True, seed: int = 0) -> BagelForUnifiedGeneration:
    """The tiny BAGEL with a placeholder for images, and with an understanding tower or without."""
    blind = tiny_bagel(seed)
    tower = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    changes = {"image_token_id": PLACEHOLDER, "vit_max_num_patch_per_side": 4}
    if eyes:
        changes["vit_config"] = {**tower, "patch_size": 2, "image_size": 8}
    config = BagelConfig(**{**blind.config.to_dict(), **changes})
    model = BagelForUnifiedGeneration(config, blind.codec)
    model.load_state_dict(blind.state_dict(), strict=False)
    for part in (model.vit_model, model.connector) if eyes else ():
        for parameter in part.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(20)
    return model


def source(number: int) -> Image.Image:
    """One image of random pixels for each number."""
    height, width = SIZES[number % len(SIZES)]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def edits(number: int = 4, column: str = "source_image", **columns) -> Dataset:
    """So many rows; in a column of lists every second one has two images."""
    images = [source(place) for place in range(number)]
    if column == "source_images":
        images = [[image, source(place + 10)][: 1 + place % 2] for place, image in enumerate(images)]
    prompts = [PROMPTS[place % len(PROMPTS)] for place in range(number)]
    return Dataset.from_dict({"prompt": prompts, column: images, **columns})
