"""Prompts against the recorded ones, sizes against those worked out by hand, pixels against an independent resize."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from trl_unigrpo.models.bagel import BagelConfig, BagelProcessor
from trl_unigrpo.models.bagel.processing import (
    ResizeRule,
    checked_rgb,
    resized,
    to_pixels,
)
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer


VAE = ResizeRule(1024, 512, 16)
VIT = ResizeRule(980, 224, 14)


@pytest.fixture(scope="session")
def processor(checkpoint) -> BagelProcessor:
    return BagelProcessor.from_pretrained(checkpoint)


def some_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours, so that two resizes differ by rounding alone."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(y / 9 + k) + np.cos(x / 7 - k) for k in range(3)]
    return Image.fromarray(np.uint8((np.stack(waves, -1) + 2) * 63)).convert(mode)


# Text


def test_prompt_is_the_recorded_one(processor, recorded, recorded_meta):
    assert processor.prompt_ids(recorded_meta["prompt"], think="image") == recorded["prefill/input_ids"].tolist()
    assert processor.prompt_ids(recorded_meta["question"]) == recorded["und/question_ids"].tolist()
    assert processor.prompt_ids(recorded_meta["prompt_b"]) == recorded["batch/prompt_b_ids"].tolist()


def test_prompt_for_an_answer_is_that_for_an_image_in_other_words(processor, recorded_meta):
    system = recorded_meta["system_prompt"]
    for ours, theirs in {
        "planning": "reasoning",
        "generate the image": "provide the user with the answer",
        "image here": "answer here",
    }.items():
        assert ours in system
        system = system.replace(ours, theirs)
    assert processor.prompt_ids("Why?", think="answer") == processor.wrap(system) + processor.wrap("Why?")


def test_prompt_is_what_the_chat_template_gives(processor, model):
    messages = [{"role": "user", "content": "two  lines\n of <b>text</b>"}]
    ids = processor.tokenizer.apply_chat_template(messages, chat_template=model.chat_template, return_dict=False)
    assert processor.prompt_ids(messages[0]["content"]) == ids


def test_unknown_thinking(processor):
    with pytest.raises(ValueError, match=r"think='video': expected one of \['answer', 'image'\], or None"):
        processor.prompt_ids("a", think="video")


# Sizes


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1024, 1024), (1024, 1024)),
        ((512, 512), (512, 512)),
        ((520, 777), (512, 784)),  # 32.5 strides round to the even 32, 48.6 to 49
        ((300, 200), (768, 512)),  # times 2.56
        ((2000, 1500), (1024, 768)),  # times 0.512
        ((1500, 2000), (768, 1024)),
        ((4000, 1000), (1024, 256)),  # 2048 x 512 for the shorter side, halved for the longer
        ((6000, 1000), (1024, 176)),  # 3072 x 512, then a third: 170.7 -> 171 -> 10.7 strides
        ((8000, 1000), (1024, 128)),  # 4096 x 512 is too many; 3528 x 441 -> 3520 x 448; then 1024 x 130.3
        ((1, 1), (512, 512)),
        ((10000, 1), (1024, 16)),  # never less than a stride
    ],
)
def test_sizes_for_the_vae(size, expected):
    assert VAE.size(*size) == expected


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1024, 1024), (980, 980)),
        ((512, 512), (518, 518)),  # 36.6 strides -> 37
        ((768, 512), (770, 518)),  # 54.9 -> 55
        ((100, 100), (224, 224)),
        ((1024, 256), (980, 252)),  # 245 are 17.5 strides -> the even 18
        ((1024, 128), (980, 126)),  # 1792 x 224, then 980 x 122.5 -> 122 -> 8.7 strides
    ],
)
def test_sizes_for_the_tower(size, expected):
    assert VIT.size(*size) == expected


def test_too_many_pixels_scale_the_sides_by_the_ratio_of_areas():
    """A fourth of the area is allowed; each side becomes a fourth, not a half."""
    assert ResizeRule(1000, 10, 10, max_pixels=250_000).size(1000, 1000) == (250, 250)
    assert ResizeRule(1000, 10, 10, max_pixels=1_000_000).size(1000, 1000) == (1000, 1000)


def test_longest_side_off_the_stride():
    with pytest.raises(ValueError, match=r"longest=1000 must be a multiple of stride=16"):
        ResizeRule(1000, 512, 16)


def test_rules_follow_from_the_configuration(processor):
    assert processor.vae_rule == ResizeRule(1024, 512, 16)
    assert processor.vit_rule == ResizeRule(980, 224, 14)
    tokenizer = shapeworld_tokenizer()
    vae = {"_class_name": "PatchAutoencoderKL", "latent_channels": 4, "strides": [4, 4]}
    sizes = {"vae_config": vae, "latent_patch_size": 1, "max_latent_size": 3}
    small = BagelProcessor(tokenizer, BagelConfig(**sizes, im_start_token_id=1, im_end_token_id=2))
    assert small.vae_rule == ResizeRule(48, 24, 16)
    with pytest.raises(ValueError, match=r"vit_config is None.*can't read images"):
        small.vit_pixels(some_image(20, 20))


# Pixels


@pytest.mark.parametrize("size", [(600, 800), (40, 30)])
def test_resized_pixels(size):
    """Smaller and larger, against PyTorch's antialiased bicubic resize: Pillow rounds after each direction."""
    image = some_image(*size)
    target = VAE.size(*size)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(values, target, mode="bicubic", antialias=True)[0].clamp(0, 255)
    actual = (to_pixels(resized(image, VAE)) + 1) * 127.5
    assert actual.shape == (3, *target)
    assert (actual - expected).abs().max() < 1.5


def test_pixels_span_minus_one_to_one():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 51, 0))
    expected = torch.tensor([[[-1.0, 1.0]], [[-1.0, -0.6]], [[-1.0, -1.0]]])
    torch.testing.assert_close(to_pixels(image), expected, rtol=0, atol=1e-6)


def test_tower_sees_the_image_that_the_vae_sees(processor):
    image = some_image(300, 200)
    large = processor.vae_image(image)
    assert (large.height, large.width) == (768, 512)
    assert processor.vae_pixels(image).shape == (3, 768, 512)
    assert torch.equal(processor.vit_pixels(image), to_pixels(resized(large, VIT)))
    assert processor.vit_pixels(image).shape == (3, 770, 518)


@torch.no_grad()
def test_pixels_are_what_the_model_takes(processor, model):
    image = some_image(60, 20)
    assert model.embed_vit_image(processor.vit_pixels(image)).shape == (70 * 23, 64)  # 1024 x 336 -> 980 x 322 pixels
    assert model.encode_images(processor.vae_pixels(image)[None]).shape == (1, 64 * 21, 64)


COLOURS = {  # of one pixel: mode, value -> RGB
    "grey": ("L", 90, (90, 90, 90)),
    "black and white": ("1", 255, (255, 255, 255)),
    "half transparent black": ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
    "transparent red": ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
    "opaque red": ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    "transparent grey": ("LA", (10, 0), (255, 255, 255)),
    "no ink": ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_become_rgb(name):
    mode, value, expected = COLOURS[name]
    image = checked_rgb(Image.new(mode, (1, 1), value))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == expected


@pytest.mark.parametrize("transparent, expected", [(None, (10, 200, 30)), (0, (255, 255, 255))])
def test_palette_becomes_rgb(transparent, expected):
    image = Image.new("P", (1, 1), 0)
    image.putpalette([10, 200, 30])
    if transparent is not None:
        image.info["transparency"] = transparent
    assert checked_rgb(image).getpixel((0, 0)) == expected


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_more_than_eight_bits_are_refused(mode):
    with pytest.raises(ValueError, match=rf"mode '{mode}': expected 8 bits per channel\. Scale"):
        checked_rgb(Image.new(mode, (4, 4)))


def test_too_large_and_empty_images_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match=r"10 x 10 pixels.*at most 99\. Make it smaller"):
        checked_rgb(Image.new("RGB", (10, 10)))
    with pytest.raises(ValueError, match=r"3 x 0 pixels.*at least one"):
        checked_rgb(Image.new("RGB", (0, 3)))
    assert checked_rgb(Image.new("RGB", (11, 9))).size == (11, 9)


# Wrong or missing tokenizers


def test_tokenizer_of_another_checkpoint(processor):
    with pytest.raises(
        ValueError, match=r"has <\|im_start\|> at 1, the model at 375 \(im_start_token_id\)\. Take both"
    ):
        BagelProcessor(shapeworld_tokenizer(), processor.config)
    small = BagelConfig(llm_config={"vocab_size": 300}, im_start_token_id=375, im_end_token_id=376)
    with pytest.raises(ValueError, match=r"The tokenizer has 388 tokens, the model 300\. Take both"):
        BagelProcessor(processor.tokenizer, small)


def test_folder_without_tokenizer_files(checkpoint, tmp_path):
    """transformers alone makes an empty tokenizer of such a folder, without a word."""
    folder = shutil.copytree(checkpoint, tmp_path / "bagel", copy_function=shutil.copyfile)
    (folder / "tokenizer.json").unlink()
    assert BagelProcessor.from_pretrained(folder).wrap("a cat") == BagelProcessor.from_pretrained(checkpoint).wrap(
        "a cat"
    )
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    assert len(AutoTokenizer.from_pretrained(folder)) < 20
    with pytest.raises(OSError, match=r"No tokenizer can be read from '.*bagel'. Put .*`tokenizer\.json`"):
        BagelProcessor.from_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no `tokenizer_config\.json`"):
        BagelProcessor.from_pretrained(folder)
