"""Pipelines that edit take source images through their own call, and others say that they don't."""

import functools
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FluxKontextPipeline
from PIL import Image

from tests.helpers.painting import prompts_alone, steps_of
from tests.helpers.tiny_painters import PROMPTS, generators, tiny_model, unified
from tests.helpers.tiny_pipelines import FAMILIES, tokenizer
from tests.helpers.tiny_unified import moved, redness, weights
from tests.models.pipeline.test_pipeline_families import counted_rows
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.sources import check_edits, show_sources
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.trajectory import from_state, to_state


STEPS = 3


@pytest.fixture(params=["flux_kontext", "flux2_klein"])
def tiny(request):
    made = FAMILIES[request.param]()
    made.size = (64, 64)  # FLUX.2 takes no smaller source
    return made


def source(number, size):
    height, width = size
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def edits(model, tiny, number=2):
    """Trajectories whose first two have one source, and the others have another."""
    own = [show_sources(model, source(i, tiny.size), tiny.size[0]) for i in range(number)]
    rows = prompts_alone(PROMPTS)
    chosen = [own[min(place // 2, number - 1)] for place in range(len(rows))]
    return [replace(row, images=one.shown, size=one.size) for row, one in zip(rows, chosen, strict=True)], chosen


def stock(tiny, arguments, sources):
    """Paint each prompt and its source by the pipeline itself."""
    accepted = inspect.signature(type(tiny.pipeline).__call__).parameters
    images = []
    for prompt, generator, shown in zip(PROMPTS, generators(), sources, strict=True):
        call = {
            **arguments,
            "max_area": tiny.size[0] * tiny.size[1],
            "image": shown.originals[0],
            "prompt": [prompt],
            "generator": [generator],
            "height": tiny.size[0],
            "width": tiny.size[1],
            "num_inference_steps": STEPS,
        }
        images += tiny.pipeline(**{k: v for k, v in call.items() if k in accepted}).images
    return images


def test_edits_are_what_the_stock_pipeline_paints(tiny):
    model = unified(tiny)
    rows, sources = edits(model, tiny)
    plan = RolloutPlan(model.own_timesteps(STEPS, tiny.size), tiny.size)
    encoded, encode = [], tiny.pipeline.vae.encode
    tiny.pipeline.vae.encode = lambda *args, **kwargs: encoded.append(args) or encode(*args, **kwargs)
    images = decode(model, paint(model, rows, plan, generators()))
    assert len(encoded) == 2  # once for each group
    for image, other in zip(images, stock(tiny, model.painter_arguments, sources), strict=True):
        # Rows of a batch round otherwise than one alone.
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    plain = decode(model, paint(model, prompts_alone(PROMPTS), plan, generators()))
    for image, other in zip(images, plain, strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() > 1


def test_velocities_of_edits_are_computed_again_after_a_checkpoint(tiny):
    model = unified(tiny)
    rows, _ = edits(model, tiny)
    plan = RolloutPlan(model.own_timesteps(STEPS, tiny.size), tiny.size, torch.tensor([0, 1]))
    images = paint(model, rows, plan, generators())
    images = from_state(to_state(images, model.context_types), model.context_types)
    assert images[0].context.images[0] is images[1].context.images[0]
    steps = steps_of(images)
    with counted_rows(tiny.pipeline.transformer) as counted, torch.no_grad():
        for index, velocity in model.velocities(steps):
            torch.testing.assert_close(velocity, steps.states.velocity[index], rtol=0, atol=1e-6)
    assert counted == [2, 2] * 2  # each group's rows, at each of two steps


def test_sizes_of_edits_are_those_that_the_pipeline_paints(tiny):
    model = unified(tiny)
    for size in ((24, 40), (40, 24), (9, 8)):
        found = show_sources(model, source(0, size), 24).size
        assert model.latent_shape(found)
        assert abs(found[0] * found[1] - 24**2) <= 24 * model.side_step
        assert (found[0] > found[1]) == (size[0] > size[1])


class NeedsImage(FluxKontextPipeline):
    """As Qwen-Image-Edit, it does not run without an image."""

    @functools.wraps(FluxKontextPipeline.__call__)
    def __call__(self, image=None, **kwargs):
        assert image.width
        return super().__call__(image, **kwargs)


def test_a_pipeline_that_needs_an_image_is_tried_with_one():
    tiny = FAMILIES["flux_kontext"]()
    plan, painted = RolloutPlan(torch.linspace(1, 0, 3), tiny.size), []
    for kind in (FluxKontextPipeline, NeedsImage):
        tiny.pipeline = kind(**tiny.pipeline.components)
        model = unified(tiny)
        assert model.edits
        painted.append(paint(model, edits(model, tiny)[0], plan, generators()))
    for image, other in zip(*painted, strict=True):
        assert torch.equal(image.latents, other.latents)


def test_edits_are_trained(make_trainer, train):
    model, shown = tiny_model("flux_kontext"), []

    def reward(prompts, completions, images, source_images, **columns):
        shown.extend(
            (image.size, *(one.size for one in own)) for image, own in zip(images, source_images, strict=True)
        )
        return redness(prompts, completions, images)

    dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "source_image": [source(0, (16, 16)), source(1, (20, 40))]})
    settings = {"processing_class": tokenizer(), "train_dataset": dataset, "image_size": 16, "reward_funcs": reward}
    trainer = make_trainer(model=model, max_completion_length=4, max_steps=2, **settings)
    before = weights(trainer.model)
    train(trainer)
    assert set(shown) == {((16, 16), (16, 16)), ((22, 12), (40, 20))}
    assert any("painter" in name for name in moved(before, weights(trainer.model)))
    first, second = trainer.state.log_history[:2]
    assert first["flow/log_ratio_std"] == 0 < second["flow/log_ratio_std"]


@pytest.mark.parametrize("name", ["sd3", "flux2_klein_kv", pytest.param("modular_z_image", marks=pytest.mark.slow)])
def test_others_are_text_to_image_only(name):
    """FLUX.2 klein KV among them: its later steps need what the first one kept of the source."""
    model = unified(FAMILIES[name]())
    with pytest.raises(ValueError, match=f"{type(model.pipeline).__name__} is text to image only"):
        check_edits(model)
