"""Outputs of a tiny model with adapters, and how they are compared."""

import torch
from peft import PeftModel

from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel
from tests.helpers.trajectories import steps_at
from trl_unigrpo.models.contract import ContextRow


BOTH = tiny_bagel().default_lora_targets("both")


def outputs(model):
    """Logits of a text and velocities of an image: all that a model computes."""
    ids = torch.tensor([[1, 8, 9, 2, 1, 10, 11, 2]])
    generator = torch.Generator().manual_seed(0)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    size = (IMAGE_SIZE, IMAGE_SIZE)
    latents = torch.randn(1, 2, *base.latent_shape(size), generator=generator)
    steps = steps_at([ContextRow(ids[0])], latents, torch.tensor([[0.9, 0.4]]), size)
    base.eval()
    with torch.no_grad():
        return base(ids).logits.float(), base.predict_velocities(steps)


def assert_same_outputs(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def difference(actual, expected):
    """The largest difference, as a share of the largest output."""
    pairs = list(zip(actual, expected, strict=True))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
