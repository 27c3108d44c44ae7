"""The built-in world's held-out prompts, as the demo evaluates on them."""

from ...shapeworld.dataset import shapeworld_dataset
from ...shapeworld.evaluate import EVALUATION_SEED, MAX_COMPLETION_LENGTH, NUM_INFERENCE_STEPS
from ...shapeworld.render import IMAGE_SIZE
from ..benchmark import Benchmark, Item, Painting


NUM_PROMPTS = 1050
BATCH_SIZE = 210


def load_shapeworld(num_prompts: int | None, seed: int | None, split: str = "test") -> Benchmark:
    """
    Draw prompts of a split, balanced over the categories; the same number and seed give the demo's.

    Args:
        num_prompts, seed: the demo's 1,050 and 1234 by default.
    """
    seed = EVALUATION_SEED if seed is None else seed
    dataset = shapeworld_dataset(split, NUM_PROMPTS if num_prompts is None else num_prompts, seed=seed)
    return Benchmark(
        "shapeworld",
        "ShapeWorld",
        tuple(
            Item(f"{place:05}", row["prompt"], row["category"], columns=dict(row)) for place, row in enumerate(dataset)
        ),
        painting=Painting(
            num_inference_steps=NUM_INFERENCE_STEPS,
            image_size=IMAGE_SIZE,
            max_completion_length=MAX_COMPLETION_LENGTH,
            batch_size=BATCH_SIZE,
            seed=seed,
        ),
    )
