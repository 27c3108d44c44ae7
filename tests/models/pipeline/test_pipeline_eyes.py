"""A thinker that reads images reads texts back from them; others say that they don't, and why."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_painters import tiny_model
from tests.helpers.tiny_pipelines import CHAT_TEMPLATE, FAMILIES, qwen3
from tests.helpers.tiny_qwen_vl import tiny_image_processor, tiny_qwen_vl
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.rewards import LocalReader, ReadBackReward
from trl_unigrpo.sampling.self_reader import SelfReader


TEXTS = ["a red cat", "日本 is far, €5", "dog"]
SIZES = [(56, 56), (112, 56), (100, 100)]


def image(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGES = [image(seed, size) for seed, size in enumerate(SIZES)]


def seeing(dtype=torch.float32):
    """A Stable Diffusion 3 with a Qwen2.5-VL as its thinker, and that one's processor."""
    thinker, processor = tiny_qwen_vl(dtype)
    processor.tokenizer.chat_template = CHAT_TEMPLATE  # of texts alone, as thinkers may have it
    tiny = FAMILIES["sd3"]()
    config = PipelineUnifiedConfig(painter_arguments=tiny.arguments)
    model = PipelineForUnifiedGeneration(thinker, processor.tokenizer, tiny.pipeline, config)
    model.image_processor = tiny_image_processor()
    return model, processor


def ids_of(model, texts=TEXTS):
    return model.tokenizer(texts, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def test_texts_are_read_as_the_thinker_alone_reads_them():
    """`LocalReader` lays out the conversation by the model's own processor."""
    model, processor = seeing(torch.float64)
    processor.tokenizer.bos_token = None  # which the processor would put before it, and the chat template does not
    processor.tokenizer.backend_tokenizer.post_processor = None
    expected = LocalReader(model.thinker, processor, device="cpu").read(IMAGES, TEXTS)
    found = model.read_back(model.read_images(IMAGES), ids_of(model))
    for row, reading in zip(found, expected, strict=True):
        assert row.tolist() == pytest.approx(reading.log_probs, abs=1e-5)
    for some_image, text, row in zip(IMAGES, ids_of(model), found, strict=True):
        (alone,) = model.read_back(model.read_images([some_image]), [text])
        assert row.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    assert model.read_back([], []) == []


@torch.no_grad()
def test_reading_leaves_writing_as_it_was():
    """Positions of the last image's text would be those of all texts written behind it."""
    model, _ = seeing()
    asked = torch.tensor([[10, 20, 30]]), {"max_new_tokens": 6, "do_sample": False}
    before = model.generate(asked[0], **asked[1])
    deltas = model.thinker.base_model.rope_deltas
    model.read_back(model.read_images(IMAGES[1:2]), ids_of(model)[:1])
    assert model.thinker.base_model.rope_deltas is deltas
    assert torch.equal(model.generate(asked[0], **asked[1]), before)


def test_the_model_reads_its_own_images_as_a_reward():
    model, _ = seeing()
    reward = ReadBackReward()
    reward.attach(SelfReader(model, model.tokenizer, reward.judge))
    scores = reward(TEXTS, images=IMAGES)
    other = reward(TEXTS, images=IMAGES[::-1])
    assert all(score < 0 for score in scores)
    assert scores[1] == pytest.approx(reward(TEXTS[1:2], images=IMAGES[1:2])[0], abs=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(scores[::2], other[::2], strict=True))


def test_image_processor_is_found_and_saved(tmp_path):
    model, _ = seeing()
    with torch.no_grad():
        before = model.read_back(model.read_images(IMAGES), ids_of(model))
    model.save_pretrained(tmp_path)
    loaded = PipelineForUnifiedGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        after = loaded.read_back(loaded.read_images(IMAGES), ids_of(model))
    for row, other in zip(before, after, strict=True):
        assert torch.allclose(row, other, atol=1e-5)
    del model.image_processor
    component = type("Processor", (), {"image_processor": tiny_image_processor()})()
    parts = {**model.pipeline.components, "processor": component}
    model.pipeline.__class__ = type("Painter", (type(model.pipeline),), {"components": parts})
    assert model.image_processor is component.image_processor


def test_thinkers_that_read_no_images_are_named():
    blind = tiny_model(thinker=qwen3(language_head=True))
    for ask in (lambda: blind.read_back([], []), lambda: blind.read_images(IMAGES)):
        with pytest.raises(ValueError, match=r"Qwen3ForCausalLM, the thinker, reads no images.*Qwen-VL kind"):
            ask()
    with pytest.raises(ValueError, match="Qwen3ForCausalLM, the thinker, reads no images"):
        SelfReader(blind, blind.tokenizer)
    model, _ = seeing()
    del model.image_processor
    with pytest.raises(ValueError, match=r"knows how to prepare them.*Set model\.image_processor = "):
        model.read_back([], [])
    model.thinker.model.visual = None
    with pytest.raises(ValueError, match="loaded without its vision tower"):
        model.read_back([], [])
