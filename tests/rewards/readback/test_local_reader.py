"""The reader in this process, on a random LLaVA and a random Qwen2.5-VL: its log-probs, what it can't read, its gradient."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PythonBackend

from tests.helpers.tiny_llava import IMAGE_SIZE, TEMPLATE, WORDS, tiny_llava
from trl_unigrpo.rewards import LocalReader, ReadBackReward
from trl_unigrpo.rewards.common import DeadRewardError


def picture(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PROMPTS = ["a red cat", "the blue dog is there", "a picture", "dog"]
IMAGES = [picture(0), picture(1, (60, 40)), picture(2, (20, 70)), picture(3)]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture
def reader(llava):
    return LocalReader(*llava, device="cpu")


def loss(llava, image, prompt, instruction=""):
    """The mean loss of a prompt's tokens, as training on it has it: `labels` are -100 but for them."""
    model, processor = llava
    text = f"<s>user : <image> {instruction} assistant : {prompt}"
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    labels = torch.full_like(inputs["input_ids"], -100)
    length = len(prompt.split())
    labels[:, -length:] = inputs["input_ids"][:, -length:]
    with torch.no_grad():
        return model(**inputs, labels=labels).loss.item()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("instruction", ["", "is there a dog ?"])
def test_log_probs_are_those_of_the_loss_alone_and_in_a_batch(llava, batch_size, instruction):
    reader = LocalReader(*llava, device="cpu", batch_size=batch_size, instruction=instruction)
    readings = reader.read(IMAGES, PROMPTS)
    for reading, image, prompt in zip(readings, IMAGES, PROMPTS, strict=True):
        assert "".join(reading.tokens) == prompt
        assert len(reading.log_probs) == len(prompt.split())
        expected = loss(llava, image, prompt, instruction)
        assert -np.mean(reading.log_probs) == pytest.approx(expected, abs=1e-6)
