"""Pipelines beside their loop: sizes, schedulers and times of their own, videos, long prompts, bad images."""

import functools
import inspect
import warnings

import diffusers
import pytest
import torch

from tests.helpers.painting import prompts_alone
from tests.helpers.tiny_painters import generators, tiny_model, unified
from tests.helpers.tiny_pipelines import (
    FAMILIES,
    TinyPipeline,
    bria,
    flux_kontext,
    hidream,
    longcat_image,
    nucleus,
    random_weights,
    sd3,
    tokenizer,
    wan,
    z_image,
)
from tests.helpers.tiny_unified import tiny_tokenizer
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.images import has_failed
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.models.pipeline.reading import cut_off
from trl_unigrpo.models.pipeline.scheduler import HandingScheduler
from trl_unigrpo.sampling import decode, paint


def painted(model, size, prompts, steps=2):
    plan = RolloutPlan(model.own_timesteps(steps, size), size)
    return paint(model, prompts_alone(prompts), plan, generators(len(prompts)))


# Schedulers


class OwnEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    """With a schedule of its own."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas**2
        self.timesteps = 1000 * self.sigmas[:-1]


@pytest.mark.parametrize("kind", ["FlowMatchEuler", "UniPC", "OwnEuler"])
def test_the_scheduler_inside_is_of_the_class_and_the_settings_of_the_pipeline_s_own(kind):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = {
        "FlowMatchEuler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "UniPC": diffusers.UniPCMultistepScheduler(**flow),
        "OwnEuler": OwnEuler(shift=3.0),
    }[kind]
    scheduler.register_to_config(sigma_max=80.0)  # as Cosmos does
    before = dict(vars(scheduler))
    handing = HandingScheduler(scheduler)
    assert type(handing.inside) is type(scheduler)
    assert handing.inside.config.sigma_max == 80.0
    sample = torch.randn(2, 3)
    assert torch.equal(handing.inside.scale_model_input(sample, 3), sample)
    handing.follow(None, lambda velocity, state: state + velocity)
    handing.inside.set_timesteps(4)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(4)
    assert torch.equal(handing.inside.sigmas, euler.sigmas**2 if kind == "OwnEuler" else euler.sigmas)
    assert torch.equal(handing.inside.step(sample, 1.0, sample, return_dict=False)[0], 2 * sample)
    assert vars(scheduler) == before


def test_a_pipeline_that_asks_for_the_class_of_its_scheduler():
    """Bria calls a method of other schedulers where the class is not the very one."""
    assert unified(bria()).latent_shape((16, 16)) == (64, 16)
    made = bria()
    made.pipeline.scheduler = OwnEuler()  # it has no `scale_model_input`: for a flow, that is to change nothing
    assert unified(made).latent_shape((16, 16)) == (64, 16)


# Times


@pytest.mark.parametrize("family", ["sd3", "flux1", "hunyuan_image", "wan"])
def test_times_are_not_rounded_to_half_precision(family, monkeypatch):
    made = FAMILIES[family]()
    model = unified(made)
    model.to(torch.bfloat16)
    network, told = type(model.painter), []
    forward = network.forward

    @functools.wraps(forward)
    def heard(*args, **kwargs):
        told.append(inspect.signature(forward).bind(*args, **kwargs).arguments["timestep"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(network, "forward", heard)
    latents = model.initial_latents(made.size, generators(1))
    time = 0.97059
    model.predict_velocity(model.encode_context(["a cube"]), latents, torch.full((1,), time), made.size)
    (told,) = told
    assert told.dtype == torch.float32
    scale = 1 if family == "flux1" else 1000
    assert told.flatten()[0].item() == pytest.approx(scale * time, rel=1e-6)


def test_a_schedule_that_is_not_a_flow_s_is_refused():
    """Mochi's is upside down; that of Cosmos 2 goes from 80."""
    for settings, start in (({"invert_sigmas": True}, "0"), ({"shift": 0.3, "use_karras_sigmas": True}, "80")):
        made = sd3()
        made.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
        made.pipeline.scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
        with pytest.raises(ValueError, match=rf"schedule of StableDiffusion3Pipeline goes from {start} to"):
            unified(made)


# Sizes


def test_a_pipeline_with_an_area_of_its_own_is_asked_for_no_other():
    model = unified(hidream())
    assert model.latent_shape((128, 128)) == (4, 16, 16)
    for size in ((64, 64), (256, 256)):
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[0]} pixels .* it paints 128 x 128"):
            model.latent_shape(size)
    assert [image.size for image in decode(model, painted(model, (128, 128), ["a cube"]))] == [(128, 128)]


def test_an_area_that_is_an_argument_is_the_one_asked_for():
    """FLUX Kontext paints a megapixel, unless it is told."""
    model = unified(flux_kontext())
    for size in ((16, 16), (8, 24)):
        (image,) = decode(model, painted(model, size, ["a cube"]))
        assert image.size == size[::-1]


def test_a_size_that_would_be_rounded():
    with pytest.raises(ValueError, match="can't paint an image of 32 x 36 pixels"):
        unified(wan()).latent_shape((32, 36))
    with pytest.raises(ValueError, match=r"20 x 20 pixels .*it paints 16 x 16"):
        tiny_model("qwen_image").latent_shape((20, 20))


# Videos


def test_a_video_of_one_frame_is_an_image():
    model = unified(wan())
    (latents,) = (image.latents for image in painted(model, (32, 32), ["a cube"]))
    assert latents.shape == (4, 1, 4, 4)
    pixels = model.decode_latents(latents[None], (32, 32), "pt")
    assert pixels.shape == (1, 3, 32, 32)
    (image,) = model.decode_latents(latents[None], (32, 32))
    assert image.size == (32, 32)


def test_a_video_of_more_frames_is_refused():
    made = wan()
    with pytest.raises(ValueError, match=r"should give an image .*\(1, 5, 3, 64, 64\).* a single frame"):
        unified(TinyPipeline(made.pipeline, made.size, {**made.arguments, "num_frames": 5}))


def test_a_second_network_for_late_steps_is_refused():
    parts = wan().pipeline.components
    parts["transformer_2"] = random_weights(type(parts["transformer"])(**parts["transformer"].config))
    pipeline = diffusers.WanPipeline(**parts, boundary_ratio=0.5)
    with pytest.raises(ValueError, match="WanPipeline leaves its steps at times near 0 to another network"):
        unified(TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 64}))


# Prompts


def test_prompts_are_not_rewritten():
    model = unified(longcat_image())
    assert model.painter_arguments["enable_prompt_rewrite"] is False
    made = longcat_image()
    with pytest.raises(ValueError, match="has its 'text_encoder' write text in each call"):
        unified(TinyPipeline(made.pipeline, made.size, {"enable_prompt_rewrite": True}))


def test_a_text_encoder_with_a_processor_thinks_too():
    made = nucleus()
    model = PipelineForUnifiedGeneration.from_pretrained(painter=made.pipeline, painter_arguments=made.arguments)
    assert model.thinker is model.pipeline.text_encoder
    assert model.tokenizer is model.pipeline.processor.tokenizer


LONG = "a market square with many people, " * 20 + "all in red"


@pytest.mark.parametrize("family", ["z_image", "flux1", "sana", "qwen_image", "chroma", "aura_flow"])
def test_a_prompt_that_is_cut_off_is_told_of_once(family):
    made = FAMILIES[family]()
    model = unified(made)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        painted(model, made.size, ["a cube", "sun"])
        assert not [w for w in caught if "cuts off" in str(w.message)]
        painted(model, made.size, ["a cube", LONG])
        painted(model, made.size, [LONG, LONG])
    (told,) = (str(w.message) for w in caught if "cuts off" in str(w.message))
    assert "the end of 1 prompts" in told
    assert "one of 690 tokens" in told
    assert "all in red" in told


def test_a_prompt_that_one_of_the_encoders_reads_to_its_end_is_not_cut_off():
    """Stable Diffusion 3 reads 77 tokens by CLIP, and here 256 by T5."""
    made = sd3()
    model = unified(TinyPipeline(made.pipeline, made.size, {"max_sequence_length": 256}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cuts off")
        painted(model, made.size, [LONG[-200:]])
        with pytest.raises(UserWarning, match=r"of one of 690 tokens it reads about 256, and not '.*all in red'"):
            painted(model, made.size, [LONG])


def test_which_tokenizer_is_whose_is_found_by_trying():
    own, other = tokenizer(), tiny_tokenizer()
    rows = own(["a cube", LONG])["input_ids"]
    for tokenizers in ([own, other], [other, own]):
        assert cut_off(["a cube", LONG], rows, [], tokenizers) == []
        assert cut_off(["a cube", LONG], [row[:300] for row in rows], [], [own]) == [(LONG, 690, 300)]
        short = cut_off(["a cube", LONG], rows, [torch.zeros(2, 500, 8)], [own])  # cut off behind the encoder
        assert short == [(LONG, 690, 500)]


# Images


def test_an_image_that_is_not_a_number_is_marked(monkeypatch):
    model = unified(z_image())
    vae, size = model.pipeline.vae, (32, 32)
    images = painted(model, size, ["a cube", "sun", "a bird"])
    assert [has_failed(image) for image in decode(model, images)] == [False] * 3
    whole = vae.decode

    def overflowing(z, *args, **kwargs):
        out = whole(z, *args, **kwargs)
        out[0][1, 0, 3, 3] = float("inf")
        return out

    monkeypatch.setattr(vae, "decode", overflowing)
    shown = decode(model, images)
    assert [has_failed(image) for image in shown] == [False, True, False]
    assert has_failed(shown[1].resize((4, 4)).convert("L"))
    monkeypatch.undo()
    images[2].latents[0, 0, 0] = float("nan")
    assert [has_failed(image) for image in decode(model, images)] == [False, False, True]
